"""The flex dispatcher over two and four gloo ranks, on STAND-INS for its libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import warm_torchrun

pytestmark = pytest.mark.slow
WORKERS = Path(__file__).with_name("flex_workers.py")


@pytest.mark.parametrize("ranks", [2, 4])
def test_flex_moves_what_alltoall_moves(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight routings (on four ranks three, with expert tensor parallelism too) × three backends
    against alltoall, and a fixed k against stock's managers."""
    monkeypatch.setenv("PYTHONPATH", str(WORKERS.parents[1]))
    job = warm_torchrun(ranks, str(WORKERS))
    assert job.returncode == 0, job.stderr[-6000:]
