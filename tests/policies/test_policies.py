"""What all policies have in common; a policy of ``POLICIES`` that is not tried here fails."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import CASES, build_policy, decide, section, uncertainty_of

from uar_megatron.errors import ConfigError
from uar_megatron.policies import POLICIES, RoutingPolicy, find_policy


def small_policy(name: str, experts: int, topk: int, low: int, high: int) -> RoutingPolicy:
    """The policy with the settings of ``CASES``, in bounds that fit ``experts``."""
    uar = section(name)
    budget = {"k_min": low, "k_max": high, "target_mean_k": (low + high) / 2 or 0.5}
    uar["budget"] = uar.get("budget", {}) | budget
    pre_softmax = CASES[name][1].get("moe_router_pre_softmax", False)
    return build_policy(uar, experts=experts, topk=topk, pre_softmax=pre_softmax)


def test_every_policy_is_tried() -> None:
    assert CASES.keys() == POLICIES.keys()


@pytest.mark.parametrize("name", POLICIES)
@given(
    seed=st.integers(0, 2**16),
    length=st.sampled_from([0, 1, 2, 7]),
    batch_size=st.sampled_from([1, 3]),
    shape=st.sampled_from([(1, 1, 1, 1), (6, 2, 0, 6), (7, 7, 7, 7), (8, 2, 1, 4), (8, 1, 1, 1)]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    has_ties=st.booleans(),
    step=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_a_decision_is_consistent(
    name: str,
    seed: int,
    length: int,
    batch_size: int,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    has_ties: bool,
    step: int,
) -> None:
    """Map, weights, k, the bounds the policy promises, and gradients, in every shape and dtype."""
    experts, topk, low, high = shape
    policy = small_policy(name, experts, topk, low, high)
    tokens = length * batch_size
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    logits = (logits.round() if has_ties else logits).to(dtype).requires_grad_()
    decision = decide(policy, logits, step=step, batch_size=batch_size)
    probs, routing_map, k = decision.probs_TE, decision.routing_map_TE, decision.k_T
    assert probs.shape == routing_map.shape == (tokens, experts)
    assert probs.dtype == dtype
    assert (routing_map.dtype, k.dtype) == (torch.bool, torch.int64)
    assert torch.equal(k, routing_map.sum(dim=1))
    assert (k <= policy.max_k).all()
    assert torch.isfinite(probs).all()
    assert (probs >= 0).all()
    assert not probs[~routing_map].any()
    assert k.sum() <= policy.mean_bound * tokens + 1e-9
    if policy.fixed_k is not None:
        assert (k == policy.fixed_k).all()
    total = policy.total_slots(tokens, step)
    assert total is None or total == k.sum()
    (probs.float().square().sum()).backward()
    assert torch.isfinite(logits.grad).all()
    again = decide(policy, logits.detach(), step=step, batch_size=batch_size)
    assert torch.equal(again.probs_TE, probs)
    assert torch.equal(again.routing_map_TE, routing_map)
    local = torch.tensor(float(tokens))
    if policy.has_loss:
        loss = policy.loss(logits, routing_map, None, local, lambda value: value)
        assert loss is not None
        assert loss.value.shape == ()
        assert math.isfinite(loss.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", POLICIES)
def test_a_token_that_is_not_finite_spoils_no_other(name: str, bad: float) -> None:
    """Neither the others' weights nor gradients; where tokens do not compete, nor their experts."""
    experts = 8
    policy = small_policy(name, experts, 2, 1, 4)
    logits = 2 * torch.randn(12, experts, generator=torch.Generator().manual_seed(1))
    spoiled = logits.clone()
    spoiled[5, 2] = bad
    spoiled[9] = bad
    spoiled.requires_grad_()
    decision = decide(policy, spoiled)
    good = [t for t in range(12) if t not in (5, 9)]
    assert torch.isfinite(decision.probs_TE[good]).all()
    assert torch.equal(decision.k_T, decision.routing_map_TE.sum(dim=1))
    assert not decision.probs_TE[~decision.routing_map_TE].any(), "an expert would get a NaN"
    (gradient,) = torch.autograd.grad(decision.probs_TE[good].square().sum(), spoiled)
    assert torch.isfinite(gradient[good]).all()
    if name in ("topk", "top_p", "relu"):  # where no token's experts depend on another
        whole = decide(policy, logits)
        assert torch.equal(decision.routing_map_TE[good], whole.routing_map_TE[good])


