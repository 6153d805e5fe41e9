"""Whole trainings with the kernels, in Triton's interpreter, against plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import UNSAVED, train

from uar_megatron.reporting.runlog import read_run

pytestmark = pytest.mark.slow

# The interpreter takes milliseconds for each token of a permutation.
SMALL = ("seq_length=8", "max_position_embeddings=8", "global_batch_size=4")
EVERYTHING = (
    *("uar.policy=uar", "uar.budget.alpha=1.5", "uar.bias.enabled=true", "moe_z_loss_coeff=0.001"),
    *("uar.clb.enabled=true", "uar.clb.start_step=5", "uar.clb.warmup_steps=10"),
    *("moe_router_load_balancing_type=[aux_loss,seq_aux_loss]", "moe_aux_loss_coeff=[0.01,0.02]"),
)
BUDGETS = {
    "free, alone": (1, 20, ("uar.budget.mode=free",)),
    "mean, TP2 × EP2": (
        *(2, 8),
        (
            *("uar.budget.mode=mean", "expert_model_parallel_size=2"),
            *("tensor_model_parallel_size=2", "sequence_parallel=true"),
            "expert_tensor_parallel_size=1",
        ),
    ),
}


@pytest.mark.parametrize("budget", BUDGETS)
def test_losses_are_those_of_plain_torch(budget: str, tmp_path: Path) -> None:
    ranks, steps, options = BUDGETS[budget]
    options = (*SMALL, *EVERYTHING, *options, f"train_iters={steps}", *UNSAVED)
    expected = train(ranks, tmp_path / "torch", *options, "uar.kernel_backend=torch")
    found = train(ranks, tmp_path / "triton", *options, "uar.kernel_backend=triton")
    assert len(expected) == steps
    assert found == pytest.approx(expected, rel=1e-5)
    assert found != expected  # the kernels round differently: they did run
    plain, fused = (read_run(tmp_path / d / "run.jsonl").steps for d in ("torch", "triton"))
    for a, b in zip(plain, fused, strict=True):
        assert [m.k_histogram for m in a.layers] == [m.k_histogram for m in b.layers], a.step
        assert [m.load for m in a.layers] == [m.load for m in b.layers], a.step
        assert all(m.rows == pytest.approx(m.k_eff * m.tokens) for m in b.layers)
