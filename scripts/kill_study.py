"""Kill a run over and over, at any moment, and compare every loss with those of a run left alone.

Trains once without interruption, then once more, killed with SIGKILL at random points (every third
one while a checkpoint is being written) and started again with the same command each time. Every
step of every attempt must have the loss of the uninterrupted run, bit for bit; if not, this fails.

    python scripts/kill_study.py --kills 30 --steps 200
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas
import psutil
import typer

from uar_megatron.data.cli import run_command
from uar_megatron.errors import UARError

# Everything that a run has to remember: statistics, bias, θ_t in mid-schedule, random numbers.
OPTIONS = (
    "uar.policy=uar",
    "uar.bias.enabled=true",
    "uar.clb.enabled=true",
    "uar.clb.start_step=4",
    "hidden_dropout=0.1",
    "log_interval=1",
)
DEADLINE = 600  # seconds an attempt may take to reach the point where it is killed
TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Point:
    """Where to kill.

    Attributes:
        step: the first step that will do.
        saving: whether to wait for a checkpoint that begins to be written, then or later.
        delay: seconds to wait after that.
    """

    step: int
    saving: bool
    delay: float


@dataclass(frozen=True)
class Attempt:
    """What became of one start of the run: a row of the table."""

    resumed_from: int | str
    killed: str
    steps: str
    saved: str
    left_half_written: bool
    compared: int
    different: int


def main(
    kills: Annotated[int, typer.Option(min=1, help="how often the run is killed")] = 30,
    steps: Annotated[int, typer.Option(min=10, help="optimizer steps")] = 200,
    save_interval: Annotated[int, typer.Option(min=1, help="steps between checkpoints")] = 5,
    ranks: Annotated[int, typer.Option(min=1, help="processes")] = 1,
    seed: Annotated[int, typer.Option(help="of the points where it is killed")] = 1,
    config: Annotated[Path, typer.Option(help="experiment")] = Path("tests/tiny.yaml"),
    output: Annotated[Path, typer.Option(help="folder of the two runs and the table")] = Path(
        "runs/kills"
    ),
) -> None:
    """Train twice, print the table, write kills.csv; an error if a loss differs."""
    command = [*(sys.executable, "-m", "torch.distributed.run", "--standalone")]
    command += [*("--nproc_per_node", str(ranks)), *("-m", "uar_megatron.pretrain")]
    command += ["--config", str(config), *OPTIONS, f"train_iters={steps}"]
    command += [f"save_interval={save_interval}", f"launch.nproc_per_node={ranks}"]
    for name in ("straight", "killed"):
        shutil.rmtree(output / name, ignore_errors=True)
    print(f"training {steps} steps without interruption", flush=True)
    straight = train(command, output / "straight", None, {})
    expected = dict(logged_steps(output / "straight" / "run.jsonl", 0))
    if straight.compared != steps:
        raise UARError(f"{straight.compared} of {steps} steps are in {output / 'straight'}")
    attempts = []
    for point in [*random_points(kills, steps, save_interval, seed), None]:
        attempts.append(train(command, output / "killed", point, expected))
        print(f"start {len(attempts)}: {attempts[-1].killed}", flush=True)
    table = pandas.DataFrame([asdict(attempt) for attempt in attempts])
    table.index += 1
    table.to_csv(output / "kills.csv", index_label="start")
    print(table.to_string())
    different = int(table["different"].sum())
    print(f"{int(table['compared'].sum())} losses compared, {different} different")
    if different or dict(logged_steps(output / "killed" / "run.jsonl", 0)) != expected:
        raise UARError(f"the killed run is not the straight one; see {output / 'kills.csv'}")


def random_points(kills: int, steps: int, save_interval: int, seed: int) -> list[Point]:
    """Points in the order of their steps; the first checkpoint is left to be completed."""
    draw = random.Random(seed)
    last = steps - 1
    chosen = sorted(draw.randint(min(save_interval + 1, last), last) for _ in range(kills))
    return [
        Point(step, saving=number % 3 == 1, delay=draw.uniform(0, 0.1))
        for number, step in enumerate(chosen)
    ]


def train(
    command: list[str], run_dir: Path, point: Point | None, expected: dict[int, float]
) -> Attempt:
    """Start the run, kill it at ``point`` unless that is None, and compare what it has logged.

    Raises:
        UARError: it ended by itself before that point, or with an error.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    log = run_dir / "run.jsonl"
    begin = log.stat().st_size if log.exists() else 0
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    with (run_dir / "train.log").open("a") as stream:
        job = subprocess.Popen(
            [*command, f"run.dir={run_dir}"],
            stdout=stream,
            stderr=stream,
            env=environment,
        )
        reached = point is not None and wait_for(point, run_dir, begin, job) and job.poll() is None
        if reached:
            kill(job)
    if job.wait() != 0 and not reached:
        raise UARError(f"training failed; see {run_dir / 'train.log'}")
    if point is not None and not reached:
        raise UARError(
            f"the run was finished before it could be killed ({describe(point)}); choose another "
            "--seed or more --steps"
        )
    starts = [record["step"] for record in logged(log, begin, "start")]
    losses = list(logged_steps(log, begin))
    if losses and starts != [losses[0][0] - 1]:
        raise UARError(f"{log}: not one process has logged steps {losses[0][0]} and following")
    saved = (run_dir / "checkpoints" / TRACKER).read_text()
    newest = max(path.name for path in (run_dir / "checkpoints").glob("iter_*"))
    return Attempt(
        resumed_from=starts[0] if starts else "-",
        killed=describe(point if reached else None),
        steps=f"{losses[0][0]}-{losses[-1][0]}" if losses else "none",
        saved=saved,
        left_half_written=newest != f"iter_{int(saved):07d}",
        compared=len(losses),
        different=sum(expected.get(step, loss) != loss for step, loss in losses),
    )


