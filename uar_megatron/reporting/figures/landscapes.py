"""Energy and entropy over depth and time, the H–F plane, observed signals (paper: Figures 2, 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from uar_megatron.reporting.figures.style import (
    PALETTE,
    STATE_COLORS,
    drawable,
    heat_map,
    layer_color,
    named_layers,
    panels,
    shade,
)
from uar_megatron.reporting.page_data import METRICS, SIGNALS, metric, thresholds
from uar_megatron.reporting.series import STATE_NAMES, mean
from uar_megatron.reporting.view import View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_LANDSCAPES = ("entropy_mean", "energy_mean", "entropy_std", "energy_std")


def landscapes(figure: Figure, views: Sequence[View]) -> None:
    """Entropy and energy, mean and std, by layer and step: a column for each run, one scale."""
    runs = drawable(views)
    rows, columns = (2, 2) if len(runs) == 1 else (len(_LANDSCAPES), len(runs))
    axes = iter(panels(figure, rows, columns))
    for name in _LANDSCAPES:
        title, unit = METRICS[name]
        tables = [metric(view.series, name) for view, _ in runs]
        known = np.concatenate([table[np.isfinite(table)] for table in tables])
        scale = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        for (view, _), table in zip(runs, tables, strict=True):
            of = f"{view.label}: " if len(views) > 1 else ""
            heat_map(next(axes), view.series, table, unit, of + title, scale)


def plane(figure: Figure, views: Sequence[View]) -> None:
    """The H–F plane with the four states: tokens where observed, and the layers' means."""
    runs = drawable(views)
    axes = panels(figure, 1, len(runs))
    for panel, (view, _) in zip(axes, runs, strict=True):
        _plane(panel, view)
    limits = [panel.get_xlim() for panel in axes]
    for panel in axes:
        panel.set_xlim(min(low for low, _ in limits), max(high for _, high in limits))


def _plane(axes: Axes, view: View) -> None:
    series = view.series
    energy, entropy = series.of_layer("energy_mean")[-1], series.of_layer("entropy_mean")[-1]
    spread = series.of_layer("energy_std")[-1], series.of_layer("entropy_std")[-1]
    highest = math.log(view.run.starts[-1].num_experts) if view.run.starts else np.nanmax(entropy)
    border_entropy, border_energy = thresholds(view)
    _tokens(axes, view)
    names = dict(named_layers(series))
    for place in range(len(series.layers)):
        axes.errorbar(
            energy[place], entropy[place], spread[1][place], spread[0][place], fmt="o",
            markersize=4, linewidth=0.8, color=layer_color(place, len(series.layers)),
            label=names.get(place),
        )  # fmt: skip
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, border_energy - 0.3), max(high, border_energy + 0.3))
    axes.set_ylim(0, max(highest, 0.1) * 1.02)
    axes.axvline(border_energy, color="gray", linestyle="--", linewidth=0.8)
    axes.axhline(border_entropy, color="gray", linestyle="--", linewidth=0.8)
    shares = mean(series.states()[-1], 0)
    corners = ((0.02, 0.03), (0.02, 0.97), (0.98, 0.03), (0.98, 0.97))
    for state, ((x, y), name) in enumerate(zip(corners, STATE_NAMES, strict=True)):
        share = f"\n{shares[state]:.0%}" if np.isfinite(shares[state]) else ""
        axes.text(
            x, y, name + share, transform=axes.transAxes, color="black", fontsize=8,
            ha="left" if x < 0.5 else "right", va="bottom" if y < 0.5 else "top",
            bbox={"facecolor": STATE_COLORS[state], "alpha": 0.35, "linewidth": 0, "pad": 2},
        )  # fmt: skip
    axes.set_title(f"{view.label}, step {series.steps[-1]}")
    axes.set_xlabel("free energy F (units of the logits)")
    axes.set_ylabel("entropy H (nats)")


def _tokens(axes: Axes, view: View) -> None:
    """Tokens of all layers at the last observation that has a histogram."""
    for observation in reversed(view.run.observations):
        tables = [np.array(m.histogram) for m in observation.layers if m.histogram]
        if tables and observation.energy_bins and observation.entropy_bins:
            x, y = observation.energy_bins, observation.entropy_bins
            total = np.sum(tables, axis=0)
            held = np.flatnonzero(total.any(axis=0))
            if held.size:
                first, end = held[0], held[-1] + 1
                edges = np.linspace(x.low, x.high, x.bins + 1)[first : end + 1]
                axes.pcolormesh(
                    edges, np.linspace(y.low, y.high, y.bins + 1),
                    np.ma.masked_equal(np.sqrt(total[:, first:end]), 0),
                    cmap="Greys", alpha=0.6, rasterized=True,
                )  # fmt: skip
            return


def signals(figure: Figure, views: Sequence[View]) -> None:
    """What was observed beyond the logging intervals: mean and range over layers."""
    names = [n for n in SIGNALS if any(np.isfinite(v.series.observed(n)).any() for v in views)]
    axes = panels(figure, max(1, -(-len(names) // 3)), min(3, max(1, len(names))))
    for name, panel in zip(names, axes, strict=False):
        for number, view in enumerate(views):
            color = PALETTE[number % 7]
            table = view.series.observed(name)
            seen = np.isfinite(table).any(axis=1)
            if seen.any():
                observed = zip(view.run.observations, seen, strict=True)
                steps = [o.step for o, there in observed if there]
                values = mean(table[seen], 1)
                panel.plot(steps, values, "o-", markersize=3, color=color, label=view.label)
                shade(panel, steps, table[seen], color)
        panel.set_title(SIGNALS[name].title)
        panel.set_xlabel("optimizer step")
        panel.set_ylabel(SIGNALS[name].unit)
    for panel in axes[len(names) :]:
        panel.set_visible(False)
