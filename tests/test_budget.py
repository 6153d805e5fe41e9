"""Eq. 5 against Python arithmetic."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uar_megatron.budget import expert_budget
from uar_megatron.config import BudgetConfig

ROUND = {"floor": math.floor, "nearest": round, "ceil": math.ceil}


@given(
    zscores=st.lists(st.floats(-6, 6, width=32), max_size=20),
    alpha=st.sampled_from([-1.0, 0.0, 0.3, 0.5, 1.0, 2.0]),
    beta=st.sampled_from([0.0, 1.5, 2.0]),
    bounds=st.tuples(st.integers(0, 4), st.integers(1, 8)).filter(lambda b: b[0] <= b[1]),
    rounding=st.sampled_from(sorted(ROUND)),
)
@settings(max_examples=200, deadline=None)
def test_equals_the_formula(
    zscores: list[float], alpha: float, beta: float, bounds: tuple[int, int], rounding: str
) -> None:
    budget = BudgetConfig(
        alpha=alpha, beta=beta, k_min=bounds[0], k_max=bounds[1], rounding=rounding
    )
    k = expert_budget(torch.tensor(zscores, dtype=torch.float32), budget)
    for z, got in zip(zscores, k.tolist(), strict=True):
        exact = alpha * z + beta
        # fp32 may land on the other side of a rounding border that float64 sees.
        allowed = {
            min(max(ROUND[rounding](exact + nudge), bounds[0]), bounds[1])
            for nudge in (-1e-5, 0.0, 1e-5)
        }
        assert got in allowed
    constant = budget.constant_k()
    if alpha == 0:
        assert all(got == constant for got in k.tolist())
    else:
        assert constant is None


def test_more_uncertain_never_means_fewer_experts() -> None:
    zscores = torch.linspace(-4, 4, 101)
    k = expert_budget(zscores, BudgetConfig(alpha=0.7, beta=2.0, k_min=1, k_max=6))
    assert (k.diff() >= 0).all()
    assert k.min() == 1
    assert k.max() == 4
