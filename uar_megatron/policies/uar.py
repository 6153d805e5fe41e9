"""Evidence-triggered expansion: uncertain tokens get more experts (Eq. 5)."""

from __future__ import annotations

import dataclasses
import math

import torch

from uar_kernels.routing import Budget
from uar_megatron.budget import ExpertBudget
from uar_megatron.decision import RoutingDecision, Uncertainty
from uar_megatron.policies.base import KernelPolicy, RouterSettings
from uar_megatron.policies.scores import route_variable_k
from uar_megatron.policies.topk import constant_line, route_fixed_k


class UARPolicy(KernelPolicy):
    """The number of experts that :class:`~uar_megatron.budget.ExpertBudget` gives each token.

    Where that is the same for every token, Megatron's own routing is called for it: off means off,
    to the last bit.
    """

    logged = ("beta",)

    def __init__(self, settings: RouterSettings) -> None:
        super().__init__(settings)
        self.budget = ExpertBudget(
            settings.budget, settings.uar.expansion, settings.topk, settings.device
        )
        self.state = self.budget
        self.fixed_k = self.budget.fixed_k
        self.max_k = self.budget.max_k if self.fixed_k is None else self.fixed_k
        self.mean_bound = self._mean_bound()
        counts_together = settings.budget.mode == "exact" or settings.budget.max_rows_factor
        self.segment = settings.budget.segment if counts_together else None
        self.is_per_token = not counts_together or self.budget.fixed_k is not None
        has_stock_k = self.fixed_k == settings.topk
        self.is_off = has_stock_k and settings.has_stock_weights(settings.topk)

    def is_stock(self, step: int) -> bool:
        """See :class:`~uar_megatron.policies.base.KernelPolicy`."""
        has_stock_weights = self.settings.has_stock_weights(self.settings.topk)
        return self.is_off or (self._is_waiting(step) and has_stock_weights)

    def total_slots(self, tokens: int, step: int) -> int | None:
        """See :class:`~uar_megatron.policies.base.KernelPolicy`."""
        k = self._constant_k(step)
        if k is not None:
            return tokens * k
        is_exact = self.settings.budget.mode == "exact"
        return self.budget.exact_total(tokens, step) if is_exact else None

    def most_slots(self, tokens: int) -> int:
        """See :class:`~uar_megatron.policies.base.KernelPolicy`."""
        factor, topk = self.settings.budget.max_rows_factor, self.settings.topk
        most = tokens * self.max_k
        return most if factor is None else min(most, math.floor(factor * topk * tokens))

    def line(self, step: int) -> Budget | None:
        """See :class:`~uar_megatron.policies.base.KernelPolicy`."""
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
        """See :class:`~uar_megatron.policies.base.KernelPolicy`."""
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
        """See :class:`~uar_megatron.policies.base.KernelPolicy`."""
        k = self._constant_k(step)
        if k is not None:
            return route_fixed_k(logits_TE, k, bias_E, self.settings)
        k_T, wanted_k_T = self.budget.experts_of(uncertainty.zscore_T, step, batch_size)
        routed = route_variable_k(logits_TE, k_T, self.max_k, bias_E, self.settings)
        return dataclasses.replace(routed, wanted_k_T=wanted_k_T)

    def _mean_bound(self) -> float:
        budget, topk = self.settings.budget, self.settings.topk
        if budget.mode == "exact":
            before = topk if self.budget.progress(0) < 1.0 else 0
            return float(max(budget.target_mean_k, before))
        if budget.max_rows_factor is None:
            return float(self.max_k)
        return min(budget.max_rows_factor * topk, float(self.max_k))

    def _constant_k(self, step: int) -> int | None:
        return self.settings.topk if self._is_waiting(step) else self.fixed_k

    def _is_waiting(self, step: int) -> bool:
        return self.budget.progress(step) == 0.0
