"""The numbers of a sweep as text: Markdown, CSV, LaTeX."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from uar_megatron.sweep.measure import Results

MISSING = "–"


@dataclass(frozen=True)
class Cells:
    """A table as text; the first column names the rows, a row of one cell the rows below it.

    Attributes:
        headings: of the columns.
        rows: of cells.
        notes: sentences for the reader.
        parts: names of groups of columns and how many they have; the first column is in none.
    """

    headings: list[str]
    rows: list[list[str]]
    notes: list[str]
    parts: list[tuple[str, int]] = field(default_factory=list)


def lay_out(results: Results) -> Cells:
    """Every column of the results, each compared one followed by Δ and p."""
    headings = ["", "seeds"]
    rows = [[str(name), seeds(row)] for name, row in results.frame.iterrows()]
    for column in results.columns:
        headings += [
            f"{column.metric.title} {column.of}".strip(),
            *(("Δ", "p") if column.compared else ()),
        ]
        digits = column.metric.digits
        for cells, (_, row) in zip(rows, results.frame.iterrows(), strict=True):
            cells.append(with_error(row, column.name, digits))
            if column.compared:
                cells.append(with_error(row, f"{column.name} delta", digits, "+"))
                cells.append(p_value(row[f"{column.name} p"]))
    return Cells(headings, rows, notes(results))


def with_error(row: pd.Series, name: str, digits: int, sign: str = "") -> str:
    """A mean with its standard error, if there is one."""
    mean, error = row[name], row[f"{name} se"]
    if pd.isna(mean):
        return MISSING
    text = f"{mean:{sign}.{digits}f}"
    return text if pd.isna(error) or digits == 0 else f"{text} ± {error:.{digits}f}"


def p_value(p: float) -> str:
    """Three digits; smaller ones only as such."""
    if pd.isna(p):
        return MISSING
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def seeds(row: pd.Series) -> str:
    """How many are finished, and of how many if some are not."""
    done, planned = int(row["finished"]), int(row["points"])
    return str(done) if done == planned else f"{done} of {planned}"


def notes(results: Results) -> list[str]:
    """What a reader must know: how to read the numbers, and what is missing from them."""
    lines = ["Mean ± standard error over the finished seeds."]
    if results.baseline is not None:
        lines.append(
            f"Δ: mean difference to {results.baseline} over the seeds that both have finished; "
            "p: two-sided paired t-test."
        )
    if results.unfinished:
        lines.append(f"Unfinished, not in the numbers ({len(results.unfinished)}):")
        lines += [f"- {point.name}: {reason}" for point, reason in results.unfinished]
    return lines


def markdown(cells: Cells) -> str:
    """A Markdown table and its notes."""
    width = len(cells.headings)
    rule = ["---", *["---:"] * (width - 1)]
    of = ["", *(f"{part}: " for part, count in cells.parts for _ in range(count))]
    headings = [p + h for p, h in zip(of, cells.headings, strict=True)] if cells.parts else None
    rows = [r if len(r) == width else [f"**{r[0]}**", *[""] * (width - 1)] for r in cells.rows]
    table = [headings or cells.headings, rule, *rows]
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in table]
    return "\n".join([*lines, "", *_paragraphs(cells.notes)])


def latex(cells: Cells) -> str:
    """A booktabs table; the notes are comments."""
    width = len(cells.headings)
    rows = [
        " & ".join(map(_tex, row)) + r" \\"
        if len(row) == width
        else rf"\multicolumn{{{width}}}{{l}}{{\emph{{{_tex(row[0])}}}}} \\"
        for row in [cells.headings, *cells.rows]
    ]
    lines = [
        rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}",
        r"\toprule",
        *_tex_parts(cells.parts),
        rows[0],
        r"\midrule",
        *rows[1:],
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join([*lines, *(f"% {note}" for note in cells.notes)])


def _tex_parts(parts: Sequence[tuple[str, int]]) -> list[str]:
    """Names above the headings, each with a rule as wide as its columns."""
    if not parts:
        return []
    names = "".join(rf" & \multicolumn{{{count}}}{{c}}{{{_tex(part)}}}" for part, count in parts)
    ends = itertools.accumulate(count for _, count in parts)
    rules = (
        rf"\cmidrule(lr){{{end - count + 2}-{end + 1}}}"
        for end, (_, count) in zip(ends, parts, strict=True)
    )
    return [rf"{names} \\", " ".join(rules)]


def csv(results: Results) -> str:
    """Every number of the frame at full precision."""
    return results.frame.to_csv().rstrip("\n")


def _paragraphs(lines: Sequence[str]) -> list[str]:
    """Markdown: sentences on lines of their own, a blank line before a list."""
    text: list[str] = []
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("- ") and not before.startswith("- "):
            text.append("")
        text.append(line)
    return text


_TEX = {
    "\\": r"\textbackslash{}", "±": r"$\pm$", "–": "--", "Δ": r"$\Delta$", "<": "$<$",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"}, "~": r"\textasciitilde{}", "^": r"\^{}",
    "α": r"$\alpha$", "β": r"$\beta$", "θ": r"$\theta$", "τ": r"$\tau$", "↓": r"$\downarrow$",
}  # fmt: skip


def _tex(text: str) -> str:
    signed = text[:1] in ("+", "-") and text[1:2].isdigit()
    escaped = "".join(_TEX.get(sign, sign) for sign in text)
    return f"${escaped[0]}${escaped[1:]}" if signed else escaped
