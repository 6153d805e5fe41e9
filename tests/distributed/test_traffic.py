"""Planned bytes of the all-to-all dispatcher are those that ranks hand to collectives, exactly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jobs import warm_torchrun

pytestmark = pytest.mark.slow
WORKERS = Path(__file__).with_name("traffic_workers.py")


@pytest.mark.parametrize(("expert", "tensor"), [(2, 1), (4, 1), (2, 2)])
def test_planned_bytes_are_those_sent(
    expert: int, tensor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(WORKERS.parents[1]), prepend=os.pathsep)
    job = warm_torchrun(expert * tensor, str(WORKERS), str(expert), str(tensor))
    assert job.returncode == 0, job.stderr[-4000:]
