"""`make replicate` in miniature, from made-up run logs; and that its real grid is the paper's.

That sweeps reach their end is in test_runner.py.
"""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from jobs import TINY
from records import start, step, validation

from uar_megatron.reporting.runlog import RunLogWriter
from uar_megatron.reporting.schema import End
from uar_megatron.sweep.grid import expand
from uar_megatron.sweep.layout import paper_tables

STEPS = {"10k": 10_000, "20k": 20_000, "5k": 5_000}
PAPER_STEPS = 200 * 162e6 / (256 * 4096)
ROWS = ("Auxloss", "Auxfree", "AE energy a=1.0", "AE energy a=1.0 rounded up from 2")


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("replicate", ("table2", "table3")),
        ("paper/table2", ("table2",)),
        ("paper/table3", ("table3",)),
    ],
)
def test_every_row_of_the_tables_has_three_seeds(
    repository: Path, name: str, tables: tuple[str, ...]
) -> None:
    rows = [p.row for p in expand(repository / "configs" / "sweeps" / f"{name}.yaml").points]
    wanted = {row for table in tables for row in paper_tables()[table].rows}
    assert wanted <= {*rows}
    assert name == "replicate" or wanted == {*rows}
    assert all(rows.count(row) >= 3 for row in wanted)


@pytest.mark.parametrize(
    ("name", "times"), [("replicate", 100), ("paper/table2", 1), ("paper/table3", 1)]
)
def test_settings_are_those_that_the_rows_are_named_after(
    repository: Path, name: str, times: int
) -> None:
    for point in expand(repository / "configs" / "sweeps" / f"{name}.yaml").points:
        uar, steps = point.experiment.uar, point.experiment.megatron["train_iters"]
        assert steps == round(PAPER_STEPS / times)
        named = dict(part.split("=") for part in point.row.split() if "=" in part)
        assert uar.clb.enabled == ("start" in named)
        if uar.clb.enabled:
            assert uar.clb.start_step * times == STEPS[named["start"]]
            assert uar.clb.warmup_steps * times == STEPS[named["warmup"]]
        assert (uar.policy == "uar") == ("a" in named)
        if "a" in named:
            assert (uar.budget.alpha, uar.budget.beta) == (float(named["a"]), 2)
        assert uar.uncertainty == ("entropy" if "entropy" in point.row else "energy")
        assert uar.bias.enabled == point.row.startswith("Auxfree")
        assert uar.budget.rounding == ("ceil" if "rounded up" in point.row else "floor")


def test_from_a_sweep_to_the_readme(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, reference, replicate = map(
        script, ("replicate_section", "config_reference", "replicate")
    )
    grid, points = tmp_path / "grid.yaml", tmp_path / "points.csv"
    rows = "".join(f"  {row}: [lr={i + 1}.0e-3]\n" for i, row in enumerate(ROWS))
    grid.write_text(
        f"base: {TINY}\ndir: {tmp_path / 'runs'}\nbaseline: Auxloss\nseeds: [1, 2]\npoints:\n{rows}"
    )
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- replicate -->\nold\n<!-- end -->\nafter\n")
    fresh = functools.partial(section.text, points, grid)
    monkeypatch.setattr(reference, "README", readme)
    monkeypatch.setattr(reference, "BLOCKS", {"replicate": fresh})
    assert fresh() == "`make replicate` has not been run yet.\n"

    for number, point in enumerate(expand(grid).points):
        log = RunLogWriter(point.folder / "run.jsonl")
        loss = 3.0 + (0.01 * number if point.row == "Auxfree" else 0.0)
        for record in (start(0), step(20), validation(20, held_out=loss)):
            log.write(record)
        log.write(End(step=20, reason="finished"))
        log.close()
    replicate.report(grid, points, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    reference.main()
    text = readme.read_text()
    assert text.startswith("before\n<!-- replicate -->\n`make replicate` trains the grids")
    assert text.endswith("<!-- end -->\nafter\n")
    for part in ("**Table 2**", "**Table 3**", "What a toy can show", "What it cannot show"):
        assert part in text
    # The same loss in every seed is no difference, and none that is called significant.
    assert "| AuxFree (baseline) | 23.85 | 0.102 | 2 | 20." in text
    assert "| AE (a = 1.0, b = 2) | 3.10 | 1.03 | 23.74 (-0.19) | 2 | 20.09 ± 0.00 |" in text
    assert "\n| AE energy a=1.0 rounded up from 2 | 2 | 20.09 ± 0.00 | +0.00 ± 0.00 | – |" in text

    monkeypatch.setattr(sys, "argv", ["config_reference.py", "--check"])
    reference.main()
    points.write_text(points.read_text().replace("AE energy a=1.0,1,,", "AE energy a=1.0,1,late,"))
    with pytest.raises(SystemExit, match="is old"):
        reference.main()
