"""A sweep in the rows and columns of one of the paper's tables, the paper's numbers beside ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf
from pydantic import model_validator

from uar_megatron.config import Section, parse_section
from uar_megatron.errors import ConfigError
from uar_megatron.experiment import Experiment, read_yaml
from uar_megatron.sweep.grid import Point, Sweep
from uar_megatron.sweep.measure import Column, compare, measure
from uar_megatron.sweep.render import MISSING, Cells, p_value, seeds, with_error

PAPER, OURS = "paper", "ours"
METRICS_SHOWN = ("perplexity", "max_vio", "max_vio_global", "k_eff", "flops_ratio")
"""Of ours, beside whatever the table of the paper has."""
METRICS_COMPARED = ("perplexity", "max_vio_global")


class PaperColumn(Section):
    """A column of a table of the paper."""

    title: str
    """As printed."""
    name: str
    """Of the rows' values."""
    digits: int
    """Printed after the point."""
    differs: bool = False
    """Whether the paper prints the difference to the baseline too."""


class PaperRow(Section):
    """A row of a table of the paper."""

    row: str
    """What sweeps call it."""
    label: str
    """What the paper calls it."""
    perplexity: float
    """Of the validation set."""
    max_vio: float | None = None
    """The paper does not say whether per batch or of the whole set."""
    k_eff: float | None = None
    """Average activated experts per token."""
    flops_ratio: float | None = None
    """FLOPs over those of Top-k."""


class PaperGroup(Section):
    """Rows that are compared with one baseline."""

    title: str
    """Above the rows."""
    baseline: str
    """The row, here or in an earlier group, that differences refer to."""
    rows: list[PaperRow]
    """From top to bottom."""


class PaperTable(Section):
    """A table of the paper."""

    reference: str
    """Where it is."""
    setting: str
    """What was trained."""
    columns: list[PaperColumn]
    """From left to right."""
    groups: list[PaperGroup]
    """From top to bottom."""

    @model_validator(mode="after")
    def _complete(self) -> PaperTable:
        known = set(self.rows)
        for group in self.groups:
            lacking = [
                f"{r.row} {c.name}"
                for r in group.rows
                for c in self.columns
                if getattr(r, c.name, None) is None
            ]
            if lacking or group.baseline not in known:
                raise ValueError(f"groups|{group.title} lacks {lacking or group.baseline}|numbers")
        return self

    @property
    def rows(self) -> dict[str, PaperRow]:
        """Every row by the name that sweeps give it."""
        return {row.row: row for group in self.groups for row in group.rows}


@dataclass(frozen=True)
class Layout:
    """A sweep beside a table of the paper.

    Attributes:
        table: the paper's.
        sweep: ours.
        frame: as :attr:`Results.frame`, of the table's rows that the sweep has, each compared with
            the baseline of its group.
        columns: of it that are shown: of perplexity that of the first validation set alone.
        absent: rows of the table that the sweep does not have.
        beyond: rows of the sweep that the table does not have.
        unfinished: points of the table's rows that are not in the numbers, and why.
    """

    table: PaperTable
    sweep: Sweep
    frame: pd.DataFrame
    columns: tuple[Column, ...]
    absent: tuple[str, ...]
    beyond: tuple[str, ...]
    unfinished: tuple[tuple[Point, str], ...]


def paper_tables() -> dict[str, PaperTable]:
    """The tables that a sweep can be laid out like, by the name of ``uar table --layout``."""
    plain = OmegaConf.to_container(read_yaml(Path(__file__).with_name("paper_tables.yaml")))
    assert isinstance(plain, dict)
    return {str(name): parse_section(PaperTable, table, str(name)) for name, table in plain.items()}


def lay_beside(sweep: Sweep, name: str, points: pd.DataFrame | None = None) -> Layout:
    """Put a sweep beside a table of the paper.

    Args:
        sweep: whose rows have the names of :func:`paper_tables`.
        name: of the table.
        points: what :func:`~uar_megatron.sweep.measure.measure` has returned; None to read the
            run logs.

    Raises:
        UARError: the sweep has no row, or not every baseline, of the table.
    """
    table = paper_tables()[name]
    ours = list(dict.fromkeys(point.row for point in sweep.points))
    absent = [row for row in table.rows if row not in ours]
    wanted = [(g.baseline, [r.row for r in g.rows if r.row in ours]) for g in table.groups]
    wanted = [(baseline, rows) for baseline, rows in wanted if rows]
    if not wanted or any(baseline in absent for baseline, _ in wanted):
        raise ConfigError(
            "--layout",
            f"{name} needs rows that the sweep does not have: {', '.join(absent)}",
            allowed=f"a sweep with rows named like {', '.join(table.rows)}",
            remedy="start from configs/sweeps/paper/, or leave --layout out",
        )
    points = measure(sweep, METRICS_SHOWN) if points is None else points
    found = [
        compare(sweep, METRICS_SHOWN, baseline, METRICS_COMPARED, points) for baseline, _ in wanted
    ]
    frames = [r.frame.loc[rows] for r, (_, rows) in zip(found, wanted, strict=True)]
    first = {column.metric.title: column for column in reversed(found[0].columns)}
    return Layout(
        table,
        sweep,
        pd.concat(frames),
        tuple(column for column in found[0].columns if column in first.values()),
        tuple(absent),
        tuple(row for row in ours if row not in table.rows),
        tuple((p, reason) for p, reason in found[0].unfinished if p.row in table.rows),
    )


