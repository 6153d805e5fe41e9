"""What the scripts that check this repository do when a check itself does not go as planned."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from uar_megatron.errors import UARError


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module


def test_a_run_that_ends_before_it_is_killed_is_no_kill(script: Any, tmp_path: Path) -> None:
    study = script("kill_study")
    point = study.Point(step=5, saving=False, delay=0.0)
    with pytest.raises(UARError, match="finished before it could be killed"):
        study.train([sys.executable, "-c", ""], tmp_path, point, {})


STEP_5 = '{"kind":"step","step":5,"loss":1.0}'


def test_a_run_that_ends_during_the_delay_is_no_kill(script: Any, tmp_path: Path) -> None:
    study = script("kill_study")
    program = f"import sys; open(sys.argv[1][8:] + '/run.jsonl', 'w').write('{STEP_5}\\n')"
    point = study.Point(step=5, saving=False, delay=1.0)
    with pytest.raises(UARError, match="finished before it could be killed"):
        study.train([sys.executable, "-c", program], tmp_path, point, {})


MEGATRON_TESTS = """
import os, time

def test_passes(): pass
def test_fails_on_rank_1(): assert os.environ["RANK"] == "0"
"""
SLOW_TEST = "import time\ndef test_takes_too_long(): time.sleep(600)\n"


@pytest.mark.slow
def test_a_megatron_test_passes_if_it_does_on_every_rank(script: Any, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(MEGATRON_TESTS)
    (tmp_path / "test_slow.py").write_text(SLOW_TEST)
    outcomes = script("megatron_unit_tests").outcomes
    assert outcomes(tmp_path, tmp_path / "test_some.py", 2, "stock", 120) == {
        "test_some::test_passes": "passed",
        "test_some::test_fails_on_rank_1": "failure",
    }
    assert outcomes(tmp_path, tmp_path / "test_slow.py", 1, "stock", 15) == {
        "test_slow::test_takes_too_long": "did not run"
    }
