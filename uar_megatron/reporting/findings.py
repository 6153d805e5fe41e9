"""What in a run deserves a look: plain rules over the logged numbers, each with its figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from uar_megatron.reporting.runlog import Run
from uar_megatron.reporting.series import Array, Series, mean

_VACUUM = 0.5
_BIAS = 0.5
_COLLAPSE = 5.0
_LATE = 0.75
"""Part of the run after which it is late."""


@dataclass(frozen=True)
class Finding:
    """One thing to look at.

    Attributes:
        kind: the rule.
        layers: the layers it holds for; empty for the whole run.
        text: what was seen, with numbers.
    """

    kind: Literal["vacuum", "bias", "load", "nonfinite", "skipped"]
    layers: tuple[int, ...]
    text: str


def find(run: Run, series: Series, logged: int) -> list[Finding]:
    """Look at a run by every rule.

    ``vacuum``: over half of a layer's tokens are in state IV in the last quarter. ``bias``: the
    largest bias passes 0.5 (scores are 0 to 1, so it overrules them) and still grew by a quarter of
    itself, well beyond its noise, in the second half. ``load``: MaxVio in the last quarter is above
    5, or half of what it is when all tokens go to the same K of E experts, E/K − 1. ``nonfinite``:
    tokens with an energy or entropy that is not finite. ``skipped``: steps that the optimizer left
    out.

    Args:
        run: the run, or evenly spaced steps of it.
        series: its numbers.
        logged: number of step records in the log; counts are told as those of a part of it where
            ``run`` has fewer.
    """
    if not series.steps:
        return []
    found = []
    held = len(run.steps)
    of = f" in {held} of the {logged} logged steps" if held < logged else ""
    if series.layers:
        late = run.part(_LATE, 1.0)
        vacuum = mean(series.states()[late, :, 3], 0)
        found += _over(series, vacuum, _VACUUM, "vacuum", "{:.0%} of the tokens are in state IV")
        found += _bias(run, series)
        load = mean(series.of_layer("max_vio")[late], 0)
        found += _over(series, load, _load_limit(run), "load", "MaxVio is {:.1f}")
        count = np.nansum(series.of_layer("nonfinite"), axis=0)
        found += _over(series, count, 0.5, "nonfinite", "{:.0f} tokens were not finite" + of)
    skipped = sum(s.skipped for s in run.steps)
    if skipped:
        found.append(Finding("skipped", (), f"The optimizer skipped {skipped} steps{of}."))
    return found


_TITLES = {
    "vacuum": "Cognitive vacuum in the last quarter of the run",
    "bias": "The selection bias runs away",
    "load": "Load is far from balanced in the last quarter of the run",
    "nonfinite": "Energy or entropy is not finite",
}


def _over(
    series: Series,
    values: Array,
    limit: float,
    kind: Literal["vacuum", "bias", "load", "nonfinite"],
    shown: str,
) -> list[Finding]:
    """One finding for all layers above a limit."""
    layers = tuple(n for n, v in zip(series.layers, values, strict=True) if v > limit)
    if not layers:
        return []
    numbers = dict(zip(series.layers, values, strict=True))
    worst = max(layers, key=lambda n: numbers[n])
    text = f"{_TITLES[kind]}: in layer {worst}, " + shown.format(numbers[worst])
    if len(layers) > 1:
        others = "all" if len(layers) == len(series.layers) else str(len(layers))
        text += f"; {others} of {len(series.layers)} layers"
        text = text.replace("; all of", "; all")
    return [Finding(kind, layers, text + ".")]


def _load_limit(run: Run) -> float:
    """MaxVio that is far from balance."""
    if not run.starts:
        return _COLLAPSE
    highest = run.starts[-1].num_experts / max(run.starts[-1].topk, 1) - 1
    return min(_COLLAPSE, highest / 2) if highest > 0 else _COLLAPSE


def _bias(run: Run, series: Series) -> list[Finding]:
    bias = series.of_layer("bias_max_abs")
    points = len(bias)
    if points < 8 or not np.isfinite(bias).any():
        return []
    width = max(1, points // 20)
    half = run.part(0.5, 1.0).start
    middle = mean(bias[max(0, half - width // 2) : half + width - width // 2], 0)
    final = mean(bias[-width:], 0)
    steps = np.abs(np.diff(bias, axis=0))
    noise = np.nan_to_num(np.median(steps, axis=0)) / np.sqrt(width)
    grew = final - middle
    values = np.where((grew > 0.25 * final) & (grew > 6 * noise), final, 0.0)
    return _over(series, values, _BIAS, "bias", "the largest bias reached {:.2f} and still grows")
