"""What a run survives, and how it ends when it cannot: dead, slow and hanging ranks, lost files."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from jobs import (
    TESTS,
    TINY,
    checkpoint_tensors,
    environment,
    kill_job,
    losses,
    torchrun_command,
    train,
    train_arguments,
    warm_torchrun,
)

pytestmark = pytest.mark.slow

OPTIONS = (
    "uar.policy=uar",
    "uar.bias.enabled=true",
    "expert_model_parallel_size=2",
    "hidden_dropout=0.1",
    "train_iters=12",
    "save_interval=4",
)
BOUND = 300  # seconds within which a job must end, on a machine that is busy; Megatron's are 600


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to; its checkpoints are of steps 4, 8 and 12."""
    run_dir = tmp_path_factory.mktemp("faults") / "straight"
    train(2, run_dir, *OPTIONS)
    return run_dir


class Job:
    """A running job of two ranks, and what it prints."""

    def __init__(self, run_dir: Path, process: subprocess.Popen[bytes], log: Path) -> None:
        self.run_dir = run_dir
        self.process = process
        self.log = log

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for_step(self, step: int) -> None:
        log = self.run_dir / "run.jsonl"
        deadline = time.monotonic() + BOUND
        while f'"kind":"step","step":{step},' not in (log.read_text() if log.exists() else ""):
            assert self.process.poll() is None, self.said[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def wait_to_hear(self, words: str) -> None:
        deadline = time.monotonic() + BOUND
        while words not in self.said:
            assert time.monotonic() < deadline, self.said[-3000:]
            time.sleep(0.1)

    def signal_rank(self, rank: int, number: signal.Signals) -> None:
        children = psutil.Process(self.process.pid).children()
        process = next(c for c in children if _rank_of(c) == str(rank))
        helpers = process.children(recursive=True)
        process.send_signal(number)
        if number is signal.SIGKILL:  # Megatron's helper processes outlive a rank that is killed
            for helper in helpers:
                helper.kill()

    def wait(self) -> int:
        return self.process.wait(timeout=BOUND)


def _rank_of(process: psutil.Process) -> str | None:
    with contextlib.suppress(psutil.Error):  # it may be on its way out
        return process.environ().get("RANK")
    return None


@contextlib.contextmanager
def running(run_dir: Path, *options: str) -> Iterator[Job]:
    """Start the tiny model; whatever is left of the job at the end is killed."""
    run_dir.mkdir(exist_ok=True)
    log = run_dir / "output.txt"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            torchrun_command(2, *train_arguments(2, run_dir, *OPTIONS, *options)),
            env=environment(),
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Job(run_dir, process, log)
    finally:
        kill_job(process)


def test_a_killed_rank_ends_the_job_which_then_resumes(straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with running(run_dir) as job:
        job.wait_for_step(6)
        job.signal_rank(1, signal.SIGKILL)
        assert job.wait() != 0
        assert "error: another rank is gone" in job.said
    assert train(2, run_dir, *OPTIONS) == losses(straight)


def test_a_slow_rank_changes_nothing(straight: Path, tmp_path: Path) -> None:
    with running(tmp_path / "run") as job:
        job.wait_for_step(3)
        job.signal_rank(1, signal.SIGSTOP)
        time.sleep(3)
        job.signal_rank(1, signal.SIGCONT)
        assert job.wait() == 0
    assert losses(tmp_path / "run") == losses(straight)


def test_a_hanging_rank_ends_the_job(tmp_path: Path) -> None:
    """Megatron can shorten the timeout after the first step; before it, minutes count."""
    with running(tmp_path / "run", "distributed_timeout_seconds_after_init=5") as job:
        job.wait_for_step(3)
        job.signal_rank(1, signal.SIGSTOP)
        job.wait_to_hear("error: another rank is gone or does not answer")
        assert "Timed out waiting 5000ms" in job.said
        # torchrun asks for 30 seconds before it forces a process that does not answer.
        job.signal_rank(1, signal.SIGKILL)
        assert job.wait() != 0


def test_a_nonfinite_gradient_on_one_rank(straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    script = str(TESTS / "poisoned_pretrain.py")
    options = (f"run.dir={run_dir}", "launch.nproc_per_node=2", *OPTIONS)
    job = warm_torchrun(2, script, "6", str(TINY), *options)
    assert job.returncode != 0
    said = job.stdout + job.stderr
    assert "found NaN in local grad norm" in said
    assert "Unexpected result nan on rank 1" in said
    assert "stopped at step 5: Megatron's validation of results stopped it" in said
    # On the same devices Megatron would go on asking for others.
    assert "rerun_mode=disabled" in said
    assert train(2, run_dir, *OPTIONS, "rerun_mode=disabled") == losses(straight)


def _lose(folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()


def _truncate(folder: Path) -> None:
    data = folder / "__1_0.distcp"
    os.truncate(data, data.stat().st_size // 2)


def _stop_before_metadata(folder: Path) -> None:
    (folder / ".metadata").unlink()
    (folder / "metadata.json").unlink()


DAMAGE = {
    "a lost file": (_lose, "__1_0.distcp is missing"),
    "a file cut short": (_truncate, "__1_0.distcp has "),
    "no .metadata": (_stop_before_metadata, ".metadata is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_checkpoint_is_refused(damage: str, straight: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight / "checkpoints", run_dir / "checkpoints")
    inflict, problem = DAMAGE[damage]
    inflict(run_dir / "checkpoints" / "iter_0000012")
    job = warm_torchrun(2, *train_arguments(2, run_dir, *OPTIONS))
    assert job.returncode != 0
    assert problem in job.stderr
    assert "ckpt_step=8" in job.stderr
    assert "exitcode  : 2 " in job.stderr
    if inflict is _lose:
        resumed = train(2, run_dir, *OPTIONS, "ckpt_step=8")
        assert resumed == {s: loss for s, loss in losses(straight).items() if s > 8}


def test_a_load_that_fails_inside_megatron_is_no_finished_job(tmp_path: Path) -> None:
    """It leaves with exit code 0 where it cannot read a file of its legacy format."""
    part = tmp_path / "run" / "checkpoints" / "iter_0000004" / "mp_rank_00" / "model_optim_rng.pt"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"garbage")
    (tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("4")
    for option in ("use_checkpoint_args=false", "use_checkpoint_args=true"):
        job = warm_torchrun(1, *train_arguments(1, tmp_path / "run", option))
        assert job.returncode != 0, option
        assert "error: load: Megatron could not load the checkpoint in" in job.stderr
        assert "exitcode  : 3 " in job.stderr


def test_async_save(straight: Path, tmp_path: Path) -> None:
    """What is written during the next steps is the state before them; resuming is exact."""
    run_dir = tmp_path / "run"
    options = (
        "async_save=true",
        "use_persistent_ckpt_worker=true",
        "async_strategy=mcore",
    )
    assert train(2, run_dir, *OPTIONS, *options) == losses(straight)
    for step in (4, 8, 12):
        ours, theirs = checkpoint_tensors(run_dir, step), checkpoint_tensors(straight, step)
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in ours)
    (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("4")
    assert train(2, run_dir, *OPTIONS, *options) == losses(straight)
    assert (run_dir / "run.jsonl").read_text().count('"kind":"start"') == 2
