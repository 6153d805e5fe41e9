"""20 training losses with UAR off equal the installed Megatron's, on 1 rank and with EP=2."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import train, train_stock

pytestmark = pytest.mark.slow

LAYOUTS = {1: [], 2: ["expert_model_parallel_size=2"]}
OFF = {
    "topk": ["uar.policy=topk"],
    "uar": ["uar.policy=uar", "uar.budget.alpha=0.0", "uar.budget.beta=2.0"],
}


@pytest.mark.parametrize("nproc", LAYOUTS)
def test_losses_equal_stock_to_the_last_bit(nproc: int, tmp_path: Path) -> None:
    stock = train_stock(nproc, tmp_path / "stock", LAYOUTS[nproc])
    assert len(stock) == 20
    assert stock[20] < stock[1]
    for name, off in OFF.items():
        assert train(nproc, tmp_path / name, *LAYOUTS[nproc], *off) == stock, name
    on = ["uar.policy=uar", "uar.budget.alpha=1.0", "uar.budget.beta=2.0"]
    assert train(nproc, tmp_path / "on", *LAYOUTS[nproc], *on) != stock  # the comparison can fail
