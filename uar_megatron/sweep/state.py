"""What is known of a point from its folder: finished or not, who runs it, how far it is."""

from __future__ import annotations

import fcntl
import os
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from pydantic import ValidationError

from uar_megatron.errors import ConfigError, UARError
from uar_megatron.experiment import changes_of_run
from uar_megatron.reporting.runlog import RUN_LOG, NoRecordError, Run, read_run
from uar_megatron.reporting.schema import Start, Step, parse_record
from uar_megatron.sweep.grid import Point

CARE, RUN = "sweep.lock", "lock"


@dataclass(frozen=True)
class State:
    """A point as its run log tells it.

    Attributes:
        run: the run; None before its first record.
        finished: the latest process trained to the end and said so.
        reason: why it is not finished; empty when it is.
    """

    run: Run | None
    finished: bool
    reason: str

    @property
    def step(self) -> int:
        """Optimizer steps taken, as far as they were logged."""
        if self.run is None:
            return 0
        steps = [self.run.starts[-1].step] if self.run.starts else []
        steps += [r.step for r in (self.run.end, *self.run.steps[-1:]) if r is not None]
        return max(steps, default=0)


def read_state(point: Point) -> State:
    """Judge a point by its run log.

    Killed processes leave broken lines; they are left out silently here.

    Raises:
        UARError: the log is of a newer schema.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = read_run(point.folder / RUN_LOG)
    except NoRecordError:
        return State(None, finished=False, reason="not started")
    if run.end is None:
        return State(run, finished=False, reason="killed, or still running")
    if run.end.reason != "finished":
        return State(run, finished=False, reason=run.end.reason)
    if point.steps is not None and run.end.step != point.steps:
        reason = f"finished at step {run.end.step} instead of {point.steps}"
        return State(run, finished=False, reason=reason)
    return State(run, finished=True, reason="")


def refuse_changed(point: Point) -> None:
    """Refuse a point whose folder holds a run with another configuration.

    Raises:
        ConfigError: it does; the message names what has changed.
    """
    changed = changes_of_run(point.experiment, point.folder)
    if changed:
        raise ConfigError(
            f"point {point.name!r}",
            f"{point.folder} holds a run with another configuration: {'; '.join(changed)}",
            remedy="take the change back, rename the point, or delete its folder",
        )


def take_lock(folder: Path, name: str) -> int | None:
    """Take one of a point's two locks; None while somebody else has it.

    ``CARE`` belongs to the sweep that looks after the point, and goes when the sweep does.
    ``RUN`` is to be the standard input of the process that runs the point: every process started
    from there inherits it, so the lock lasts until the last of them is gone, whatever becomes of
    the sweep. Who takes ``RUN`` has ``CARE``. The files stay empty.

    Raises:
        UARError: the file is another user's, or there are no locks here.
    """
    try:
        file = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UARError(
            f"{folder / name}: {error.strerror}\n"
            "  remedy:  sweep in a folder of your own, or have its owner make the folder and its "
            "locks writable for you (umask 002)"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except OSError as error:
        os.close(file)
        raise UARError(
            f"{folder}: this file system has no locks ({error.strerror})\n"
            "  remedy:  choose a dir on a file system with flock, such as a local disk"
        ) from error
    return file


def processes_of(folder: Path) -> list[psutil.Process]:
    """The processes on this machine that run a point, those that started others first."""
    lock = str((folder / RUN).resolve())
    found = []
    for process in psutil.process_iter():
        try:
            if any(f.fd == 0 and f.path == lock for f in process.open_files()):
                found.append(process)
        except psutil.Error:
            continue  # gone, or another user's
    return sorted(found, key=lambda process: process.create_time())


class Follower:
    """Reads step and loss from the end of a run log as it grows."""

    def __init__(self, log: Path) -> None:
        self.step: int | None = None
        self.loss: float | None = None
        self._log = log
        self._offset = log.stat().st_size if log.exists() else 0
        self._rest = b""

    def poll(self) -> None:
        """Take in what was written since the last call."""
        try:
            with self._log.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            try:
                record = parse_record(line)
            except ValidationError:
                continue
            if isinstance(record, Start | Step):
                self.step = record.step
            if isinstance(record, Step):
                self.loss = record.loss


@dataclass
class Job:
    """A point on its way through a sweep.

    Attributes:
        point: the point.
        state: ``elsewhere`` is looked after by another sweep.
        attempts: that this sweep has begun.
        trouble: why the attempt is not going to finish, or why the point has failed.
        care: descriptor of the lock ``CARE`` while running.
        child: the process of the attempt; None for one that a sweep has left behind.
        follower: reads the run log of the attempt.
        stop_at: monotonic time at which the attempt has lasted too long.
        kill_at: monotonic time at which patience with a stopping attempt ends.
    """

    point: Point
    state: Literal["waiting", "running", "elsewhere", "finished", "failed"] = "waiting"
    attempts: int = 0
    trouble: str = ""
    care: int | None = None
    child: subprocess.Popen[bytes] | None = None
    follower: Follower | None = None
    stop_at: float | None = None
    kill_at: float | None = None

    @property
    def active(self) -> bool:
        """Whether a process runs the point."""
        return self.state in ("running", "elsewhere")
