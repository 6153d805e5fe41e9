"""How depth and time shape energy and entropy (paper: Figures 4, 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from uar_megatron.reporting.figures.style import (
    PALETTE,
    drawable,
    finish,
    line,
    mark_phases,
    panels,
)
from uar_megatron.reporting.page_data import METRICS, layer_mean, metric
from uar_megatron.reporting.series import mean
from uar_megatron.reporting.view import View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PROFILES = 5


def depth(figure: Figure, views: Sequence[View]) -> None:
    """Entropy and energy by layer at five steps of each run."""
    runs = drawable(views)
    axes = iter(panels(figure, len(runs), 2))
    for view, _ in runs:
        for name in ("entropy_mean", "energy_mean"):
            _profiles(next(axes), view, name, f"{view.label}: " if len(views) > 1 else "")


def _profiles(axes: Axes, view: View, name: str, of: str) -> None:
    table, steps = metric(view.series, name), view.series.steps
    evenly = np.linspace(steps[0], steps[-1], _PROFILES)
    places = np.unique(np.abs(np.subtract.outer(evenly, steps)).argmin(axis=1)).tolist()
    for number, place in enumerate(places):
        axes.plot(
            view.series.layers, table[place], "o-", markersize=3,
            color=PALETTE[number], label=f"step {steps[place]}",
        )  # fmt: skip
    axes.set_title(of + METRICS[name][0])
    axes.set_xlabel("layer")
    axes.set_ylabel(METRICS[name][1])
    # Each run has steps of its own.
    axes.legend(
        ncols=_PROFILES,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        frameon=False,
        columnspacing=0.8,
        handlelength=1.2,
    )


def expert_counts(figure: Figure, views: Sequence[View]) -> None:
    """Entropy and energy by layer, late in runs with different numbers of experts."""
    left, right = panels(figure, 1, 2)
    for view, color in drawable(views):
        start = view.run.starts[-1] if view.run.starts else None
        name = view.label if start is None else (
            f"{view.label} ({start.num_experts}A{start.topk})"
        )  # fmt: skip
        highest = math.log(start.num_experts) if start and start.num_experts > 1 else 1.0
        late = view.run.part(0.75, 1.0)
        for axes, quantity, unit in (
            (left, "entropy_mean", highest),
            (right, "energy_mean", 1.0),
        ):
            values = mean(metric(view.series, quantity)[late], 0) / unit
            axes.plot(view.series.layers, values, "o-", color=color, markersize=4, label=name)
            axes.set_xlabel("layer")
    left.set_title("Router entropy over ln E, last quarter")
    left.set_ylabel("H / ln E")
    right.set_title("Free energy F, last quarter")
    right.set_ylabel(METRICS["energy_mean"][1])


def trajectory(figure: Figure, views: Sequence[View]) -> None:
    """Mean energy over steps with its phases, and the way of each run through the H–F plane."""
    over_time, plane = panels(figure, 1, 2)
    for view, color in drawable(views):
        energy, entropy = (layer_mean(view.series, n) for n in ("energy_mean", "entropy_mean"))
        line(over_time, view.series.steps, energy, color=color, label=view.label)
        overall = view.phases[0]
        if len(views) == 1:
            mark_phases(over_time, view)
        if overall.peak_step is not None and overall.peak is not None:
            over_time.plot(overall.peak_step, overall.peak, "v", color=color, markersize=7)
        line(plane, entropy.tolist(), energy, color=color, label=view.label)
        plane.plot(entropy[0], energy[0], "o", color=color, markersize=5)
        plane.plot(entropy[-1], energy[-1], "s", color=color, markersize=5)
    title = "Free energy, mean over layers (▼ peak)"
    if len(views) == 1 and views[0].phases[0].reason:
        title += "\nphases not yet distinguishable"
    finish(over_time, views, title, METRICS["energy_mean"][1])
    plane.set_title("Trajectory (● first step, ■ last)")
    plane.set_xlabel("entropy H (nats)")
    plane.set_ylabel("free energy F (units of the logits)")