def cells(layout: Layout) -> Cells:
    """The table as text: the paper's columns, then ours."""
    paper = [column.title for column in layout.table.columns]
    headings = ["seeds"]
    for column in layout.columns:
        title = f"{column.metric.title} {column.of}".strip()
        headings += [title, *(("Δ", "p") if column.compared else ())]
    rows: list[list[str]] = []
    for group in layout.table.groups:
        rows.append([group.title])
        for row in group.rows:
            printed = _paper_cells(layout.table, row, layout.table.rows[group.baseline])
            is_ours = row.row in layout.frame.index
            own = _own_cells(layout, row.row) if is_ours else [MISSING] * len(headings)
            rows.append([row.label, *printed, *own])
    parts = [(PAPER, len(paper)), (OURS, len(headings))]
    return Cells(["", *paper, *headings], rows, notes(layout), parts)


def notes(layout: Layout) -> list[str]:
    """Whose numbers these are, of what, and what is missing."""
    lines = [
        f"Paper: {layout.table.reference}. {layout.table.setting}.",
        f"Ours: {describe(layout.sweep.points[0].experiment)}; mean ± standard error over the "
        "finished seeds; Δ: mean difference to the group's baseline over the seeds that both "
        "have finished; p: two-sided paired t-test. MaxVio global is of the whole validation set, "
        "MaxVio batch, k_eff and FLOPs (over Top-k's) of the last quarter of the training.",
    ]
    if layout.absent:
        lines.append(f"Not in this sweep: {', '.join(layout.absent)}.")
    if layout.beyond:
        lines.append(f"Only in this sweep, not shown: {', '.join(layout.beyond)}.")
    if layout.unfinished:
        lines.append(f"Unfinished, not in the numbers ({len(layout.unfinished)}):")
        lines += [f"- {point.name}: {reason}" for point, reason in layout.unfinished]
    return lines


def numbers(layout: Layout) -> pd.DataFrame:
    """Every number at full precision: ``paper …`` and ``ours …`` columns, a row per table row."""
    records: list[dict[str, Any]] = []
    for group in layout.table.groups:
        for row in group.rows:
            record: dict[str, Any] = {"group": group.title, "row": row.row}
            record |= {f"{PAPER} {c.name}": getattr(row, c.name) for c in layout.table.columns}
            if row.row in layout.frame.index:
                own = layout.frame.loc[row.row]
                record |= {f"{OURS} {name}": value for name, value in own.items()}
            records.append(record)
    return pd.DataFrame(records)


def describe(experiment: Experiment) -> str:
    """Model and length of a training in a phrase, e.g. for the heading of a table."""
    args = experiment.megatron
    missing = [n for n in ("train_iters", "global_batch_size", "seq_length") if not args.get(n)]
    length = "a length that train_iters does not say"
    if not missing:
        tokens = args["train_iters"] * args["global_batch_size"] * args["seq_length"]
        length = f"{args['train_iters']} steps, {tokens / 1e6:,.1f} million tokens"
    return (
        f"{args.get('num_layers')} layers of width {args.get('hidden_size')}, "
        f"{args.get('num_experts')}A{args.get('moe_router_topk')}, {length}"
    )


def _paper_cells(table: PaperTable, row: PaperRow, baseline: PaperRow) -> list[str]:
    texts = []
    for column in table.columns:
        value, reference = getattr(row, column.name), getattr(baseline, column.name)
        text = f"{value:.{column.digits}f}"
        if column.differs and row is not baseline:
            # The paper prints no sign where there is no difference.
            sign = "+" if value != reference else ""
            text += f" ({value - reference:{sign}.{column.digits}f})"
        texts.append(text)
    return texts


def _own_cells(layout: Layout, row: str) -> list[str]:
    own = layout.frame.loc[row]
    texts = [seeds(own)]
    for column in layout.columns:
        digits = column.metric.digits
        texts.append(with_error(own, column.name, digits))
        if column.compared:
            texts.append(with_error(own, f"{column.name} delta", digits, "+"))
            texts.append(p_value(own[f"{column.name} p"]))
    return texts
