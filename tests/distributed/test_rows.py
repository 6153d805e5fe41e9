"""Property: every (token, expert) pair is computed exactly once and weighted with its own prob."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import warm_torchrun

pytestmark = pytest.mark.slow
WORKERS = Path(__file__).with_name("row_workers.py")


@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_are_conserved(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(WORKERS.parents[1]))
    job = warm_torchrun(ranks, str(WORKERS))
    assert job.returncode == 0, job.stdout[-2000:] + job.stderr[-6000:]
