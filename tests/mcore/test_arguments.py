"""Every Megatron argument by its own name, and back."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest

from uar_megatron.config import UARConfig
from uar_megatron.errors import ConfigError
from uar_megatron.mcore.arguments import check_compatible, megatron_parser, to_argv


def parse(megatron: dict[str, Any]) -> argparse.Namespace:
    return megatron_parser().parse_args(to_argv(megatron))


def samples() -> list[tuple[str, Any, Any]]:
    """(destination, a value to write, what the parser must make of it) for every argument."""
    found = []
    for action in megatron_parser()._actions:
        if not action.option_strings or action.dest in ("spec", "yaml_cfg", "help", "yaml-cfg"):
            continue
        if isinstance(action, argparse.BooleanOptionalAction):
            found.append((action.dest, not action.default, not action.default))
        elif action.nargs == 0:
            value = action.const
            found.append((action.dest, value, value))
        else:
            sample = _sample(action)
            if sample is not None:
                many = action.nargs in ("+", "*") or isinstance(action.nargs, int)
                count = action.nargs if isinstance(action.nargs, int) else 2
                expected = [action.type(str(sample)) if action.type else sample] * count
                found.append(
                    (action.dest, [sample] * count, expected)
                    if many
                    else (action.dest, sample, expected[0])
                )
    return found


def _sample(action: argparse.Action) -> Any:
    if action.choices:
        choice = list(action.choices)[-1]
        return getattr(choice, "name", choice)
    return {int: -3, float: -0.25, str: "some text", None: "some text"}.get(action.type)


@pytest.mark.parametrize("case", samples(), ids=lambda case: case[0])
def test_round_trip_through_megatrons_parser(case: tuple[str, Any, Any]) -> None:
    name, value, expected = case
    assert getattr(parse({name: value}), name) == expected


def test_there_are_hundreds() -> None:
    assert len(samples()) > 400


def test_both_names_of_an_argument_work() -> None:
    assert parse({"bias_swiglu_fusion": False}).bias_swiglu_fusion is False
    assert parse({"no_bias_swiglu_fusion": True}).bias_swiglu_fusion is False
    assert parse({"no-bias-swiglu-fusion": True}).bias_swiglu_fusion is False
    assert parse({"no_bias_swiglu_fusion": False}).bias_swiglu_fusion is True
    assert parse({"swiglu": False, "lr": None}).swiglu is False
    assert parse({"moe_layer_freq": [0, 1, 1]}).moe_layer_freq == [0, 1, 1]
    assert parse({"moe_layer_freq": "[0]+[1]*2"}).moe_layer_freq == [0, 1, 1]


@pytest.mark.parametrize(
    ("megatron", "words"),
    [
        ({"num_layer": 2}, ["num_layer", "did you mean 'num_layers'"]),
        ({"num_layers": 2.5}, ["num_layers", "2.5", "int"]),
        ({"num_layers": True}, ["num_layers", "int"]),
        ({"swiglu": "yes"}, ["swiglu", "true, false"]),
        ({"normalization": "RMS"}, ["normalization", "LayerNorm, RMSNorm"]),
        ({"swiglu": {"a": 1}}, ["swiglu"]),
        ({"lr": [1.0, 2.0]}, ["lr"]),
        ({"spec": "x"}, ["spec", "cannot be set here"]),
        (
            {"bias_swiglu_fusion": False, "no_bias_swiglu_fusion": True},
            ["already set by 'bias_swiglu_fusion'"],
        ),
    ],
)
def test_what_is_refused_says_why(megatron: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        to_argv(megatron)
    for word in words:
        assert word in str(error.value)


def megatron_args(**changes: Any) -> SimpleNamespace:
    defaults = {a.dest: a.default for a in megatron_parser()._actions}
    settings = {"num_experts": 8, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.01}
    kind = {"moe_router_load_balancing_type": "aux_loss", "transformer_impl": "local"}
    return SimpleNamespace(
        **{**defaults, **settings, **kind, "moe_token_dispatcher_type": "alltoall", **changes}
    )


UAR = {"policy": "uar"}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"num_experts": None}, "num_experts"),
    ({"policy": "uar", "budget": {"k_max": 9}}, {}, "uar.budget.k_max"),
    (UAR, {"moe_token_dispatcher_type": "flex"}, "moe_token_dispatcher_type"),
    (UAR, {"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor"),
    (UAR, {"moe_router_padding_for_quantization": True}, "moe_router_padding_for_quantization"),
    (UAR, {"moe_router_group_topk": 2}, "moe_router_group_topk"),
    (UAR, {"moe_router_fusion": True}, "moe_router_fusion"),
    (UAR, {"moe_enable_routing_replay": True}, "moe_enable_routing_replay"),
    (UAR, {"moe_router_load_balancing_type": "sinkhorn"}, "moe_router_load_balancing_type"),
    (UAR, {"moe_router_load_balancing_type": ["seq_aux_loss"]}, "moe_router_load_balancing_type"),
    (UAR, {"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias"),
    (UAR, {"cuda_graph_impl": "local"}, "cuda_graph_impl"),
    (UAR, {"transformer_impl": "inference_optimized"}, "transformer_impl"),
    (UAR, {"overlap_moe_expert_parallel_comm": True}, "overlap_moe_expert_parallel_comm"),
    ({"clb": {"enabled": True}}, {"moe_aux_loss_coeff": 0.0}, "uar.clb.enabled"),
    ({"bias": {"enabled": True}}, {"moe_router_enable_expert_bias": True}, "uar.bias.enabled"),
]


@pytest.mark.parametrize(("uar", "changes", "field"), REFUSED, ids=lambda v: str(v)[:40])
def test_combinations_that_cannot_work(uar: dict, changes: dict, field: str) -> None:
    config = UARConfig.model_validate(uar)
    with pytest.raises(ConfigError) as error:
        check_compatible(config, megatron_args(**changes))
    assert error.value.field == field
    if field != "num_experts" and "transformer_impl" not in changes and uar != {}:
        check_compatible(UARConfig(), megatron_args(**changes))  # stock may do all of it
