"""``uar doctor`` finds what is there, and what would stop a training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jobs import TIMEOUT, TINY, environment

from uar_megatron.doctor import examine

pytestmark = pytest.mark.slow


def doctor(*arguments: str, **variables: str) -> tuple[int, dict[str, Any]]:
    """Exit code, and the checks by name."""
    result = subprocess.run(
        [sys.executable, "-m", "uar_megatron.cli", "doctor", "--json", *arguments],
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    report = json.loads(result.stdout)
    assert report["ok"] == (result.returncode == 0)
    return result.returncode, {check["name"]: check for check in report["checks"]}


def test_a_good_experiment(tmp_path: Path) -> None:
    options = (f"run.dir={tmp_path}", "routing=uar_ae_clb", "uar.budget.mode=exact")
    code, checks = doctor(str(TINY), *options)
    assert code == 0
    assert checks[f"experiment {TINY}"]["detail"] == "would start"
    assert checks["Adaptive Expansion"] == {
        "name": "Adaptive Expansion",
        "status": "ok",
        "detail": "mode exact",
        "remedy": "",
    }
    assert checks["aux-loss-free bias"]["status"] == "off"
    assert checks["megatron-core"]["detail"].startswith("0.19")
    assert checks["wandb"]["status"] == "ok"


@pytest.mark.parametrize(
    ("override", "words"),
    [("num_layer=2", "num_layer"), ("uar.budget.k_max=9", "larger than the number of experts")],
)
def test_a_bad_experiment(override: str, words: str, tmp_path: Path) -> None:
    code, checks = doctor(str(TINY), f"run.dir={tmp_path}", "uar.policy=uar", override)
    assert code == 1
    check = checks[f"experiment {TINY}"]
    assert check["status"] == "error"
    assert words in check["detail"]
    assert check["remedy"]


def test_a_folder_that_cannot_be_written_to() -> None:
    code, checks = doctor(str(TINY), "run.dir=/proc/nowhere")
    assert code == 1
    assert checks["output folder"]["status"] == "error"


def test_the_other_apex(tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    code, checks = doctor(PYTHONPATH=path)
    assert code == 1
    assert "another project" in checks["NVIDIA apex"]["detail"]


def test_without_an_experiment(tmp_path: Path) -> None:
    names = {check.name for check in examine(folder=tmp_path / "not" / "yet")}
    assert {"python", "torch", "CUDA", "NCCL", "Triton", "Transformer Engine", "disk"} <= names
