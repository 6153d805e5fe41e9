"""Which layers have experts, and what Megatron's arguments mean by a capacity."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from uar_megatron.errors import ConfigError
from uar_megatron.shape import capacity_factor, moe_pattern


def pattern(frequency: Any, layers: int = 4) -> tuple[bool, ...]:
    return moe_pattern(SimpleNamespace(moe_layer_freq=frequency, num_layers=layers))


def test_the_pattern_is_megatrons() -> None:
    assert pattern(1) == (True,) * 4
    assert pattern(2) == (True, False, True, False)
    assert pattern([0, 1, 1, 0]) == (False, True, True, False)


@pytest.mark.parametrize(
    ("frequency", "words"),
    [
        ([0, 1, 1], ["3 entries", "num_layers is 4", "[0]+[1]*3"]),
        ([0, 1, 1, 1, 1], ["5 entries"]),
        ([0, 1, 2, 1], ["other entries", "0 for a dense one"]),
        (0, ["0 is not allowed", "n ≥ 1"]),
        (-1, ["-1 is not allowed"]),
    ],
)
def test_a_pattern_that_megatron_cannot_build_is_refused(frequency: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        pattern(frequency)
    for word in ["moe_layer_freq", *words]:
        assert word in str(refusal.value)


@pytest.mark.parametrize(("given", "meant"), [(None, None), (-1.0, None), (0.0, 0.0), (2, 2.0)])
def test_a_negative_capacity_is_none(given: float | None, meant: float | None) -> None:
    assert capacity_factor(SimpleNamespace(moe_expert_capacity_factor=given)) == meant
