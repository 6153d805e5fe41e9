"""Selective Sinkhorn routing against the transport plan, scaled to its marginals in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import build_policy, decide

from uar_megatron.policies.base import RoutingPolicy
from uar_megatron.policies.sinkhorn_selective import log_expert_potential


def sinkhorn_policy(
    experts: int, topk: int, scaling_factor: float | None = None, **options: object
) -> RoutingPolicy:
    uar = {"policy": "sinkhorn_selective", "sinkhorn": {"probability": 1.0, **options}}
    return build_policy(uar, experts=experts, topk=topk, scaling_factor=scaling_factor)


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def transport_plan(cost: np.ndarray, xi: float) -> tuple[np.ndarray, np.ndarray]:
    """Π = diag(u)·exp(C/ξ)·diag(v) with rows that sum to 1 and columns that sum to T/E, and v."""
    tokens, experts = cost.shape
    kernel = np.exp(cost / xi)
    u, v = np.ones(tokens), np.ones(experts)
    for _ in range(3000):
        u = 1 / (kernel @ v)
        v = (tokens / experts) / (kernel.T @ u)
        plan = u[:, None] * kernel * v
        if np.abs(plan.sum(axis=1) - 1).max() < 1e-13:
            break
    return plan, v


CASES = {
    "seed": st.integers(0, 2**16),
    "tokens": st.sampled_from([1, 2, 5, 12]),
    "shape": st.sampled_from([(1, 1), (6, 2), (7, 7), (8, 1)]),
    "cost": st.sampled_from(["softmax", "logits"]),
    "xi": st.sampled_from([0.5, 1.0]),
}


@given(**CASES, scaling_factor=st.sampled_from([None, 2.5]))
@settings(max_examples=80, deadline=None)
def test_equals_the_reference(
    seed: int,
    tokens: int,
    shape: tuple[int, int],
    cost: str,
    xi: float,
    scaling_factor: float | None,
) -> None:
    """Experts are the top-k of a row of the plan; weights its entries, normalised."""
    experts, topk = shape
    policy = sinkhorn_policy(experts, topk, scaling_factor, cost=cost, xi=xi, iterations=400)
    logits = np.random.default_rng(seed).normal(size=(tokens, experts))
    decision = decide(policy, torch.tensor(logits))
    plan, _ = transport_plan(softmax(logits) if cost == "softmax" else logits, xi)
    np.testing.assert_allclose(plan.sum(axis=1), 1, atol=1e-9)
    np.testing.assert_allclose(plan.sum(axis=0), tokens / experts, atol=1e-9)
    for t, row in enumerate(plan):
        order = sorted(range(experts), key=lambda e: -row[e])
        if topk < experts and row[order[topk - 1]] - row[order[topk]] < 1e-4:
            continue
        chosen = order[:topk]
        expected = np.zeros(experts)
        for e in chosen:
            expected[e] = row[e] / sum(row[j] for j in chosen) * (scaling_factor or 1.0)
        np.testing.assert_allclose(decision.probs_TE[t].numpy(), expected, rtol=1e-3, atol=1e-6)
        assert decision.routing_map_TE[t].numpy().nonzero()[0].tolist() == sorted(chosen)


@given(**CASES)
@settings(max_examples=40, deadline=None)
def test_the_marginals_converge(
    seed: int, tokens: int, shape: tuple[int, int], cost: str, xi: float
) -> None:
    """Rows exactly after every iteration; columns the closer, the more of them."""
    experts, _ = shape
    logits = np.random.default_rng(seed).normal(size=(tokens, experts))
    matrix = torch.tensor(softmax(logits) if cost == "softmax" else logits) / xi
    errors = []
    for iterations in (1, 10, 400):
        log_v_E = log_expert_potential(matrix, iterations)
        plan = torch.softmax(matrix + log_v_E, dim=1)  # u makes the rows sum to 1
        errors.append(float((plan.sum(dim=0) - tokens / experts).abs().max()))
    assert errors[0] >= errors[1] - 1e-12
    assert errors[1] >= errors[2] - 1e-12
    assert errors[2] < 1e-6


@given(**CASES)
@settings(max_examples=25, deadline=None)
def test_the_gradient_flows_through_the_cost_alone(
    seed: int, tokens: int, shape: tuple[int, int], cost: str, xi: float
) -> None:
    """Central differences of the softmax over the selected C/ξ + log v, with v held."""
    experts, topk = shape
    policy = sinkhorn_policy(experts, topk, cost=cost, xi=xi, iterations=400)
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(tokens, experts))
    wanted = rng.normal(size=(tokens, experts))
    variable = torch.tensor(logits, requires_grad=True)
    decision = decide(policy, variable)
    (decision.probs_TE * torch.tensor(wanted)).sum().backward()
    _, v = transport_plan(softmax(logits) if cost == "softmax" else logits, xi)
    selected = decision.routing_map_TE.numpy()

    def value(z: np.ndarray) -> float:
        c = softmax(z) if cost == "softmax" else z
        mass = np.exp(c / xi) * v * selected
        return float((mass / mass.sum(axis=1, keepdims=True) * wanted).sum())

    for t in range(tokens):
        for e in range(experts):
            up, down = logits.copy(), logits.copy()
            up[t, e] += 1e-5
            down[t, e] -= 1e-5
            slope = (value(up) - value(down)) / 2e-5
            assert float(variable.grad[t, e]) == pytest.approx(slope, rel=2e-3, abs=2e-5)


def test_a_skewed_router_is_balanced_by_the_plan() -> None:
    """All tokens prefer expert 0, some more than others: no expert gets more than its share."""
    logits = torch.zeros(40, 4)
    logits[:, 0] = 3.0
    logits += torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    topk = logits.topk(1).indices.flatten().bincount(minlength=4)
    policy = sinkhorn_policy(4, 1, cost="logits", xi=0.1, iterations=2000)
    load = decide(policy, logits).routing_map_TE.sum(dim=0)
    assert topk.max() > 30
    assert load.max() <= 12


def test_only_drawn_steps_of_training_are_routed_by_the_plan() -> None:
    """At the others, and in evaluation, the decision is Megatron's to the last bit."""
    policy = build_policy(
        {"policy": "sinkhorn_selective", "sinkhorn": {"probability": 0.25}},
        experts=6,
        scaling_factor=2.5,
    )
    logits = 3 * torch.randn(30, 6, generator=torch.Generator().manual_seed(2))
    probs, routing_map = policy.settings.fixed_topk(logits, 2)
    drawn = [step for step in range(400) if not policy.is_stock(step)]
    assert 60 < len(drawn) < 140  # 100 ± 4.6 σ
    assert drawn == [step for step in range(400) if not policy.is_stock(step)]
    gaps = {b - a for a, b in itertools.pairwise(drawn)}
    assert len(gaps) > 5, "drawn, not every so many steps"
    for step in range(20):
        decision = decide(policy, logits, step=step)
        is_megatrons = torch.equal(decision.probs_TE, probs)
        assert is_megatrons == policy.is_stock(step) == (step not in drawn)
    policy.is_training = False
    for step in range(20):
        assert policy.is_stock(step)
        decision = decide(policy, logits, step=step)
        assert torch.equal(decision.probs_TE, probs)
        assert torch.equal(decision.routing_map_TE, routing_map)


@pytest.mark.parametrize(("probability", "is_stock"), [(0.0, True), (1.0, False)])
def test_never_and_always(probability: float, is_stock: bool) -> None:
    policy = sinkhorn_policy(4, 2, probability=probability)
    assert all(policy.is_stock(step) == is_stock for step in range(1000))


def test_all_layers_and_ranks_draw_the_same_steps() -> None:
    first, second = sinkhorn_policy(4, 2, probability=0.5), sinkhorn_policy(8, 2, probability=0.5)
    drawn = [[policy.is_stock(step) for step in range(100)] for policy in (first, second)]
    assert drawn[0] == drawn[1]
