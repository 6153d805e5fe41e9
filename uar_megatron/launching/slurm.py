"""One SLURM job, or one job array, that trains runs to their end with ``launch/slurm.sbatch``."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uar_megatron.errors import ConfigError, UARError, UnsupportedEnvironmentError
from uar_megatron.experiment import Experiment
from uar_megatron.launching.container import refuse_what_is_not_mounted
from uar_megatron.launching.scripts import fill_in, script_dir, write_script

SCRIPT = "slurm.sbatch"
JOB = "slurm.job"
"""Holds the number of the latest job, beside the script."""
_WARNING = 300
"""Seconds before the time limit at which ranks are asked to save."""
_NUM_WORKERS = 2
"""Data loaders of a rank where the configuration does not say: Megatron's default."""
_EXCLUDES = {
    "mem-per-cpu": ("mem",),
    "mem-per-gpu": ("mem",),
    "cpus-per-gpu": ("cpus-per-task",),
}
"""What sbatch does not take together with an option."""


@dataclass(frozen=True)
class SlurmOptions:
    """What the command line says about the job.

    Attributes:
        time: limit of one start of the job, as sbatch reads it; None for the partition's.
        partition: None for the default one.
        account: None for the user's.
        container: image for pyxis/enroot; None to run without.
        mounts: ``SRC:DST,…`` for the container, beside the current folder.
        max_attempts: starts in a row without a new checkpoint before the job gives up.
        more: further options of sbatch, as on its command line; they win over all others.
    """

    time: str | None = None
    partition: str | None = None
    account: str | None = None
    container: str | None = None
    mounts: str | None = None
    max_attempts: int = 3
    more: Sequence[str] = ()


@dataclass(frozen=True)
class Batch:
    """Runs that become one job, or one array.

    Attributes:
        name: of the job.
        folder: where script, log and job number go.
        runs: experiments that differ neither in nodes nor in ranks per node.
        is_array: one task per run; a single run otherwise.
        at_a_time: tasks of the array; None for as many as SLURM has room for.
    """

    name: str
    folder: Path
    runs: Sequence[Experiment]
    is_array: bool = False
    at_a_time: int | None = None


def batch_script(batch: Batch, options: SlurmOptions) -> str:
    """Return the script of a job.

    Raises:
        ConfigError: a run could not be resumed, or not be found in its container, the runs need
            different nodes, or an option is not one.
    """
    for run in batch.runs:
        refuse_what_cannot_resume(run)
        if options.container:
            refuse_what_is_not_mounted(run, options.mounts)
    launch = batch.runs[0].launch
    for run in batch.runs:
        if run.launch != launch:
            raise ConfigError(
                "launch",
                f"{run.run.name!r} needs {run.launch!r}, {batch.runs[0].run.name!r} {launch!r}",
                allowed="the same nodes for every task of a job array",
                remedy="make a sweep of its own of each",
            )
    directives: dict[str, str | None] = {
        "job-name": re.sub(r"[^A-Za-z0-9.=+-]+", "_", batch.name),
        "nodes": str(launch.nnodes),
        "chdir": str(Path.cwd()),
        "output": str(batch.folder.resolve() / "%x-%j.log"),
    }
    if launch.device == "cuda":
        directives |= _share_of_a_gpu_node(batch.runs)
    if batch.is_array:
        throttle = "" if batch.at_a_time is None else f"%{batch.at_a_time}"
        directives["array"] = f"0-{len(batch.runs) - 1}{throttle}"
    given = {"time": options.time, "partition": options.partition, "account": options.account}
    directives |= {name: value for name, value in given.items() if value is not None}
    minutes = None if options.time is None else minutes_of(options.time)
    if minutes is not None:
        directives["signal"] = f"B:USR1@{_warning(minutes)}"
    for option in options.more:
        name, value = _option(option)
        for excluded in _EXCLUDES.get(name, ()):
            directives.pop(excluded, None)
        directives[name] = value
    return fill_in(
        (script_dir() / SCRIPT).read_text(encoding="utf-8"),
        directives,
        {
            "runs": [run.run.dir for run in batch.runs],
            "overrides": _overrides(batch.runs, minutes),
            "python": "python3" if options.container else sys.executable,
            "nproc_per_node": launch.nproc_per_node,
            "max_attempts": options.max_attempts,
            "container_image": options.container or "",
            "container_mounts": options.mounts or "",
        },
    )


def submit(folder: Path, text: str) -> str:
    """Write a script and submit it; return the number of the job.

    Raises:
        UARError: SLURM is not here, or refuses; or the folder's last job is still in the queue.
    """
    refuse_submission(folder)
    write_script(folder / SCRIPT, text)
    done = subprocess.run(
        ["sbatch", "--parsable", str(folder / SCRIPT)], capture_output=True, text=True
    )
    if done.returncode:
        raise UARError(f"sbatch refused {folder / SCRIPT}: {done.stderr.strip()}")
    job = done.stdout.strip().partition(";")[0]
    (folder / JOB).write_text(f"{job}\n", encoding="utf-8")
    return job


