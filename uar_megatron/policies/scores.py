"""Weights for a selection in which tokens have different numbers of experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from uar_kernels.selection import select_experts
from uar_megatron.decision import RoutingDecision
from uar_megatron.policies.base import RouterSettings


def route_variable_k(
    logits_TE: torch.Tensor,
    k_T: torch.Tensor,
    width: int,
    bias_E: torch.Tensor | None,
    settings: RouterSettings,
) -> RoutingDecision:
    """Select ``k_T`` experts per token and weight them as Megatron does for a fixed k.

    The rules are those of ``topk_routing_with_score_function`` (moe_utils.py:710), in fp32:
    softmax before the selection keeps p as the weight; softmax after it normalises over the
    selected logits; sigmoid and sqrtsoftplus scores are divided by their selected sum, unless at
    most one expert can be selected. The bias takes part in the selection only.

    Args:
        logits_TE: router logits (differentiable).
        k_T: experts of each token, int64 in ``[0, width]``.
        width: the largest k possible.
        bias_E: selection bias or None.
        settings: score function and scaling.
    """
    scores_TE = _scores(logits_TE, settings.score_function)
    selection_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    index_TK, chosen_TK = select_experts(selection_TE, k_T, width)

    if settings.score_function == "softmax" and not settings.use_pre_softmax:
        selected_TK = logits_TE.float().gather(1, index_TK)
        selected_TK = selected_TK.masked_fill(~chosen_TK, float("-inf"))
        # A token without experts has only −inf here, whose softmax is NaN, in backward too.
        selected_TK = selected_TK.masked_fill((k_T == 0).unsqueeze(-1), 0.0)
        weights_TK = torch.softmax(selected_TK, dim=-1)
    else:
        weights_TK = scores_TE.gather(1, index_TK)
        if settings.score_function != "softmax" and width > 1:
            total_T1 = (weights_TK * chosen_TK).sum(dim=-1, keepdim=True)
            weights_TK = weights_TK / (total_T1 + 1e-20)
    if settings.scaling_factor:
        weights_TK = weights_TK * settings.scaling_factor

    weights_TK = torch.where(chosen_TK, weights_TK, torch.zeros_like(weights_TK))
    probs_TE = torch.zeros_like(logits_TE).scatter(1, index_TK, weights_TK.type_as(logits_TE))
    routing_map_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, index_TK, chosen_TK)
    return RoutingDecision(probs_TE, routing_map_TE, k_T)


def _scores(logits_TE: torch.Tensor, score_function: str) -> torch.Tensor:
    if score_function == "softmax":
        return torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    if score_function == "sigmoid":
        return torch.sigmoid(logits_TE.float())
    return F.softplus(logits_TE.float()).sqrt()
