"""ReLU routing and its L1 loss against the equations of ReMoE, number by number in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import build_policy, decide

from uar_megatron.config import ReLUConfig
from uar_megatron.policies.relu import ReLUPolicy, SparsityControl


def relu_policy(experts: int, target: float, layers: int = 1, **options: float) -> ReLUPolicy:
    uar = {"policy": "relu", "budget": {"target_mean_k": target}, "relu": options}
    policy = build_policy(uar, experts=experts, topk=1, pre_softmax=True, layers=layers)
    assert isinstance(policy, ReLUPolicy)
    return policy


@given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(0, 6),
    experts=st.sampled_from([1, 6, 8, 13]),
    has_zeros=st.booleans(),
    scaling_factor=st.sampled_from([None, 2.5]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)
@settings(max_examples=100, deadline=None)
def test_weights_are_the_positive_logits(
    seed: int,
    tokens: int,
    experts: int,
    has_zeros: bool,
    scaling_factor: float | None,
    dtype: torch.dtype,
) -> None:
    """A logit of exactly 0 is no expert; a token may have none, or all."""
    policy = build_policy(
        {"policy": "relu"},
        experts=experts,
        topk=1,
        pre_softmax=True,
        scaling_factor=scaling_factor,
    )
    logits = np.random.default_rng(seed).normal(size=(tokens, experts))
    variable = torch.tensor(np.round(logits) if has_zeros else logits, dtype=dtype)
    variable.requires_grad_()
    decision = decide(policy, variable)
    weights = torch.rand(tokens, experts, dtype=dtype)
    (gradient,) = torch.autograd.grad((decision.probs_TE * weights).sum(), variable)
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-6
    for t in range(tokens):
        active = 0
        for e in range(experts):
            z = float(variable[t, e])
            scale = scaling_factor or 1.0
            assert bool(decision.routing_map_TE[t, e]) == (z > 0)
            assert float(decision.probs_TE[t, e]) == pytest.approx(max(z, 0) * scale, rel=rtol)
            slope = scale * float(weights[t, e]) if z > 0 else 0.0
            assert float(gradient[t, e]) == pytest.approx(slope, rel=rtol)
            active += z > 0
        assert int(decision.k_T[t]) == active


def test_the_extremes_have_no_expert_and_all_of_them() -> None:
    policy = relu_policy(4, 2.0)
    logits = torch.tensor([[-1.0] * 4, [1.0] * 4, [0.0] * 4], requires_grad=True)
    decision = decide(policy, logits)
    assert decision.k_T.tolist() == [0, 4, 0]
    assert policy.max_k == 4
    decision.probs_TE.sum().backward()
    assert logits.grad.sum(dim=1).tolist() == [0, 4, 0]


def loads(logits: np.ndarray, valid: np.ndarray, target: float) -> np.ndarray:
    """f_e = E/(K·T) Σ_t 1[R_te > 0]."""
    experts = logits.shape[1]
    counts = np.zeros(experts)
    for row, counted in zip(logits, valid, strict=True):
        for e in range(experts):
            counts[e] += bool(counted and row[e] > 0)
    return experts / (target * max(valid.sum(), 1)) * counts


def l1_loss(logits: np.ndarray, valid: np.ndarray, fractions: np.ndarray, layers: int) -> float:
    """1/(L·T) Σ_t Σ_e f_e·R_te of one layer."""
    terms = [
        fractions[e] * max(row[e], 0.0)
        for row, counted in zip(logits, valid, strict=True)
        for e in range(len(row))
        if counted
    ]
    return math.fsum(terms) / (layers * max(valid.sum(), 1))


@given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(0, 6),
    experts=st.sampled_from([1, 6, 8]),
    target=st.sampled_from([0.5, 1.0]),
    layers=st.sampled_from([1, 3]),
    is_padded=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_the_loss_is_the_load_balanced_l1_norm(
    seed: int, tokens: int, experts: int, target: float, layers: int, is_padded: bool
) -> None:
    """Value, and gradient by central differences with the loads held."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(tokens, experts))
    logits += 0.01 * np.sign(logits)  # away from the kink
    valid = rng.random(tokens) < (0.6 if is_padded else 2.0)
    policy = relu_policy(experts, target, layers, initial_coeff=0.125)
    variable = torch.tensor(logits, requires_grad=True)
    decision = decide(policy, variable)
    valid_T = torch.tensor(valid, dtype=torch.bool)
    loss = policy.loss(
        variable,
        decision.routing_map_TE & valid_T.unsqueeze(-1),
        valid_T if is_padded else None,
        torch.tensor(float(valid.sum())),
        lambda value: value,
    )
    fractions = loads(logits, valid, target)
    assert float(loss.coeff) == 0.125
    expected = l1_loss(logits, valid, fractions, layers)
    assert float(loss.value.detach()) == pytest.approx(expected, rel=1e-5, abs=1e-9)
    loss.value.backward()
    for t in range(tokens):
        for e in range(experts):
            up, down = logits.copy(), logits.copy()
            up[t, e] += 1e-4
            down[t, e] -= 1e-4
            slope = l1_loss(up, valid, fractions, layers) - l1_loss(down, valid, fractions, layers)
            assert float(variable.grad[t, e]) == pytest.approx(slope / 2e-4, rel=1e-4, abs=1e-8)


