"""The table's numbers against numbers computed by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from jobs import TINY
from records import start, step

from uar_megatron.errors import ConfigError
from uar_megatron.experiment import save_resolved
from uar_megatron.reporting.runlog import RunLogWriter
from uar_megatron.reporting.schema import End, LayerValidation, Record, Validation
from uar_megatron.sweep.command import make_table
from uar_megatron.sweep.grid import Point, Sweep, expand
from uar_megatron.sweep.measure import compare
from uar_megatron.sweep.state import read_state

PERPLEXITIES = {"Top-k": (10.0, 12.0, 14.0), "UAR": (9.0, 11.5, 12.0)}


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(
        f"base: {TINY}\ndir: {tmp_path / 'runs'}\nseeds: [1, 2, 3]\nbaseline: Top-k\n"
        "points: {Top-k: [routing=topk], UAR: [routing=uar_ae]}\n"
    )
    return path


def log(point: Point, *records: Record) -> None:
    writer = RunLogWriter(point.folder / "run.jsonl")
    for record in records:
        writer.write(record)
    writer.close()


def trained(point: Point, perplexity: float, k_eff: float = 2.0) -> None:
    """A whole run: k_eff is 1 until the last quarter."""
    steps = []
    for at in range(1, 21):
        record = step(at)
        record.k_eff = k_eff if at > 15 else 1.0
        record.flops_ratio = k_eff / 2
        for layer in record.layers:
            layer.max_vio = (0.1 if at > 15 else 9.0) * layer.layer
        steps.append(record)
    layers = [
        LayerValidation(layer=n, tokens=64, k_eff=2, load=[0.5, 0.5], max_vio=0.1 * n)
        for n in (2, 3)
    ]
    losses = {"first": math.log(perplexity), "second": math.log(2 * perplexity)}
    last = Validation(step=20, losses=losses, layers={"first": layers, "second": []})
    early = Validation(step=10, losses={"first": 9.0, "second": 9.0})
    log(point, start(0), *steps[:10], early, *steps[10:], last, End(step=20, reason="finished"))


def train_all(sweep: Sweep) -> None:
    for point in sweep.points:
        trained(point, PERPLEXITIES[point.row][point.seed - 1], 2.0 if point.row == "Top-k" else 3)


def test_means_errors_deltas_and_significance(grid: Path) -> None:
    sweep = expand(grid)
    train_all(sweep)
    frame = compare(sweep).frame
    base, ours = frame.loc["Top-k"], frame.loc["UAR"]
    assert base["perplexity first"] == pytest.approx(12.0)
    assert base["perplexity first se"] == pytest.approx(2 / math.sqrt(3))
    # Differences by seed: −1, −½, −2; so t² = 7 with two degrees of freedom, p = 1 − t/√(t² + 2).
    assert ours["perplexity first delta"] == pytest.approx(-3.5 / 3)
    assert ours["perplexity first delta se"] == pytest.approx(3.5 / 3 / math.sqrt(7))
    assert ours["perplexity first p"] == pytest.approx(1 - math.sqrt(7 / 9))
    assert ours["perplexity first pairs"] == 3
    assert ours["perplexity second delta"] == pytest.approx(-7 / 3)
    assert math.isnan(base["perplexity first delta"])
    assert ours["k_eff"] == pytest.approx(3.0)
    assert ours["flops_ratio"] == pytest.approx(1.5)
    assert ours["max_vio"] == pytest.approx(0.25)
    assert ours["max_vio_global"] == pytest.approx(0.25)
    assert ours["steps"] == 20


def test_as_text(grid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_all(expand(grid))
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps({"UAR": [1.0234, 0.0121]}))
    options = ["perplexity", "k_eff"]
    assert make_table(grid, metrics=options, bench=bench).splitlines()[:4] == [
        "|  | seeds | perplexity first | Δ | p | perplexity second | Δ | p | k_eff | step time |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| Top-k | 3 | 12.00 ± 1.15 | – | – | 24.00 ± 2.31 | – | – | 2.00 ± 0.00 | – |",
        "| UAR | 3 | 10.83 ± 0.93 | -1.17 ± 0.44 | 0.118 | 21.67 ± 1.86 | -2.33 ± 0.88 | 0.118 "
        "| 3.00 ± 0.00 | 1.023 ± 0.012 |",
    ]
    latex = make_table(grid, "latex", metrics=options)
    assert r"UAR & 3 & 10.83 $\pm$ 0.93 & $-$1.17 $\pm$ 0.44 & 0.118 &" in latex
    assert r"k\_eff" in latex
    csv = make_table(grid, "csv", metrics=["k_eff"])
    assert csv.splitlines()[0] == "row,finished,points,k_eff,k_eff se"
    assert csv.splitlines()[2] == "UAR,3,3,3.0,0.0"
    assert "Mean ±" in capsys.readouterr().err


def test_unfinished_points_are_listed_and_pairs_are_seeds_of_both(grid: Path) -> None:
    sweep = expand(grid)
    train_all(sweep)
    broken, stopped, unread = sweep.points[2], sweep.points[3], sweep.points[4]
    (unread.folder / "run.jsonl").write_text('{"schema":1,"kind":"sta')
    log(broken, start(15), step(16))
    (stopped.folder / "run.jsonl").unlink()
    log(stopped, start(0), step(1), End(step=1, reason="SIGTERM received, checkpoint saved"))
    results = compare(sweep)
    assert list(results.frame["finished"]) == [2, 1]
    # Top-k has seeds 1 and 2, UAR seed 3 alone: there is no pair.
    assert results.frame.loc["Top-k", "perplexity first"] == pytest.approx(11.0)
    assert results.frame.loc["UAR", "perplexity first pairs"] == 0
    text = make_table(grid)
    assert "| UAR | 1 of 3 | 12.00 | – | – |" in text
    assert "Unfinished, not in the numbers (3):" in text
    assert "- Top-k seed=3: step 16 of 20: killed, or still running" in text
    assert "- UAR seed=1: step 1 of 20: SIGTERM received, checkpoint saved" in text
    assert "- UAR seed=2: step 0 of 20: not started" in text


def test_what_was_trained_with_another_configuration_is_not_in_the_numbers(grid: Path) -> None:
    sweep = expand(grid)
    train_all(sweep)
    for point in sweep.points:
        save_resolved(point.experiment, point.folder)
    before = make_table(grid)
    assert "Unfinished" not in before
    grid.write_text(grid.read_text().replace("uar_ae]", "uar_ae, lr=0.007]"))
    text = make_table(grid)
    assert "Unfinished, not in the numbers (3):" in text
    assert "- UAR seed=2: its run has another configuration: lr was " in text


def test_nothing_trained_yet(grid: Path) -> None:
    text = make_table(grid)
    assert "| UAR | 0 of 3 | – | – | – | – |" in text
    assert text.count("not started") == 6


def test_a_value_that_is_missing_is_not_averaged_over(grid: Path) -> None:
    sweep = expand(grid)
    train_all(sweep)
    file = sweep.points[0].folder / "run.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if '"validation"' not in line))
    assert "| Top-k | 3 | – |" in make_table(grid)


def test_a_baseline_at_each_setting(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(
        f"base: {TINY}\ndir: {tmp_path / 'runs'}\nbaseline: A\n"
        "points: {A: [routing=topk], B: [routing=uar_ae]}\ngrid: {lr: [0.1, 0.2]}\n"
    )
    sweep = expand(path)
    for point, perplexity in zip(sweep.points, (10.0, 20.0, 11.0, 23.0), strict=True):
        trained(point, perplexity)
    delta = "perplexity first delta"
    frame = compare(sweep).frame
    assert list(frame[delta])[2:] == pytest.approx([1.0, 3.0])
    assert math.isnan(frame.loc["A lr=0.2", delta])
    assert compare(sweep, baseline="A lr=0.1").frame.loc["A lr=0.2", delta] == pytest.approx(10)


def test_unknown_names_are_refused(grid: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'perplexity'"):
        make_table(grid, metrics=["perplexty"])
    with pytest.raises(ConfigError, match="did you mean 'Top-k'"):
        make_table(grid, baseline="Topk")
    bench = tmp_path / "bench.json"
    bench.write_text('{"Top-p": [1.0, 0.1]}')
    with pytest.raises(ConfigError, match="there is no row 'Top-p'"):
        make_table(grid, bench=bench)


def test_a_point_is_finished_when_its_latest_process_says_so(grid: Path) -> None:
    point = expand(grid).points[0]
    assert read_state(point).reason == "not started"
    end = End(step=20, reason="finished")
    log(point, start(0), step(19), End(step=19, reason="exit_interval reached"))
    assert read_state(point).reason == "exit_interval reached"
    log(point, start(19), step(20))
    assert read_state(point).reason == "killed, or still running"
    log(point, end)
    assert read_state(point).finished
    log(point, start(0))  # somebody began it anew
    assert not read_state(point).finished
    log(point, End(step=10, reason="finished"))
    assert read_state(point).reason == "finished at step 10 instead of 20"
