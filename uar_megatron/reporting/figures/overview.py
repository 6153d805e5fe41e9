"""The run at a glance: loss, active experts, energy, entropy, states, load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from uar_megatron.reporting.figures.style import (
    PALETTE,
    STATE_COLORS,
    by_step,
    finish,
    line,
    panels,
)
from uar_megatron.reporting.series import STATE_NAMES, mean
from uar_megatron.reporting.view import View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def overview(figure: Figure, views: Sequence[View]) -> None:
    """The README's figure."""
    axes = panels(figure, 2, 3)
    loss(axes[0], views)
    experts(axes[1], views)
    by_step(axes[2], views, "energy_mean")
    by_step(axes[3], views, "entropy_mean")
    if len(views) == 1 and views[0].series.layers:
        states(axes[4], views[0])
        load(axes[5], views[0])
    else:
        by_step(axes[4], views, "vacuum")
        by_step(axes[5], views, "max_vio")


def loss(axes: Axes, views: Sequence[View]) -> None:
    """Training and validation loss."""
    for number, view in enumerate(views):
        of = f"{view.label}: " if len(views) > 1 else ""
        color = PALETTE[number % 7]
        if view.run.steps:
            values = view.series.of_step("loss")
            line(axes, view.series.steps, values, color=color, label=f"{of}training")
        names = list(dict.fromkeys(n for v in view.run.validations for n in v.losses))
        for i, name in enumerate(names):
            found = [(v.step, v.losses[name]) for v in view.run.validations if name in v.losses]
            axes.plot(
                *zip(*found, strict=True), "osD^v"[i % 5] + "--", markersize=4, linewidth=1,
                color=PALETTE[(i + 1) % 7] if len(views) == 1 else color,
                label=of + name.replace("_", " "),
            )  # fmt: skip
    finish(axes, views, "Loss", "cross-entropy per token (nats)", any(v.run.steps for v in views))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right")


def experts(axes: Axes, views: Sequence[View]) -> None:
    """k_eff, with the K of Top-K."""
    topk = {view.run.starts[-1].topk for view in views if view.run.starts}
    for k in sorted(topk):
        axes.axhline(k, color="gray", linestyle=":", label="top-k")
    by_step(axes, views, "k_eff")


def states(axes: Axes, view: View) -> None:
    """Shares of the four states, mean over layers."""
    shares = mean(view.series.states(), 1)
    kept = np.isfinite(shares).all(axis=1)
    axes.stackplot(
        np.asarray(view.series.steps)[kept], shares[kept].T, labels=STATE_NAMES,
        colors=STATE_COLORS, alpha=0.8,
    )  # fmt: skip
    axes.set_ylim(0, 1)
    finish(axes, [view], "Routing states, all layers", "share of tokens")
    axes.legend(loc="lower left", frameon=True, framealpha=0.85)


def load(axes: Axes, view: View) -> None:
    """Load by expert over the last quarter of the run, layers by experts."""
    loads = view.series.loads
    table = mean(loads[view.run.part(0.75, 1.0)], 0) * loads.shape[2]
    axes.set_title("Load by expert, last quarter")
    if not table.size:
        axes.text(0.5, 0.5, "not in the log", transform=axes.transAxes, ha="center", color="gray")
        return
    image = axes.imshow(np.ma.masked_invalid(table), cmap="cividis", aspect="auto", vmin=0)
    axes.figure.colorbar(image, ax=axes, label="load / mean load")
    every = -(-len(table) // 12)
    axes.set_yticks(range(0, len(table), every), [str(n) for n in view.series.layers[::every]])
    axes.grid(visible=False)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
