"""Experts per token as planned, against the budget that routes."""

from __future__ import annotations

import argparse
import math
from typing import Any

import pytest
import torch

from uar_megatron.budget import ExpertBudget
from uar_megatron.config import UARConfig
from uar_megatron.mcore.arguments import megatron_parser, to_argv
from uar_megatron.mcore.policies import layer_policies
from uar_megatron.planning import experts_per_token
from uar_megatron.planning.experts_per_token import LayerK, within_capacity
from uar_megatron.shape import ModelShape, shape_of


def args(**options: Any) -> argparse.Namespace:
    model = {
        "num_layers": 3,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_experts": 16,
        "seq_length": 128,
        "vocab_size": 1000,
        "moe_router_topk": 2,
        "moe_layer_freq": "[0]+[1]*2",
    }
    return megatron_parser().parse_args(to_argv(model | options))


def shape(**options: Any) -> ModelShape:
    return shape_of(args(**options))


def layers_of(uar: UARConfig, shape: ModelShape, **options: Any) -> list[LayerK]:
    return experts_per_token.layers_of(uar, shape, layer_policies(uar, args(**options)))


def uar(**sections: Any) -> UARConfig:
    return UARConfig.model_validate({"policy": "uar", **sections})


def test_topk_is_the_same_for_every_token() -> None:
    found = layers_of(UARConfig(), shape())
    assert found == [LayerK(2, 2.0, 2, 2.0, "moe_router_topk = 2")] * 2


@pytest.mark.parametrize("rounding", ["floor", "nearest", "ceil"])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 2.0), (0.3, 2.5), (2.0, 3.3), (0.0, 2.6)])
def test_expectation_is_the_mean_of_the_real_budget(
    rounding: str, alpha: float, beta: float
) -> None:
    config = uar(
        budget={"alpha": alpha, "beta": beta, "k_min": 1, "k_max": 5, "rounding": rounding}
    )
    found = layers_of(config, shape())[0]
    real = ExpertBudget(config.budget.layers(2, 2)[0], config.expansion, 2, "cpu")
    zscores = torch.randn(400_000, generator=torch.Generator().manual_seed(1))
    k_T, _ = real.experts_of(zscores, 10)
    assert found.expected == pytest.approx(float(k_T.double().mean()), abs=0.01)


def test_modes_and_bounds() -> None:
    mean = uar(budget={"mode": "mean", "target_mean_k": 3, "k_max": 6})
    assert layers_of(mean, shape())[0] == LayerK(1, 3.0, 6, 6.0, "uar.budget.k_max = 6")
    exact = uar(budget={"mode": "exact", "target_mean_k": 3, "k_max": 6})
    assert layers_of(exact, shape())[0].most_rows_per_token == 3
    assert "mode = exact" in layers_of(exact, shape())[0].bound
    cut = uar(budget={"beta": 4.0, "k_max": 6, "max_rows_factor": 1.5})
    found = layers_of(cut, shape())[0]
    assert (found.expected, found.most_rows_per_token) == (3.0, 3.0)
    assert "max_rows_factor = 1.5" in found.bound
    late = uar(budget={"mode": "free", "k_max": 1}, expansion={"start_step": 5})
    assert layers_of(late, shape())[0].most_rows_per_token == 2
    assert layers_of(late, shape())[0].k_max == 2


def test_depth_and_mtp_layers() -> None:
    schedule = {"shape": "ascending", "low": 2, "high": 4}
    config = uar(budget={"k_min": 1, "k_max": schedule})
    assert [one.k_max for one in layers_of(config, shape(mtp_num_layers=1))] == [2, 4, 4]


def test_capacity_bounds_rows() -> None:
    layers = [LayerK(1, 2.5, 4, 4.0, "uar.budget.k_max = 4")]
    assert within_capacity(layers, None, 2, is_padded=False) == layers
    assert within_capacity(layers, 4.0, 2, is_padded=False) == layers
    (cut,) = within_capacity(layers, 1.0, 2, is_padded=False)
    assert (cut.expected, cut.most_rows_per_token) == (2.0, 2.0)
    assert cut.bound == "moe_expert_capacity_factor = 1"
    (padded,) = within_capacity(layers, 4.0, 2, is_padded=True)
    assert padded.expected == padded.most_rows_per_token == 8.0
    assert math.isfinite(padded.k_max)


def test_other_policies_have_their_own_bounds() -> None:
    budget = {"k_min": 1, "k_max": 6, "target_mean_k": 3}

    def first(policy: str, **options: Any) -> LayerK:
        section = UARConfig.model_validate({"policy": policy, "budget": budget})
        return layers_of(section, shape(), **options)[0]

    top_p = LayerK(1, 3.0, 6, 6.0, "uar.policy = top_p, uar.budget.k_max = 6")
    assert first("top_p") == top_p
    per_sequence = LayerK(1, 3.0, 6, 3.0, "uar.policy = seq_topk, uar.budget.target_mean_k = 3")
    assert first("seq_topk") == per_sequence
    relu = LayerK(0, 3.0, 16, 16.0, "uar.policy = relu, 16 experts")
    assert first("relu", moe_router_pre_softmax=True) == relu
    assert first("sinkhorn_selective") == LayerK(2, 2.0, 2, 2.0, "moe_router_topk = 2")
