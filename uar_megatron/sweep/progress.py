"""Shows how a sweep goes: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from uar_megatron.sweep.state import Job

_PLAIN_SECONDS = 60.0
"""Between two rounds of plain lines."""


class Progress:
    """Takes events as they happen, and the jobs' state at every poll."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._next = time.monotonic() + _PLAIN_SECONDS

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print an event; it stays on the screen."""
        clock = time.strftime("%H:%M:%S")
        self._console.print(f"{clock} {text}", markup=False, highlight=False, soft_wrap=True)

    def update(self, jobs: Sequence[Job]) -> None:
        """Show the present state: at once on a terminal, else once a minute."""
        if self._live is not None:
            self._live.update(_view(jobs), refresh=True)
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + _PLAIN_SECONDS
            for job in jobs:
                if job.active:
                    self.say(f"{job.point.name}: {job.state}, {_step(job)}, loss {_loss(job)}")
            self.say(_counts(jobs))


def _view(jobs: Sequence[Job]) -> Table:
    """What runs and what failed, row by row; the rest is counted."""
    table = Table("point", "state", "step", "loss", "attempt", caption=_counts(jobs))
    for job in jobs:
        if job.active or job.state == "failed":
            colour = "red" if job.state == "failed" else "green"
            table.add_row(
                escape(job.point.name),
                f"[{colour}]{job.state}",
                _step(job),
                _loss(job),
                str(job.attempts or "–"),
            )
    return table


def _counts(jobs: Sequence[Job]) -> str:
    counts: Counter[str] = Counter(job.state for job in jobs)
    parts = [f"{counts['finished']} of {len(jobs)} finished"]
    states = ("running", "elsewhere", "waiting", "failed")
    return ", ".join(parts + [f"{counts[state]} {state}" for state in states if counts[state]])


def _step(job: Job) -> str:
    step = job.follower.step if job.follower is not None else None
    return f"step {'–' if step is None else step} of {job.point.steps or '–'}"


def _loss(job: Job) -> str:
    loss = job.follower.loss if job.follower is not None else None
    return "–" if loss is None else f"{loss:.4f}"
