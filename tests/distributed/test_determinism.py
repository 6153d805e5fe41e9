"""Two runs of one configuration are one run: losses and checkpoints, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import checkpoint_tensors, train

pytestmark = pytest.mark.slow

OPTIONS = (
    "deterministic_mode=true",
    "uar.policy=uar",
    "uar.bias.enabled=true",
    "uar.clb.enabled=true",
    "uar.clb.start_step=2",
    "uar.budget.mode=exact",
    "expert_model_parallel_size=2",
    "hidden_dropout=0.1",
    "train_iters=8",
)


def test_two_runs_are_bit_equal(tmp_path: Path) -> None:
    first = train(2, tmp_path / "first", *OPTIONS)
    assert train(2, tmp_path / "second", *OPTIONS) == first
    assert len(first) == 8
    ours, theirs = (checkpoint_tensors(tmp_path / name, 8) for name in ("first", "second"))
    assert ours.keys() == theirs.keys()
    assert any(".uar_" in name for name in ours)
    assert all(ours[name].equal(theirs[name]) for name in ours)
