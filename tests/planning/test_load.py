"""Imbalance of ranks: drawn, and replayed from a run log."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from records import start, step

from uar_megatron.errors import ConfigError, UARError
from uar_megatron.planning.load import dirichlet, fullest_rank, replay
from uar_megatron.reporting.runlog import RunLogWriter
from uar_megatron.reporting.schema import Step


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Two MoE layers of four experts that get 0.1, 0.2, 0.3 and 0.4 of the slots."""
    writer = RunLogWriter(tmp_path / "run.jsonl")
    for record in (start(0), step(1), step(2, layers=0), step(3)):
        writer.write(record)
    writer.close()
    return tmp_path


def test_loads_of_a_run_are_folded_onto_ranks(log: Path) -> None:
    two = replay(log, 4, 2, 2)
    assert [one.expected for one in two] == pytest.approx([1.4, 1.4])  # 0.7 of 2 ranks
    assert replay(log / "run.jsonl", 4, 4, 2)[0].worst == pytest.approx(1.6)
    assert replay(log, 4, 1, 2)[0].expected == pytest.approx(1.0)
    assert "2 records" in two[0].source


def test_mean_and_worst_of_records(tmp_path: Path) -> None:
    writer = RunLogWriter(tmp_path / "run.jsonl")
    other = step(2)
    for layer in other.layers:
        layer.load = [0.25, 0.25, 0.25, 0.25]
    for record in (start(0), step(1), other):
        writer.write(record)
    writer.close()
    found = replay(tmp_path, 4, 2, 2)[0]
    assert (found.expected, found.worst) == pytest.approx((1.2, 1.4))


def test_the_log_of_another_model_is_refused(log: Path) -> None:
    with pytest.raises(ConfigError, match="2 MoE layers, the configuration has 7"):
        replay(log, 4, 2, 7)
    with pytest.raises(ConfigError, match="4 experts, the configuration has 8"):
        replay(log, 8, 2, 2)
    with pytest.raises(UARError, match="no run log"):
        replay(log / "elsewhere", 4, 2, 2)


@pytest.fixture
def two_records(tmp_path: Path) -> tuple[Path, Step, Step]:
    """Where a log of two steps goes; the first has the loads of ``records.layer``."""
    return tmp_path / "run.jsonl", step(1), step(2)


def write(path: Path, *steps: Step) -> None:
    writer = RunLogWriter(path)
    for record in (start(0), *steps):
        writer.write(record)
    writer.close()


def test_every_record_and_layer_is_checked(two_records: tuple[Path, Step, Step]) -> None:
    path, first, second = two_records
    write(path, first, step(2, layers=1))
    with pytest.raises(ConfigError, match="1 MoE layers, the configuration has 2"):
        replay(path, 4, 2, 2)
    path.unlink()
    second.layers[1].load = [0.2] * 5
    write(path, first, second)
    with pytest.raises(ConfigError, match="5 experts, the configuration has 4"):
        replay(path, 4, 2, 2)
    path.unlink()
    second.layers[0].load = second.layers[1].load = [0.125] * 8
    write(path, first, second)
    with pytest.raises(ConfigError, match="8 experts, the configuration has 4"):
        replay(path, 4, 2, 2)


@pytest.mark.parametrize("load", [[0.0] * 4, [math.nan, 0.5, 0.3, 0.2], [math.inf, 0.0, 0.0, 0.0]])
def test_a_load_that_says_nothing_is_left_out(
    load: list[float], two_records: tuple[Path, Step, Step]
) -> None:
    path, first, second = two_records
    second.layers[0].load = load
    write(path, first, second)
    found = replay(path, 4, 2, 2)
    assert [one.expected for one in found] == pytest.approx([1.4, 1.4])
    assert [one.source.split()[0] for one in found] == ["1", "2"]
    path.unlink()
    write(path, second)
    with pytest.raises(ConfigError, match="all zero or not finite"):
        replay(path, 4, 2, 2)


def test_drawn_loads_are_those_of_experts_folded_onto_ranks() -> None:
    """Against experts drawn one by one, and one rank, and nearly even loads."""
    shares = np.random.default_rng(5).dirichlet(np.full(64, 0.5), 20_000)
    fullest = [fullest_rank(load, 8) for load in shares]
    found = dirichlet(0.5, 64, 8)
    assert found.expected == pytest.approx(np.mean(fullest), rel=0.02)
    assert found.worst == pytest.approx(np.quantile(fullest, 0.99), rel=0.05)
    assert dirichlet(0.5, 64, 1).expected == pytest.approx(1.0)
    assert 1.0 < dirichlet(1e4, 64, 8).expected < 1.01
    assert dirichlet(0.5, 64, 8) == found
    for impossible in (0.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="--dirichlet"):
            dirichlet(impossible, 64, 8)
