"""Eq. 2, 6 and 7 and the θ_t schedule against float64 arithmetic and autograd."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uar_megatron.balance import BalancingBias, epistemic_weight, masked_balancing_loss, threshold
from uar_megatron.config import BiasConfig, CLBConfig


def test_threshold_schedule() -> None:
    clb = CLBConfig(enabled=True, start_step=10, warmup_steps=4, theta_start=-3.0, theta=1.0)
    assert [threshold(step, clb) for step in (0, 9)] == [None, None]
    assert [threshold(step, clb) for step in (10, 11, 12, 14, 99)] == [-3.0, -2.0, -1.0, 1.0, 1.0]
    assert threshold(10, clb.model_copy(update={"warmup_steps": 0})) == 1.0
    assert threshold(99, clb.model_copy(update={"enabled": False})) is None


def test_epistemic_weight_is_a_sigmoid() -> None:
    zscores = torch.tensor([-2.0, 0.5, 3.0])
    expected = [1 / (1 + math.exp(-(z - 0.5) / 0.25)) for z in zscores.tolist()]
    assert epistemic_weight(zscores, 0.5, 0.25).tolist() == pytest.approx(expected, rel=1e-5)


@given(
    tokens=st.integers(0, 9),
    experts=st.sampled_from([1, 6, 8]),
    seed=st.integers(0, 2**16),
    nobody=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_masked_loss_and_its_gradient(tokens: int, experts: int, seed: int, nobody: bool) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(tokens, experts))
    routing_map = rng.random((tokens, experts)) < 0.4
    omega = np.zeros(tokens) if nobody else rng.random(tokens)
    coeff, epsilon = 0.01, 1e-6

    variable = torch.tensor(logits, requires_grad=True)
    loss = masked_balancing_loss(
        torch.softmax(variable, dim=-1),
        torch.tensor(omega),
        torch.tensor(routing_map).sum(dim=0).double(),
        torch.tensor(omega.sum()),
        coeff,
        epsilon,
    )
    probs = np.exp(logits - logits.max(axis=1, keepdims=True)) if tokens else logits
    probs = probs / probs.sum(axis=1, keepdims=True) if tokens else probs
    fractions = routing_map.sum(axis=0) / max(routing_map.sum(), 1)
    token_loss = [experts * float((fractions * p).sum()) for p in probs]
    weight = omega.sum() + epsilon
    expected = coeff * math.fsum(w * x for w, x in zip(omega, token_loss, strict=True)) / weight
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-15)

    loss.backward()
    # dL/dz_he = coeff·E·ω_h/(Σω+ε) · p_he (f_e − Σ_j f_j p_hj): the softmax's derivative by hand.
    inner = probs * (fractions - (probs * fractions).sum(axis=1, keepdims=True))
    by_hand = coeff * experts * (omega / weight)[:, None] * inner
    np.testing.assert_allclose(variable.grad.numpy(), by_hand, rtol=1e-7, atol=1e-14)


@given(
    seed=st.integers(0, 2**16), rule=st.sampled_from(["sign", "proportional"]), mask=st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_bias_update(seed: int, rule: str, mask: bool) -> None:
    rng = np.random.default_rng(seed)
    experts = 6
    bias = BalancingBias(BiasConfig(enabled=True, rate=0.01, update=rule), experts, "cpu")
    clb = CLBConfig(lambda_hi=1.0, lambda_lo=0.25)
    weighted = np.zeros(experts)
    for tokens in (0, 3, 8):
        routing_map = rng.random((tokens, experts)) < 0.4
        zscores = rng.normal(size=tokens)
        theta = 0.3 if mask else None
        bias.accumulate(
            torch.tensor(routing_map), torch.tensor(zscores, dtype=torch.float32), theta, clb
        )
        for row, z in zip(routing_map, zscores, strict=True):
            weighted += row * ((1.0 if z > 0.3 else 0.25) if mask else 1.0)
    bias.commit(bias.pending().clone())
    offset = weighted.mean() - weighted
    change = np.sign(offset) if rule == "sign" else offset / max(weighted.mean(), 1e-12)
    np.testing.assert_allclose(bias.value.numpy(), 0.01 * change, rtol=1e-5, atol=1e-9)
    assert torch.count_nonzero(bias.pending()) == 0


def test_bias_stays_fp32_in_a_bf16_model() -> None:
    bias = BalancingBias(BiasConfig(enabled=True), 4, "cpu")
    bias.value.fill_(1.0 + 1e-4)
    torch.nn.Sequential(bias).bfloat16()
    assert bias.value.dtype == torch.float32
    assert bias.value[0] == np.float32(1.0 + 1e-4)
