"""How many experts tokens will get, layer by layer: what all of a plan depends on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from uar_megatron.config import LayerBudget, UARConfig
from uar_megatron.policies import RoutingPolicy
from uar_megatron.shape import ModelShape


@dataclass(frozen=True)
class LayerK:
    """Experts per token in one MoE layer.

    Attributes:
        k_min: fewest of a token.
        expected: mean over tokens.
        k_max: most of a token.
        most_rows_per_token: the largest Σk over the tokens that a rank routes together.
        bound: the setting that bounds it, and what it is.
    """

    k_min: int
    expected: float
    k_max: int
    most_rows_per_token: float
    bound: str


def layers_of(uar: UARConfig, shape: ModelShape, policies: Sequence[RoutingPolicy]) -> list[LayerK]:
    """Return each MoE layer's, then those of the MTP layers, which are as the last one.

    Args:
        uar: the UAR section.
        shape: the model's.
        policies: of each MoE layer.
    """
    if uar.policy != "uar":
        found = [_of_policy(uar, policy) for policy in policies]
    else:
        begins_later = uar.expansion.start_step > 0 or uar.expansion.ramp_steps > 0
        found = [_of_budget(policy.settings.budget, shape.topk) for policy in policies]
        if begins_later:  # the steps before expansion have Top-K's rows
            found = [_at_least(layer, shape.topk) for layer in found]
    return found + (found[-1:] * shape.mtp_layers if shape.is_moe[-1] else [])


def within_capacity(
    layers: list[LayerK], factor: float | None, topk: int, *, is_padded: bool
) -> list[LayerK]:
    """Return the layers as ``moe_expert_capacity_factor`` leaves them.

    All experts together take factor · topk rows per token of a rank, whatever k is.

    Args:
        layers: without a capacity.
        factor: None for no capacity.
        topk: ``moe_router_topk``.
        is_padded: ``moe_pad_expert_input_to_capacity``: experts always get that many.
    """
    if factor is None:
        return layers
    most = factor * topk
    bound = f"moe_expert_capacity_factor = {factor:g}"
    if is_padded:
        return [
            dataclasses.replace(one, expected=most, most_rows_per_token=most, bound=bound)
            for one in layers
        ]
    return [
        dataclasses.replace(
            one, expected=min(one.expected, most), most_rows_per_token=most, bound=bound
        )
        if most < one.most_rows_per_token
        else one
        for one in layers
    ]


def _of_policy(uar: UARConfig, policy: RoutingPolicy) -> LayerK:
    budget = policy.settings.budget
    if policy.fixed_k is not None:
        return _constant(policy.fixed_k, f"moe_router_topk = {policy.fixed_k}")
    at_most = f"uar.budget.k_max = {budget.k_max}"
    if policy.mean_bound < policy.max_k:
        at_most = f"uar.budget.target_mean_k = {budget.target_mean_k:g}"
    elif policy.max_k != budget.k_max:
        at_most = f"{policy.max_k} experts"
    return LayerK(
        k_min=min(budget.k_min, policy.max_k) if policy.max_k == budget.k_max else 0,
        expected=min(budget.target_mean_k, policy.mean_bound),
        k_max=policy.max_k,
        most_rows_per_token=policy.mean_bound,
        bound=f"uar.policy = {uar.policy}, {at_most}",
    )


def _constant(k: int, bound: str) -> LayerK:
    return LayerK(k, float(k), k, float(k), bound)


def _at_least(layer: LayerK, topk: int) -> LayerK:
    if topk <= layer.most_rows_per_token:
        return dataclasses.replace(layer, k_max=max(layer.k_max, topk))
    return dataclasses.replace(
        layer,
        k_max=max(layer.k_max, topk),
        most_rows_per_token=float(topk),
        bound=f"moe_router_topk = {topk} (before uar.expansion.start_step)",
    )


def _of_budget(budget: LayerBudget, topk: int) -> LayerK:
    constant = budget.constant_k()
    if constant is not None:
        return _constant(constant, f"k is {constant} for every token")
    if budget.mode == "exact":
        target = budget.target_mean_k
        bound = f"uar.budget.mode = exact, target_mean_k = {target:g}"
        return LayerK(budget.k_min, target, budget.k_max, target, bound)
    expected = budget.target_mean_k if budget.mode == "mean" else _mean_of_normal(budget)
    most, bound = float(budget.k_max), f"uar.budget.k_max = {budget.k_max}"
    if budget.max_rows_factor is not None and budget.max_rows_factor * topk < most:
        most = budget.max_rows_factor * topk
        bound = f"uar.budget.max_rows_factor = {budget.max_rows_factor:g}"
    return LayerK(budget.k_min, min(expected, most), budget.k_max, most, bound)


def _mean_of_normal(budget: LayerBudget) -> float:
    """Mean of Eq. 5 over a normal ẑ: K_min + Σ_j P(round(α·ẑ + β) ≥ j) for j up to K_max."""
    shift = {"floor": 0.0, "nearest": 0.5, "ceil": 1.0}[budget.rounding]
    mean = float(budget.k_min)
    for j in range(budget.k_min + 1, budget.k_max + 1):
        if budget.alpha == 0:
            mean += budget.beta + shift >= j
        else:
            distance = (j - shift - budget.beta) / abs(budget.alpha)
            mean += 0.5 * math.erfc(distance / math.sqrt(2))
    return mean
