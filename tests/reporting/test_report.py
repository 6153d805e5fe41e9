"""Console, scalars and summary from made-up runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from records import start, step, validation

from uar_megatron.errors import ConfigError, UARError
from uar_megatron.reporting.export import export_run
from uar_megatron.reporting.report import write_report
from uar_megatron.reporting.runlog import Run
from uar_megatron.reporting.sinks import (
    FanOut,
    TensorBoardSink,
    WandbSink,
    console_line,
    scalars,
)
from uar_megatron.reporting.summary import read_unigram, summarise, write_summary
from uar_megatron.reporting.view import View


def test_console_lines_can_be_read() -> None:
    line = console_line(step(120))
    assert "step 120 | loss 3.000 | k 2.000 (L2 2.05 L3 1.95)" in line
    assert "ω 0.50 θ -1.00 | |bias| 0.100" in line
    assert line.endswith("FLOPs 1.023 × top-k | 0.1k tok/s | 12.3 TFLOP/s per rank")
    assert console_line(step(1, loss=None, layers=0)) == " uar | step 1 | loss –"
    assert "resumes at step 7" in console_line(start(7))
    assert "in_domain 2.5000" in console_line(validation(7, in_domain=2.5))


def test_scalars_name_metric_and_layer() -> None:
    values = scalars(step(3))
    assert values["uar/k_eff/layer_2"] == step(3).layers[0].k_eff
    assert values["uar/vacuum/layer_3"] == 0.2
    assert (values["uar/flops"], values["uar/flops_ratio"]) == (6e12, 1.0234)
    assert values["uar/throughput"] == 12.345
    assert (values["uar/flops/layer_2"], values["uar/flops_ratio/layer_2"]) == (2e9, 1.01)
    assert scalars(validation(3, a=1.0)) == {"uar/validation_loss/a": 1.0}
    assert scalars(start(0)) == {}


class Recorder:
    """Stands where a SummaryWriter or wandb run does."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def add_scalar(self, *args: Any) -> None:
        self.calls.append(args)

    def log(self, *args: Any) -> None:
        self.calls.append(args)


def test_tensorboard_and_wandb_get_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    board, wandb = Recorder(), Recorder()
    sinks = FanOut([TensorBoardSink(board), WandbSink(wandb), TensorBoardSink(None)])
    for record in (start(0), step(5), step(6)):
        sinks.write(record)
    sinks.close()
    assert {call[2] for call in board.calls} == {5, 6}
    assert [call[1] for call in wandb.calls] == [5, 6]
    assert capsys.readouterr().err.count("is left out from now on") == 1


def test_summary_counts(tmp_path: Path) -> None:
    run = Run(
        starts=[start(0), start(20)],
        steps=[step(i) for i in range(1, 41)],
        validations=[validation(20, a=3.0, b=5.0), validation(40, a=2.0, b=5.5)],
    )
    view = View("made up", tmp_path / "run.jsonl", run, 40, ["a note"])
    summary = summarise(run, {"a": 100.0})
    assert summary["resumed_at"] == [20]
    assert summary["validation"]["a"]["perplexity"] == pytest.approx(math.exp(2.0))
    assert summary["validation"]["a"]["unigram_over_model"] == pytest.approx(100 / math.exp(2.0))
    assert summary["validation"]["a"]["fell_at_every_evaluation"]
    assert not summary["validation"]["b"]["fell_at_every_evaluation"]
    assert summary["validation"]["b"]["best_loss"] == 5.0
    assert summary["max_vio_late"] == pytest.approx(0.6)
    assert summary["flops_ratio_late"] == pytest.approx(1.0234)
    assert summary["throughput"] == pytest.approx(12.345)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"unigram": {"valid_a": {"perplexity": 100.0}}}))
    text = write_summary([view], tmp_path, "summary", read_unigram(manifest))
    assert "| a | 2.0000 | 7.39 | 100.0 | 13.53 | yes (2 evaluations) |" in text
    assert "FLOPs over those of Top-K: 1.023." in text
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 40
    with pytest.raises(UARError, match="manifest"):
        read_unigram(tmp_path / "none.json")
    assert "* a note" in text
    assert "Phases of the mean energy: not yet distinguishable" in text


def test_one_record_that_is_not_finite_hides_no_other() -> None:
    run = Run(
        steps=[step(i) for i in range(1, 41)],
        validations=[
            validation(1, a=math.nan, b=math.nan), validation(20, a=2.0), validation(40, a=3.0)
        ],
    )  # fmt: skip
    run.steps[2].tokens_per_second = math.nan
    run.steps[39].layers[0].max_vio = math.inf
    summary = summarise(run)
    assert summary["validation"]["a"]["best_loss"] == 2.0
    assert summary["validation"]["b"]["best_loss"] is None
    assert summary["tokens_per_second"] == pytest.approx(128.0)
    assert summary["max_vio_late"] == pytest.approx(0.6)


@pytest.mark.parametrize("output", ["run.jsonl", "folder.html", "run.jsonl/page.html", "page"])
def test_a_page_is_written_nowhere_else(output: str, tmp_path: Path) -> None:
    """Least of all over the log."""
    log = tmp_path / "run.jsonl"
    log.write_text(start(0).to_line() + step(1).to_line())
    (tmp_path / "folder.html").mkdir()
    before = log.read_text()
    with pytest.raises(ConfigError, match="--output"):
        write_report([tmp_path], tmp_path / output)
    with pytest.raises(ConfigError, match=r"--output.*writ"):
        export_run(tmp_path, "csv", log)
    assert log.read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.html", "run.jsonl"]
