"""Settings that every policy is tried with, and what it takes to build one outside a model."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

from uar_megatron.config import UARConfig
from uar_megatron.decision import RoutingDecision, Uncertainty
from uar_megatron.policies import RouterSettings, RoutingPolicy, find_policy
from uar_megatron.uncertainty import UncertaintyStatistics

NO_LOSS = {"moe_router_load_balancing_type": "none"}
# UAR section without ``policy``, and options of Megatron's. A new policy has a line here.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "topk": ({"weights": "renormalised"}, {"moe_router_pre_softmax": True}),
    "uar": ({"budget": {"alpha": 1.5, "beta": 2.5, "k_min": 0, "k_max": 5}}, {}),
    "top_p": ({"top_p": {"p": 0.8}, "budget": {"k_max": 6}}, {"moe_router_pre_softmax": True}),
    "relu": (
        {"budget": {"target_mean_k": 2.5}, "relu": {"initial_coeff": 0.05}},
        {"moe_router_pre_softmax": True, **NO_LOSS},
    ),
    "seq_topk": ({"budget": {"k_max": 5, "target_mean_k": 2.5}}, {}),
    "sinkhorn_selective": ({"sinkhorn": {"probability": 1.0}}, NO_LOSS),
}


def section(policy: str) -> dict[str, Any]:
    """The UAR section that ``policy`` is tried with."""
    return {"policy": policy, **CASES[policy][0]}


def build_policy(
    uar: dict[str, Any],
    *,
    experts: int = 8,
    topk: int = 2,
    score_function: str = "softmax",
    pre_softmax: bool = False,
    scaling_factor: float | None = None,
    layers: int = 1,
) -> RoutingPolicy:
    """The policy that ``uar`` names, with Megatron's own routing for a fixed k."""
    config = UARConfig.model_validate(uar)
    fixed_topk = functools.partial(
        topk_routing_with_score_function,
        use_pre_softmax=pre_softmax,
        scaling_factor=scaling_factor,
        score_function=score_function,
    )
    settings = RouterSettings(
        num_experts=experts,
        topk=topk,
        score_function=score_function,
        use_pre_softmax=pre_softmax,
        scaling_factor=scaling_factor,
        num_groups=None,
        group_topk=None,
        num_moe_layers=layers,
        uar=config,
        fixed_topk=fixed_topk,
        budget=config.budget.layers(layers, topk)[0],
        device="cpu",
    )
    return find_policy(config.policy)(settings)


def uncertainty_of(policy: RoutingPolicy, logits_TE: torch.Tensor) -> Uncertainty:
    """Of these tokens, normalised by their own values."""
    uar = policy.settings.uar
    batch = uar.model_copy(
        update={"statistics": uar.statistics.model_copy(update={"mode": "batch"})}
    )
    return UncertaintyStatistics(batch, "cpu").measure(logits_TE.detach())


def decide(
    policy: RoutingPolicy,
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None = None,
    step: int = 0,
    batch_size: int = 1,
) -> RoutingDecision:
    """What ``policy`` makes of the logits."""
    uncertainty = uncertainty_of(policy, logits_TE)
    return policy.route(logits_TE, uncertainty, bias_E, step, batch_size)