def refuse_submission(folder: Path) -> None:
    """Refuse what :func:`submit` would refuse, before anything of the folder is replaced.

    Raises:
        UARError: SLURM is not here, or has the folder's last job in its queue.
    """
    if shutil.which("sbatch") is None:
        raise UnsupportedEnvironmentError(
            "sbatch: not found, so there is no SLURM here\n"
            "  remedy:  submit from a login node of the cluster, or --dry-run to see the script"
        )
    refuse_queued(folder)


def refuse_queued(folder: Path) -> None:
    """Refuse to start what the folder's last job is still at, or is about to be.

    Two trainings of one run would overwrite each other's checkpoints.

    Raises:
        UARError: SLURM has the job in its queue, or cannot say; it forgets those that have ended.
    """
    if not (folder / JOB).exists() or shutil.which("squeue") is None:
        return
    job = (folder / JOB).read_text(encoding="utf-8").strip()
    asked = subprocess.run(["squeue", "-h", "-o", "%T", "-j", job], capture_output=True, text=True)
    if asked.returncode and "Invalid job id" not in asked.stderr:
        raise UARError(
            f"squeue: {asked.stderr.strip()}: is job {job} of {folder} still in the queue?\n"
            f"  remedy:  try again, or delete {folder / JOB} if that job is over"
        )
    if asked.stdout.strip():
        states = ", ".join(sorted(set(asked.stdout.lower().split())))
        raise UARError(
            f"job {job} of {folder} is still in the queue ({states})\n"
            f"  remedy:  wait for it, or end it with: scancel {job}"
        )


def refuse_what_cannot_resume(run: Experiment) -> None:
    """Refuse a run that would begin anew each time the job comes back, or lose what it has done.

    Raises:
        ConfigError: it does not load from where it saves, or does not save on a signal.
    """
    save, load = run.megatron.get("save"), run.megatron.get("load")
    if save is None or load is None or Path(save).resolve() != Path(load).resolve():
        raise ConfigError(
            "load" if save else "save",
            f"the job comes back after an interruption, but load is {load} and save is {save}",
            allowed="the same folder for both",
            remedy="use `logging: default`, or set load and save to ${run.dir}/checkpoints; to "
            "begin from another checkpoint set pretrained_checkpoint",
        )
    if not run.megatron.get("exit_signal_handler"):
        raise ConfigError(
            "exit_signal_handler",
            "is not set: ranks would not save when the job is about to be stopped",
            remedy="exit_signal_handler=true",
        )


def minutes_of(time: str) -> int | None:
    """A time limit as sbatch reads it, in whole minutes, at least one; None for no limit.

    SLURM takes zero for no limit, and rounds seconds up, also those of less than a minute.

    Raises:
        ConfigError: sbatch would not understand it.
    """
    if time.lower() in ("infinite", "unlimited"):
        return None
    days, dash, clock = time.rpartition("-")
    parts = clock.split(":")
    if not all(p.isdigit() for p in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        raise ConfigError(
            "--time",
            f"{time!r} is not a time",
            allowed="minutes, hours:minutes:seconds, days-hours, days-hours:minutes, …",
        )
    numbers = [int(part) for part in parts]
    if not any(numbers) and not (dash and int(days)):
        return None
    return max(1, _whole_minutes(int(days) if dash else None, numbers))


def _whole_minutes(days: int | None, numbers: Sequence[int]) -> int:
    if days is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes = (*numbers, 0)[:2]
        return (days * 24 + hours) * 60 + minutes
    if len(numbers) == 3:
        return numbers[0] * 60 + numbers[1]
    return numbers[0]  # minutes[:seconds]


def _share_of_a_gpu_node(runs: Sequence[Experiment]) -> dict[str, str | None]:
    """GPUs, and the cores and memory that go with them.

    Several nodes are taken whole; exclusive alone would not bring more than the default memory. On
    one, which others may share, a core for each rank and each of its data loaders; memory is the
    cluster's default, which usually goes by cores or GPUs.
    """
    launch = runs[0].launch
    share: dict[str, str | None] = {"gpus-per-node": str(launch.nproc_per_node)}
    if launch.nnodes > 1:
        return share | {"exclusive": None, "mem": "0"}
    given = [run.megatron.get("num_workers") for run in runs]
    loaders = max(_NUM_WORKERS if number is None else number for number in given)
    return share | {"cpus-per-task": str((1 + loaders) * launch.nproc_per_node)}


def _warning(minutes: int) -> int:
    """Five minutes before the end, or half of a shorter time."""
    return min(_WARNING, minutes * 30)


def _overrides(runs: Sequence[Experiment], minutes: int | None) -> list[str]:
    """Have Megatron save and stop by itself a little before SLURM's signal; that may be late."""
    if minutes is None or any(run.megatron.get("exit_duration_in_mins") for run in runs):
        return []
    left = minutes - 2 * _WARNING // 60
    return [f"exit_duration_in_mins={left}"] if left > 0 else []


def _option(option: str) -> tuple[str, str | None]:
    match = re.fullmatch(r"--([a-z][a-z-]*)(?:=(.*))?", option)
    if match is None:
        raise ConfigError(
            "--sbatch", f"{option!r} is no option of sbatch", allowed="--name, --name=value"
        )
    return match[1], match[2]
