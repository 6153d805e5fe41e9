"""The paper's tables beside a sweep's numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
from jobs import TINY

from uar_megatron.errors import ConfigError
from uar_megatron.sweep.command import make_table
from uar_megatron.sweep.grid import Sweep, expand
from uar_megatron.sweep.layout import cells, lay_beside, numbers, paper_tables
from uar_megatron.sweep.render import latex, markdown

ENERGY = "Auxloss + CLB energy start=10k warmup=5k"
BIAS_ENERGY = "Auxfree + CLB energy start=10k warmup=5k"
# The differences that the paper prints in parentheses beside the values.
PRINTED = {
    "table2": {
        "perplexity": [None, -0.16, -0.14, -0.18, -0.15, None, -0.16, -0.18],
        "max_vio": [None, -0.044, -0.040, -0.047, -0.043, None, -0.028, -0.033],
    },
    "table3": {"perplexity": [None, 0.00, -0.06, -0.11, -0.14, -0.16, -0.19]},
}


def sweep_of(rows: Sequence[str], folder: Path, seeds: str = "[1, 2, 3]") -> Sweep:
    points = "".join(f"  {row}: [lr={0.001 + i / 1000}]\n" for i, row in enumerate(rows))
    path = folder / "grid.yaml"
    path.write_text(f"base: {TINY}\ndir: {folder / 'runs'}\nseeds: {seeds}\npoints:\n{points}")
    return expand(path)


def measured(sweep: Sweep) -> pd.DataFrame:
    """Made-up numbers: the i-th row is 10·i lower in perplexity, seeds differ by 1."""
    rows = list(dict.fromkeys(point.row for point in sweep.points))
    return pd.DataFrame(
        {
            "row": p.row, "seed": p.seed, "reason": "",
            "perplexity a": 300.0 - 10 * rows.index(p.row) + (p.seed or 0),
            "perplexity b": 1.0, "max_vio": 0.5, "max_vio_global": 0.25 + rows.index(p.row),
            "k_eff": 2.0, "flops_ratio": 1.0,
        }
        for p in sweep.points
    )  # fmt: skip


@pytest.mark.parametrize("name", PRINTED)
def test_differences_of_the_paper_follow_from_its_values(name: str) -> None:
    table = paper_tables()[name]
    for column, printed in PRINTED[name].items():
        found = [
            None
            if row.row == group.baseline
            else round(getattr(row, column) - getattr(table.rows[group.baseline], column), 3)
            for group in table.groups
            for row in group.rows
        ]
        assert found == printed


def test_both_tables_share_their_baseline() -> None:
    tables = paper_tables()
    assert tables["table2"].rows["Auxloss"].perplexity == 23.93
    assert tables["table3"].rows["Auxloss"].perplexity == 23.93


def test_each_group_is_compared_with_its_own_baseline(tmp_path: Path) -> None:
    sweep = sweep_of(["Auxloss", ENERGY, "Auxfree", BIAS_ENERGY], tmp_path)
    layout = lay_beside(sweep, "table2", measured(sweep))
    frame = layout.frame
    assert frame.loc[ENERGY, "perplexity a delta"] == pytest.approx(-10)
    assert frame.loc[BIAS_ENERGY, "perplexity a delta"] == pytest.approx(-10)  # to Auxfree
    assert frame.loc[BIAS_ENERGY, "max_vio_global delta"] == pytest.approx(1)
    lines = markdown(cells(layout)).splitlines()
    assert lines[0].startswith("|  | paper: Perplexity ↓ | paper: MaxVio ↓ | ours: seeds | ours: ")
    assert "perplexity b" not in lines[0]  # of the first validation set alone
    (row,) = [line for line in lines if line.startswith("| Energy, Start@10k")][:1]
    assert row.startswith("| Energy, Start@10k, Warmup=5k | 23.77 (-0.16) | 0.108 (-0.044) | 3 | ")
    assert "292.00 ± 0.58 | -10.00 ± 0.00 |" in row
    (absent,) = [line for line in lines if line.startswith("| Energy, Start@20k")]
    assert "23.79 (-0.14) | 0.112 (-0.040) | – | –" in absent
    assert any(
        line.startswith("Not in this sweep: Auxloss + CLB energy start=20k") for line in lines
    )
    (ours,) = [line for line in lines if line.startswith("Ours: ")]
    assert "3 layers of width 32, 8A2, 20 steps, 0.0 million tokens" in ours
    assert "32.4 billion" in next(line for line in lines if line.startswith("Paper: "))


def test_latex_and_csv(tmp_path: Path) -> None:
    sweep = sweep_of(["Auxloss", "AE energy a=0.5", "mine"], tmp_path)
    layout = lay_beside(sweep, "table3", measured(sweep))
    assert layout.beyond == ("mine",)
    text = latex(cells(layout))
    assert r" & \multicolumn{3}{c}{paper} & \multicolumn{10}{c}{ours} \\" in text
    assert r"\cmidrule(lr){2-4} \cmidrule(lr){5-14}" in text
    assert r"\multicolumn{14}{l}{\emph{Uncertainty = Energy}} \\" in text
    rows = list(csv.DictReader(io.StringIO(numbers(layout).to_csv(index=False))))
    energy = next(row for row in rows if row["row"] == "AE energy a=0.5")
    assert (energy["paper k_eff"], energy["ours k_eff"]) == ("2.55", "2.0")
    assert energy["ours perplexity a delta"] == "-10.0"
    assert next(row for row in rows if row["row"] == "AE energy a=0.7")["ours k_eff"] == ""


def test_from_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep_of(["Auxloss", ENERGY], tmp_path, "[1]")
    grid = tmp_path / "grid.yaml"
    text = make_table(grid, layout="table2")
    assert "Unfinished, not in the numbers (2):" in text
    assert make_table(grid, "csv", layout="table2").splitlines()[0].startswith("group,row,paper ")
    assert "Paper: Table 2" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="leave the others out"):
        make_table(grid, metrics=["k_eff"], layout="table2")


def test_a_sweep_that_is_not_like_the_table_is_refused(tmp_path: Path) -> None:
    sweep = sweep_of([ENERGY], tmp_path, "[1]")  # without its baseline
    with pytest.raises(ConfigError, match="needs rows that the sweep does not have: Auxloss"):
        lay_beside(sweep, "table2", measured(sweep))
    with pytest.raises(ConfigError, match="start from configs/sweeps/paper/"):
        lay_beside(sweep, "table3", measured(sweep))
