"""A killed run resumes as if nothing had happened: statistics, bias, θ_t, optimizer, data order.

``test_kills.py`` does it with a single rank, several times over.
"""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
from jobs import environment, kill_job, losses, torchrun_command, train, train_arguments

pytestmark = pytest.mark.slow

# θ_t is mid-schedule at the kill, the bias moves, k varies, dropout draws random numbers.
EVERYTHING = (
    "uar.policy=uar",
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
def test_kill_and_resume_equals_a_straight_run(layout: str, tmp_path: Path) -> None:
    nproc, options = LAYOUTS[layout]
    straight = train(nproc, tmp_path / "straight", *EVERYTHING, *options)
    assert len(straight) == 20

    killed = tmp_path / "killed"
    kill_after(14, nproc, killed, *EVERYTHING, *options)
    before = losses(killed)
    assert 14 <= max(before) < 20
    assert train(nproc, killed, *EVERYTHING, *options) == straight
    starts = (killed / "run.jsonl").read_text().count('"kind":"start"')
    assert starts == 2


def kill_after(step: int, nproc: int, run_dir: Path, *overrides: str) -> None:
    """Train until the run log holds ``step``, then kill -9 every process of the job."""
    # Slow enough to be caught between two steps.
    arguments = train_arguments(nproc, run_dir, *overrides)
    job = subprocess.Popen(
        torchrun_command(nproc, *arguments),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = run_dir / "run.jsonl"
    deadline = time.monotonic() + 120
    while f'"kind":"step","step":{step},' not in (log.read_text() if log.exists() else ""):
        assert job.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    kill_job(job)
    assert job.returncode == -signal.SIGKILL
