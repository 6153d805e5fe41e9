"""`uar log export`: a run log as tables, in bounded memory. CSV, or Parquet with pyarrow."""

from __future__ import annotations

import csv
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from uar_megatron.errors import UARError
from uar_megatron.experiment import check_writable
from uar_megatron.reporting.runlog import RUN_LOG
from uar_megatron.reporting.sample import Index, Line, index_log, notes_of, read_lines
from uar_megatron.reporting.schema import AnyRecord, Edges, Observation, Step, Validation
from uar_megatron.reporting.sinks import STATES

_ROWS = 20_000
"""Rows of Parquet that are held at a time."""
_Row = dict[str, Any]
_Columns = dict[str, type]


def export_run(
    run: Path, form: Literal["csv", "parquet"], output: Path | None = None
) -> list[Path]:
    """Write the tables of a run: all logged steps that no resume took back.

    ``steps``, ``layers`` (a row for each step and layer; lists in numbered columns),
    ``validations`` (a row for each set), ``validation_layers`` (a row for each set and layer),
    ``observations`` (a row for each layer), ``histograms`` (a row for each layer and bin of entropy
    and energy that holds tokens) and ``token_classes`` (a row for each layer and class). A table
    without a row is not written. What is missing in the log or broken is told on stderr.

    Args:
        run: folder of the run, or its log.
        form: of the files.
        output: folder; ``export`` beside the log if None.

    Raises:
        UARError: there is no log, the folder cannot be written to, or pyarrow is asked for and not
            installed.
    """
    write = _write_csv if form == "csv" else _parquet_writer()
    log = run if run.suffix == ".jsonl" else run / RUN_LOG
    index = index_log(log)
    folder = output or log.parent / "export"
    check_writable("--output", folder)
    tables: dict[str, Callable[[], Iterator[_Row]]] = {
        "steps": partial(_rows, _step_row, log, index, index.steps),
        "layers": partial(_rows, _layer_rows, log, index, index.steps),
        "validations": partial(_validation_rows, index.run.validations),
        "validation_layers": partial(_validation_layer_rows, log, index),
        "observations": partial(_rows, _observation_rows, log, index, index.observations),
        "histograms": partial(_rows, _histogram_rows, log, index, index.observations),
        "token_classes": partial(_rows, _class_rows, log, index, index.observations),
    }
    written = []
    for name, rows in tables.items():
        # Twice through the log: what is logged may change when a run is resumed.
        columns = _columns(rows())
        if columns:
            path = folder / f"{name}.{form}"
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            write(temporary, columns, rows())
            temporary.replace(path)
            written.append(path)
    for note in notes_of(index, len(index.steps), len(index.observations)):
        print(f"{log}: {note}", file=sys.stderr)
    return written


def _rows(
    rows_of: Callable[[Any], Iterator[_Row]], log: Path, index: Index, lines: list[Line]
) -> Iterator[_Row]:
    with log.open("rb") as file:
        record: AnyRecord
        for record in read_lines(file, lines, index):
            yield from rows_of(record)


def _step_row(record: Step) -> Iterator[_Row]:
    yield record.model_dump(exclude={"kind", "layers", "schema_version"})


def _layer_rows(record: Step) -> Iterator[_Row]:
    for layer in record.layers:
        row: _Row = {"step": record.step}
        lists = {"k_histogram", "states", "load", "balancing_loss", "policy"}
        row |= layer.model_dump(exclude=lists)
        row |= dict(zip((f"state_{name}" for name in STATES), layer.states, strict=False))
        row |= _numbered("k", layer.k_histogram) | _numbered("load", layer.load)
        yield row | layer.balancing_loss | {f"policy_{k}": v for k, v in layer.policy.items()}


def _validation_rows(records: Iterable[Validation]) -> Iterator[_Row]:
    for record in records:
        for name, loss in record.losses.items():
            yield {"step": record.step, "set": name, "loss": loss}


def _validation_layer_rows(log: Path, index: Index) -> Iterator[_Row]:
    with log.open("rb") as file:
        records: Iterator[Any] = read_lines(file, index.validations, index)
        for step, of_step in itertools.groupby(records, key=lambda record: record.step):
            # A set that is evaluated twice at a step counts once.
            sets = {name: layers for record in of_step for name, layers in record.layers.items()}
            for name, layers in sets.items():
                for layer in layers:
                    row: _Row = {"step": step, "set": name} | layer.model_dump(exclude={"load"})
                    yield row | _numbered("load", layer.load)


def _observation_rows(record: Observation) -> Iterator[_Row]:
    for layer in record.layers:
        lists = {"histogram", "classes", "router_row_norms", "bias", "cache_hit_rates"}
        row: _Row = {"step": record.step} | layer.model_dump(exclude=lists)
        row |= _numbered("router_norm", layer.router_row_norms) | _numbered("bias", layer.bias)
        yield row | {f"cache_{size}": rate for size, rate in (layer.cache_hit_rates or {}).items()}


def _histogram_rows(record: Observation) -> Iterator[_Row]:
    """Bins by their middles: entropy in nats, energy in units of the logits."""
    if record.entropy_bins is None or record.energy_bins is None:
        return
    for layer in record.layers:
        for i, row in enumerate(layer.histogram or ()):
            for j, tokens in enumerate(row):
                if tokens:
                    yield {
                        "step": record.step, "layer": layer.layer,
                        "entropy": _middle(record.entropy_bins, i),
                        "energy": _middle(record.energy_bins, j), "tokens": tokens,
                    }  # fmt: skip


def _middle(edges: Edges, number: int) -> float:
    return edges.low + (number + 0.5) * (edges.high - edges.low) / edges.bins


def _class_rows(record: Observation) -> Iterator[_Row]:
    for layer in record.layers:
        for group in layer.classes or ():
            yield {"step": record.step, "layer": layer.layer} | group.model_dump()


def _numbered(name: str, values: list[float] | None) -> _Row:
    return {f"{name}_{number}": value for number, value in enumerate(values or ())}


def _columns(rows: Iterator[_Row]) -> _Columns:
    """Names of all columns and the type that holds every value of each."""
    found: _Columns = {}
    for row in rows:
        for name, value in row.items():
            if found.get(name, int) is int:
                # What is None everywhere is an empty column of numbers.
                found[name] = float if value is None else type(value)
    return found


def _write_csv(path: Path, columns: _Columns, rows: Iterator[_Row]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)


def _parquet_writer() -> Callable[[Path, _Columns, Iterator[_Row]], None]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UARError(
            "an export to parquet needs pyarrow\n"
            "  remedy:  pip install 'uar-megatron[parquet]', or --format csv"
        ) from error
    kinds = {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}

    def write(path: Path, columns: _Columns, rows: Iterator[_Row]) -> None:
        schema = pyarrow.schema([(name, kinds[kind]) for name, kind in columns.items()])
        with parquet.ParquetWriter(path, schema) as writer:
            while piece := list(itertools.islice(rows, _ROWS)):
                writer.write_table(pyarrow.Table.from_pylist(piece, schema))

    return write
