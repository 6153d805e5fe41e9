"""Runs the checks of ``workers.py`` on two gloo ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import torchrun

pytestmark = pytest.mark.slow
WORKERS = Path(__file__).with_name("workers.py")


@pytest.mark.parametrize(
    "check", ["collectives", "statistics", "expert_parallel_parity", "expert_parallel_rows"]
)
def test_on_two_ranks(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(WORKERS.parents[1]))
    job = torchrun(2, str(WORKERS), check)
    assert job.returncode == 0, job.stderr[-4000:]
