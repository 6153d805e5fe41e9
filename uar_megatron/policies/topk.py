"""Top-k routing: Megatron's own, or with a selection bias that Megatron would refuse."""

from __future__ import annotations

import torch

from uar_kernels.routing import Budget
from uar_megatron.decision import RoutingDecision, Uncertainty
from uar_megatron.policies.base import KernelPolicy, RouterSettings
from uar_megatron.policies.scores import route_variable_k


class TopKPolicy(KernelPolicy):
    """The same number of experts for every token (``moe_router_topk``)."""

    def __init__(self, settings: RouterSettings) -> None:
        super().__init__(settings)
        self.max_k = self.fixed_k = settings.topk
        self.is_per_token = True
        self.mean_bound = float(settings.topk)
        self.is_off = settings.has_stock_weights(settings.topk)

    def is_stock(self, step: int) -> bool:
        """See :class:`~uar_megatron.policies.base.KernelPolicy`."""
        return self.is_off

    def total_slots(self, tokens: int, step: int) -> int | None:
        """See :class:`~uar_megatron.policies.base.KernelPolicy`."""
        return tokens * self.max_k

    def most_slots(self, tokens: int) -> int:
        """See :class:`~uar_megatron.policies.base.KernelPolicy`."""
        return tokens * self.max_k

    def line(self, step: int) -> Budget:
        """See :class:`~uar_megatron.policies.base.KernelPolicy`."""
        return constant_line(self.max_k)

    def experts_of(
        self, zscore_T: torch.Tensor, step: int, batch_size: int
    ) -> tuple[torch.Tensor, None]:
        """See :class:`~uar_megatron.policies.base.KernelPolicy`."""
        return torch.full_like(zscore_T, self.max_k, dtype=torch.int64), None

    def route(
        self,
        logits_TE: torch.Tensor,
        uncertainty: Uncertainty,
        bias_E: torch.Tensor | None,
        step: int,
        batch_size: int,
    ) -> RoutingDecision:
        """See :class:`~uar_megatron.policies.base.KernelPolicy`."""
        return route_fixed_k(logits_TE, self.max_k, bias_E, self.settings)


def constant_line(k: int) -> Budget:
    """Eq. 5 where every token gets ``k`` experts."""
    return Budget(0.0, float(k), k, k)


def route_fixed_k(
    logits_TE: torch.Tensor, k: int, bias_E: torch.Tensor | None, settings: RouterSettings
) -> RoutingDecision:
    """Route every token to ``k`` experts: Megatron's function, called as it is, where it can."""
    k_T = torch.full((logits_TE.shape[0],), k, dtype=torch.int64, device=logits_TE.device)
    # Megatron has no k = 0, and sizes its groups by moe_router_topk.
    is_megatrons = bias_E is None and settings.has_stock_weights(k) and k > 0
    if not is_megatrons or (settings.group_topk and k != settings.topk):
        return route_variable_k(logits_TE, k_T, k, bias_E, settings)
    probs_TE, routing_map_TE = settings.fixed_topk(logits_TE, k)
    return RoutingDecision(probs_TE, routing_map_TE, k_T)
