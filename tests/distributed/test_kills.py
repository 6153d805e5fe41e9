"""The script that kills a run again and again, on a small scale."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import TIMEOUT, TINY, environment

pytestmark = pytest.mark.slow


def test_a_run_killed_three_times_is_the_straight_run(tmp_path: Path, repository: Path) -> None:
    study = subprocess.run(
        [
            *(sys.executable, str(repository / "scripts" / "kill_study.py")),
            *("--kills", "3", "--steps", "20", "--save-interval", "3"),
            *("--config", str(TINY), "--output", str(tmp_path)),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert study.returncode == 0, study.stdout + study.stderr
    with (tmp_path / "kills.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == 4
    assert sum(row["killed"] != "never" for row in rows) == 3
    assert any("saving" in row["killed"] for row in rows)
    assert all(row["different"] == "0" for row in rows)
    assert " 0 different" in study.stdout
