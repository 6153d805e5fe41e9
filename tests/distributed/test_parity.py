"""20 training losses with UAR off equal the installed Megatron's, on 1 rank and with EP=2."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import UNSAVED, train, train_stock

pytestmark = pytest.mark.slow

LAYOUTS = {
    1: [*UNSAVED],
    # Everything of Megatron's that has a say in routing, at once.
    2: [
        "expert_model_parallel_size=2",
        "moe_router_load_balancing_type=[aux_loss,seq_aux_loss,global_aux_loss]",
        "moe_aux_loss_coeff=[0.01,0.02,0.03]",
        "moe_router_score_function=sigmoid",
        "moe_router_enable_expert_bias=true",
        "moe_router_num_groups=4",
        "moe_router_group_topk=2",
        "moe_z_loss_coeff=0.001",
        "moe_expert_capacity_factor=1.5",
        *UNSAVED,
    ],
}
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
