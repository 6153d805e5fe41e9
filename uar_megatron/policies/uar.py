"""Evidence-triggered expansion: uncertain tokens get more experts (Eq. 5)."""

from __future__ import annotations

import dataclasses
import math

import torch

from uar_kernels.routing import Budget
from uar_megatron.budget import ExpertBudget
from uar_megatron.decision import RoutingDecision, Uncertainty
from uar_megatron.policies.base import PolicyState, RouterSettings
from uar_megatron.policies.scores import route_variable_k
from uar_megatron.policies.topk import constant_line, route_fixed_k


class UARPolicy:
    """The number of experts that :class:`~uar_megatron.budget.ExpertBudget` gives each token.

    Where that is the same for every token, Megatron's own routing is called for it: off means off,
    to the last bit.
    """

    def __init__(self, settings: RouterSettings) -> None:
        self.settings = settings
        self.budget = ExpertBudget(
            settings.budget, settings.expansion, settings.topk, settings.device
        )
        self.state: PolicyState | None = self.budget
        self.fixed_k = self.budget.fixed_k
        self.max_k = self.budget.max_k if self.fixed_k is None else self.fixed_k

    def is_stock(self, step: int) -> bool:
        """See :class:`~uar_megatron.policies.base.RoutingPolicy`."""
        is_topk = self.fixed_k == self.settings.topk or self._is_waiting(step)
        return is_topk and self.settings.has_stock_weights(self.settings.topk)

    def total_slots(self, tokens: int, step: int) -> int | None:
        """See :class:`~uar_megatron.policies.base.RoutingPolicy`."""
        k = self._constant_k(step)
        if k is not None:
            return tokens * k
        is_exact = self.settings.budget.mode == "exact"
        return self.budget.exact_total(tokens, step) if is_exact else None

    def most_slots(self, tokens: int) -> int:
        """See :class:`~uar_megatron.policies.base.RoutingPolicy`."""
        factor, topk = self.settings.budget.max_rows_factor, self.settings.topk
        most = tokens * self.max_k
        return most if factor is None else min(most, math.floor(factor * topk * tokens))

    def line(self, step: int) -> Budget | None:
        """See :class:`~uar_megatron.policies.base.RoutingPolicy`."""
        k, budget = self._constant_k(step), self.settings.budget
        if k is not None:
            return constant_line(k)
        if budget.mode == "exact" or budget.max_rows_factor is not None:
            return None
        alpha, beta = self.budget.line(step)
        return Budget(alpha, beta, budget.k_min, budget.k_max, budget.rounding)

    def experts_of(
        self, zscore_T: torch.Tensor, step: int, batch_size: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See :class:`~uar_megatron.policies.base.RoutingPolicy`."""
        k = self._constant_k(step)
        if k is not None:
            return torch.full_like(zscore_T, k, dtype=torch.int64), None
        return self.budget.experts_of(zscore_T, step, batch_size)

    def route(
        self,
        logits_TE: torch.Tensor,
        uncertainty: Uncertainty,
        bias_E: torch.Tensor | None,
        step: int,
        batch_size: int,
    ) -> RoutingDecision:
        """See :class:`~uar_megatron.policies.base.RoutingPolicy`."""
        k = self._constant_k(step)
        if k is not None:
            return route_fixed_k(logits_TE, k, bias_E, self.settings)
        k_T, wanted_k_T = self.budget.experts_of(uncertainty.zscore_T, step, batch_size)
        routed = route_variable_k(logits_TE, k_T, self.max_k, bias_E, self.settings)
        return dataclasses.replace(routed, wanted_k_T=wanted_k_T)

    def _constant_k(self, step: int) -> int | None:
        return self.settings.topk if self._is_waiting(step) else self.fixed_k

    def _is_waiting(self, step: int) -> bool:
        return self.budget.progress(step) == 0.0
