"""Megatron's own top-k, with the selection bias as the only addition."""

from __future__ import annotations

import torch

from uar_megatron.config import UARConfig
from uar_megatron.decision import RoutingDecision, Uncertainty
from uar_megatron.policies.base import RouterSettings
from uar_megatron.policies.scores import route_variable_k


class TopKPolicy:
    """The same number of experts for every token (``moe_router_topk``)."""

    def __init__(self, config: UARConfig, settings: RouterSettings) -> None:
        self.settings = settings
        self.max_k = settings.topk
        self.fixed_k: int | None = settings.topk

    def route(
        self, logits_TE: torch.Tensor, uncertainty: Uncertainty, bias_E: torch.Tensor | None
    ) -> RoutingDecision:
        """See :class:`~uar_megatron.policies.base.RoutingPolicy`."""
        return route_fixed_k(logits_TE, self.max_k, bias_E, self.settings)


def route_fixed_k(
    logits_TE: torch.Tensor, k: int, bias_E: torch.Tensor | None, settings: RouterSettings
) -> RoutingDecision:
    """Route every token to ``k`` experts: Megatron's function, called as it is, unless biased."""
    k_T = torch.full((logits_TE.shape[0],), k, dtype=torch.int64, device=logits_TE.device)
    if bias_E is not None or k == 0:  # Megatron has no k = 0
        return route_variable_k(logits_TE, k_T, k, bias_E, settings)
    probs_TE, routing_map_TE = settings.fixed_topk(logits_TE, k)
    return RoutingDecision(probs_TE, routing_map_TE, k_T)
