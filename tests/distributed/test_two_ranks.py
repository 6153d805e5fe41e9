"""Runs the checks of ``workers.py`` on two gloo ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from jobs import torchrun, train_arguments

pytestmark = pytest.mark.slow
WORKERS = Path(__file__).with_name("workers.py")


# Those that set up other process groups come last.
CHECKS = (
    "collectives",
    "statistics",
    "communication",
    "disagreement",
    "expert_parallel_parity",
    "expert_parallel_rows",
    "kernels",
)


def test_on_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(WORKERS.parents[1]))
    job = torchrun(2, str(WORKERS), *CHECKS)
    assert job.returncode == 0, job.stderr[-4000:]


def test_ranks_with_other_configurations_do_not_start(tmp_path: Path) -> None:
    command = " ".join(train_arguments(2, tmp_path, "uar.policy=uar"))
    script = f"exec {sys.executable} {command} uar.budget.k_max=$((4 + RANK))"
    job = torchrun(2, "--no-python", "bash", "-c", script)
    assert job.returncode != 0
    problem = "error: uar.budget.k_max: differs between ranks: 4 on rank 0; 5 on rank 1"
    assert problem in job.stderr, job.stderr[-4000:]
