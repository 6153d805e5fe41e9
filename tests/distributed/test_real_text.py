"""Text to figures: a dataset of real text, two ranks, every sink, the report."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest
from jobs import torchrun, train_arguments
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from uar_megatron.data.bpe import train_bpe
from uar_megatron.data.build import build_dataset
from uar_megatron.reporting.report import write_report
from uar_megatron.reporting.runlog import read_run

pytestmark = pytest.mark.slow


def test_from_text_to_figures(tmp_path: Path) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    train_files = sorted((library / "json").glob("*.py")) + sorted((library / "email").glob("*.py"))
    train_bpe((f.read_text() for f in train_files), 512, tmp_path / "tokenizer")
    spec = f"hf:{tmp_path / 'tokenizer'}"
    for name, files in {"train": train_files, "valid": [library / "sched.py"]}.items():
        build_dataset(files, tmp_path / name, spec, workers=1)
    run_dir = tmp_path / "run"
    data = [
        "mock_data=null",
        "vocab_size=null",
        "split=null",
        "tokenizer_type=HuggingFaceTokenizer",
        f"tokenizer_model={tmp_path / 'tokenizer'}",
        f"train_data_path=[{tmp_path / 'train'}]",
        f"valid_data_path=[{tmp_path / 'valid'},{tmp_path / 'valid'}]",
        "multiple_validation_sets=true",
        "full_validation=true",
        "validation_set_names=[one,two]",
        "eval_micro_batch_size=1",
        "eval_global_batch_size=2",
    ]
    options = [
        *("routing=uar_ae_clb", "uar.clb.start_step=5", "expert_model_parallel_size=2"),
        *("train_iters=12", "eval_interval=6", "log_interval=4"),
        *("wandb_project=test", "wandb_exp_name=test", f"wandb_save_dir={run_dir}"),
    ]
    job = torchrun(2, *train_arguments(2, run_dir, *data, *options))
    assert job.returncode == 0, job.stderr[-4000:]

    run = read_run(run_dir / "run.jsonl")
    assert [s.step for s in run.steps] == [4, 8, 12]
    assert [s.interval for s in run.steps] == [4, 4, 4]
    assert [v.step for v in run.validations] == [6, 12]
    assert run.validations[0].losses["one"] == run.validations[0].losses["two"]
    assert run.validations[1].losses["one"] < run.validations[0].losses["one"]
    tokens = 4 * run.starts[0].tokens_per_step
    for step in run.steps:
        assert [m.layer for m in step.layers] == [2, 3]
        for m in step.layers:
            assert m.tokens == tokens
            assert m.rows * 4 == pytest.approx(m.k_eff * tokens)
            assert sum(m.states) == pytest.approx(1)
    assert run.steps[0].layers[0].theta is None
    assert run.steps[2].layers[0].theta is not None
    assert " uar | step 12 | loss" in job.stdout

    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    (k_eff,) = [e.value for e in board.Scalars("uar/k_eff/layer_2") if e.step == 8]
    assert k_eff == pytest.approx(run.steps[1].layers[0].k_eff)
    assert list((run_dir / "wandb").glob("offline-run-*/*.wandb"))

    assert (run_dir / "config.yaml").read_text() == (
        run_dir / "checkpoints" / "config.yaml"
    ).read_text()
    write_report([run_dir])
    assert (run_dir / "report.html").stat().st_size > 50_000
    assert (run_dir / "figures" / "overview.png").exists()
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 12
