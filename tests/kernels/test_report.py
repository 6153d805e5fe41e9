"""The committed report of what the kernels cost: its targets, and that it is up to date."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

REPORT = Path("kernels/report.json")
PERMUTATION = ("permute", "permute backward", "unpermute", "unpermute backward")
# What the kernels were written to meet.
TARGETS = {
    "all kernels: spills": 0,
    "routing forward: registers": 96,
    "routing backward: registers": 128,
    "plan count_kernel: registers": 64,
    "plan rank_kernel: registers": 64,
    "routing forward: E=8, K=8: warp_instructions_per_token": 65,
    "routing forward: E=16, K=8: warp_instructions_per_token": 85,
    "routing forward: E=64, K=8: warp_instructions_per_token": 350,
    "routing forward: E=256, K=8: warp_instructions_per_token": 1000,
    "routing backward: E=8, K=8: warp_instructions_per_token": 40,
    "routing backward: E=16, K=8: warp_instructions_per_token": 50,
    "routing backward: E=64, K=8: warp_instructions_per_token": 130,
    "routing backward: E=256, K=8: warp_instructions_per_token": 380,
    "plan: warp_instructions_per_token": 100,
    "router forward: kernels": 1,
    "router forward, two launches: kernels": 2,
    "router backward: kernels": 1,
    "plan: kernels": 2,
    "logits to permuted rows: kernels": 5,
    "logits to permuted rows: host_syncs": 0,
    "router forward: ratio": 1.15,
    "router forward, two launches: ratio": 2.0,
    "router backward: ratio": 1.1,
    "plan: share_of_permutation": 0.03,
    **{f"{name}: registers": 48 for name in PERMUTATION},
    **{f"{name}: rows_128bit_share": 1 for name in PERMUTATION},
    **{f"{name}: kernels": 1 for name in PERMUTATION},
    **{f"{name}: ratio": 1.03 for name in PERMUTATION},
}


@pytest.fixture
def report(repository: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((repository / REPORT).read_text())
    return result


def run_report(repository: Path, *options: str, **variables: str) -> subprocess.CompletedProcess:
    """Run the script as a user does: the kernels of this session are interpreted, its are not."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "scripts/kernel_report.py", *options],
        cwd=repository,
        env=environment | {"OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("target", TARGETS)
def test_target(target: str, report: dict[str, Any]) -> None:
    goal = report["targets"][target]
    assert goal["limit"] == TARGETS[target]
    assert not goal["over"]


def test_no_target_is_left_out(report: dict[str, Any]) -> None:
    assert report["targets"].keys() == TARGETS.keys()
    compiled = {case.split(": ")[0] for case in report["code"]}
    assert compiled == {
        "routing forward",
        "routing backward",
        "plan count_kernel",
        "plan rank_kernel",
        *PERMUTATION,
    }
    assert {f"E={e}, K={k}" for e in (8, 16, 64, 256) for k in (2, 4, 8, 16) if k <= e} == {
        case.split(": ")[1] for case in report["code"] if case.startswith("routing forward")
    }


@pytest.mark.slow
def test_no_kernel_has_got_worse(repository: Path) -> None:
    check = run_report(repository, "--check")
    assert check.returncode == 0, check.stdout + check.stderr
    if "NOT compared" in check.stdout:
        pytest.skip(check.stdout.splitlines()[0])


@pytest.mark.slow
def test_check_names_what_is_worse_missing_or_new(
    repository: Path, report: dict[str, Any], tmp_path: Path
) -> None:
    permute, unpermute = (f"{name}: bf16, H=1024, K=8" for name in ("permute", "unpermute"))
    report["triton"] = triton.__version__
    report["code"][permute]["registers"] *= 0.9
    # A better share is a higher one.
    report["code"][permute]["rows_128bit_share"] = 2
    report["code"][f"{unpermute}0"] = report["code"].pop(unpermute)
    (tmp_path / "report.json").write_text(json.dumps(report))
    options = ("--only", "permute: bf16, H=1024, K=8", "--report", str(tmp_path / "report.json"))
    check = run_report(repository, "--check", *options)
    assert check.returncode == 1, check.stderr
    lines = check.stdout.splitlines()
    for figure in ("registers", "rows_128bit_share"):
        assert any(line.startswith(f"{permute}: {figure}: ") for line in lines)
    assert f"{unpermute}: registers: not in the report; write it again" in lines
    assert f"{unpermute}0: registers: gone; write the report again" in lines
    # Nothing else of that kernel has changed.
    assert sum(line.startswith(f"{permute}: ") for line in lines) == 2


@pytest.mark.slow
def test_the_interpreter_is_refused(repository: Path) -> None:
    refused = run_report(repository, "--check", TRITON_INTERPRET="1")
    assert refused.returncode == 1
    assert "TRITON_INTERPRET is set" in refused.stderr
