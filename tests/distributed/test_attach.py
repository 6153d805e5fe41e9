"""UAR is switched on in a stock run, and off again, without a jolt."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from jobs import losses, train, train_arguments, train_stock, warm_torchrun

from uar_megatron.reporting.runlog import read_run

pytestmark = pytest.mark.slow

UAR = (
    "routing=uar_ae",
    "uar.expansion.start_step=3",
    "uar.expansion.ramp_steps=10",
    "uar.clb.enabled=true",
    "uar.clb.start_step=5",
    "uar.bias.enabled=false",
)
SCHEDULE = ("train_iters=30", "save_interval=10")


def test_attach_and_detach(tmp_path: Path) -> None:
    """10 stock steps; 10 more with UAR attached; 10 more without it; against 30 stock steps."""
    stock_dir, run_dir = tmp_path / "stock", tmp_path / "run"
    stock = train_stock(2, stock_dir, [*SCHEDULE, "expert_model_parallel_size=2"])

    shutil.copytree(stock_dir, run_dir)
    checkpoints = run_dir / "checkpoints"
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("10")
    options = (*SCHEDULE, *UAR, "expert_model_parallel_size=2")
    attached = train(2, run_dir, *options, "exit_interval=20")
    # α = 0 and no mask: bit-equal. Then the ramp sets in.
    assert [attached[s] for s in (11, 12, 13)] == [stock[s] for s in (11, 12, 13)]
    # Steps 18 to 20 are past the middle of the ramp: it has had an effect by now …
    assert attached[20] != stock[20]
    # … that is smaller than what separates neighbouring batches.
    noise = max(abs(stock[s] - stock[s - 1]) for s in range(12, 21))
    assert all(abs(attached[s] - stock[s]) < noise for s in range(14, 21))
    log = read_run(run_dir / "run.jsonl")
    assert log.starts[0].step == 10

    detached = train_stock(2, run_dir, [*SCHEDULE, "expert_model_parallel_size=2"])
    assert sorted(detached) == list(range(21, 31))
    assert all(abs(detached[s] - stock[s]) < noise for s in range(21, 31))


def test_what_starts_fresh_is_said(tmp_path: Path) -> None:
    """The bias is switched on later than the rest."""
    run_dir = tmp_path / "run"
    train(1, run_dir, "routing=uar_ae", "train_iters=4", "save_interval=2", "exit_interval=2")
    options = ("routing=uar_ae", "train_iters=4", "uar.bias.enabled=true")
    job = warm_torchrun(1, *train_arguments(1, run_dir, *options))
    assert job.returncode == 0, job.stderr[-3000:]
    assert "has no .uar_ state of: bias.value; it starts fresh" in job.stdout + job.stderr
    assert sorted(losses(run_dir)) == [1, 2, 3, 4]
