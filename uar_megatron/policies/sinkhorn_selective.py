"""Selective Sinkhorn routing: now and then a step is routed by a balanced transport plan."""

from __future__ import annotations

import math
import random

import torch

from uar_megatron.decision import RoutingDecision, Uncertainty
from uar_megatron.errors import ConfigError
from uar_megatron.policies.base import RouterSettings, RoutingPolicy
from uar_megatron.policies.topk import route_fixed_k


class SelectiveSinkhornPolicy(RoutingPolicy):
    """Top-k, and on a small part of the training steps top-k of a transport plan instead.

    From "Selective Sinkhorn Routing" (SSR, arXiv 2511.08972): the plan Π maximises ⟨Π, C⟩ plus ξ
    times its entropy, with Π1 = 1 (each token is routed once) and Πᵀ1 = T/E (every expert gets the
    same); experts are the top-k of a token's row and their weights its entries, normalised. There
    is no auxiliary loss, and evaluation never uses the plan.

    The text of the paper could not be had, only its abstract and what others write about it. Our
    choices for what they leave open, or contradict each other in:

    - A step is drawn with ``uar.sinkhorn.probability`` for all layers and ranks together, from a
      generator seeded with the step: a recomputed or resumed step is the same.
    - C is ``uar.sinkhorn.cost``, and ξ and the number of iterations are settings; the paper's own
      values are not known. No noise is added.
    - The gradient flows through C; the potentials of the plan are constants. A row of Π is
      exp((C_e)/ξ + log v_e) up to a factor that normalising takes out, so the weights are a softmax
      over the selected C/ξ + log v.
    - Marginals are those of this rank's micro-batch, so they depend on the layout.
    - Weights of all steps sum to one: a softmax over all experts (``moe_router_pre_softmax``) would
      leave those of the other steps smaller, by ten times and more with many experts.
    """

    own_balance = "selective Sinkhorn routing balances loads by its transport plan, without a loss"

    def __init__(self, settings: RouterSettings) -> None:
        super().__init__(settings)
        if settings.score_function != "softmax" or settings.uar.weights != "megatron":
            raise ConfigError(
                "uar.policy",
                "sinkhorn_selective with weights other than Megatron's softmax",
                allowed="moe_router_score_function=softmax with uar.weights=megatron",
            )
        if settings.use_pre_softmax:
            raise ConfigError(
                "moe_router_pre_softmax",
                "weights that do not sum to one with sinkhorn_selective, whose plan's do",
                allowed="false",
            )
        settings.refuse_groups("sinkhorn_selective")
        self.max_k = self.fixed_k = settings.topk
        self.is_per_token = True
        self.mean_bound = float(settings.topk)

    def is_stock(self, step: int) -> bool:
        """See :class:`~uar_megatron.policies.base.RoutingPolicy`."""
        return not self._is_drawn(step)

    def total_slots(self, tokens: int, step: int) -> int | None:
        """See :class:`~uar_megatron.policies.base.RoutingPolicy`."""
        return tokens * self.max_k

    def route(
        self,
        logits_TE: torch.Tensor,
        uncertainty: Uncertainty,
        bias_E: torch.Tensor | None,
        step: int,
        batch_size: int,
    ) -> RoutingDecision:
        """See :class:`~uar_megatron.policies.base.RoutingPolicy`."""
        if not self._is_drawn(step):
            return route_fixed_k(logits_TE, self.max_k, bias_E, self.settings)
        config = self.settings.uar.sinkhorn
        cost_TE = logits_TE.float()
        if config.cost == "softmax":
            cost_TE = torch.softmax(cost_TE, dim=-1)
        cost_TE = cost_TE / config.xi
        row_TE = cost_TE + log_expert_potential(cost_TE.detach(), config.iterations)
        index_TK = row_TE.topk(self.max_k, dim=-1).indices
        weights_TK = torch.softmax(row_TE.gather(1, index_TK), dim=-1)
        if self.settings.scaling_factor:
            weights_TK = weights_TK * self.settings.scaling_factor
        probs_TE = torch.zeros_like(logits_TE).scatter(1, index_TK, weights_TK.type_as(logits_TE))
        is_routed_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, index_TK, True)
        return RoutingDecision(probs_TE, is_routed_TE, is_routed_TE.sum(dim=-1))

    def _is_drawn(self, step: int) -> bool:
        chance = random.Random(step).random()
        return self.is_training and chance < self.settings.uar.sinkhorn.probability


@torch.no_grad()
def log_expert_potential(cost_TE: torch.Tensor, iterations: int) -> torch.Tensor:
    """Return log v of the plan Π = diag(u)·exp(C/ξ)·diag(v), by Sinkhorn's iterations from u = 1.

    Args:
        cost_TE: C/ξ, fp32 or fp64. A token that is not finite counts as one without a preference.
        iterations: updates of v and then u; a fixed number, so that nothing waits for the device.
    """
    tokens, experts = cost_TE.shape
    if tokens == 0:
        return cost_TE.new_zeros(experts)
    cost_TE = cost_TE.masked_fill(~cost_TE.isfinite().all(dim=-1, keepdim=True), 0.0)
    log_load = math.log(tokens / experts)
    log_u_T1 = cost_TE.new_zeros(tokens, 1)
    for _ in range(iterations):
        log_v_E = log_load - torch.logsumexp(cost_TE + log_u_T1, dim=0)
        log_u_T1 = -torch.logsumexp(cost_TE + log_v_E, dim=1, keepdim=True)
    return log_v_E
