"""The wheel works outside the repository; the README's reference is current."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from jobs import TIMEOUT, environment


def test_config_reference_is_current(repository: Path) -> None:
    script = repository / "scripts" / "config_reference.py"
    subprocess.run([sys.executable, str(script), "--check"], check=True)


@pytest.mark.slow
def test_wheel_works_outside_the_repository(repository: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(repository)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--quiet",
        "--target",
        str(site),
    ]
    subprocess.run([*install, str(wheel)], check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.yaml").write_text(
        "defaults:\n  - model: tiny_8x2\n  - routing: uar_ae\n  - data: mock\n  - parallel: cpu\n"
        "micro_batch_size: 2\nglobal_batch_size: 4\ntrain_iters: 3\nlr: 1.0e-3\nlog_interval: 1\n"
        "eval_interval: 10\neval_iters: 1\nlr_decay_style: constant\n"
    )
    where = (
        "import uar_megatron, uar_kernels; print(uar_megatron.__file__, uar_kernels.__file__);"
        "from uar_megatron.launching.scripts import script_dir; print(*script_dir().iterdir())"
    )
    for command in (["-c", where], ["-m", "uar_megatron.cli", "train", "mine.yaml"]):
        result = subprocess.run(
            [sys.executable, *command],
            cwd=elsewhere,
            env=environment() | {"PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        if command[0] == "-c":
            assert result.stdout.count(str(site)) == 4
            assert "torchrun.sh" in result.stdout
    assert " uar | step 3 | loss" in result.stdout
    assert (elsewhere / "runs" / "run" / "run.jsonl").exists()
