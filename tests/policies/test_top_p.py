"""Top-p routing against Eq. 17, expert by expert in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import build_policy, decide

SHAPES = [(1, 1, 1), (6, 1, 6), (8, 1, 4), (8, 3, 3), (12, 2, 12), (13, 0, 5)]


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def experts_needed(probs: np.ndarray, p: float) -> int:
    """min{n: the n largest probabilities sum to at least p}; all of them where rounding forbids."""
    total = 0.0
    for n, prob in enumerate(sorted(probs, reverse=True), start=1):
        total += prob
        if total >= p:
            return n
    return len(probs)


def is_borderline(probs: np.ndarray, p: float) -> bool:
    """Whether float32 may round a sum to the other side of p."""
    sums = np.cumsum(sorted(probs, reverse=True))
    return bool((np.abs(sums - p) < 1e-6).any())


@given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(0, 6),
    shape=st.sampled_from(SHAPES),
    p=st.floats(0.05, 0.99),
    pre_softmax=st.booleans(),
    has_bias=st.booleans(),
    has_ties=st.booleans(),
    scaling_factor=st.sampled_from([None, 2.5]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)
@settings(max_examples=120, deadline=None)
def test_equals_the_reference(
    seed: int,
    tokens: int,
    shape: tuple[int, int, int],
    p: float,
    pre_softmax: bool,
    has_bias: bool,
    has_ties: bool,
    scaling_factor: float | None,
    dtype: torch.dtype,
) -> None:
    experts, low, high = shape
    policy = build_policy(
        {"policy": "top_p", "top_p": {"p": p}, "budget": {"k_min": low, "k_max": high}},
        experts=experts,
        topk=1,
        pre_softmax=pre_softmax,
        scaling_factor=scaling_factor,
    )
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(tokens, experts)) * 2
    variable = torch.tensor(np.round(logits) if has_ties else logits, dtype=dtype)
    logits = variable.double().numpy()
    bias = rng.normal(size=experts) / 4
    decision = decide(policy, variable, torch.tensor(bias) if has_bias else None)
    for t, row in enumerate(logits):
        probs = softmax(row)
        if is_borderline(probs, p):
            continue
        n = min(max(experts_needed(probs, p), low), high)
        score = probs + bias if has_bias else probs
        chosen = sorted(range(experts), key=lambda e: (-score[e], e))[:n]
        total = 1.0 if pre_softmax else sum(probs[e] for e in chosen)
        expected = np.zeros(experts)
        for e in chosen:
            expected[e] = probs[e] / total * (scaling_factor or 1.0)
        assert int(decision.k_T[t]) == n
        assert decision.routing_map_TE[t].numpy().nonzero()[0].tolist() == sorted(chosen)
        rtol = 1e-2 if dtype == torch.bfloat16 else 2e-5
        np.testing.assert_allclose(
            decision.probs_TE[t].double().numpy(), expected, rtol=rtol, atol=1e-7
        )


@given(seed=st.integers(0, 2**16), p=st.floats(0.05, 0.999), scale=st.floats(0.0, 6.0))
@settings(max_examples=30, deadline=None)
def test_the_set_collects_p_and_no_smaller_one_does(seed: int, p: float, scale: float) -> None:
    """Without bounds: Σ ≥ p, and it falls short of p without the least of them."""
    uar = {"policy": "top_p", "top_p": {"p": p}, "budget": {"k_max": 12}}
    policy = build_policy(uar, experts=12, pre_softmax=True)
    logits = scale * torch.randn(20, 12, generator=torch.Generator().manual_seed(seed))
    decision = decide(policy, logits)
    probs = torch.softmax(logits.double(), dim=-1)
    for t in range(20):
        chosen = probs[t][decision.routing_map_TE[t]]
        left = probs[t][~decision.routing_map_TE[t]]
        assert chosen.sum() >= p - 1e-6
        assert chosen.sum() - chosen.min() < p + 1e-6
        assert not len(left) or left.max() <= chosen.min() + 1e-7


@pytest.mark.parametrize(("p", "n"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_at_least_p_not_more_than_p(p: float, n: int) -> None:
    """Quarters are exact: a sum that equals p is enough."""
    uar = {"policy": "top_p", "top_p": {"p": p}, "budget": {"k_max": 4}}
    decision = decide(build_policy(uar, experts=4), torch.zeros(3, 4))
    assert decision.k_T.tolist() == [n] * 3
    assert decision.routing_map_TE[:, :n].all()


def mean_entropy(logits: np.ndarray, valid: np.ndarray) -> float:
    """Mean over the tokens that are no padding of −Σ p ln p."""
    entropies = []
    for row, counts in zip(logits, valid, strict=True):
        if counts:
            entropies.append(-math.fsum(q * math.log(q) for q in softmax(row)))
    return math.fsum(entropies) / max(len(entropies), 1)


@given(
    seed=st.integers(0, 2**16), tokens=st.integers(0, 5), padding=st.sampled_from(["no", "some"])
)
@settings(max_examples=40, deadline=None)
def test_the_loss_is_the_mean_entropy(seed: int, tokens: int, padding: str) -> None:
    """Value, and gradient by central differences of the reference."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(tokens, 6)) * 2
    valid = rng.random(tokens) < (0.6 if padding == "some" else 2.0)
    uar = {"policy": "top_p", "top_p": {"entropy_coeff": 0.3}}
    policy = build_policy(uar, experts=6)
    variable = torch.tensor(logits, requires_grad=True)
    loss = policy.loss(
        variable,
        torch.ones(tokens, 6, dtype=torch.bool),
        None if padding == "no" else torch.tensor(valid, dtype=torch.bool),
        torch.tensor(float(valid.sum())),
        lambda value: value,
    )
    assert loss is not None
    assert loss.coeff == 0.3
    assert float(loss.value) == pytest.approx(mean_entropy(logits, valid), rel=1e-5, abs=1e-7)
    loss.value.backward()
    for t in range(tokens):
        for e in range(6):
            up, down = logits.copy(), logits.copy()
            up[t, e] += 1e-5
            down[t, e] -= 1e-5
            slope = (mean_entropy(up, valid) - mean_entropy(down, valid)) / 2e-5
            assert float(variable.grad[t, e]) == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_probabilities_of_zero_have_no_entropy_and_a_finite_gradient() -> None:
    """Logits far apart: p underflows, and p ln p is 0, with a gradient."""
    policy = build_policy({"policy": "top_p"}, experts=4)
    variable = torch.tensor([[0.0, -200.0, -300.0, -400.0]], requires_grad=True)
    routed = torch.ones(1, 4, dtype=torch.bool)
    loss = policy.loss(variable, routed, None, torch.tensor(1.0), lambda value: value)
    assert loss is not None
    loss.value.backward()
    assert float(loss.value) == 0.0
    assert torch.isfinite(variable.grad).all()


def test_without_a_coefficient_there_is_no_loss() -> None:
    policy = build_policy({"policy": "top_p", "top_p": {"entropy_coeff": 0}}, experts=4)
    routed = torch.ones(1, 4, dtype=torch.bool)
    assert policy.loss(torch.zeros(1, 4), routed, None, torch.tensor(1.0), lambda v: v) is None
