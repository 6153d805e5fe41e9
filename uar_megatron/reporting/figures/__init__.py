"""Figures of one run or several, from their logs alone. Needs the ``plots`` extra.

A figure is one entry in ``FIGURES``: what draws it, and what the logs must have for it. The numbers
in brackets are the paper's figures they answer to.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from uar_megatron.errors import UARError
from uar_megatron.reporting.figures import balance, dynamics, landscapes, overview
from uar_megatron.reporting.figures.style import STYLE, legend_below
from uar_megatron.reporting.page_data import SIGNALS
from uar_megatron.reporting.view import View

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawing:
    """How a figure is made.

    Attributes:
        draw: fills an empty figure.
        needs: says what is missing, and how to get it; nothing where all is there.
    """

    draw: Callable[[Figure, Sequence[View]], None]
    needs: Callable[[Sequence[View]], str]


def _steps(views: Sequence[View]) -> str:
    if any(view.run.steps for view in views):
        return ""
    return "no run has reached its first logging interval (log_interval)"


def _layers(views: Sequence[View]) -> str:
    if any(view.series.layers for view in views):
        return ""
    return _steps(views) or "no MoE layer is in the log"


def _several(views: Sequence[View]) -> str:
    if sum(bool(view.series.layers) for view in views) > 1:
        return ""
    return "a comparison needs two runs: uar report RUN RUN"


def _balancing(views: Sequence[View]) -> str:
    if any(np.isfinite(view.series.balancing_loss()).any() for view in views):
        return ""
    return _layers(views) or "no balancing loss is on (moe_router_load_balancing_type)"


def _observed(views: Sequence[View]) -> str:
    if any(np.isfinite(v.series.observed(name)).any() for v in views for name in SIGNALS):
        return ""
    return (
        _layers(views)
        or "nothing was observed: set uar.observe.interval and uar.observe.probe_interval"
    )


FIGURES: dict[str, Drawing] = {
    "overview": Drawing(overview.overview, _steps),
    "landscapes": Drawing(landscapes.landscapes, _layers),  # (2)
    "plane": Drawing(landscapes.plane, _layers),  # (3)
    "depth": Drawing(dynamics.depth, _layers),  # (4, left)
    "expert_counts": Drawing(dynamics.expert_counts, _several),  # (4, right)
    "trajectory": Drawing(dynamics.trajectory, _layers),  # (5)
    "stability": Drawing(balance.stability, _steps),  # (7)
    "uncertainty": Drawing(balance.uncertainty, _balancing),  # (8)
    "expansion": Drawing(balance.expansion, _layers),  # (9)
    "signals": Drawing(landscapes.signals, _observed),
}


def write_figures(views: Sequence[View], folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Write every figure as PNG and SVG.

    Returns:
        The PNG files, and by name why a figure was left out.

    Raises:
        UARError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UARError(
            "figures need matplotlib\n  remedy:  pip install 'uar-megatron[plots]'"
        ) from error
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    views = [_in_legends(view) for view in views]
    written, left_out = [], {}
    for name, drawing in FIGURES.items():
        missing = drawing.needs(views)
        if missing:
            left_out[name] = missing
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE):
            figure = Figure()
            FigureCanvasAgg(figure)
            drawing.draw(figure, views)
            legend_below(figure)
            written.append(_save(figure, folder / name))
    return written, left_out


def _in_legends(view: View) -> View:
    """The same run with a name that matplotlib shows: it hides names that begin with ``_``."""
    if not view.label.startswith("_"):
        return view
    # A copy has the arrays and phases that were computed.
    named = copy.copy(view)
    named.label = "\u200b" + view.label  # a space without width
    return named


def _save(figure: Figure, path: Path) -> Path:
    """Write ``path`` as PNG and SVG, each whole or not at all."""
    # The layout is the same for both: once is enough.
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.execute(figure)
        figure.set_layout_engine("none")
    for suffix in (".svg", ".png"):
        temporary = path.with_name(f".{path.name}.{os.getpid()}{suffix}")
        # No date in the file: the same run gives the same bytes.
        metadata = {"Date": None} if suffix == ".svg" else {}
        figure.savefig(temporary, dpi=125, metadata=metadata)
        temporary.replace(path.with_suffix(suffix))
    return path.with_suffix(".png")
