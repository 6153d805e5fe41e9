"""Jobs of a real SLURM are interrupted in every way, and end as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from jobs import TINY, environment
from records import start
from slurm_cluster import SlurmCluster

from uar_megatron.errors import UARError
from uar_megatron.launching.command import launch_slurm
from uar_megatron.launching.slurm import SlurmOptions
from uar_megatron.reporting.runlog import RunLogWriter, read_run
from uar_megatron.reporting.schema import End
from uar_megatron.sweep.command import make_table, run_sweep
from uar_megatron.sweep.grid import load_sweep
from uar_megatron.sweep.slurm import submit_sweep

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
STEPS, SAVE_INTERVAL, INTERRUPT_AFTER = 16, 4, 6
TRAINING = (
    *("uar.policy=slow_policy:SlowPolicy", "uar.budget.alpha=0.5", "hidden_dropout=0.1"),
    *(f"train_iters={STEPS}", f"save_interval={SAVE_INTERVAL}", "eval_iters=0"),
    "tensorboard_dir=null",
)
ASYNC = ("async_save=true", "use_persistent_ckpt_worker=true", "async_strategy=mcore")
PATIENCE = 1500.0


@dataclass
class Job:
    """A submitted run.

    Attributes:
        number: SLURM's.
        folder: of the run.
        slow: the file that keeps the training slow.
    """

    slurm: SlurmCluster
    number: str
    folder: Path
    slow: Path

    @property
    def log(self) -> str:
        """What the script and the ranks have printed."""
        return "".join(path.read_text() for path in self.folder.glob(f"*-{self.number}.log"))

    def steps(self) -> list[int]:
        """The step of every record in the run log, those that were taken back included."""
        return [record["step"] for record in self.records("step")]

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The whole records of one kind in the run log."""
        file = self.folder / "run.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        parsed = [json.loads(line) for line in lines if line.endswith("}")]
        return [record for record in parsed if record["kind"] == kind]

    def field(self, name: str) -> str:
        """A field of what SLURM knows of the job."""
        shown = self.slurm.run("scontrol", "show", "job", self.number)
        found = re.search(rf"\b{name}=(\S*)", shown)
        return found[1] if found else ""

    def wait_for(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"waited for {what}:\n{self.log[-3000:]}"
            time.sleep(0.5)

    def wait_until_over(self) -> None:
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        self.wait_for("the end", lambda: self.field("JobState") in over)

    def comparable(self) -> list[dict[str, Any]]:
        """Every step of the run once, with all that is not a time."""
        times = {"seconds_per_step", "tokens_per_second", "throughput"}
        steps = read_run(self.folder / "run.jsonl").steps
        return [step.model_dump(exclude=times) for step in steps]


def submit(
    slurm: SlurmCluster, folder: Path, *overrides: str, nodes: int = 2, **options: Any
) -> Job:
    slow = folder.with_suffix(".slow")
    slow.touch()
    os.environ["UAR_TEST_SLOW"] = str(slow)  # sbatch hands the environment on
    said = launch_slurm(
        TINY,
        [f"run.dir={folder}", *overrides],
        nodes,
        lambda experiments: None,
        SlurmOptions(**{"time": "30", "more": ("--mem=1000",)} | options),
        dry_run=False,
    )
    number = re.search(r"job (\d+) submitted", said)
    assert number is not None, said
    return Job(slurm, number[1], folder, slow)


def requeue(job: Job) -> None:
    """What an operator does."""
    job.slurm.run("scontrol", "requeue", job.number)


def limit(job: Job, minutes: int) -> None:
    job.slurm.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes}")


