"""A policy from outside the package, as the README shows it: no edit inside."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jobs import TIMEOUT, TINY, environment, train
from moe_cases import HIDDEN, hidden_states, stock_layer, transformer_config, uar_layer

from uar_megatron.config import UARConfig
from uar_megatron.errors import ConfigError
from uar_megatron.mcore.kernels import uses_kernels
from uar_megatron.policies import find_policy
from uar_megatron.reporting.runlog import read_run

NAME = "threshold:ThresholdPolicy"


@pytest.fixture
def folder(repository: Path, tmp_path: Path) -> Path:
    """A folder with the README's policy in it."""
    readme = (repository / "README.md").read_text()
    block = readme.split("<!-- own policy -->")[1].split("<!-- end -->")[0]
    text = block.strip().removeprefix("```python\n").removesuffix("```")
    assert len(text.splitlines()) <= 40
    (tmp_path / "threshold.py").write_text(text)
    return tmp_path


@pytest.fixture
def importable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That folder is one in which Python looks."""
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "threshold", raising=False)
    importlib.invalidate_caches()


@pytest.mark.usefixtures("model_parallel", "importable")
@pytest.mark.parametrize("threshold", [0.05, 0.2])
def test_a_layer_routes_by_it(threshold: float) -> None:
    config = transformer_config()
    uar = {
        "policy": NAME,
        "options": {"threshold": threshold},
        "budget": {"k_max": 8},
        "bias": {"enabled": True},
    }
    layer = uar_layer(config, uar, like=stock_layer(config))
    with torch.no_grad():
        layer.router.weight.mul_(20)
    inputs = hidden_states(40)
    output, _ = layer(inputs)
    output.square().sum().backward()
    probs, routing_map = layer.router(inputs)
    scores = torch.softmax(inputs.view(-1, HIDDEN) @ layer.router.weight.T, dim=-1)
    k = (scores > threshold).sum(dim=1).clamp(1, 8)
    assert len(set(k.tolist())) > 1
    assert torch.equal(routing_map.sum(dim=1), k)
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(40))


@pytest.mark.usefixtures("importable")
def test_the_kernels_do_not_know_it() -> None:
    config = transformer_config()
    assert not uses_kernels(UARConfig(policy=NAME), config)
    with pytest.raises(ConfigError, match=NAME):
        uses_kernels(UARConfig(policy=NAME, kernel_backend="triton"), config)


def test_a_module_that_is_nowhere_is_named() -> None:
    sys.modules.pop("threshold", None)
    with pytest.raises(ConfigError, match=r"threshold.*\n.*PYTHONPATH"):
        find_policy(NAME)


@pytest.mark.slow
def test_a_run_trains_with_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two expert-parallel ranks, resumed half-way: k in the log follows the threshold."""
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
    options = (
        *(f"uar.policy={NAME}", "uar.options.threshold=0.13", "uar.budget.k_max=6"),
        *("expert_model_parallel_size=2", "save_interval=5", "train_iters=10"),
    )
    run_dir = folder / "run"
    train(2, run_dir, *options, "exit_interval=5")
    losses = train(2, run_dir, *options)
    assert list(losses) == list(range(1, 11))
    assert losses[10] < losses[1]
    for step in read_run(run_dir / "run.jsonl").steps:
        for layer in step.layers:
            histogram = layer.k_histogram
            assert len(histogram) == 7
            assert histogram[0] == 0.0
            assert sum(share > 0 for share in histogram) > 1
            assert layer.k_eff == pytest.approx(sum(k * s for k, s in enumerate(histogram)))
            assert layer.rows == pytest.approx(layer.k_eff * layer.tokens)


@pytest.mark.slow
def test_it_is_found_where_the_command_is_started_and_refuses_its_settings(folder: Path) -> None:
    """As the installed ``uar`` is: a script elsewhere, which Python would look beside."""
    script = folder / "bin" / "uar"
    script.parent.mkdir()
    script.write_text("from uar_megatron.cli import main\n\nmain()\n")
    result = subprocess.run(
        [
            *(sys.executable, str(script), "train", str(TINY), f"run.dir={folder}/run"),
            *(f"uar.policy={NAME}", "uar.options.threshold=1.5"),
        ],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "uar.options.threshold: 1.5 is no probability" in result.stderr
    assert not (folder / "run").exists()
