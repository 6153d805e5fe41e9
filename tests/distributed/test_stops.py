"""How a run ends when something goes wrong: what is said, what is saved, which exit code."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from jobs import (
    TIMEOUT,
    environment,
    losses,
    steps_so_far,
    torchrun_command,
    train,
    train_arguments,
    warm_torchrun,
)

from uar_megatron.reporting.runlog import read_run

pytestmark = pytest.mark.slow

AE = ("routing=uar_ae",)


def test_sigterm_saves_and_says_so(tmp_path: Path) -> None:
    """Sent to every process of the job, as batch systems do, after a first checkpoint."""
    run_dir = tmp_path / "run"
    options = (*AE, "train_iters=500", "lr_decay_iters=20", "uar.budget.mode=mean")
    options += ("save_interval=3",)
    log = tmp_path / "log"
    with (
        log.open("w") as stream,
        subprocess.Popen(
            torchrun_command(2, *train_arguments(2, run_dir, *options)),
            # torchrun, which hands the signal on, would kill the ranks after 30 s.
            env=environment() | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(TIMEOUT)},
            stdout=stream,
            stderr=subprocess.STDOUT,
        ) as job,
    ):
        _wait_for_steps(run_dir / "run.jsonl", 4)
        for process in [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
        job.wait(timeout=TIMEOUT)
    assert job.returncode != 0
    run = read_run(run_dir / "run.jsonl")
    stopped = run.ends[-1]
    assert stopped.reason == "SIGTERM received, checkpoint saved"
    assert stopped.step == run.steps[-1].step
    assert f"stopped at step {stopped.step}: SIGTERM received" in log.read_text()
    tracker = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert int(tracker.read_text()) == stopped.step
    # What was saved goes on as if nothing had happened.
    last = stopped.step + 3
    train(2, run_dir, *options, f"exit_interval={last}")
    straight = train(2, tmp_path / "straight", *options, f"exit_interval={last}")
    resumed = losses(run_dir)
    assert [resumed[s] for s in range(1, last + 1)] == [straight[s] for s in range(1, last + 1)]


def _wait_for_steps(log: Path, steps: int) -> None:
    for _ in range(3000):
        if len(steps_so_far(log)) >= steps:
            return
        time.sleep(0.1)
    raise AssertionError("training did not begin")


@pytest.mark.parametrize("megatron_checks", [True, False])
def test_a_router_that_is_not_finite_is_named(tmp_path: Path, megatron_checks: bool) -> None:
    """The weights overflow in the second step; layer 2 is the first with a router."""
    options = (*AE, "lr=1e30", "lr_warmup_iters=0", "clip_grad=0", "normalization=LayerNorm")
    checks = "null" if megatron_checks else "true"
    job = warm_torchrun(
        1,
        *train_arguments(
            1, tmp_path / "run", *options, f"no_check_for_nan_in_loss_and_grad={checks}"
        ),
    )
    assert job.returncode != 0
    said = job.stdout + job.stderr
    assert "step 2: in layer 2 the router's energy or entropy of" in said
    assert ("stopped at step 1: Megatron's validation" in said) == megatron_checks


def test_a_full_disk_costs_log_lines_not_the_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "run.jsonl").symlink_to("/dev/full")
    job = warm_torchrun(1, *train_arguments(1, run_dir, *AE, "train_iters=3"))
    assert job.returncode == 0, job.stderr[-3000:]
    assert "run log: cannot write" in job.stderr
    assert "step 3" in job.stdout
    tracker = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert int(tracker.read_text()) == 3
