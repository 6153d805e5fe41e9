"""Figures of a run, from its log alone. Needs the ``plots`` extra."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from uar_megatron.errors import UARError
from uar_megatron.reporting.runlog import Run
from uar_megatron.reporting.sinks import STATES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "uar-megatron",
}


def write_figures(run: Run, folder: Path) -> list[Path]:
    """Write every figure as PNG and SVG; return the PNG files.

    Raises:
        UARError: matplotlib is not installed, or the run has no logged step yet.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UARError(
            "figures need matplotlib\n  remedy:  pip install 'uar-megatron[plots]'"
        ) from error
    if not run.steps:
        raise UARError("the run has not reached its first logging interval: nothing to draw")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(_STYLE):
        for name, (panels, columns) in _FIGURES.items():
            rows = -(-len(panels) // columns)
            figure, axes = pyplot.subplots(
                rows, columns, figsize=(4.2 * columns, 3.0 * rows), squeeze=False
            )
            for draw, panel in zip(panels, axes.flat, strict=False):
                draw(panel, run)
            written.append(_save(figure, folder / name))
            pyplot.close(figure)
    return written


def _save(figure: Figure, path: Path) -> Path:
    """Write ``path`` as PNG and SVG, each whole or not at all."""
    for suffix in (".svg", ".png"):
        temporary = path.with_name(f".{path.name}.{os.getpid()}{suffix}")
        # No date in the file: the same run gives the same bytes.
        metadata = {"Date": None} if suffix == ".svg" else {}
        figure.savefig(temporary, dpi=150, metadata=metadata)
        temporary.replace(path.with_suffix(suffix))
    return path.with_suffix(".png")


def _loss(axes: Axes, run: Run) -> None:
    known = [(s.step, s.loss) for s in run.steps if s.loss is not None]
    axes.plot(*_columns(known), color=_PALETTE[0], label="training")
    names = list(dict.fromkeys(n for v in run.validations for n in v.losses))
    for name, color in zip(names, _PALETTE[1:], strict=False):
        points = [(v.step, v.losses[name]) for v in run.validations if name in v.losses]
        label = name.replace("_", " ")
        axes.plot(*_columns(points), "o--", color=color, markersize=4, linewidth=1, label=label)
    _finish(axes, run, "Loss", "cross-entropy per token (nats)")
    axes.legend()


def _k_eff(axes: Axes, run: Run) -> None:
    _per_layer(axes, run, "k_eff")
    mean = [(s.step, s.k_eff) for s in run.steps if s.k_eff is not None]
    axes.plot(*_columns(mean), color="black", linewidth=2, label="mean")
    if run.starts:
        axes.axhline(run.starts[-1].topk, color="gray", linestyle=":", label="top-k")
    _finish(axes, run, "Active experts", "experts per token")
    _layer_legend(axes)


def _lag(axes: Axes, run: Run) -> None:
    _per_layer(axes, run, "zscore_mean")
    axes.axhline(0, color="gray", linestyle=":")
    _finish(axes, run, "Lag of the statistics", "mean ẑ (σ above the ū in use)")
    _layer_legend(axes)


def _energy(axes: Axes, run: Run) -> None:
    _per_layer(axes, run, "energy_mean", spread="energy_std")
    _finish(axes, run, "Free energy (mean ± std)", "F (units of the logits)")
    _layer_legend(axes)


def _entropy(axes: Axes, run: Run) -> None:
    _per_layer(axes, run, "entropy_mean", spread="entropy_std")
    _finish(axes, run, "Router entropy (mean ± std)", "H (nats)")
    _layer_legend(axes)


def _states(axes: Axes, run: Run) -> None:
    steps = [s.step for s in run.steps if s.layers]
    shares = [
        [sum(m.states[i] for m in s.layers) / len(s.layers) for s in run.steps if s.layers]
        for i in range(len(STATES))
    ]
    labels = ("I consensus", "II ambiguity", "III stubborn bias", "IV vacuum")
    axes.stackplot(steps, shares, labels=labels, colors=_PALETTE[:4], alpha=0.8)
    axes.set_ylim(0, 1)
    _finish(axes, run, "Routing states, all layers", "share of tokens")
    axes.legend(loc="lower left", frameon=True, framealpha=0.85)


def _max_vio(axes: Axes, run: Run) -> None:
    _per_layer(axes, run, "max_vio")
    axes.set_ylim(bottom=0)
    _finish(axes, run, "Load violation per batch", "max load / mean load − 1")
    _layer_legend(axes)


def _load(axes: Axes, run: Run) -> None:
    """Load by expert over the last quarter of the run, layers by experts."""
    late = [s for s in run.steps[-max(1, len(run.steps) // 4) :] if s.layers]
    layers = [m.layer for m in late[-1].layers] if late else []
    table = [
        [sum(column) / len(late) for column in zip(*(s.layers[i].load for s in late), strict=True)]
        for i in range(len(layers))
    ]
    if not table:
        return
    experts = len(table[0])
    image = axes.imshow(
        [[value * experts for value in row] for row in table], cmap="cividis", aspect="auto", vmin=0
    )
    axes.figure.colorbar(image, ax=axes, label="load / mean load")
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.grid(visible=False)
    axes.set_title("Load by expert, last quarter")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")


def _per_layer(axes: Axes, run: Run, name: str, spread: str | None = None) -> None:
    layers = sorted({m.layer for s in run.steps for m in s.layers})
    for position, layer in enumerate(layers):
        color = _layer_color(position, len(layers))
        rows = [(s.step, m) for s in run.steps for m in s.layers if m.layer == layer]
        steps = [step for step, _ in rows]
        values = [getattr(m, name) for _, m in rows]
        axes.plot(steps, values, color=color, linewidth=1.2, label=f"layer {layer}")
        if spread:
            widths = [getattr(m, spread) for _, m in rows]
            low = [v - w for v, w in zip(values, widths, strict=True)]
            high = [v + w for v, w in zip(values, widths, strict=True)]
            axes.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)


def _layer_color(position: int, count: int) -> tuple[float, ...] | str:
    if count < len(_PALETTE):
        return _PALETTE[position]
    from matplotlib import colormaps

    return colormaps["viridis"](position / (count - 1))


def _layer_legend(axes: Axes) -> None:
    if len(axes.lines) <= len(_PALETTE) + 2:
        axes.legend()


def _finish(axes: Axes, run: Run, title: str, label: str) -> None:
    for step in run.resumed_at:
        axes.axvline(step, color="gray", linewidth=0.8, linestyle="--")
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


_Panel = Callable[["Axes", Run], None]
_FIGURES: dict[str, tuple[tuple[_Panel, ...], int]] = {
    "overview": ((_loss, _k_eff, _energy, _entropy, _states, _load), 3),
    "loss": ((_loss,), 1),
    "k_eff": ((_k_eff, _lag), 2),
    "thermodynamics": ((_energy, _entropy), 2),
    "load": ((_load, _max_vio), 2),
}
