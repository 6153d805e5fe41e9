"""Eq. 2, 6 and 7 and the θ_t schedule against float64 arithmetic and autograd."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uar_megatron.balance import (
    BalancingBias,
    balancing_sums,
    epistemic_weight,
    masked_balancing_loss,
    threshold,
)
from uar_megatron.config import BiasConfig, CLBConfig
from uar_megatron.decision import RoutingDecision, Uncertainty


def uncertainty(zscores: torch.Tensor, measure: torch.Tensor | None = None) -> Uncertainty:
    u = zscores * 0 if measure is None else measure
    return Uncertainty(u, u, u, zscores, torch.isfinite(u), u.new_zeros(()), u.new_ones(()))


def test_threshold_schedule() -> None:
    clb = CLBConfig(enabled=True, start_step=10, warmup_steps=4, theta_start=-3.0, theta=1.0)
    assert [threshold(step, clb) for step in (0, 9)] == [None, None]
    assert [threshold(step, clb) for step in (10, 11, 12, 14, 99)] == [-3.0, -2.0, -1.0, 1.0, 1.0]
    assert threshold(10, clb.model_copy(update={"warmup_steps": 0})) == 1.0
    assert threshold(99, clb.model_copy(update={"enabled": False})) is None


def test_cosine_schedule() -> None:
    clb = CLBConfig(enabled=True, warmup_steps=4, theta_start=-3.0, theta=1.0, schedule="cosine")
    steps = [threshold(step, clb) for step in (0, 1, 2, 3, 4, 9)]
    expected = [-1.0 - 2.0 * math.cos(math.pi * step / 4) for step in range(5)]
    assert steps == pytest.approx([*expected, 1.0])


@pytest.mark.parametrize("units", ["sigma", "absolute"])
@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_epistemic_weight_is_a_sigmoid(units: str, floor: float) -> None:
    values = torch.tensor([-2.0, 0.5, 3.0])
    other = torch.tensor([9.0, 9.0, 9.0])
    pair = (values, other) if units == "sigma" else (other, values)
    clb = CLBConfig(units=units, width=0.25, floor=floor)
    expected = [floor + (1 - floor) / (1 + math.exp(-(z - 0.5) / 0.25)) for z in values.tolist()]
    got = epistemic_weight(uncertainty(*pair), 0.5, clb)
    assert got.tolist() == pytest.approx(expected, rel=1e-5)


def test_nonfinite_tokens_have_no_weight() -> None:
    clb = CLBConfig(units="absolute", floor=0.2)
    values = torch.tensor([math.nan, math.inf, 1.0])
    got = epistemic_weight(uncertainty(values * 0, values), 0.0, clb)
    assert got[:2].tolist() == [0.0, 0.0]
    assert got[2] > 0.2


@given(
    tokens=st.integers(0, 9),
    parts=st.integers(1, 3),
    experts=st.sampled_from([1, 6, 8]),
    seed=st.integers(0, 2**16),
    nobody=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_masked_loss_and_its_gradient(
    tokens: int, parts: int, experts: int, seed: int, nobody: bool
) -> None:
    """``tokens`` in each of ``parts`` sequences, each balanced on its own."""
    rng = np.random.default_rng(seed)
    coeff, epsilon = 0.01, 1e-6
    logits = rng.normal(size=(tokens, parts, experts))
    routing_map = rng.random((tokens, parts, experts)) < 0.4
    omega = np.zeros((tokens, parts)) if nobody else rng.random((tokens, parts))
    variable = torch.tensor(logits, requires_grad=True)
    sums = balancing_sums(
        torch.softmax(variable, dim=-1).view(-1, experts),
        torch.tensor(routing_map).view(-1, experts),
        torch.tensor(omega).flatten(),
        parts,
    )
    loss = masked_balancing_loss(
        sums.weighted_BE, sums.slots_BE.double(), sums.omega_B, coeff, epsilon
    )
    loss.backward()
    losses = []
    for b in range(parts):
        value, gradient = loss_by_hand(logits[:, b], routing_map[:, b], omega[:, b], epsilon)
        losses.append(value)
        np.testing.assert_allclose(
            variable.grad[:, b].numpy(), coeff * gradient / parts, rtol=1e-7, atol=1e-14
        )
    assert loss.item() == pytest.approx(coeff * math.fsum(losses) / parts, rel=1e-9, abs=1e-15)


def loss_by_hand(
    logits: np.ndarray, routing_map: np.ndarray, omega: np.ndarray, epsilon: float
) -> tuple[float, np.ndarray]:
    """The loss of one sequence token by token, and its gradient by the softmax's derivative."""
    tokens, experts = logits.shape
    probs = np.exp(logits - logits.max(axis=1, keepdims=True)) if tokens else logits
    probs = probs / probs.sum(axis=1, keepdims=True) if tokens else probs
    fractions = routing_map.sum(axis=0) / max(routing_map.sum(), 1)
    token_loss = [experts * float((fractions * p).sum()) for p in probs]
    weight = omega.sum() + epsilon
    value = math.fsum(w * x for w, x in zip(omega, token_loss, strict=True)) / weight
    # dL/dz_he = E·ω_h/(Σω+ε) · p_he (f_e − Σ_j f_j p_hj)
    inner = probs * (fractions - (probs * fractions).sum(axis=1, keepdims=True))
    return value, experts * (omega / weight)[:, None] * inner


@given(
    seed=st.integers(0, 2**16),
    rule=st.sampled_from(["sign", "proportional"]),
    mask=st.booleans(),
    recentre=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_bias_update(seed: int, rule: str, mask: bool, recentre: bool) -> None:
    rng = np.random.default_rng(seed)
    experts = 6
    config = BiasConfig(enabled=True, rate=0.01, update=rule, recentre=recentre)
    bias = BalancingBias(config, experts, "cpu")
    clb = CLBConfig(lambda_hi=1.0, lambda_lo=0.25)
    weighted = np.zeros(experts)
    for tokens in (0, 3, 8):
        routing_map = rng.random((tokens, experts)) < 0.4
        zscores = rng.normal(size=tokens)
        theta = 0.3 if mask else None
        measured = uncertainty(torch.tensor(zscores, dtype=torch.float32))
        routing_map_TE = torch.tensor(routing_map)
        routed = RoutingDecision(routing_map_TE.float(), routing_map_TE, routing_map_TE.sum(dim=1))
        bias.accumulate(routed, measured, theta, clb)
        for row, z in zip(routing_map, zscores, strict=True):
            weighted += row * ((1.0 if z > 0.3 else 0.25) if mask else 1.0)
    bias.commit(bias.pending().clone())
    offset = weighted.mean() - weighted
    change = np.sign(offset) if rule == "sign" else offset / max(weighted.mean(), 1e-12)
    change = change - change.mean() if recentre else change
    np.testing.assert_allclose(bias.value.numpy(), 0.01 * change, rtol=1e-5, atol=1e-8)
    assert torch.count_nonzero(bias.pending()) == 0


def test_bias_stays_fp32_in_a_bf16_model() -> None:
    bias = BalancingBias(BiasConfig(enabled=True), 4, "cpu")
    bias.value.fill_(1.0 + 1e-4)
    torch.nn.Sequential(bias).bfloat16()
    assert bias.value.dtype == torch.float32
    assert bias.value[0] == np.float32(1.0 + 1e-4)
