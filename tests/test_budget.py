"""Eq. 5 and the budget modes against Python arithmetic."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uar_megatron.budget import ExpertBudget, exact_budget, free_budget
from uar_megatron.config import BudgetConfig, ExpansionConfig, UARConfig, parse_section
from uar_megatron.errors import ConfigError, UARError

ROUND = {"floor": math.floor, "nearest": round, "ceil": math.ceil}
ZSCORES = st.lists(st.floats(-6, 6, width=32), max_size=20)
ALPHAS = st.sampled_from([-1.0, 0.0, 0.3, 0.5, 1.0, 2.0])
BOUNDS = st.tuples(st.integers(0, 4), st.integers(1, 8)).filter(lambda b: b[0] <= b[1])


@given(
    zscores=ZSCORES,
    alpha=ALPHAS,
    beta=st.sampled_from([0.0, 1.5, 2.0]),
    bounds=BOUNDS,
    rounding=st.sampled_from(sorted(ROUND)),
)
@settings(max_examples=200, deadline=None)
def test_free_equals_the_formula(
    zscores: list[float], alpha: float, beta: float, bounds: tuple[int, int], rounding: str
) -> None:
    k = free_budget(torch.tensor(zscores, dtype=torch.float32), alpha, beta, bounds, rounding)
    for z, got in zip(zscores, k.tolist(), strict=True):
        exact = alpha * z + beta
        # fp32 may land on the other side of a rounding border that float64 sees.
        allowed = {
            min(max(ROUND[rounding](exact + nudge), bounds[0]), bounds[1])
            for nudge in (-1e-5, 0.0, 1e-5)
        }
        assert got in allowed
    fields = {"alpha": alpha, "beta": beta, "k_min": bounds[0], "k_max": bounds[1]}
    (layer,) = BudgetConfig.model_validate({**fields, "rounding": rounding}).layers(1, 2)
    constant = layer.constant_k()
    assert (constant is not None) == (alpha == 0 or bounds[0] == bounds[1])
    assert constant is None or all(got == constant for got in k.tolist())


def exact(
    zscores_T: torch.Tensor, alpha: float, bounds: tuple[int, int], total: int
) -> torch.Tensor:
    """One group; the total on the host and on the device must give the same."""
    k = exact_budget(zscores_T.unsqueeze(0), alpha, bounds, total)
    assert torch.equal(
        k, exact_budget(zscores_T.unsqueeze(0), alpha, bounds, torch.tensor([total]))
    )
    return k.squeeze(0)


def by_hand(zscores: list[float], alpha: float, bounds: tuple[int, int], total: int) -> list[int]:
    """Buy one expert after the other where the next one is cheapest; ties: more uncertain first."""
    low, high = bounds
    k = [low] * len(zscores)
    order = sorted(range(len(zscores)), key=lambda t: (-alpha * zscores[t], t))
    while sum(k) < total:
        open_ = [t for t in order if k[t] < high]
        best = min(open_, key=lambda t: (k[t] + 1 - alpha * zscores[t], order.index(t)))
        k[best] += 1
    return k


@given(
    zscores=ZSCORES,
    alpha=ALPHAS,
    bounds=BOUNDS,
    share=st.floats(0, 1),
    equal=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_exact_spends_the_total_where_it_is_cheapest(
    zscores: list[float], alpha: float, bounds: tuple[int, int], share: float, equal: bool
) -> None:
    if equal and zscores:
        zscores = [zscores[0]] * len(zscores)
    low, high = bounds
    total = len(zscores) * low + round(share * len(zscores) * (high - low))
    k = exact(torch.tensor(zscores, dtype=torch.float32), alpha, bounds, total).tolist()
    assert sum(k) == total
    assert all(low <= x <= high for x in k)
    assert k == by_hand(zscores, alpha, bounds, total)
    ranked = sorted(range(len(k)), key=lambda t: alpha * zscores[t])
    for a, b in itertools.pairwise(ranked):
        if alpha * zscores[a] < alpha * zscores[b]:
            assert k[a] <= k[b], "a more uncertain token never gets fewer experts"


def test_exact_is_the_formula_with_one_shift() -> None:
    zscores = torch.randn(300, generator=torch.Generator().manual_seed(0))
    k = exact(zscores, 1.3, (1, 5), 300 * 2)
    shifts = torch.linspace(-2, 4, 60001)
    candidates = [
        s for s in shifts.tolist() if (1.3 * zscores + s).floor().clamp(1, 5).sum() <= 600
    ]
    floor = (1.3 * zscores + max(candidates)).floor().clamp(1, 5).long()
    assert ((k - floor) >= 0).all()
    assert (k - floor).sum() == 600 - floor.sum() <= 1


def test_exact_tells_the_smallest_difference_apart() -> None:
    zscores = torch.tensor([0.0, 1e-30, -1e-30])
    assert exact(zscores, 1.0, (1, 4), 4).tolist() == [1, 2, 1]
    assert exact(zscores, 1.0, (1, 4), 5).tolist() == [2, 2, 1]


def budget_of(expansion: dict[str, int] | None = None, **fields: Any) -> ExpertBudget:
    (layer,) = BudgetConfig.model_validate(fields).layers(1, 2)
    return ExpertBudget(layer, ExpansionConfig.model_validate(expansion or {}), 2, "cpu")


def run_mean(budget: ExpertBudget, steps: int, first: int = 0, drift: float = 0.0) -> list[float]:
    """Mean k of each step when ẑ drifts like a lagging average's; state moves as in training."""
    means = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        zscores = torch.randn(32768, generator=generator) + drift * math.exp(-step / 10)
        k, _ = budget.experts_of(zscores, step)
        budget.accumulate(k, None)
        budget.commit(budget.pending().clone(), torch.tensor(float(len(k))), step)
        means.append(k.double().mean().item())
    return means


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("rounding", sorted(ROUND))
@pytest.mark.parametrize(("target", "k_min"), [(2.0, 1), (2.7, 1), (1.4, 0)])
def test_mean_meets_its_target_without_oscillating(
    alpha: float, rounding: str, target: float, k_min: int
) -> None:
    budget = budget_of(
        mode="mean", alpha=alpha, rounding=rounding, target_mean_k=target, k_min=k_min, k_max=6
    )
    means = run_mean(budget, 150, drift=2.0)
    settled = means[80:]
    assert all(abs(m - target) / target < 0.02 for m in settled)
    offsets = torch.tensor([m - target for m in settled])
    # An oscillation would show as offsets that change sign from step to step with one size.
    correlation = (offsets[1:] * offsets[:-1]).mean() / offsets.square().mean()
    assert correlation > -0.5


