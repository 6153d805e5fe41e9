"""Runs the points of a sweep on this machine, each as a process that outlives the sweep.

All state is in the points' folders: run log, checkpoints and lock. A sweep that is started again,
after it was killed or beside one that runs, finds out from there what is left to do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import psutil

from uar_megatron.reporting.runlog import RUN_LOG
from uar_megatron.sweep.grid import Point
from uar_megatron.sweep.progress import Progress
from uar_megatron.sweep.state import (
    CARE,
    RUN,
    Follower,
    Job,
    State,
    processes_of,
    read_state,
    take_lock,
)

TRAIN_LOG = "train.log"
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 60.0
"""Between asking processes to stop and killing them."""
_USER_ERROR = 2
"""Exit code of a configuration that is refused: trying again does not help."""

Command = Callable[[Path], Sequence[str]]


def train_command(config: Path) -> Sequence[str]:
    """The command that trains a point, and resumes it."""
    return (sys.executable, "-m", "uar_megatron.cli", "train", str(config))


class Runner:
    """Runs points until each is finished or has failed too often.

    Args:
        points: what to run, in this order. One point of the sweep is enough: nothing is shared
            between points but the machine.
        jobs: points at a time, those included that another sweep looks after.
        retries: attempts after the first.
        timeout: seconds for one attempt; None for no limit.
        command: gives the command line for a configuration file.
    """

    def __init__(
        self,
        points: Sequence[Point],
        *,
        jobs: int = 1,
        retries: int = 2,
        timeout: float | None = None,
        command: Command = train_command,
    ) -> None:
        self.jobs = [Job(point) for point in points]
        self._slots = jobs
        self._retries = retries
        self._timeout = timeout
        self._command = command
        self._wake = threading.Event()
        self.stopped_by: signal.Signals | None = None
        """The signal that ended the sweep early."""

    def run(self, progress: Progress) -> None:
        """Run everything; returns when all is settled, or stopped after SIGINT or SIGTERM."""
        with self._signals(), progress:
            while not all(job.state in ("finished", "failed") for job in self.jobs):
                for job in self.jobs:
                    if job.active:
                        self._look_after(job, progress)
                if self.stopped_by is not None:
                    break
                self._start(progress)
                progress.update(self.jobs)
                if any(job.active for job in self.jobs):
                    self._wake.wait(POLL_SECONDS)
            self._stop(progress)
            progress.update(self.jobs)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM stops the sweep, the second kills what has not stopped."""

        def on_signal(signum: int, frame: object) -> None:
            if self.stopped_by is not None:
                for job in self.jobs:
                    job.kill_at = 0.0
            self.stopped_by = signal.Signals(signum)
            self._wake.set()

        caught = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(signum, on_signal) for signum in caught]
        try:
            yield
        finally:
            for signum, handler in zip(caught, before, strict=True):
                signal.signal(signum, handler)

    def _start(self, progress: Progress) -> None:
        """Begin waiting points while there are free places."""
        for job in self.jobs:
            if sum(j.active for j in self.jobs) >= self._slots:
                return
            if job.state == "waiting":
                self._begin(job, progress)

    def _begin(self, job: Job, progress: Progress) -> None:
        name, folder = job.point.name, job.point.folder
        job.follower = Follower(folder / RUN_LOG)
        job.child = job.kill_at = None
        job.stop_at = None if self._timeout is None else time.monotonic() + self._timeout
        job.care = take_lock(folder, CARE)
        if job.care is None:
            job.state = "elsewhere"
            progress.say(f"{name}: another sweep is at it")
            return
        job.state = "running"
        lock = take_lock(folder, RUN)
        if lock is None:
            progress.say(f"{name}: still runs, left behind by a sweep that is gone")
            return
        try:
            state = read_state(job.point)
            if state.finished:
                _leave(job, "finished")
                return
            job.attempts += 1
            job.child = self._popen(job.point, lock, job.attempts)
        except OSError as error:
            self._broken(job, f"before it started: {error}", progress)
            return
        finally:
            os.close(lock)
        verb = "starts" if state.step == 0 else f"goes on, was at step {state.step}"
        attempt = f" (attempt {job.attempts})" if job.attempts > 1 else ""
        progress.say(f"{name}: {verb}{attempt}")

    def _popen(self, point: Point, lock: int, attempt: int) -> subprocess.Popen[bytes]:
        command = [*self._command(point.folder / "config.yaml")]
        with (point.folder / TRAIN_LOG).open("ab") as log:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            log.write(f"== uar sweep, {now}, attempt {attempt}: {' '.join(command)}\n".encode())
            log.flush()
            # A session of its own: Ctrl-C and a closed terminal reach the sweep alone.
            return subprocess.Popen(
                command,
                stdin=lock,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _look_after(self, job: Job, progress: Progress) -> None:
        """Follow an attempt; when its last process is gone, judge it."""
        assert job.follower is not None
        job.follower.poll()
        if job.care is None:
            job.care = take_lock(job.point.folder, CARE)
            if job.care is not None:  # the other sweep has done with it, or is gone
                _leave(job, "waiting")
            return
        code = job.child.poll() if job.child is not None else None
        if job.child is None or code is not None:
            lock = take_lock(job.point.folder, RUN)
            if lock is not None:
                os.close(lock)
                self._judge(job, code, read_state(job.point), progress)
                return
        self._enforce_limits(job, code)

    def _enforce_limits(self, job: Job, code: int | None) -> None:
        """End an attempt that takes too long, and what a process that is gone left behind."""
        now = time.monotonic()
        if job.kill_at is not None:
            if now > job.kill_at:
                _send(processes_of(job.point.folder), signal.SIGKILL)
        elif code is not None:  # ranks without their torchrun, for example
            job.kill_at = now + PATIENCE_SECONDS
        elif job.stop_at is not None and now > job.stop_at:
            job.trouble = f"took longer than {self._timeout:g} s"
            self._ask_to_stop(job)

    def _judge(self, job: Job, code: int | None, state: State, progress: Progress) -> None:
        name = job.point.name
        if state.finished:
            _leave(job, "finished")
            progress.say(f"{name}: finished at step {state.step}")
        elif self.stopped_by is not None:
            _leave(job, "waiting")
            progress.say(f"{name}: stopped at step {state.step}")
        else:
            ended = "" if code is None else f"{_exit(code)}, "
            trouble = job.trouble or f"{ended}run log: {state.reason}"
            self._broken(job, f"at step {state.step}: {trouble}", progress, code == _USER_ERROR)

    def _broken(self, job: Job, trouble: str, progress: Progress, final: bool = False) -> None:
        """Put a point back into the queue, or give it up."""
        final = final or job.attempts > self._retries
        _leave(job, "failed" if final else "waiting", trouble if final else "")
        said = "failed" if final else "will be tried again, broke off"
        progress.say(f"{job.point.name}: {said} {trouble}")

    def _ask_to_stop(self, job: Job) -> None:
        """SIGTERM: torchrun hands it on, and ranks save a checkpoint."""
        job.kill_at = time.monotonic() + PATIENCE_SECONDS
        if job.child is not None:
            job.child.terminate()
        else:
            _send(processes_of(job.point.folder)[:1], signal.SIGTERM)

    def _stop(self, progress: Progress) -> None:
        """Stop the attempts of this sweep and wait for them."""
        own = [job for job in self.jobs if job.state == "running"]
        for job in own:
            self._ask_to_stop(job)
            progress.say(f"{job.point.name}: is asked to stop")
        while any(job.state == "running" for job in own):
            for job in own:
                if job.state == "running":
                    self._look_after(job, progress)
            time.sleep(POLL_SECONDS / 5)


def _leave(job: Job, state: Literal["waiting", "finished", "failed"], trouble: str = "") -> None:
    """Nothing runs the point any more, and another sweep may look after it."""
    job.state, job.trouble = state, trouble
    if job.care is not None:
        os.close(job.care)
        job.care = None


def _send(processes: Sequence[psutil.Process], signum: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signum)


def _exit(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def log_tail(log: Path, lines: int = 12) -> str:
    """The last lines of what a point's processes printed."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
