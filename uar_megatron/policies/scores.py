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
    most one expert can be selected. ``uar.weights`` may ask for other weights. The bias takes part
    in the selection only.

    Args:
        logits_TE: router logits (differentiable).
        k_T: experts of each token, int64 in ``[0, width]``.
        width: the largest k possible.
        bias_E: selection bias or None.
        settings: score function, weights, groups and scaling.
    """
    scores_TE = scores_of(logits_TE, settings.score_function)
    by_logits = settings.score_function == "softmax" and not settings.use_pre_softmax
    if bias_E is not None:
        selection_TE = scores_TE.detach() + bias_E
    else:
        # As in Megatron; scores that underflow to 0 keep their order as logits.
        selection_TE = (logits_TE if by_logits else scores_TE).detach()
    if settings.group_topk and settings.num_groups:
        selection_TE = limit_to_groups(
            selection_TE, settings.topk, settings.num_groups, settings.group_topk
        )
    weights = weights_rule(settings, width)
    columns = max(width, settings.topk) if weights == "renormalised_to_K" else width
    index_TK, chosen_TK = select_experts(selection_TE, k_T, columns)

    if weights == "softmax_after":
        selected_TK = logits_TE.float().gather(1, index_TK)
        selected_TK = selected_TK.masked_fill(~chosen_TK, float("-inf"))
        # A token without experts has only −inf here, whose softmax is NaN, in backward too.
        selected_TK = selected_TK.masked_fill((k_T == 0).unsqueeze(-1), 0.0)
        weights_TK = torch.softmax(selected_TK, dim=-1)
    else:
        weights_TK = scores_TE.gather(1, index_TK)
        if weights != "as_they_are":
            total_T1 = (weights_TK * chosen_TK).sum(dim=-1, keepdim=True)
            # Dividing by nothing would be 0·∞ in backward, for a token without experts.
            total_T1 = total_T1.masked_fill((k_T == 0).unsqueeze(-1), 1.0)
            scaled_TK = weights_TK / (total_T1 + 1e-20)
            if weights == "renormalised_to_K":
                shares_TK = weights_TK
                if settings.score_function != "softmax":
                    shares_TK = weights_TK / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)
                scaled_TK = scaled_TK * shares_TK[:, : settings.topk].sum(dim=-1, keepdim=True)
            weights_TK = scaled_TK
    if settings.scaling_factor:
        weights_TK = weights_TK * settings.scaling_factor

    weights_TK = torch.where(chosen_TK, weights_TK, torch.zeros_like(weights_TK))
    probs_TE = torch.zeros_like(logits_TE).scatter(1, index_TK, weights_TK.type_as(logits_TE))
    routing_map_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, index_TK, chosen_TK)
    return RoutingDecision(probs_TE, routing_map_TE, k_T)


def limit_to_groups(
    selection_TE: torch.Tensor, topk: int, num_groups: int, group_topk: int
) -> torch.Tensor:
    """Put −inf where a token's expert is outside the token's best ``group_topk`` groups.

    A group is worth the sum of its best ``topk``/``group_topk`` scores, with ``moe_router_topk``
    whatever the token's k, as ``group_limited_topk`` has it (moe_utils.py:617): a token's groups do
    not depend on its k.
    """
    tokens, experts = selection_TE.shape
    groups_TGE = selection_TE.view(tokens, num_groups, experts // num_groups)
    worth_TG = groups_TGE.topk(topk // group_topk, dim=-1).values.sum(dim=-1)
    best_TG = worth_TG.topk(group_topk, dim=-1, sorted=False).indices
    allowed_TG = torch.zeros_like(worth_TG, dtype=torch.bool).scatter(1, best_TG, True)
    outside_TE = ~allowed_TG.repeat_interleave(experts // num_groups, dim=-1)
    return selection_TE.masked_fill(outside_TE, float("-inf"))


def weights_rule(settings: RouterSettings, width: int) -> str:
    """Return how the weights of a token's experts are made, where at most ``width`` are chosen."""
    if settings.uar.weights == "renormalised_to_K":
        return settings.uar.weights
    if settings.score_function == "softmax":
        keeps = settings.use_pre_softmax
        if settings.uar.weights != "megatron":
            keeps = settings.uar.weights == "softmax_all"
        return "as_they_are" if keeps else "softmax_after"
    return "renormalised" if width > 1 or settings.uar.weights == "renormalised" else "as_they_are"


def scores_of(logits_TE: torch.Tensor, score_function: str) -> torch.Tensor:
    """Return the scores of all experts, fp32, before any selection (differentiable)."""
    if score_function == "softmax":
        return torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    if score_function == "sigmoid":
        return torch.sigmoid(logits_TE.float())
    return F.softplus(logits_TE.float()).sqrt()
