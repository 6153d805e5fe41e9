"""One look for all figures: Okabe and Ito's colours, cividis for quantities, light grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from uar_megatron.reporting.page_data import METRICS, metric
from uar_megatron.reporting.series import Array, Series, mean
from uar_megatron.reporting.view import View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STATE_COLORS = ("#009E73", "#56B4E9", "#E69F00", "#CC79A7")
PHASE_COLORS = {
    "Exploration": "#56B4E9",
    "Symmetry breaking": "#E69F00",
    "Stabilisation": "#009E73",
}
STYLE: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": True,
    "legend.framealpha": 0.7,
    "legend.edgecolor": "none",
    "figure.constrained_layout.use": True,
    # Run names are text, whatever dollars they have.
    "text.parse_math": False,
    "path.simplify": True,
    "svg.hashsalt": "uar-megatron",
    # Letters stay letters: they can be found and copied, and are written sooner.
    "svg.fonttype": "none",
}
_LAYERS = 7
"""Layers that are drawn one by one at most."""
_DRAWN = 300
"""Points that a line is drawn with at most."""


def panels(figure: Figure, rows: int, columns: int) -> list[Axes]:
    """Axes in reading order, of one size in all figures."""
    figure.set_size_inches(4.2 * columns, 3.0 * rows)
    return list(figure.subplots(rows, columns, squeeze=False).flat)


def drawable(views: Sequence[View]) -> list[tuple[View, str]]:
    """Runs with MoE layers in their log, and their colours."""
    return [(v, PALETTE[i % 7]) for i, v in enumerate(views) if v.series.layers]


def by_step(axes: Axes, views: Sequence[View], name: str, title: str = "") -> None:
    """A metric over steps: of several runs mean and range over layers, of a single one its layers.

    More than seven layers are drawn as seven of them and the range of all.
    """
    runs = [(v, c) for v, c in drawable(views) if np.isfinite(metric(v.series, name)).any()]
    for view, color in runs:
        table = metric(view.series, name)
        # Of several runs one alone may have the metric: it is still drawn as a run.
        if len(views) > 1:
            line(axes, view.series.steps, mean(table, 1), color=color, label=view.label)
            shade(axes, view.series.steps, table, color)
        else:
            if len(view.series.layers) > _LAYERS:
                shade(axes, view.series.steps, table, "gray")
            for place, label in named_layers(view.series):
                color = layer_color(place, len(view.series.layers))
                line(axes, view.series.steps, table[:, place], color=color, label=label)
            mark_phases(axes, view)
    finish(axes, views, title or METRICS[name][0], METRICS[name][1], runs != [])


def by_layer(axes: Axes, views: Sequence[View], name: str, title: str, last: float = 0.25) -> None:
    """A metric over depth, mean over the last part of each run."""
    for view, color in drawable(views):
        values = mean(metric(view.series, name)[view.run.part(1 - last, 1.0)], 0)
        label = view.label if len(views) > 1 else None
        axes.plot(view.series.layers, values, "o-", color=color, markersize=4, label=label)
    axes.set_title(title)
    axes.set_xlabel("layer")
    axes.set_ylabel(METRICS[name][1])


def line(axes: Axes, steps: Sequence[int], values: Array, **options: Any) -> None:
    """A line of at most ``_DRAWN`` points; thin."""
    every = max(1, -(-len(steps) // _DRAWN))
    axes.plot(steps[::every], values[::every], **({"linewidth": 1.2} | options))


def shade(axes: Axes, steps: Sequence[int], table: Array, color: str) -> None:
    """The range over layers."""
    every = max(1, -(-len(steps) // _DRAWN))
    rows = table[::every]
    kept = np.isfinite(rows).all(axis=1)
    axes.fill_between(
        np.asarray(steps[::every])[kept], rows[kept].min(axis=1), rows[kept].max(axis=1),
        color=color, alpha=0.15, linewidth=0,
    )  # fmt: skip


def mark_phases(axes: Axes, view: View) -> None:
    """Tint the phases behind a curve over steps."""
    for name, start, end in view.phases[0].spans:
        axes.axvspan(start, end, color=PHASE_COLORS[name], alpha=0.18, linewidth=0, label=name)


def named_layers(series: Series) -> list[tuple[int, str]]:
    """Places and names of all layers, or of seven from the first to the last."""
    count = len(series.layers)
    places = list(range(count))
    if count > _LAYERS:
        places = [round(i * (count - 1) / (_LAYERS - 1)) for i in range(_LAYERS)]
    return [(place, f"layer {series.layers[place]}") for place in places]


def layer_color(place: int, count: int) -> Any:
    """Palette for few layers, viridis for many."""
    if count < len(PALETTE):
        return PALETTE[place]
    from matplotlib import colormaps

    return colormaps["viridis"](place / (count - 1))


def heat_map(
    axes: Axes, series: Series, table: Array, label: str, title: str, scale: tuple[float, float]
) -> None:
    """Layers × steps, in colours from the first to the second number of ``scale``.

    A logging interval is as wide as the steps it has: a resume may change them.
    """
    image = axes.pcolormesh(
        series.edges, np.arange(len(series.layers) + 1) - 0.5, np.ma.masked_invalid(table.T),
        cmap="cividis", vmin=scale[0], vmax=scale[1], rasterized=True,
    )  # fmt: skip
    axes.invert_yaxis()
    axes.figure.colorbar(image, ax=axes, label=label)
    every = math.ceil(len(series.layers) / 12)
    places = range(0, len(series.layers), every)
    axes.set_yticks(list(places), [str(series.layers[i]) for i in places])
    axes.grid(visible=False)
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("layer")


def finish(axes: Axes, views: Sequence[View], title: str, label: str, there: bool = True) -> None:
    """Title, labels, resumes."""
    if len(views) == 1:
        for step in views[0].run.resumed_at:
            axes.axvline(step, color="gray", linewidth=0.8, linestyle="--")
    if not there:
        axes.text(0.5, 0.5, "not in the log", transform=axes.transAxes, ha="center", color="gray")
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)


def legend_below(figure: Figure) -> None:
    """One legend for all panels that have none of their own: it hides no curve."""
    entries = {
        label: handle
        for axes in figure.axes
        if axes.get_legend() is None
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if len(entries) > 1:
        columns = min(len(entries), round(figure.get_figwidth() / 1.6))
        handles, labels = list(entries.values()), list(entries)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
