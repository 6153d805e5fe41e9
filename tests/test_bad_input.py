"""Bad input is refused at start-up: one message that helps, exit code 2, nothing half-written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from jobs import TIMEOUT, TINY, environment, torchrun, train_arguments

from uar_megatron.data.build import build_dataset
from uar_megatron.errors import (
    ConfigError,
    TrainingError,
    UARError,
    UnsupportedEnvironmentError,
)
from uar_megatron.mcore.compat import check_megatron_version
from uar_megatron.pretrain import fail

CASES = {
    "unknown key": (["num_layer=2"], ["num_layer", "did you mean 'num_layers'"]),
    "unknown UAR field": (["uar.budget.alfa=1"], ["uar.budget.alfa", "did you mean 'alpha'"]),
    "wrong type": (["num_layers=three"], ["num_layers", "three", "int"]),
    "wrong choice": (["normalization=RMS"], ["normalization", "RMSNorm"]),
    "wrong UAR choice": (["uar.uncertainty=heat"], ["uar.uncertainty", "energy", "entropy"]),
    "alpha not finite": (["uar.budget.alpha=.nan"], ["uar.budget.alpha", "finite"]),
    "k_min above k_max": (["uar.budget.k_min=5"], ["uar.budget.k_min", "k_max = 4"]),
    "k_max above E": (["uar.policy=uar", "uar.budget.k_max=9"], ["k_max", "number of experts"]),
    "unwritable folder": (["run.dir=/proc/nowhere"], ["run.dir", "/proc/nowhere", "writable"]),
    "missing data": (
        ["mock_data=null", "data_path=[no/such/data]", "tokenizer_type=NullTokenizer"],
        ["no/such/data", "uar data"],
    ),
    "missing tokenizer": (
        ["tokenizer_type=HuggingFaceTokenizer", "tokenizer_model=no/such/tokenizer"],
        ["no/such/tokenizer", "prepare the data"],
    ),
    "no data": (["mock_data=null"], ["data_path", "mock_data"]),
    "two bad fields": (["uar.temperature=0", "uar.bias.rate=-1"], ["uar.temperature", "uar.bias"]),
    "missing group": (["parallel=gpu"], ["parallel", "cpu_ep2"]),
    "not an override": (["lr"], ["lr", "key=value"]),
    "Megatron's own refusal": (["num_attention_heads=3"], ["Megatron refuses", "num_attention"]),
    "nothing to calibrate": (
        ["uar.clb.enabled=true", "moe_aux_loss_coeff=0.0"],
        ["uar.clb.enabled", "nothing to calibrate"],
    ),
    "warm-up without end": (["lr_warmup_iters=20"], ["lr_warmup_iters", "0 … 19"]),
    "unknown policy": (
        ["uar.policy=top_k"],
        ["uar.policy", "did you mean 'topk'", "module:Class"],
    ),
    "relu with a softmax after the selection": (
        ["uar.policy=relu", "moe_router_load_balancing_type=none"],
        ["moe_router_pre_softmax", "uar.policy=relu", "gates are the weights"],
    ),
    "cuda without a GPU": (["launch.device=cuda"], ["launch.device", "parallel=cpu"]),
}


def uar(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "uar_megatron.cli", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_is_refused_with_a_message_that_helps(case: str, tmp_path: Path) -> None:
    overrides, expected = CASES[case]
    run_dir = tmp_path / "run"
    result = uar("train", str(TINY), f"run.dir={run_dir}", *overrides)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error:") == 1
    for words in expected:
        assert words in result.stderr
    assert not run_dir.exists()


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A small real dataset whose tokens are bytes."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    build_dataset([text], tmp_path / "data", "bytes", workers=1)
    return tmp_path / "data"


def train_on(dataset: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    keys = ("mock_data=null", f"data_path=[{dataset}]", *overrides)
    return uar("train", str(TINY), f"run.dir={dataset.parent / 'run'}", *keys)


@pytest.mark.slow
def test_corrupt_index(dataset: Path) -> None:
    index = dataset.with_suffix(".idx")
    index.write_bytes(index.read_bytes()[:-7])
    result = train_on(dataset)
    assert result.returncode == 2, result.stderr
    assert f"{dataset}" in result.stderr
    assert "build it again" in result.stderr
    assert not (dataset.parent / "run").exists()


@pytest.mark.slow
def test_vocabulary_mismatch(dataset: Path) -> None:
    result = train_on(dataset, "vocab_size=60", "make_vocab_size_divisible_by=1")
    assert result.returncode == 2, result.stderr
    assert "vocab" in result.stderr
    assert not (dataset.parent / "run").exists()


@pytest.mark.slow
def test_every_rank_refuses_and_one_speaks(tmp_path: Path) -> None:
    job = torchrun(2, *train_arguments(2, tmp_path / "run", "uar.budget.k_min=7"))
    assert job.returncode != 0
    assert job.stderr.count("error: uar.budget.k_min") == 1
    assert "exitcode  : 2" in job.stderr
    assert "Error:" not in job.stderr.replace("ChildFailedError:", "")


@pytest.mark.parametrize(
    ("rank", "error", "waited"),
    [
        ("0", ConfigError("lr", "bad"), []),
        ("1", ConfigError("lr", "bad"), [30.0]),
        ("1", TrainingError("lost"), []),
    ],
)
def test_other_ranks_wait_and_speak_if_nobody_did(
    rank: str,
    error: UARError,
    waited: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    slept: list[float] = []
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr("time.sleep", slept.append)
    with pytest.raises(SystemExit) as left:
        fail(error)
    assert left.value.code == error.exit_code
    assert capsys.readouterr().err == f"error: {error}\n"
    assert slept == waited


@pytest.mark.slow
@pytest.mark.parametrize("content", [None, "a: [1", "[1, 2]"])
def test_missing_or_broken_file(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    result = uar("train", str(path))
    assert result.returncode == 2
    assert str(path) in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("version", ["0.18.2", "0.20.0", "1.0"])
def test_other_megatron_versions_are_named(version: str) -> None:
    with pytest.raises(UnsupportedEnvironmentError, match=rf"{version}.*\n?.*0\.19"):
        check_megatron_version(version)
    check_megatron_version("0.19.3rc0+local")


def test_setup_names_a_python_that_is_too_old(repository: Path, tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "setup.sh"
    script.write_text((repository / "scripts" / "setup.sh").read_text())
    (tmp_path / "pyproject.toml").write_text("")
    result = subprocess.run(
        ["bash", str(script)],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(old)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert str(old) in result.stderr
    assert "3.12" in result.stderr
    assert not (tmp_path / ".venv").exists()
