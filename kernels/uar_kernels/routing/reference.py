"""The routing of a micro-batch in plain torch: the definition of the op."""

from __future__ import annotations

import torch

from uar_kernels.routing.settings import Budget, Mask, Measure, Measured, Routed, Scoring
from uar_kernels.selection import select_experts
from uar_kernels.uncertainty import energy_and_entropy

_ROUND = {"floor": torch.floor, "nearest": torch.round, "ceil": torch.ceil}


def measure_reference(
    logits_TE: torch.Tensor, measure: Measure, valid_T: torch.Tensor | None
) -> Measured:
    """F, H and the sums that ū and σ_u are made of (``UncertaintyStatistics._sums``)."""
    energy_T, entropy_T = energy_and_entropy(logits_TE.detach(), measure.temperature)
    finite_T = energy_T.isfinite()
    energy_T = energy_T.masked_fill(~finite_T, torch.nan)
    entropy_T = entropy_T.masked_fill(~finite_T, torch.nan)
    valid_T = torch.ones_like(finite_T) if valid_T is None else valid_T
    deviation_T = _deviation(energy_T, entropy_T, measure).masked_fill(~(finite_T & valid_T), 0.0)
    sums = (
        deviation_T.double().sum(),
        deviation_T.double().square().sum(),
        (finite_T & valid_T).sum().double(),
        (~finite_T & valid_T).sum().double(),
    )
    return Measured(energy_T, entropy_T, torch.stack(sums))


def route_reference(
    logits_TE: torch.Tensor,
    width: int,
    budget: Budget | torch.Tensor,
    measure: Measure,
    scoring: Scoring,
    mask: Mask | None,
    valid_T: torch.Tensor | None,
    sequences: int,
    measured: Measured | None = None,
) -> Routed:
    """Arguments and result as in :func:`uar_kernels.routing.route`; fp64 for fp64 logits."""
    experts = logits_TE.shape[1]
    measured = measured or measure_reference(logits_TE, measure, valid_T)
    finite_T = measured.energy_T.isfinite()
    deviation_T = _deviation(measured.energy_T, measured.entropy_T, measure)
    if measure.inverse_sigma is None:
        zscore_T = torch.zeros_like(deviation_T)
    else:
        zscore_T = (deviation_T * measure.inverse_sigma).masked_fill(~finite_T, 0.0)
    k_T = budget if isinstance(budget, torch.Tensor) else _budget(zscore_T, budget)

    exact_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    softmax = scoring.function == "softmax"
    scores_TE = torch.softmax(exact_TE, dim=-1) if softmax else torch.sigmoid(exact_TE)
    ranked_TE = (exact_TE if scoring.ranks_logits else scores_TE).detach()
    if scoring.bias_E is not None:
        ranked_TE = ranked_TE + scoring.bias_E
    ranked_TE = ranked_TE.masked_fill(~finite_T.unsqueeze(-1), 0.0)
    index_TK, chosen_TK = select_experts(ranked_TE, k_T, width)
    probs_TK = _weights(exact_TE, scores_TE, index_TK, chosen_TK, scoring)
    probs_TK = probs_TK.masked_fill(~finite_T.unsqueeze(-1), torch.nan)

    counted_T = finite_T if valid_T is None else finite_T & valid_T
    omega_T = _omega(zscore_T, measured, measure, mask) * counted_T
    normalised_TE = scores_TE if softmax else scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
    weighted_TE = omega_T.unsqueeze(-1) * normalised_TE
    weighted_TE = weighted_TE.masked_fill(~counted_T.unsqueeze(-1), 0.0)
    routed_TE = torch.zeros_like(scores_TE, dtype=torch.int32)
    slot_TK = chosen_TK if valid_T is None else chosen_TK & valid_T.unsqueeze(-1)
    routed_TE = routed_TE.scatter(1, index_TK, slot_TK.int())
    return Routed(
        index_TK=index_TK.masked_fill(~chosen_TK, -1).int(),
        probs_TK=probs_TK.masked_fill(~chosen_TK, 0.0),
        k_T=k_T.int(),
        energy_T=measured.energy_T,
        entropy_T=measured.entropy_T,
        lse_T=torch.logsumexp(exact_TE, dim=-1).masked_fill(~finite_T, torch.nan),
        statistics=measured.statistics,
        slots_GE=routed_TE.view(-1, sequences, experts).sum(dim=0, dtype=torch.int32),
        weighted_GE=weighted_TE.view(-1, sequences, experts).sum(dim=0),
        omega_G=omega_T.view(-1, sequences).sum(dim=0),
    )


def _deviation(energy_T: torch.Tensor, entropy_T: torch.Tensor, measure: Measure) -> torch.Tensor:
    u_T = energy_T if measure.name == "energy" else entropy_T
    return u_T if measure.mean is None else u_T - measure.mean


def _budget(zscore_T: torch.Tensor, budget: Budget) -> torch.Tensor:
    exact_T = _ROUND[budget.rounding](budget.alpha * zscore_T + budget.beta)
    return exact_T.clamp(budget.k_min, budget.k_max).long()


def _weights(
    logits_TE: torch.Tensor,
    scores_TE: torch.Tensor,
    index_TK: torch.Tensor,
    chosen_TK: torch.Tensor,
    scoring: Scoring,
) -> torch.Tensor:
    """The rules of ``route_variable_k`` (uar_megatron/policies/scores.py)."""
    has_none_T1 = ~chosen_TK.any(dim=-1, keepdim=True)
    if scoring.weights == "softmax_after":
        selected_TK = logits_TE.gather(1, index_TK).masked_fill(~chosen_TK, -torch.inf)
        # A token without experts has only −inf here, whose softmax is NaN, in backward too.
        weights_TK = torch.softmax(selected_TK.masked_fill(has_none_T1, 0.0), dim=-1)
    else:
        weights_TK = scores_TE.gather(1, index_TK)
        if scoring.weights == "renormalised":
            total_T1 = (weights_TK * chosen_TK).sum(dim=-1, keepdim=True)
            weights_TK = weights_TK / (total_T1.masked_fill(has_none_T1, 1.0) + 1e-20)
    return weights_TK * scoring.scaling_factor


def _omega(
    zscore_T: torch.Tensor, measured: Measured, measure: Measure, mask: Mask | None
) -> torch.Tensor:
    """ω of finite tokens; that of others is not looked at, but must be finite itself."""
    if mask is None:
        return torch.ones_like(zscore_T)
    u_T = measured.energy_T if measure.name == "energy" else measured.entropy_T
    quantity_T = zscore_T if mask.units == "sigma" else u_T.nan_to_num()
    return mask.floor + (1.0 - mask.floor) * torch.sigmoid((quantity_T - mask.theta) / mask.width)