def test_mean_goes_on_after_a_resume() -> None:
    fields = {"mode": "mean", "target_mean_k": 2.5, "k_max": 6}
    straight = budget_of(**fields)
    expected = run_mean(straight, 40)
    first, second = budget_of(**fields), budget_of(**fields)
    head = run_mean(first, 20)
    second.load_state_dict(first.state_dict())
    assert set(first.state_dict()) == {"beta"}
    assert head + run_mean(second, 20, first=20) == expected
    assert torch.equal(second.beta, straight.beta)


def test_mean_does_not_wind_up_where_the_target_is_out_of_reach() -> None:
    budget = budget_of(mode="mean", target_mean_k=4.0, k_max=4)
    run_mean(budget, 200)
    assert budget.beta <= 4 + 4 + 1
    empty = budget.beta.clone()
    budget.commit(torch.zeros(1, dtype=torch.float64), torch.tensor(0.0), 200)
    assert torch.equal(budget.beta, empty), "a step without tokens moves nothing"


@pytest.mark.parametrize("mode", ["free", "mean", "exact"])
@pytest.mark.parametrize("rounding", sorted(ROUND))
def test_expansion_sets_in_gently(mode: str, rounding: str) -> None:
    budget = budget_of({"start_step": 5, "ramp_steps": 100}, mode=mode, rounding=rounding)
    zscores = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    assert budget.fixed_k is None
    assert [budget.progress(s) for s in (0, 4, 5, 55, 105, 999)] == [0, 0, 0, 0.5, 1, 1]
    changed = [
        (budget.experts_of(zscores, s)[0] != 2).double().mean().item() for s in range(5, 106)
    ]
    assert changed[0] == 0
    # |α·ẑ| passes the middle of the rounding interval for one token in a hundred at α ≈ 0.2.
    assert changed[10] < 0.001
    assert changed[100] > 0.3
    assert max(b - a for a, b in itertools.pairwise(changed)) < 0.05


def test_padding_has_no_part_in_the_mean() -> None:
    budget = budget_of(mode="mean")
    budget.accumulate(torch.tensor([4, 1, 1]), torch.tensor([False, True, True]))
    assert budget.pending().tolist() == [2]


def of_batch(zscores_SB: torch.Tensor, budget: ExpertBudget) -> torch.Tensor:
    k, _ = budget.experts_of(zscores_SB.flatten(), 0, zscores_SB.shape[1])
    return k.view(zscores_SB.shape)


