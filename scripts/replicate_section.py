"""The README's section on the toy replication: text, tables and figure, from stored numbers.

``.github/replicate.csv`` has a row per training; what is made of it depends on nothing else that a
fresh clone lacks, so ``config_reference.py --check`` can hold the README against it.
"""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd

from uar_megatron.sweep.grid import Sweep, expand
from uar_megatron.sweep.layout import (
    METRICS_COMPARED,
    METRICS_SHOWN,
    Layout,
    cells,
    describe,
    lay_beside,
)
from uar_megatron.sweep.measure import Results, compare
from uar_megatron.sweep.render import lay_out, markdown

ROOT = Path(__file__).resolve().parents[1]
BLOCK = "replicate"
"""Of the README: ``<!-- replicate -->`` … ``<!-- end -->``."""
GRID = ROOT / "configs" / "sweeps" / "replicate.yaml"
POINTS = ROOT / ".github" / "replicate.csv"
FIGURE = ROOT / ".github" / "replicate.png"
_T_OF_TWO = 4.303
"""Two-sided 5 % point of Student's t with two degrees of freedom: three seeds."""

INTRODUCTION = """\
`make replicate` trains the grids of the paper's Tables 2 and 3 on the demo's text: {points}
trainings, {seeds} seeds of each row, two at a time. That took 73 minutes on two cores that did
other things too; a second call goes on where the first was stopped. All lengths are a hundredth of
the paper's: 309 steps for 30,899 (200 tokens for each of 162M parameters, in batches of 256 ×
4096), CLB from step 100 or 200 for 10k or 20k, and 50 or 100 steps of warm-up for 5k or 10k.

![Perplexity, MaxVio, active experts and FLOPs of every row, beside the paper's]({figure})
"""
LIMITS = """\
**What a toy can show.** That every row trains to its end from one file, and that a = 0 is Top-k.
How many experts Eq. 5 activates and what they cost: both are counted, and depend on the formula
and the distribution of ẑ more than on scale. {experts} Rows with other numbers of experts compute
more or less than Top-k: their perplexities are not at equal compute. Large effects on the loads.

**What it cannot show.** Which row is the better one in the paper's setting. A training sees a fifth
of a token per parameter (0.5 million tokens, 2.5 million parameters), the paper's 200. {power}
{significant} A difference that is significant here is one of this toy, with its warm-up still near:
nothing here says anything about larger models, longer trainings, the transition that the paper sees
at 5k–15k steps, or downstream tasks. The bias of Auxfree moves by 1e-3 a step whatever the length
of a run, so it gets a hundredth as far as in the paper; that rate, θ_t, the width of the mask,
K_min and K_max are not in the paper.
"""


def text(points_file: Path = POINTS, grid: Path = GRID) -> str:
    """Return the section; a sentence where nothing has been run yet."""
    if not points_file.exists():
        return "`make replicate` has not been run yet.\n"
    sweep, points = expand(grid), load_points(points_file)
    layouts = [lay_beside(sweep, name, points) for name in ("table2", "table3")]
    parts = [introduction(sweep)]
    for name, layout in zip(("Table 2", "Table 3"), layouts, strict=True):
        parts += [f"**{name}**\n", _lean(layout), ""]
    ours = beyond(sweep, layouts, points)
    if len(ours.frame):
        parts += ["**Not in the paper**: Eq. 5 rounded up, from K_min = 2\n"]
        parts += [markdown(lay_out(ours)).rpartition("\n\n")[0], ""]
    return "\n".join([*parts, _wrapped(LIMITS.format(**verdict(sweep, layouts, ours)))])


def introduction(sweep: Sweep) -> str:
    """What is run."""
    rows = {point.row for point in sweep.points}
    seeds = len(sweep.points) // len(rows)
    words = {3: "three", 4: "four", 5: "five"}
    return _wrapped(
        INTRODUCTION.format(
            points=len(sweep.points), seeds=words.get(seeds, seeds), figure=f".github/{FIGURE.name}"
        )
    )


def _wrapped(text: str) -> str:
    """The same in the README's line length, paragraph by paragraph."""
    paragraphs = [textwrap.fill(p, 118, break_on_hyphens=False) for p in text.split("\n\n")]
    return "\n\n".join(paragraphs) + "\n"


def _lean(layout: Layout) -> str:
    """The layout as Markdown, without what it says of rows that other tables show."""
    table = cells(layout)
    table.notes[:] = [note for note in table.notes if not note.startswith("Only in this sweep")]
    return markdown(table)


def beyond(sweep: Sweep, layouts: list[Layout], points: pd.DataFrame) -> Results:
    """The rows that neither table has, compared with the sweep's baseline."""
    results = compare(sweep, METRICS_SHOWN, None, METRICS_COMPARED, points)
    rows = [row for row in layouts[0].beyond if row in layouts[1].beyond]
    columns = tuple(column for column in results.columns if column in layouts[0].columns)
    return Results(results.frame.loc[rows], columns, results.baseline, results.unfinished)


