"""A killed run resumes as if nothing had happened: statistics, bias, θ_t, optimizer, data order.

``test_kills.py`` does it with a single rank, several times over.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from jobs import (
    TESTS,
    TIMEOUT,
    checkpoint_tensors,
    environment,
    kill_job,
    losses,
    steps_so_far,
    torchrun_command,
    train,
    train_arguments,
)

from uar_megatron.reporting.runlog import read_run

pytestmark = pytest.mark.slow

# θ_t is mid-schedule at the kill, the bias moves, k varies, dropout draws random numbers. The
# policy is ours, and slow while a file is there, so that steps can be told apart.
EVERYTHING = (
    "uar.policy=slow_policy:SlowPolicy",
    "uar.bias.enabled=true",
    "uar.clb.enabled=true",
    "uar.clb.start_step=4",
    "uar.clb.warmup_steps=12",
    "hidden_dropout=0.1",
    "save_interval=10",
)
LAYOUTS = {
    "EP 2, fp32": (2, ("expert_model_parallel_size=2",)),
    "DP 2, distributed optimizer, fp32": (2, ("use_distributed_optimizer=true",)),
    "DP 2, distributed optimizer, bf16": (2, ("use_distributed_optimizer=true", "bf16=true")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kill_and_resume_equals_a_straight_run(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nproc, options = LAYOUTS[layout]
    slow = tmp_path / "slow"
    monkeypatch.setenv("UAR_TEST_SLOW", str(slow))
    monkeypatch.setenv("PYTHONPATH", f"{TESTS / 'launch'}:{os.environ.get('PYTHONPATH', '')}")
    straight = train(nproc, tmp_path / "straight", *EVERYTHING, *options)
    assert len(straight) == 20

    killed = tmp_path / "killed"
    kill_after(14, slow, nproc, killed, *EVERYTHING, *options)
    before = losses(killed)
    assert 14 <= max(before) < 20
    assert train(nproc, killed, *EVERYTHING, *options) == straight
    starts = (killed / "run.jsonl").read_text().count('"kind":"start"')
    assert starts == 2


def test_the_coefficient_of_relu_resumes(tmp_path: Path) -> None:
    """λ on two pipeline stages, stopped and started again, is that of a straight run."""
    options = (
        *("uar.policy=relu", "uar.relu.initial_coeff=0.01", "uar.budget.target_mean_k=3"),
        *("moe_router_pre_softmax=true", "moe_router_load_balancing_type=none"),
        *("num_layers=4", 'moe_layer_freq="[0]+[1]*3"', "pipeline_model_parallel_size=2"),
        *("train_iters=10", "save_interval=5", "hidden_dropout=0.1"),
    )
    straight = train(2, tmp_path / "straight", *options)
    train(2, tmp_path / "stopped", *options, "exit_interval=5")
    assert train(2, tmp_path / "stopped", *options) == straight
    logs = [read_run(tmp_path / name / "run.jsonl").steps for name in ("straight", "stopped")]
    coeffs = [[{layer.policy["l1_coeff"] for layer in s.layers} for s in steps] for steps in logs]
    assert coeffs[0] == coeffs[1]
    assert all(len(coeff) == 1 for coeff in coeffs[0])
    assert len(set.union(*coeffs[0])) > 3
    saved = checkpoint_tensors(tmp_path / "stopped", 10)
    lambdas = {float(v) for name, v in saved.items() if name.endswith("uar_policy.coeff")}
    assert len(lambdas) == 1


def test_a_run_killed_after_its_last_checkpoint_gets_finished(tmp_path: Path) -> None:
    """No step is left, and without evaluations nothing else is ever logged."""
    options = ("train_iters=3", "eval_iters=0")
    straight = train(1, tmp_path, *options)
    log = tmp_path / "run.jsonl"
    *lines, end = log.read_text().splitlines(keepends=True)
    assert '"finished"' in end
    log.write_text("".join(lines))
    assert train(1, tmp_path, *options) == straight
    run = read_run(log)
    assert [start.step for start in run.starts] == [0, 3]
    assert run.end is not None
    assert (run.end.step, run.end.reason) == (3, "finished")


def kill_after(step: int, slow: Path, nproc: int, run_dir: Path, *overrides: str) -> None:
    """Train until the run log holds ``step``, then kill -9 every process of the job.

    The steps before it are made slow, so that a busy test does not miss it.
    """
    arguments = train_arguments(nproc, run_dir, *overrides)
    job = subprocess.Popen(
        torchrun_command(nproc, *arguments),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + TIMEOUT
    while (so_far := max(steps_so_far(run_dir / "run.jsonl"), default=0)) < step:
        assert job.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline
        if so_far >= step // 2:
            slow.touch()
        time.sleep(0.05)
    kill_job(job)
    slow.unlink(missing_ok=True)
    assert job.returncode == -signal.SIGKILL