def test_a_balanced_layer_at_the_target_has_the_plain_l1_norm() -> None:
    """f_e = 1 where every expert has its share: the sum over ranks of the summands is the loss."""
    policy = relu_policy(4, 2.0)
    logits = torch.tensor([[3.0, 1.0, -1.0, -1.0], [-1.0, -1.0, 2.0, 2.0]])
    routed = logits > 0
    halves = [
        policy.loss(logits[t : t + 1], routed[t : t + 1], None, torch.tensor(2.0), lambda v: v * 2)
        for t in (0, 1)
    ]
    # Each half sees its own loads doubled, as if the other rank had the same.
    assert [float(half.value) for half in halves] == pytest.approx([2 * 4 / 2, 2 * 4 / 2])
    whole = policy.loss(logits, routed, None, torch.tensor(2.0), lambda v: v)
    assert float(whole.value) == pytest.approx(8 / 2)


def test_padding_that_is_not_finite_stays_out_of_the_loss() -> None:
    policy = relu_policy(3, 1.0)
    logits = torch.tensor([[1.0, -1.0, 2.0], [math.nan, math.inf, 1.0]], requires_grad=True)
    valid = torch.tensor([True, False])
    routed = (logits > 0) & valid.unsqueeze(-1)
    loss = policy.loss(logits, routed, valid, torch.tensor(1.0), lambda v: v)
    assert float(loss.value.detach()) == pytest.approx(3 * (1 + 2))
    loss.value.backward()
    assert torch.isfinite(logits.grad).all()


@given(
    seed=st.integers(0, 2**16),
    experts=st.sampled_from([4, 6]),
    target=st.sampled_from([1.0, 2.0, 2.5]),
    multiplier=st.sampled_from([1.1, 1.2, 2.0]),
)
@settings(max_examples=60, deadline=None)
def test_lambda_follows_the_sign_of_what_is_missing(
    seed: int, experts: int, target: float, multiplier: float
) -> None:
    """λ·α^sign((1 − K/E) − S) step by step; S of all tokens of a step; unchanged at equality."""
    rng = np.random.default_rng(seed)
    control = SparsityControl(
        ReLUConfig(initial_coeff=1e-8, multiplier=multiplier), target, experts, "cpu"
    )
    coeff = 1e-8
    for step in range(8):
        active, tokens = 0, 0
        for _ in range(2):
            k = rng.integers(0, experts + 1, size=int(rng.integers(0, 4)))
            valid = rng.random(len(k)) < 0.8
            control.accumulate(torch.tensor(k), torch.tensor(valid, dtype=torch.bool))
            active, tokens = active + int(k[valid].sum()), tokens + int(valid.sum())
        if step == 3:  # hit the target exactly
            tokens, active = 2 * experts, round(2 * experts * target)
            control._pending.fill_(active)
        control.commit(control.pending().clone(), torch.tensor(float(tokens)), step)
        missing = active - target * tokens  # of the sign of (1 − K/E) − S
        coeff *= multiplier ** ((missing > 0) - (missing < 0))
        assert float(control.coeff) == pytest.approx(coeff, rel=1e-12)
        assert control.coeff.dtype == torch.float64
        assert not control.pending().any()


def test_lambda_is_kept_at_targets_that_binary_fractions_do_not_hold() -> None:
    """Equality must not hang on how 1 − K/E rounds: every K = k of E experts, every size."""
    for experts in (*range(2, 14), 64, 160):
        for k in range(1, experts):
            control = SparsityControl(ReLUConfig(), float(k), experts, "cpu")
            for tokens in (7, 4099):
                total = torch.tensor([float(k * tokens)], dtype=torch.float64)
                control.commit(total, torch.tensor(float(tokens), dtype=torch.float64), 0)
            assert float(control.coeff) == 1e-8, (experts, k)


def test_lambda_can_always_come_back() -> None:
    """Thousands of steps below the target, which no loss can cure, may not end at 0 or ∞."""
    control = SparsityControl(ReLUConfig(multiplier=8.0), 2.0, 8, "cpu")
    for total in (0.0, 8.0):
        for step in range(1000):
            control.commit(torch.tensor([total], dtype=torch.float64), torch.tensor(1.0), step)
        assert 0.0 < float(control.coeff.float()) < math.inf


def test_lambda_stays_in_float64_in_a_bf16_model() -> None:
    control = SparsityControl(ReLUConfig(initial_coeff=1.01), 2.0, 8, "cpu")
    torch.nn.Sequential(control).bfloat16()
    assert control.coeff.dtype == torch.float64
    assert "coeff" in control.state_dict()
    assert "_pending" not in control.state_dict()
    other = SparsityControl(ReLUConfig(), 2.0, 8, "cpu")
    other.load_state_dict(control.state_dict())
    assert float(other.coeff) == 1.01
