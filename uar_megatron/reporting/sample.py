"""Reading a run log of any size: all lines are looked at, a bounded number is parsed.

A line of 48 layers has tens of kilobytes, so a log of 10⁵ of them has gigabytes and cannot be held.
``read_sample`` goes through the file once, tells steps and observations by the first bytes of their
lines, keeps their places in the file, and parses evenly spaced ones: ``SAMPLE_STEPS`` or what has
``SAMPLE_BYTES``. Starts, ends and the losses of validations are few and all kept; the routing of
validations is sampled too. What a screen shows is the same; a spike between two sampled lines is
not seen. Smaller logs are read whole.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pydantic import ValidationError

from uar_megatron.reporting.runlog import NoRecordError, Run, refuse_newer_schema
from uar_megatron.reporting.schema import (
    SCHEMA_VERSION,
    AnyRecord,
    LayerMetrics,
    Observation,
    Start,
    Step,
    Validation,
    parse_record,
)

SAMPLE_STEPS = 2000
SAMPLE_BYTES = 32 << 20
"""Of step lines and, again, of observation and validation lines; parsed they take about six times
as much."""
_HEAD = re.compile(rb'\{"schema":(\d+),"kind":"(step|observation)","step":(\d+),')
_BUFFER = 1 << 20


class Line(NamedTuple):
    """Where a record lies in the file."""

    step: int
    offset: int
    length: int


@dataclass
class Index:
    """What a log holds, large records as places in the file.

    Attributes:
        run: everything but steps, observations, and the layers of validations.
        steps: lines that no later process has taken back, by step.
        observations: likewise.
        validations: likewise; several of one step where its sets came one after the other.
        broken: numbers of the lines that are no whole record.
        missing: fields that lines of an older version do not have.
        unread: where lines begin that looked whole and are not.
    """

    run: Run = field(default_factory=Run)
    steps: list[Line] = field(default_factory=list)
    observations: list[Line] = field(default_factory=list)
    validations: list[Line] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)
    missing: Counter[str] = field(default_factory=Counter)
    unread: set[int] = field(default_factory=set)


@dataclass
class Sample:
    """A run of which at most some thousand steps are held.

    Attributes:
        run: the run.
        logged: step records in the log.
        notes: what a reader of the figures must know: sampling, lines and fields that are missing.
    """

    run: Run
    logged: int
    notes: list[str]


def read_sample(path: Path) -> Sample:
    """Read a run log, or evenly spaced steps of it where it is large.

    Raises:
        NoRecordError: there is no file.
        UARError: it is of a newer schema.
    """
    index = index_log(path)
    steps = evenly(index.steps)
    observations = evenly(index.observations)
    run = index.run
    validations = {v.step: v for v in run.validations}
    lines = sorted(steps + observations + evenly(index.validations), key=lambda n: n.offset)
    with path.open("rb") as file:
        for record in read_lines(file, lines, index):
            if isinstance(record, Validation):
                validations[record.step].layers |= record.layers
            else:
                run.add(record)
    return Sample(run, len(index.steps), notes_of(index, len(steps), len(observations)))


def index_log(path: Path) -> Index:
    """Go through a log once; the same rules of resuming as ``Run.add``."""
    if not path.is_file():
        raise NoRecordError(
            f"{path}: no run log here\n  remedy:  train first; a run writes run.jsonl"
        )
    index = Index()
    offset = 0
    with path.open("rb", buffering=_BUFFER) as file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                _index_line(index, line, number, offset, path)
            offset += len(line)
    return index


def evenly(lines: list[Line]) -> list[Line]:
    """At most ``SAMPLE_STEPS`` lines and ``SAMPLE_BYTES``: evenly spaced, from first to last."""
    total = sum(line.length for line in lines)
    if not lines or (len(lines) <= SAMPLE_STEPS and total <= SAMPLE_BYTES):
        return list(lines)
    count = max(2, min(SAMPLE_STEPS, SAMPLE_BYTES * len(lines) // total))
    last = len(lines) - 1
    chosen = dict.fromkeys(round(i * last / (count - 1)) for i in range(count))
    return [lines[i] for i in chosen]


def read_lines(file: BinaryIO, lines: list[Line], index: Index) -> Iterator[AnyRecord]:
    """Parse lines of an open log; fields that an older version did not write are NaN or empty."""
    for line in lines:
        file.seek(line.offset)
        record = _parse(file.read(line.length), index)
        if record is None:
            index.unread.add(line.offset)
        else:
            yield record


def _index_line(index: Index, line: bytes, number: int, offset: int, path: Path) -> None:
    head = _HEAD.match(line)
    # The end alone: lines are long, and copied by rstrip.
    if not line[-8:].rstrip().endswith(b"}"):
        index.broken.append(number)
        return
    # Lines of a newer schema are parsed: they may not be readable.
    if head and int(head[1]) <= SCHEMA_VERSION:
        kept = index.steps if head[2] == b"step" else index.observations
        _keep(kept, Line(int(head[3]), offset, len(line)))
        return
    record = _parse(line, index)
    if record is None:
        refuse_newer_schema(line, path, number)
        index.broken.append(number)
    elif isinstance(record, Step | Observation):
        kept = index.steps if isinstance(record, Step) else index.observations
        _keep(kept, Line(record.step, offset, len(line)))
    else:
        if isinstance(record, Start):
            index.steps = [n for n in index.steps if n.step <= record.step]
            index.observations = [n for n in index.observations if n.step <= record.step]
            index.validations = [n for n in index.validations if n.step <= record.step]
        elif isinstance(record, Validation):
            # Unlike steps, one of the same step adds its sets.
            index.validations = [n for n in index.validations if n.step <= record.step]
            index.validations.append(Line(record.step, offset, len(line)))
            record.layers = {}
        index.run.add(record)


def _keep(lines: list[Line], line: Line) -> None:
    while lines and lines[-1].step >= line.step:
        lines.pop()
    lines.append(line)


def _parse(line: bytes, index: Index) -> AnyRecord | None:
    try:
        return parse_record(line)
    except ValidationError as error:
        if any(problem["type"] != "missing" for problem in error.errors()):
            return None
        problems = error.errors()
    data = json.loads(line)
    for problem in problems:
        # The location begins with the kind of record.
        *way, name = problem["loc"][1:]
        target = data
        for part in way:
            target = target[part]
        target[name] = _absent(str(name))
        index.missing[str(name)] += 1
    try:
        return parse_record(json.dumps(data))
    except ValidationError:
        return None


def _absent(name: str) -> Any:
    """What stands for a field that was not written."""
    if name in ("k_histogram", "states", "load", "layers"):
        return []
    if name in ("balancing_loss", "versions", "config", "losses"):
        return {}
    if name in ("nonfinite", "tokens", "skipped", "world_size", "tokens_per_step"):
        return 0
    if name in ("num_experts", "topk", "interval"):
        return 1
    known = LayerMetrics.model_fields | Step.model_fields
    return math.nan if name in known else None


def notes_of(index: Index, steps: int, observations: int) -> list[str]:
    """What a reader must know of a log of which so many steps and observations were read."""
    notes = []
    if not index.run.starts and not index.steps:
        notes.append("The log is empty: training has not written a record yet.")
    elif not index.steps:
        notes.append(
            "No step is logged yet: the run has not reached its first logging interval "
            "(log_interval)."
        )
    if steps < len(index.steps):
        notes.append(
            f"Large log: {steps} evenly spaced of {len(index.steps)} logged steps are drawn; "
            "`uar log export` has them all."
        )
    if observations < len(index.observations):
        notes.append(
            f"Large log: {observations} evenly spaced of {len(index.observations)} observations "
            "are drawn."
        )
    bad = len(index.broken) + len(index.unread)
    if bad:
        some = ", ".join(map(str, index.broken[:5])) + (" …" if len(index.broken) > 5 else "")
        where = f" (line {some})" if some else ""
        notes.append(
            f"{bad} line(s) are not whole records{where} and left out: a process was killed while "
            "writing, or the file was changed."
        )
    if index.missing:
        names = ", ".join(sorted(index.missing))
        notes.append(f"An older version wrote this log; it has no {names}.")
    return notes
