"""ReLU routing reaches its target in a real training."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
from jobs import UNSAVED, train

from uar_megatron.reporting.runlog import read_run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("target", [2.0, 3.5])
def test_relu_goes_through_its_three_stages(target: float, tmp_path: Path) -> None:
    """Dense, sparsifying, and at the target sparsity to 3 % of it."""
    train(
        1,
        tmp_path,
        *("routing=relu", f"uar.budget.target_mean_k={target}", "num_experts=16"),
        *(
            "moe_router_load_balancing_type=none",
            "train_iters=200",
            "log_interval=10",
            "global_batch_size=4",
            "lr_decay_style=constant",
            *UNSAVED,
        ),
    )
    steps = read_run(tmp_path / "run.jsonl").steps
    sparsity = [1 - fmean(m.k_eff for m in step.layers) / 16 for step in steps]
    coeffs = [step.layers[0].policy["l1_coeff"] for step in steps]
    assert sparsity[0] < 0.65  # a router that starts around 0
    assert coeffs[5] > 100 * coeffs[0]
    assert fmean(sparsity[-5:]) == pytest.approx(1 - target / 16, rel=0.03)
    assert all(m.policy == steps[-1].layers[0].policy for m in steps[-1].layers)
