"""What a sweep has found: one row of numbers per point, then means, deltas and significance."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from uar_megatron.config import nearest
from uar_megatron.errors import ConfigError, UARError
from uar_megatron.experiment import changes_of_run
from uar_megatron.reporting.runlog import Run
from uar_megatron.reporting.schema import Validation
from uar_megatron.reporting.summary import perplexity, summarise
from uar_megatron.sweep.grid import Point, Sweep, check_baseline
from uar_megatron.sweep.state import read_state

Values = dict[str, float | None]


@dataclass(frozen=True)
class Metric:
    """A quantity of a finished run.

    Attributes:
        title: its column.
        digits: shown after the point.
        values: the run's values; by validation set where there is one for each, else under "".
    """

    title: str
    digits: int
    values: Callable[[Run], Values]


def _at_the_end(run: Run) -> Validation | None:
    """The validation after the last step."""
    last = run.validations[-1] if run.validations else None
    return last if last is not None and run.end and last.step == run.end.step else None


def _perplexities(run: Run) -> Values:
    last = _at_the_end(run)
    return {name: perplexity(loss) for name, loss in last.losses.items()} if last else {}


def _global_max_vio(run: Run) -> Values:
    """Of the first validation set, mean over layers."""
    last = _at_the_end(run)
    layers = last.layers.get(next(iter(last.losses), ""), []) if last else []
    return {"": fmean(layer.max_vio for layer in layers) if layers else None}


METRICS: dict[str, Metric] = {
    "perplexity": Metric("perplexity", 2, _perplexities),
    "max_vio": Metric("MaxVio batch", 3, lambda run: {"": summarise(run)["max_vio_late"]}),
    "max_vio_global": Metric("MaxVio global", 3, _global_max_vio),
    "k_eff": Metric("k_eff", 2, lambda run: {"": summarise(run)["k_eff"]["late"]}),
    "flops_ratio": Metric("FLOPs", 3, lambda run: {"": summarise(run)["flops_ratio_late"]}),
    "steps": Metric("steps", 0, lambda run: {"": run.end.step if run.end else None}),
}
"""What `uar table` can show. Late figures are those of the last quarter of the run."""
COMPARED = ("perplexity",)
"""Whose difference to the baseline it shows."""


@dataclass(frozen=True)
class Column:
    """A column of :attr:`Results.frame`: a metric, of one validation set where it has several.

    Attributes:
        name: in the frame.
        metric: what it is.
        of: the validation set; empty where there is one value for all.
        compared: whether the table shows its difference to the baseline.
    """

    name: str
    metric: Metric
    of: str = ""
    compared: bool = False


@dataclass(frozen=True)
class Results:
    """A sweep in numbers.

    Attributes:
        frame: a row per row of the sweep. For each column its mean under the column's name, and
            under ``<name> se`` the standard error; for compared ones ``<name> delta``, ``… delta
            se``, ``… pairs`` and ``… p``. Missing where there is no number to give. ``finished``
            and ``points`` count seeds.
        columns: in order.
        baseline: the name that differences refer to.
        unfinished: points that are not in the numbers, and why.
    """

    frame: pd.DataFrame
    columns: tuple[Column, ...]
    baseline: str | None
    unfinished: tuple[tuple[Point, str], ...]


def measure(sweep: Sweep, metrics: Sequence[str] = tuple(METRICS)) -> pd.DataFrame:
    """Return one row per point: ``row``, ``seed``, ``reason`` (empty when finished), its values.

    Raises:
        UARError: an unknown metric, or a run log of a newer version.
    """
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(
                "metric",
                f"there is no metric {name!r}",
                allowed=", ".join(METRICS),
                remedy=nearest(name, METRICS),
            )
    records = []
    for point in sweep.points:
        state = read_state(point)
        reason = state.reason and f"step {state.step} of {point.steps or '?'}: {state.reason}"
        if changed := changes_of_run(point.experiment, point.folder):
            reason = f"its run has another configuration: {'; '.join(changed)}"
        record: dict[str, Any] = {"row": point.row, "seed": point.seed, "reason": reason}
        if not reason and state.run is not None:
            for name in metrics:
                for of, value in METRICS[name].values(state.run).items():
                    record[f"{name} {of}".strip()] = math.nan if value is None else value
        records.append(record)
    return pd.DataFrame(records)


def compare(
    sweep: Sweep,
    metrics: Sequence[str] = tuple(METRICS),
    baseline: str | None = None,
    compared: Sequence[str] = COMPARED,
    points: pd.DataFrame | None = None,
) -> Results:
    """Average over seeds and compare with the baseline, seed by seed.

    Args:
        sweep: the sweep.
        metrics: names in :data:`METRICS`, in the order of the columns.
        baseline: instead of the sweep's own.
        compared: metrics whose differences are wanted.
        points: what :func:`measure` has returned, with more metrics perhaps; None to read the logs.

    Raises:
        UARError: an unknown metric or baseline, or a run log of a newer version.
    """
    baseline = baseline or sweep.baseline
    if baseline is not None:
        check_baseline(sweep, baseline)
    points = measure(sweep, metrics) if points is None else points
    columns = _columns(points, metrics, compared if baseline is not None else ())
    points = points.reindex(columns=["row", "seed", "reason", *(c.name for c in columns)])
    finished = points[points["reason"] == ""]
    # Without seeds a row is one point, and pairs with the baseline's only one.
    by_row = {
        row: finished[finished["row"] == row].fillna({"seed": 0}).set_index("seed")
        for row in points["row"].unique()
    }
    of_row = {p.row: p for p in sweep.points}
    records = []
    for row, seeds in by_row.items():
        record: dict[str, Any] = {"row": row, "finished": len(seeds)}
        record["points"] = int((points["row"] == row).sum())
        reference = by_row.get(_baseline_row(of_row[row], baseline, by_row))
        for column in columns:
            record |= _mean(column.name, seeds[column.name])
            if column.compared:
                other = None if reference is None or reference is seeds else reference[column.name]
                record |= _difference(column.name, seeds[column.name], other)
        records.append(record)
    unfinished = [
        (point, reason)
        for point, reason in zip(sweep.points, points["reason"], strict=True)
        if reason
    ]
    frame = pd.DataFrame(records).set_index("row")
    return Results(frame, tuple(columns), baseline, tuple(unfinished))


def add_ratios(results: Results, file: Path, title: str = "step time") -> Results:
    """Add a column of measured ratios to the baseline.

    Args:
        results: of the sweep.
        file: JSON, ``{row: [ratio, its standard error]}``.
        title: the column's.

    Raises:
        UARError: the file cannot be read, or names a row that is not there.
    """
    try:
        read = json.loads(file.read_text("utf-8")).items()
        ratios = {row: [float(ratio), float(error)] for row, (ratio, error) in read}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UARError(
            f"{file}: not a JSON object of rows and pairs of numbers ({error})"
        ) from error
    for row in ratios:
        if row not in results.frame.index:
            raise ConfigError(
                str(file),
                f"there is no row {row!r}",
                allowed=", ".join(results.frame.index),
                remedy=nearest(row, results.frame.index),
            )
    measured = pd.DataFrame.from_dict(ratios, orient="index", columns=[title, f"{title} se"])
    frame = results.frame.join(measured)
    column = Column(title, Metric(title, 3, lambda run: {}))
    return Results(frame, (*results.columns, column), results.baseline, results.unfinished)


def _columns(points: pd.DataFrame, metrics: Sequence[str], compared: Sequence[str]) -> list[Column]:
    columns = []
    for name in metrics:
        found = [c for c in points.columns if c == name or c.startswith(f"{name} ")]
        columns += [
            Column(column, METRICS[name], column.removeprefix(name).strip(), name in compared)
            for column in found or [name]
        ]
    return columns


def _baseline_row(point: Point, baseline: str | None, rows: Any) -> str | None:
    """The row to compare with: the baseline itself, or its variant at the same setting."""
    at_same_setting = f"{baseline} {point.setting}".strip()
    return at_same_setting if at_same_setting in rows else baseline


def _mean(name: str, values: pd.Series) -> dict[str, float]:
    """Mean and standard error; missing if any finished seed lacks the value."""
    return {
        name: values.mean(skipna=False) if len(values) else math.nan,
        f"{name} se": values.sem(skipna=False) if len(values) > 1 else math.nan,
    }


def _difference(name: str, values: pd.Series, other: pd.Series | None) -> dict[str, float]:
    """Mean difference over the seeds that both have, and a paired t-test."""
    if other is None:
        nothing = dict.fromkeys(("delta", "delta se", "p"), math.nan)
        return {f"{name} {key}": value for key, value in nothing.items()} | {f"{name} pairs": 0}
    both = values.index.intersection(other.index)
    difference = values[both] - other[both]
    return {
        **_mean(f"{name} delta", difference),
        f"{name} p": _significance(difference),
        f"{name} pairs": len(difference),
    }


def _significance(difference: pd.Series) -> float:
    """p of a two-sided t-test of a mean difference of 0: the paired t-test."""
    if len(difference) < 2 or not difference.std(skipna=False) > 0:
        return math.nan
    try:
        from scipy.stats import ttest_1samp
    except ModuleNotFoundError as error:
        raise UARError(
            "significance needs scipy\n  remedy:  pip install 'uar-megatron[plots]'"
        ) from error
    return float(ttest_1samp(difference, 0.0).pvalue)
