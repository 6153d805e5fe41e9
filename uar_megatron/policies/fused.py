"""A policy's decision by the fused kernels: nothing of size tokens × experts but the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch

from uar_kernels.routing import Budget, Mask, Measure, Scoring, measure_tokens, route
from uar_megatron.balance import BalancingSums
from uar_megatron.config import CLBConfig
from uar_megatron.decision import CompactDecision, Uncertainty
from uar_megatron.policies.base import KernelPolicy, RouterSettings
from uar_megatron.policies.scores import weights_rule
from uar_megatron.uncertainty import UncertaintyStatistics


class FusedDecision(NamedTuple):
    """What one routing by the kernels returns.

    Attributes:
        uncertainty: of the tokens.
        routed: the decision; ``probs_TK`` is differentiable.
        balancing: what the balancing losses need.
        lse_T: fp32 logsumexp of the logits (differentiable), for the z-loss.
        sums: the tokens' part of the statistics, as ``UncertaintyStatistics.pending`` has it.
    """

    uncertainty: Uncertainty
    routed: CompactDecision
    balancing: BalancingSums
    lse_T: torch.Tensor
    sums: torch.Tensor


def route_fused(
    logits_TE: torch.Tensor,
    policy: KernelPolicy,
    settings: RouterSettings,
    statistics: UncertaintyStatistics,
    clb: CLBConfig,
    *,
    theta: float | None,
    bias_E: torch.Tensor | None,
    valid_T: torch.Tensor | None,
    step: int,
    batch_size: int,
    sequences: int,
) -> FusedDecision:
    """Decide as ``policy`` does, in one kernel, or in two where k depends on all tokens.

    Args:
        logits_TE: fp32, fp16 or bf16 router logits (differentiable).
        policy: gives each token's k.
        settings: score function, weights and scaling; neither ``renormalised_to_K`` nor groups of
            experts.
        statistics: ū and σ_u of the layer.
        clb: the shape of ω.
        theta: θ_t, or None: every ω is 1.
        bias_E: selection bias or None.
        valid_T: False for padding, or None.
        step: optimizer steps taken so far.
        batch_size: sequences in the micro-batch; tokens are ordered ``[sequence, batch]``.
        sequences: for how many of them the balancing sums are kept apart: ``batch_size`` or 1.
    """
    name, temperature = statistics.measure_name, statistics.temperature
    mean, inverse_sigma = statistics.frozen()
    measure = Measure(name, temperature, mean, inverse_sigma)
    budget: Budget | torch.Tensor | None = policy.line(step)
    first = uncertainty = wanted_k_T = None
    if budget is None or (statistics.of_batch and statistics.training):
        first = measure_tokens(logits_TE, measure=measure, valid_T=valid_T, backend="triton")
        uncertainty = statistics.normalise(
            first.energy_T, first.entropy_T, valid_T, first.statistics
        )
        budget, wanted_k_T = policy.experts_of(uncertainty.zscore_T, step, batch_size)
        measure = Measure(name, temperature, uncertainty.mean, uncertainty.inverse_sigma)
    width = policy.max_k
    if isinstance(budget, Budget) and budget.k_min == budget.k_max:
        width = max(budget.k_max, 1)
    found = route(
        logits_TE,
        width=width,
        budget=budget,
        measure=measure,
        scoring=Scoring(
            settings.score_function,
            weights_rule(settings, width),
            settings.scaling_factor or 1.0,
            bias_E,
        ),
        mask=None if theta is None else Mask(theta, clb.width, clb.floor, clb.units),
        valid_T=valid_T,
        sequences=sequences,
        measured=first,
        backend="triton",
    )
    if uncertainty is None:
        uncertainty = statistics.normalise(found.energy_T, found.entropy_T, valid_T)
    routed = CompactDecision(
        found.index_TK,
        found.probs_TK.type_as(logits_TE),
        found.k_T,
        found.slots_GE.sum(dim=0),
        wanted_k_T,
    )
    balancing = BalancingSums(found.slots_GE.float(), found.weighted_GE, found.omega_G)
    return FusedDecision(uncertainty, routed, balancing, found.lse_T, found.statistics)
