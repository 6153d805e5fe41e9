"""Writing and reading the run log, a file of JSON lines that survives kills and full disks."""

from __future__ import annotations

import bisect
import json
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from uar_megatron.errors import UARError
from uar_megatron.experiment import RUN_LOG as RUN_LOG
from uar_megatron.reporting.schema import (
    SCHEMA_VERSION,
    AnyRecord,
    End,
    Observation,
    Record,
    Start,
    Step,
    Validation,
    parse_record,
)


class NoRecordError(UARError):
    """There is no run log yet, or none with a whole record."""


class RunLogWriter:
    """Appends records, each with one write of one whole line.

    A line that an earlier process was killed in is ended first, so that it spoils nothing after it.
    Where the disk is full the training goes on: lost lines are counted and announced on stderr.

    Args:
        path: the log; its folder is made if missing.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._lost = 0
        # A device such as /dev/full has no end to look at.
        size = os.fstat(self._file).st_size
        self._line_is_open = size > 0 and os.pread(self._file, 1, size - 1) != b"\n"

    def write(self, record: Record) -> None:
        """Append one record."""
        line = record.to_line().encode()
        if self._line_is_open:
            line = b"\n" + line
        try:
            written = os.write(self._file, line)
        except OSError as error:
            if self._lost == 0:
                print(
                    f"run log: cannot write ({error.strerror}); training goes on", file=sys.stderr
                )
            self._lost += 1
            return
        self._line_is_open = written < len(line)
        if self._line_is_open:
            self._lost += 1
        elif self._lost:
            print(f"run log: writing again, {self._lost} lines were lost", file=sys.stderr)
            self._lost = 0

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


@dataclass
class Run:
    """A run as its log tells it, every step once.

    Attributes:
        starts: one per process that trained, in order.
        steps: logging intervals, by step.
        validations: by step.
        observations: by step.
        ends: one per process that was not killed, in order.
        end: how the latest process stopped; None while it runs, or when it was killed.
    """

    starts: list[Start] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    end: End | None = None

    @property
    def resumed_at(self) -> list[int]:
        """Steps at which a later process took the run up again."""
        return [start.step for start in self.starts if start.step > 0]

    @property
    def begin(self) -> int:
        """Optimizer steps already taken when the first logging interval began."""
        return self.steps[0].step - self.steps[0].interval if self.steps else 0

    def part(self, start: float, end: float) -> slice:
        """Places in ``steps`` of what was logged between two fractions of the run; one at least.

        By step, not by record: a resume may change the logging interval.
        """
        at = [record.step for record in self.steps]
        if not at:
            return slice(0, 0)
        border = [self.begin + share * (at[-1] - self.begin) for share in (start, end)]
        first = min(bisect.bisect_right(at, border[0]), len(at) - 1)
        return slice(first, max(bisect.bisect_right(at, border[1]), first + 1))

    def add(self, record: AnyRecord) -> None:
        """Take the next record of the log.

        A resume at step S takes back what the killed process logged after S, so nothing counts
        twice; so does a record of a step that is there already.
        """
        if isinstance(record, Start):
            self.starts.append(record)
            self.end = None
            self.steps = [s for s in self.steps if s.step <= record.step]
            self.validations = [v for v in self.validations if v.step <= record.step]
            self.observations = [o for o in self.observations if o.step <= record.step]
        elif isinstance(record, End):
            self.ends.append(record)
            self.end = record
        elif isinstance(record, Step):
            while self.steps and self.steps[-1].step >= record.step:
                self.steps.pop()
            self.steps.append(record)
        elif isinstance(record, Observation):
            while self.observations and self.observations[-1].step >= record.step:
                self.observations.pop()
            self.observations.append(record)
        else:
            while self.validations and self.validations[-1].step > record.step:
                self.validations.pop()
            if self.validations and self.validations[-1].step == record.step:
                # Validation and test sets come one after the other.
                earlier = self.validations.pop()
                record.losses = earlier.losses | record.losses
                record.layers = earlier.layers | record.layers
            self.validations.append(record)


def read_run(path: Path) -> Run:
    """Read a run log.

    Lines that are not records (a process was killed while writing) are left out with a warning.

    Raises:
        NoRecordError: the file is missing or holds no record.
        UARError: it is of a newer schema.
    """
    if not path.is_file():
        raise NoRecordError(
            f"{path}: no run log here\n  remedy:  train first; a run writes run.jsonl"
        )
    run = Run()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                record = _parse(line, path, number)
                if record is not None:
                    run.add(record)
    if not run.starts and not run.steps:
        raise NoRecordError(f"{path}: the run log holds no record yet")
    return run


def _parse(line: bytes, path: Path, number: int) -> AnyRecord | None:
    try:
        return parse_record(line)
    except ValidationError:
        refuse_newer_schema(line, path, number)
        warnings.warn(f"{path}: line {number} is not a whole record, left out", stacklevel=3)
        return None


def refuse_newer_schema(line: bytes, path: Path, number: int) -> None:
    """Raise UARError if a line that could not be read is of a newer schema than ours."""
    try:
        version = json.loads(line).get("schema")
    except (ValueError, AttributeError):
        return
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UARError(
            f"{path}: line {number} is of schema {version}; this version reads up to "
            f"{SCHEMA_VERSION}\n  remedy:  upgrade uar-megatron"
        )