@pytest.mark.parametrize("name", POLICIES)
def test_one_step_after_another_leaves_no_trace_without_a_commit(name: str) -> None:
    """A forward moves nothing: only :meth:`commit` does."""
    policy = small_policy(name, 8, 2, 1, 4)
    if policy.state is None:
        return
    before = {n: b.clone() for n, b in policy.state.named_buffers() if n != "_pending"}
    k_T = torch.tensor([1, 4, 0])
    policy.state.accumulate(k_T, torch.tensor([True, True, False]))
    for n, b in policy.state.named_buffers():
        assert n == "_pending" or torch.equal(b, before[n])
    assert policy.state.logged().keys() <= set(policy.logged)


def test_names_that_are_no_policy() -> None:
    for name, words in {
        "top_k": ["did you mean 'topk'", "module:Class"],
        "TOPP": ["top_p", "module:Class"],
        "no_such_module:Mine": ["no_such_module", "PYTHONPATH"],
        "math:Mine": ["Mine", "cannot be imported"],
        "math:pi": ["not a routing policy", "RoutingPolicy"],
        "math:": ["not allowed"],
        ":Mine": ["not allowed"],
        ".relative:Mine": ["not allowed"],
        "uar_megatron.config:UARConfig": ["not a routing policy"],
        "uar_megatron.policies:RoutingPolicy": ["route"],
    }.items():
        with pytest.raises(ConfigError) as error:
            find_policy(name)
        assert error.value.field == "uar.policy"
        for word in words:
            assert word in str(error.value), name


def test_policies_of_the_package_can_be_named_by_module_too() -> None:
    assert find_policy("uar_megatron.policies.relu:ReLUPolicy") is POLICIES["relu"]


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "top_p, sigmoid": (
        {"policy": "top_p"},
        {"score_function": "sigmoid"},
        "moe_router_score_function",
    ),
    "relu, softmax after": ({"policy": "relu"}, {}, "moe_router_pre_softmax"),
    "relu, sigmoid": (
        {"policy": "relu"},
        {"score_function": "sigmoid", "pre_softmax": True},
        "moe_router_pre_softmax",
    ),
    "relu, weights": (
        {"policy": "relu", "weights": "renormalised"},
        {"pre_softmax": True},
        "uar.weights",
    ),
    "relu, target above E": (
        {"policy": "relu", "budget": {"target_mean_k": 8.5}},
        {"pre_softmax": True},
        "uar.budget.target_mean_k",
    ),
    "relu, target 0": (
        {"policy": "relu", "budget": {"target_mean_k": 0}},
        {"pre_softmax": True},
        "uar.budget.target_mean_k",
    ),
    "relu, target over depth": (
        {
            "policy": "relu",
            "budget": {"target_mean_k": {"shape": "ascending", "low": 1, "high": 3}},
        },
        {"pre_softmax": True, "layers": 2},
        "uar.budget.target_mean_k",
    ),
    "seq_topk, target above k_max": (
        {"policy": "seq_topk", "budget": {"target_mean_k": 4.5}},
        {},
        "uar.budget.target_mean_k",
    ),
    "seq_topk, target below k_min": (
        {"policy": "seq_topk", "budget": {"target_mean_k": 1.5, "k_min": 2}},
        {},
        "uar.budget.target_mean_k",
    ),
    "seq_topk, K above k_max": (
        {"policy": "seq_topk", "budget": {"k_max": 1}},
        {},
        "uar.budget.target_mean_k",
    ),
    "sinkhorn, sigmoid": (
        {"policy": "sinkhorn_selective"},
        {"score_function": "sigmoid"},
        "uar.policy",
    ),
    "sinkhorn, weights": (
        {"policy": "sinkhorn_selective", "weights": "softmax_all"},
        {},
        "uar.policy",
    ),
    "sinkhorn, weights that do not sum to one": (
        {"policy": "sinkhorn_selective"},
        {"pre_softmax": True},
        "moe_router_pre_softmax",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_policy_refuses_what_it_cannot_work_with(case: str) -> None:
    uar, changes, field = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        build_policy(uar, **changes)
    assert error.value.field == field
    assert "allowed" in str(error.value) or "remedy" in str(error.value)


@pytest.mark.parametrize("name", ["top_p", "relu", "seq_topk", "sinkhorn_selective"])
def test_groups_of_experts_are_refused(name: str) -> None:
    policy = small_policy(name, 8, 2, 1, 4)
    grouped = dataclasses.replace(policy.settings, num_groups=4, group_topk=2)
    with pytest.raises(ConfigError) as error:
        type(policy)(grouped)
    assert error.value.field == "moe_router_group_topk"


def test_uncertainty_here_is_of_these_tokens() -> None:
    policy = small_policy("uar", 8, 2, 1, 4)
    zscore = uncertainty_of(policy, torch.randn(50, 8)).zscore_T
    assert abs(float(zscore.mean())) < 1e-5
    assert float(zscore.std(unbiased=False)) == pytest.approx(1, rel=1e-4)
