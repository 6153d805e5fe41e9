"""``uar plan`` as a command: tables, JSON, and errors without a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import TIMEOUT, environment

pytestmark = pytest.mark.slow
CONFIG = Path(__file__).parents[2] / "configs" / "plan_256a8.yaml"


def uar_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "uar_megatron.cli", "plan", str(CONFIG), *arguments],
        env=environment() | {"COLUMNS": "140"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def test_prints_tables_assumptions_and_warnings() -> None:
    result = uar_plan("--gpus", "64", "uar.budget.k_max=128", "micro_batch_size=16")
    assert result.returncode == 0, result.stderr
    for words in ("Memory of the fullest rank", "All-to-all", "Optimizer step", "Assumptions"):
        assert words in result.stdout
    assert "warning:" in result.stdout
    assert "bounded by uar.budget.k_max = 128" in result.stdout


def test_prints_json_and_nothing_else() -> None:
    result = uar_plan("--gpus", "16", "--gpu", "h100", "--dirichlet", "2", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["job"]["hardware"]["name"] == "h100"
    assert found["job"]["layout"]["data"] == 16
    assert found["job"]["imbalance"][0]["expected"] > 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "12"], ["--gpus", "not a multiple of 8"]),
        (["--gpus", "8", "--tokens", "inf", "--json"], ["--tokens", "finite"]),
        (["--gpus", "8", "--nvlink-gbs", "inf", "--json"], ["--nvlink-gbs", "finite"]),
        (["--gpus", "8", "--dirichlet", "inf"], ["--dirichlet", "finite"]),
        (["--gpus", "8", "--gpu", "h900"], ["--gpu", "did you mean"]),
        (["--gpus", "8", "hidden_sise=3"], ["hidden_sise", "did you mean 'hidden_size'"]),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(arguments: list[str], words: list[str]) -> None:
    result = uar_plan(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error:") == 1
    for word in words:
        assert word in result.stderr
