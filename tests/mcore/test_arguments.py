"""Every Megatron argument by its own name, and back."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from uar_megatron.errors import ConfigError
from uar_megatron.mcore.arguments import megatron_parser, to_argv


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
