"""A run as figures, page and summary look at it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from uar_megatron.reporting.findings import Finding, find
from uar_megatron.reporting.phases import Phases, phases_of
from uar_megatron.reporting.runlog import RUN_LOG, Run
from uar_megatron.reporting.sample import read_sample
from uar_megatron.reporting.series import Series


@dataclass
class View:
    """One run.

    Attributes:
        label: its name, unique among the runs that are shown together.
        path: its log.
        run: its records, evenly spaced ones of a large log.
        logged: number of step records in the log.
        notes: what is missing or was left out.
    """

    label: str
    path: Path
    run: Run
    logged: int
    notes: list[str]

    @cached_property
    def series(self) -> Series:
        """The run's numbers as arrays."""
        return Series(self.run)

    @cached_property
    def phases(self) -> tuple[Phases, list[Phases]]:
        """Phases of the mean over layers, and of each layer."""
        return phases_of(self.series)

    @cached_property
    def findings(self) -> list[Finding]:
        """What deserves a look."""
        return find(self.run, self.series, self.logged)


def load_views(paths: Sequence[Path]) -> list[View]:
    """Read runs: folders that hold a run log, or run logs.

    Raises:
        NoRecordError: one has no log.
        UARError: one is of a newer schema.
    """
    views = []
    for path in paths:
        log = path / RUN_LOG if path.is_dir() or path.suffix != ".jsonl" else path
        sample = read_sample(log)
        starts = sample.run.starts
        label = starts[-1].run if starts else log.parent.resolve().name
        views.append(View(label, log, sample.run, sample.logged, sample.notes))
    names = Counter(view.label for view in views)
    for number, view in enumerate(views, start=1):
        if names[view.label] > 1:
            view.label = f"{view.label} ({number}: {view.path.resolve().parent.name})"
    return views