@pytest.mark.parametrize(
    "fields", [{"mode": "exact"}, {"beta": 4.0, "max_rows_factor": 1.3}], ids=["exact", "bounded"]
)
def test_with_segments_no_layout_changes_k(fields: dict[str, Any]) -> None:
    """Neither how a sequence is cut nor how sequences are batched."""
    budget = budget_of(**fields, alpha=1.5, k_max=6, segment=4)
    zscores = torch.randn(24, 6, generator=torch.Generator().manual_seed(4))
    whole = of_batch(zscores, budget)
    for part in (zscores.split(8), zscores.split(4), zscores.split(12)):
        assert torch.equal(torch.cat([of_batch(p, budget) for p in part]), whole)
    by_sequence = [of_batch(p, budget) for p in zscores.split(2, dim=1)]
    assert torch.equal(torch.cat(by_sequence, dim=1), whole)
    sums = whole.view(6, 4, 6).sum(dim=1)
    if "mode" in fields:
        assert (sums == 4 * 2).all()
    else:
        assert (sums <= math.floor(4 * 2 * 1.3)).all()
    with pytest.raises(UARError, match="6 tokens of a sequence"):
        of_batch(zscores[:6], budget)
    unbounded = budget_of(beta=4.0, alpha=1.5, k_max=6, segment=4)
    assert of_batch(zscores[:6], unbounded).shape == (6, 6)  # Eq. 5 has no use for segments


@given(
    zscores=ZSCORES,
    alpha=ALPHAS,
    beta=st.sampled_from([0.0, 2.0, 5.0]),
    bounds=BOUNDS,
    rounding=st.sampled_from(sorted(ROUND)),
    factor=st.sampled_from([1.0, 1.3, 2.0]),
)
@settings(max_examples=200, deadline=None)
def test_a_bound_on_the_rows_trims_the_least_uncertain_expansions(
    zscores: list[float],
    alpha: float,
    beta: float,
    bounds: tuple[int, int],
    rounding: str,
    factor: float,
) -> None:
    low, high = min(bounds[0], 2), bounds[1]
    fields = {"alpha": alpha, "beta": beta, "k_min": low, "k_max": high, "rounding": rounding}
    z = torch.tensor(zscores, dtype=torch.float32)
    k, wanted = budget_of(**fields, max_rows_factor=factor).experts_of(z, 0)
    free, none = budget_of(**fields).experts_of(z, 0)
    assert none is None
    assert wanted is not None
    assert torch.equal(wanted, free)
    most = math.floor(factor * 2 * len(zscores))
    if free.sum() <= most:
        assert torch.equal(k, free)
    else:
        assert k.tolist() == by_hand(z.tolist(), alpha, (low, high), most)


SCHEDULES = {
    "constant": [2.0, 2.0, 2.0, 2.0, 2.0],
    "ascending": [1.0, 1.5, 2.0, 2.5, 3.0],
    "descending": [3.0, 2.5, 2.0, 1.5, 1.0],
    "pyramid": [1.0, 2.0, 3.0, 2.0, 1.0],
}


@pytest.mark.parametrize("shape", SCHEDULES)
def test_schedules_over_depth(shape: str) -> None:
    schedule = {"shape": shape, "low": 1.0, "high": 3.0}
    budget = BudgetConfig.model_validate({"beta": schedule, "k_max": schedule})
    layers = budget.layers(5, 2)
    assert [layer.beta for layer in layers] == SCHEDULES[shape]
    assert [layer.k_max for layer in layers] == [round(x) for x in SCHEDULES[shape]]
    assert budget.layers(1, 2)[0].beta in (1.0, 2.0, 3.0)


BAD = {
    "k_min above k_max in a layer": ({"k_min": [1, 3], "k_max": 2}, "layer 2 of 2"),
    "list of another length": ({"alpha": [1.0, 2.0, 3.0]}, "3 values for 2 MoE layers"),
    "target out of reach": ({"mode": "exact", "target_mean_k": 5}, "target_mean_k"),
    "negative k_min": ({"k_min": -1}, "negative"),
    "segment": ({"mode": "exact", "target_mean_k": 2.1, "segment": 16}, "no whole number"),
    "rows in exact": ({"mode": "exact", "max_rows_factor": 1.5}, "mode exact"),
    "rows below k_min": ({"max_rows_factor": 1.2, "k_min": 3}, "less than k_min"),
    "rows below the target": (
        {"mode": "mean", "target_mean_k": 3, "max_rows_factor": 1.2},
        "target_mean_k = 3",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_budgets_are_refused(case: str) -> None:
    fields, words = BAD[case]
    with pytest.raises(ConfigError, match=words):
        parse_section(UARConfig, {"budget": fields}, "uar").budget.layers(2, 2)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("x", "uar.budget.alpha: 'x'"),
        ([1, "x"], "uar.budget.alpha.1: 'x'"),
        ({"shape": "up", "low": 1, "high": 2}, "uar.budget.alpha.shape: 'up'"),
        ({"shape": "ascending", "low": 1}, "uar.budget.alpha.high: is missing"),
    ],
)
def test_errors_name_the_place_within_a_per_layer_field(value: object, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_section(UARConfig, {"budget": {"alpha": value}}, "uar")
    assert words in str(error.value)