def time_limit(job: Job) -> None:
    """The limit is brought near, and SLURM sends the signal that the script has asked for."""
    job.slow.write_text("2")  # SLURM looks every half a minute
    elapsed = time.time() - (job.folder / "slurm" / "attempts").stat().st_mtime
    limit(job, int(elapsed // 60) + 2)
    job.wait_for("the signal", lambda: "the time is up" in job.log)
    limit(job, 30)


def kill_a_rank(job: Job) -> None:
    """SIGKILL to a single rank."""
    ranks = [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(job.folder / "config.yaml") in (command := process.info["cmdline"] or [])
        and command[1:4] == ["-u", "-m", "uar_megatron.pretrain"]
    ]
    assert len(ranks) == 2
    ranks[0].kill()


def drain(job: Job) -> None:
    """A node is taken out of service and its jobs are sent away."""
    node = job.field("NodeList").removeprefix("n[")[0]
    job.slurm.run("scontrol", "update", f"NodeName=n{node}", "State=DRAIN", "Reason=test")
    try:
        requeue(job)
        job.wait_for("the second start", lambda: "start 2 of" in job.log)
    finally:
        job.slurm.run("scontrol", "update", f"NodeName=n{node}", "State=RESUME")
    nodes = re.findall(r"start \d of job \d+ at step \d+ on (\S+)", job.log)
    assert node in nodes[0]
    assert node not in nodes[1]


INTERRUPTIONS: dict[str, Callable[[Job], None]] = {
    "time limit": time_limit,
    "drain": drain,
    "requeue": requeue,
    "rank killed": kill_a_rank,
}
"""The one that takes longest comes first."""


@pytest.fixture(scope="module")
def jobs(
    slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Job | BaseException]]:
    """A job that is left alone and one per interruption, side by side, after their ends."""
    folder = tmp_path_factory.mktemp("runs")
    ended: dict[str, Job | BaseException] = {}

    def see_through(name: str, job: Job) -> None:
        try:
            if name in INTERRUPTIONS:
                job.wait_for("steps", lambda: max(job.steps(), default=0) >= INTERRUPT_AFTER)
                INTERRUPTIONS[name](job)
            job.slow.unlink()
            job.wait_until_over()
            ended[name] = job
        except BaseException as error:
            ended[name] = error

    with job_environment():
        threads = []
        for name in (*INTERRUPTIONS, "left alone"):
            # How checkpoints are written changes no loss.
            options = (*TRAINING, *ASYNC) if name == "drain" else TRAINING
            job = submit(
                slurm, folder / name.replace(" ", "_"), *options,
                more=("--mem=1000", "--signal=B:USR1@120"),
            )  # fmt: skip
            threads.append(threading.Thread(target=see_through, args=(name, job)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return ended


@contextlib.contextmanager
def job_environment() -> Iterator[None]:
    """What sbatch is to hand on to the ranks."""
    path = f"{HERE}:{os.environ.get('PYTHONPATH', '')}"
    ranks = {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment() | ranks).items():
            patch.setenv(name, value)
        patch.setenv("UAR_TEST_SLOW", "")
        yield


def ended(jobs: dict[str, Job | BaseException], name: str) -> Job:
    job = jobs[name]
    if isinstance(job, BaseException):
        raise job
    return job


def test_two_nodes_train(jobs: dict[str, Job | BaseException]) -> None:
    job = ended(jobs, "left alone")
    assert job.field("JobState") == "COMPLETED", job.log[-5000:]
    assert job.steps() == list(range(1, STEPS + 1))
    (begun,) = read_run(job.folder / "run.jsonl").starts
    assert begun.world_size == 2
    assert begun.config["exit_duration_in_mins"] == 20, "30 min without twice the warning"
    (recorded,) = (job.folder / "slurm").glob("*.txt")
    text = recorded.read_text()
    assert "GLOO_SOCKET_IFNAME=lo" in text
    assert f"JobId={job.number}" in text


@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_an_interrupted_job_is_the_uninterrupted_one(
    name: str, jobs: dict[str, Job | BaseException]
) -> None:
    job, straight = ended(jobs, name), ended(jobs, "left alone")
    assert job.field("JobState") == "COMPLETED", job.log[-5000:]
    assert job.field("Restarts") == "1"
    assert job.comparable() == straight.comparable()
    begun = [record["step"] for record in job.records("start")]
    saved = begun[1]
    if name == "rank killed":
        assert saved == SAVE_INTERVAL, "nobody could save"
    else:
        assert saved >= INTERRUPT_AFTER, "saved when it was told to stop"
        assert job.steps() == list(range(1, STEPS + 1)), "no step was taken twice"
    assert begun == [0, saved]
    assert job.records("end")[-1]["reason"] == "finished"
    assert len(set((job.folder / "slurm" / "wandb_run_id").read_text().split())) == 1


SHORT_LIVED = """#!/bin/sh
[ "$1" = -c ] && exit
# One task of an array has the number of the array.
if [ "$SLURM_JOB_ID" = "$SLURM_ARRAY_JOB_ID" ]; then sleep 1; exit 7; fi
sleep 8
for word; do
  case $word in
    */config.yaml) echo '{"schema":1,"kind":"end","reason":"finished"}' >"${word%/*}/run.jsonl" ;;
  esac
done
"""
"""In place of Python: the training of one task crashes while that of the other comes to its end."""


def test_a_crash_loop_ends_and_other_tasks_go_on(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python, grid = tmp_path / "python", tmp_path / "grid.yaml"
    python.write_text(SHORT_LIVED)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    grid.write_text(f"base: {TINY}\ndir: {tmp_path / 'runs'}\nseeds: [1, 2]\n")
    number = submit_array(grid, "2 of 2", max_attempts=2)
    with pytest.raises(UARError, match=f"job {number} of .* is still in the queue"):
        submit_array(grid, "2 of 2")
    with pytest.raises(UARError, match="still in the queue"):
        run_sweep(grid, lambda experiments: None)
    wait_for_empty_queue(slurm)
    said = {}
    for log in (tmp_path / "runs").glob("*.log"):
        lines = re.findall(r"slurm.sbatch: \S+ \S+ (.*)", log.read_text())
        said[log.stem.rpartition("-")[2] == number] = [
            re.sub(f"^.*seed=.: | of job.*|{number}_.", "", line) for line in lines
        ]
    assert said == {
        True: [
            "start 1",
            "exit code 7, checkpoint at step 0: back into the queue",
            "start 2",
            "giving up: started 2 times at step 0 without getting further (exit 7)",
        ],
        False: ["start 1", "finished"],
    }
    states = slurm.run("scontrol", "show", "job", number)
    assert sorted(re.findall(r"JobState=(\S+)", states)) == ["COMPLETED", "FAILED"]


def submit_array(grid: Path, points: str, **options: Any) -> str:
    said = submit_sweep(
        grid, lambda experiments: None, SlurmOptions(**{"more": ("--mem=1000",)} | options),
        at_a_time=None, dry_run=False,
    )  # fmt: skip
    number = re.search(rf"job array (\d+) submitted: {points} points", said)
    assert number is not None, said
    return number[1]


def wait_for_empty_queue(slurm: SlurmCluster) -> None:
    deadline = time.monotonic() + PATIENCE
    while slurm.run("squeue", "-h"):
        assert time.monotonic() < deadline
        time.sleep(1)


def test_an_array_runs_what_is_left_of_a_sweep(slurm: SlurmCluster, tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        f"base: {TINY}\ndir: {tmp_path / 'runs'}\n"
        f"points: {{small: [train_iters=3, eval_iters=0, save_interval=100]}}\nseeds: [1, 2, 3]\n"
    )
    finished = load_sweep(grid).points[1]
    log = RunLogWriter(finished.folder / "run.jsonl")
    log.write(start(0))
    log.write(End(step=3, reason="finished"))

    with job_environment():
        submit_array(grid, "2 of 3")
    wait_for_empty_queue(slurm)
    assert "Unfinished" not in make_table(grid)
    assert not finished.folder.joinpath("slurm").exists()
    again = submit_sweep(
        grid, lambda experiments: None, SlurmOptions(), at_a_time=None, dry_run=False
    )
    assert again == "all 3 points are finished"
