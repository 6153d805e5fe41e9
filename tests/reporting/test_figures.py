"""Figures from made-up runs: small, large, several, and with parts missing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import planted
import pytest
from matplotlib.figure import Figure
from records import start, step, validation

from uar_megatron.reporting import figures
from uar_megatron.reporting.figures import (
    FIGURES,
    balance,
    dynamics,
    landscapes,
    overview,
    write_figures,
)
from uar_megatron.reporting.runlog import Run
from uar_megatron.reporting.view import View, load_views


def view(run: Run, label: str = "made up") -> View:
    return View(label, Path("run.jsonl"), run, len(run.steps), [])


def test_every_figure_of_two_runs(tmp_path: Path) -> None:
    one = planted.write(tmp_path / "one", planted.records(steps=60, observe=20))
    other = planted.write(tmp_path / "other", planted.records(steps=60, observe=0, name="$a^{b$"))
    written, left_out = write_figures(load_views([one, other]), tmp_path / "figures")
    assert {path.stem for path in written} == set(FIGURES)
    assert left_out == {}
    for path in written:
        assert path.stat().st_size > 5_000
        assert path.with_suffix(".svg").stat().st_size > 5_000
    assert len(list((tmp_path / "figures").iterdir())) == 2 * len(written)


@pytest.mark.parametrize(("steps", "layers"), [(1, 1), (3, 0), (120, 30)])
def test_small_and_deep_runs(steps: int, layers: int, tmp_path: Path) -> None:
    run = Run(
        starts=[start(0), start(steps // 2)],
        steps=[step(i, layers=layers) for i in range(1, steps + 1)],
        validations=[validation(steps, a=2.0, b=3.0)],
    )
    written, left_out = write_figures([view(run)], tmp_path)
    assert "uar report RUN RUN" in left_out["expert_counts"]
    assert ("uar.observe" if layers else "no MoE layer") in left_out["signals"]
    expected = {"overview", "stability"} if not layers else set(FIGURES) - set(left_out)
    assert {path.stem for path in written} == expected


def labels_of(draw: Callable[[Figure, list[View]], None], views: list[View]) -> list[set[str]]:
    figure = Figure()
    draw(figure, views)
    return [set(axes.get_legend_handles_labels()[1]) for axes in figure.axes]


def test_a_run_that_alone_has_a_metric_is_drawn_as_a_run() -> None:
    """Not as its layers, without a name and in the colours of other runs."""
    without = Run(steps=[step(i) for i in range(1, 31)])
    for metrics in (m for s in without.steps for m in s.layers):
        metrics.bias_mean = None
    biased = Run(steps=[step(i) for i in range(1, 31)])
    views = [view(without, "without"), view(biased, "biased")]
    assert labels_of(balance.stability, views)[2] == {"biased"}
    assert labels_of(balance.stability, views[1:])[2] == {"layer 2", "layer 3"}
    dense = view(Run(steps=[step(i, layers=0) for i in range(1, 31)]), "dense")
    for labels in labels_of(overview.overview, [dense, views[1]])[1:]:
        assert labels <= {"biased", "top-k"}


def test_names_that_begin_with_an_underscore_are_in_the_legend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "FIGURES", {"overview": FIGURES["overview"]})
    run = Run(steps=[step(i) for i in range(1, 9)], validations=[validation(4, _a=2.0)])
    views = [view(run, "_base"), view(run, "other")]
    (path,), _ = write_figures(views, tmp_path)
    text = path.with_suffix(".svg").read_text()
    for name in ("_base", "other", "_base: training", "_base:  a"):
        assert re.search(f">\u200b?{name}<", text)
    assert views[0].label == "_base"


def test_a_landscape_is_drawn_over_steps() -> None:
    """Not over records, which a resume with another log_interval makes longer or shorter."""
    run = Run(steps=[step(i) for i in [*range(1, 21), *range(120, 2021, 100)]])
    figure = Figure()
    landscapes.landscapes(figure, [view(run)])
    corners = figure.axes[0].collections[0].get_coordinates()
    assert corners[0, :, 0].tolist() == [*range(21), *range(120, 2021, 100)]
    low, high = figure.axes[0].get_ylim()
    assert low > high
    dynamics.depth(figure := Figure(), [view(run)])
    names = [line.get_label() for line in figure.axes[0].lines]
    assert names == [f"step {n}" for n in (1, 520, 1020, 1520, 2020)]


def test_a_run_without_a_step_says_so(tmp_path: Path) -> None:
    written, left_out = write_figures([view(Run(starts=[start(0)]))], tmp_path / "figures")
    assert written == []
    assert "first logging interval" in left_out["overview"]
    assert not (tmp_path / "figures").exists()


def test_the_same_log_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: FIGURES[name] for name in ("overview", "plane")}
    monkeypatch.setattr(figures, "FIGURES", few)
    run = planted.write(tmp_path / "run", planted.records(steps=30, observe=0))
    first, _ = write_figures(load_views([run]), tmp_path / "a")
    again, _ = write_figures(load_views([run]), tmp_path / "b")
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert one.with_suffix(".svg").read_bytes() == other.with_suffix(".svg").read_bytes()