def verdict(sweep: Sweep, layouts: list[Layout], ours: Results) -> dict[str, str]:
    """What the differences in perplexity amount to, in sentences."""
    frame = pd.concat([*(layout.frame for layout in layouts), ours.frame])
    frame = frame[~frame.index.duplicated()]
    name = next(c.name for c in ours.columns if c.metric.title == "perplexity")
    compared = frame[frame[f"{name} p"].notna()]
    least = _T_OF_TWO * compared[f"{name} delta se"].median()
    share = 100 * least / frame.loc[sweep.baseline, name]
    found = compared[compared[f"{name} p"] < 0.05]
    rows = ", ".join(f"{row} ({value:+.2f})" for row, value in found[f"{name} delta"].items())
    power = (
        f"With three seeds, paired, a difference in perplexity must exceed about {least:.2f} "
        f"({share:.1f} %, median over the rows) to have p < 0.05; the paper's are at most 0.8 %, "
        "without errors."
    )
    significant = (
        f"Of {len(compared)} differences here {len(found)} have p < 0.05{': ' * bool(rows)}{rows}; "
        f"chance alone gives {0.05 * len(compared):.1f} on average."
    )
    expanded = [row for row in layouts[1].frame.index if " a=" in row and not row.endswith(" a=0")]
    experts = (
        f"As printed, rounded down, a > 0 activates {_range(frame.loc[expanded, 'k_eff'])} experts "
        "here where the paper's Table 3 reports 2.15–3.10"
    )
    if len(ours.frame):
        experts += f"; rounded up from K_min = 2 it activates {_range(ours.frame['k_eff'])}"
    return {"power": power, "significant": significant, "experts": f"{experts}."}


def _range(values: pd.Series) -> str:
    return f"{values.min():.2f}–{values.max():.2f}"


def save_points(points: pd.DataFrame, file: Path = POINTS) -> None:
    """Write a row per training at full precision, whole or not at all."""
    temporary = file.with_name(f".{file.name}.part")
    points.to_csv(temporary, index=False)
    temporary.replace(file)


def load_points(file: Path = POINTS) -> pd.DataFrame:
    """Read what :func:`save_points` has written."""
    return pd.read_csv(file, float_precision="round_trip", keep_default_na=True).fillna(
        {"reason": ""}
    )


def draw(points: pd.DataFrame, file: Path = FIGURE, grid: Path = GRID) -> None:
    """Draw every row: the seeds, their mean ± standard error, and the paper's number."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sweep = expand(grid)
    layouts = [lay_beside(sweep, name, points) for name in ("table2", "table3")]
    rows = list(dict.fromkeys(point.row for point in sweep.points))
    panels = (
        ("perplexity", "perplexity − baseline, %", "perplexity"),
        ("max_vio_global", "MaxVio of the validation set", "max_vio"),
        ("k_eff", "active experts", "k_eff"),
        ("flops_ratio", "FLOPs over Top-k's", "flops_ratio"),
    )
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(14, 0.32 * len(rows) + 1.2), sharey=True, layout="constrained"
    )
    printed = _printed(layouts)
    baselines = _baselines(sweep, layouts)
    for axis, (name, title, papers) in zip(axes, panels, strict=True):
        for place, row in enumerate(rows):
            values = _values(points, row, name, baselines[row])
            mean, error = values.mean(), values.sem()
            axis.plot(values, [place] * len(values), "o", ms=3, color="tab:blue", alpha=0.5)
            axis.errorbar(mean, place, xerr=error, fmt="|", color="tab:blue", ms=9, capsize=2)
            paper = printed.get(row, {}).get(papers)
            if paper is not None:
                axis.plot(paper, place, "D", ms=5, mfc="none", color="tab:orange")
        axis.set_xlabel(title)
        axis.grid(alpha=0.25)
    axes[0].axvline(0, color="gray", linestyle=":")
    axes[0].set_yticks(range(len(rows)), rows, fontsize=8)
    axes[0].invert_yaxis()
    axes[0].plot([], [], "o", color="tab:blue", ms=3, label="ours: seeds, mean ± s.e.")
    axes[0].plot([], [], "D", mfc="none", color="tab:orange", label="paper: 162M, 32.4 B tokens")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.suptitle(f"ours: {describe(sweep.points[0].experiment)}", fontsize=9, y=0.0, va="top")
    temporary = file.with_name(f".{file.name}.part")
    figure.savefig(temporary, dpi=110, format="png", bbox_inches="tight")
    temporary.replace(file)
    pyplot.close(figure)


def _values(points: pd.DataFrame, row: str, name: str, baseline: str) -> pd.Series:
    """A row's values, one per seed; perplexities as differences to the baseline in per cent."""
    column = next(c for c in points.columns if c == name or c.startswith(f"{name} "))
    by_seed = {r: points[points["row"] == r].set_index("seed")[column] for r in (row, baseline)}
    if name != "perplexity":
        return by_seed[row]
    return 100 * (by_seed[row] / by_seed[baseline] - 1)


def _baselines(sweep: Sweep, layouts: list[Layout]) -> dict[str, str]:
    found = {point.row: str(sweep.baseline) for point in sweep.points}
    for layout in layouts:
        found |= {r.row: g.baseline for g in layout.table.groups for r in g.rows}
    return found


def _printed(layouts: list[Layout]) -> dict[str, dict[str, float]]:
    """The paper's numbers by row; perplexities as differences to the baseline in per cent."""
    found: dict[str, dict[str, Any]] = {}
    for layout in layouts:
        for group in layout.table.groups:
            reference = layout.table.rows[group.baseline].perplexity
            for row in group.rows:
                values = row.model_dump(exclude={"row", "label"}, exclude_none=True)
                values["perplexity"] = 100 * (row.perplexity / reference - 1)
                assert math.isfinite(values["perplexity"])
                found.setdefault(row.row, {}).update(values)
    return found
