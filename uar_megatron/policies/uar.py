"""Evidence-triggered expansion: uncertain tokens get more experts (Eq. 5)."""

from __future__ import annotations

import torch

from uar_megatron.budget import expert_budget
from uar_megatron.config import UARConfig
from uar_megatron.decision import RoutingDecision, Uncertainty
from uar_megatron.policies.base import RouterSettings
from uar_megatron.policies.scores import route_variable_k
from uar_megatron.policies.topk import route_fixed_k


class UARPolicy:
    """k = clamp(round(α·ẑ + β), K_min, K_max) experts per token.

    With α = 0 every token gets the same number, and Megatron's own routing is called for it: off
    means off, to the last bit.
    """

    def __init__(self, config: UARConfig, settings: RouterSettings) -> None:
        self.budget = config.budget
        self.settings = settings
        self.fixed_k = config.budget.constant_k()
        self.max_k = config.budget.k_max if self.fixed_k is None else self.fixed_k

    def route(
        self, logits_TE: torch.Tensor, uncertainty: Uncertainty, bias_E: torch.Tensor | None
    ) -> RoutingDecision:
        """See :class:`~uar_megatron.policies.base.RoutingPolicy`."""
        if self.fixed_k is not None:
            return route_fixed_k(logits_TE, self.fixed_k, bias_E, self.settings)
        k_T = expert_budget(uncertainty.zscore_T, self.budget)
        return route_variable_k(logits_TE, k_T, self.max_k, bias_E, self.settings)
