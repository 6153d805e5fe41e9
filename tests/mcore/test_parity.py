"""Off means off: with UAR switched off, layers equal the installed Megatron's to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from moe_cases import (
    assert_bit_equal,
    hidden_states,
    run,
    stock_layer,
    transformer_config,
    uar_layer,
)

from uar_megatron.mcore.moe_layer import UARMoELayer
from uar_megatron.mcore.step import commit

pytestmark = pytest.mark.usefixtures("model_parallel")

OFF: dict[str, dict[str, Any]] = {
    "topk": {"policy": "topk"},
    # K_max above K must not matter when α is 0.
    "free": {"policy": "uar", "budget": {"alpha": 0.0, "beta": 2.0, "k_min": 1, "k_max": 6}},
    "exact": {"policy": "uar", "budget": {"mode": "exact", "alpha": 0.0}},
    "not yet": {
        "policy": "uar",
        "expansion": {"start_step": 1},
        "clb": {"enabled": True, "start_step": 1},
    },
}
SCORES: dict[str, dict[str, Any]] = {
    "post-softmax": {},
    "pre-softmax": {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "sqrtsoftplus": {"moe_router_score_function": "sqrtsoftplus"},
    "sigmoid+bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
}
LOSSES: dict[str, dict[str, Any]] = {
    "aux": {},
    "seq": {"moe_router_load_balancing_type": "seq_aux_loss"},
    "global": {"moe_router_load_balancing_type": "global_aux_loss"},
    "all three": {
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [0.01, 0.02, 0.03],
    },
    "none": {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0},
}
DROPPING: dict[str, dict[str, Any]] = {
    "dropless": {},
    "drop by prob": {"moe_expert_capacity_factor": 1.0},
    "drop by position": {
        "moe_expert_capacity_factor": 0.7,
        "moe_token_drop_policy": "position",
    },
    "drop and pad": {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
}
# Megatron pads to capacity with all-to-all only.
DISPATCHERS = {"alltoall": tuple(DROPPING), "allgather": tuple(DROPPING)[:-1]}
OTHER: dict[str, dict[str, Any]] = {
    "fp64 router": {"moe_router_dtype": "fp64"},
    "z-loss": {"moe_z_loss_coeff": 0.1},
    "per-token loss": {"calculate_per_token_loss": True},
    "groups": {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
    "groups, sigmoid": {
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_score_function": "sigmoid",
    },
    "sinkhorn": {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0},
    "quantile balancing": {
        "moe_router_load_balancing_type": "quantile_balancing",
        "moe_aux_loss_coeff": 0.0,
    },
    "shared expert": {"moe_shared_expert_intermediate_size": 12},
    "shared expert, overlapped": {
        "moe_shared_expert_intermediate_size": 12,
        "moe_shared_expert_overlap": True,
    },
    "grouped experts": {"moe_grouped_gemm": True},
    "jitter": {"moe_input_jitter_eps": 0.1},
    "random logits": {"moe_router_force_load_balancing": True},
}


def assert_equals_stock(off: str, options: dict[str, Any], tokens: int, batch: int = 1) -> None:
    config = transformer_config(**options)
    stock = stock_layer(config)
    ours = uar_layer(config, OFF[off], like=stock)
    inputs = hidden_states(tokens, batch=batch)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    expected = run(stock, inputs)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    assert_bit_equal(run(ours, inputs), expected)


@pytest.mark.parametrize(
    ("dispatcher", "dropping"), [(d, drop) for d, drops in DISPATCHERS.items() for drop in drops]
)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("off", OFF)
def test_the_whole_matrix(off: str, scores: str, loss: str, dropping: str, dispatcher: str) -> None:
    options = SCORES[scores] | LOSSES[loss] | DROPPING[dropping]
    assert_equals_stock(
        off, options | {"moe_token_dispatcher_type": dispatcher}, tokens=36, batch=2
    )


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("option", OTHER)
def test_every_other_option(off: str, option: str) -> None:
    assert_equals_stock(off, OTHER[option], tokens=36, batch=2)


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("tokens", [37, 1])  # stock's gating cannot take 0 tokens
def test_odd_numbers_of_tokens(off: str, tokens: int) -> None:
    assert_equals_stock(off, {}, tokens)


def test_evaluation_equals_stock() -> None:
    config = transformer_config()
    stock = stock_layer(config).eval()
    ours = uar_layer(config, OFF["free"], like=stock).eval()
    inputs = hidden_states(37)
    assert_bit_equal(run(ours, inputs), run(stock, inputs))


def losses_of(layer: Any, steps: int) -> list[float]:
    """Train a layer alone; the loss of each step, balancing losses in the gradient."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    losses = []
    for step in range(steps):
        inputs = hidden_states(36, seed=step, batch=2)
        loss = (layer(inputs)[0] - inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if isinstance(layer, UARMoELayer):
            commit([layer.router])
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("off", ["topk", "free", "exact"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scores", SCORES)
def test_twenty_steps(off: str, scores: str, loss: str) -> None:
    config = transformer_config(**SCORES[scores], **LOSSES[loss])
    stock = stock_layer(config)
    ours = uar_layer(config, OFF[off], like=stock)
    expected = losses_of(stock, 20)
    assert losses_of(ours, 20) == expected
    assert expected[-1] != expected[0]


def test_what_waits_does_begin() -> None:
    """The case `not yet` would pass with routing that never begins."""
    config = transformer_config()
    stock = stock_layer(config)
    ours = uar_layer(config, OFF["not yet"], like=stock)
    inputs = hidden_states(36)
    run(ours, inputs)
    commit([ours.router])
    assert not torch.equal(run(ours, inputs)["routing_map"], run(stock, inputs)["routing_map"])