def describe(point: Point | None) -> str:
    """Say where a run was killed."""
    if point is None:
        return "never"
    return f"saving, {point.step} or later" if point.saving else f"after step {point.step}"


def wait_for(point: Point, run_dir: Path, begin: int, job: subprocess.Popen[bytes]) -> bool:
    """Wait until the run is where it is to be killed; False if it has finished before."""
    started = time.time()

    def is_there() -> bool:
        if point.saving:
            folders = (run_dir / "checkpoints").glob("iter_*")
            return any(
                int(folder.name.removeprefix("iter_")) >= point.step
                and folder.stat().st_mtime > started
                for folder in folders
            )
        return any(step >= point.step for step, _ in logged_steps(run_dir / "run.jsonl", begin))

    while not is_there():
        if job.poll() is not None:
            return False
        if time.time() > started + DEADLINE:
            kill(job)
            raise UARError(f"step {point.step} was not reached; see {run_dir / 'train.log'}")
        time.sleep(0.002)
    time.sleep(point.delay)
    return True


def kill(job: subprocess.Popen[bytes]) -> None:
    """Kill torchrun and all that it has started: every rank leads a session of its own."""
    launcher = psutil.Process(job.pid)
    processes = [launcher, *launcher.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    job.wait()
    psutil.wait_procs(processes)


def logged_steps(log: Path, begin: int) -> Iterator[tuple[int, float]]:
    """Step and loss of each step in a run log from a position on."""
    for record in logged(log, begin, "step"):
        yield record["step"], record["loss"]


def logged(log: Path, begin: int, kind: str) -> Iterator[dict[str, Any]]:
    """The whole records of a kind in a run log from a position on, repeated steps included."""
    if not log.exists():
        return
    with log.open("rb") as stream:
        stream.seek(begin)
        for line in stream:
            if line.endswith(b"}\n") and line.startswith(b"{"):
                record = json.loads(line)
                if record["kind"] == kind:
                    yield record


if __name__ == "__main__":
    run_command(main)
