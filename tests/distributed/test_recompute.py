"""Activation recomputation changes memory, not training."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import UNSAVED, train

pytestmark = pytest.mark.slow

RECOMPUTE = {
    "full": (
        "recompute_granularity=full",
        "recompute_method=uniform",
        "recompute_num_layers=1",
    ),
    "selective": ("recompute_granularity=selective", "recompute_modules=[moe]"),
}
# The batch's own statistics are reduced over ranks in the first pass, and not in the second.
BUDGETS = {
    "free": ("uar.budget.mode=free", "uar.statistics.mode=batch"),
    "mean": ("uar.budget.mode=mean", "uar.budget.target_mean_k=2.5"),
    "exact": ("uar.budget.mode=exact", "uar.budget.target_mean_k=2.5"),
}


@pytest.mark.parametrize("budget", BUDGETS)
def test_losses_are_the_same(budget: str, tmp_path: Path) -> None:
    options = (
        *("routing=uar_ae", "uar.clb.enabled=true", "uar.bias.enabled=true", "train_iters=6"),
        *(*BUDGETS[budget], *UNSAVED),
    )
    plain = train(2, tmp_path / "plain", *options)
    assert len(plain) == 6
    for name, recompute in RECOMPUTE.items():
        assert train(2, tmp_path / name, *options, *recompute) == plain
