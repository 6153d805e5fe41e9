"""Top-p routing: as many experts as it takes to collect the probability p (Eq. 17)."""

from __future__ import annotations

import torch

from uar_megatron.decision import RoutingDecision, Uncertainty
from uar_megatron.errors import ConfigError
from uar_megatron.policies.base import PolicyLoss, RouterSettings, RoutingPolicy, SumOverRanks
from uar_megatron.policies.scores import route_variable_k


class TopPPolicy(RoutingPolicy):
    """N = min{n : the n largest probabilities sum to at least p} (Eq. 17), within k_min … k_max.

    From "Harder Tasks Need More Experts" (Huang et al., arXiv 2403.07652), whose dynamic loss, the
    mean router entropy, keeps N from growing; our ``uar.top_p``. Choices where the sources are
    silent or differ:

    - "at least p" as in Eq. 17; the authors' code stops at "more than p", another number only
      where a sum equals p.
    - N is bounded by ``uar.budget.k_max``; the authors have no bound. k_max = E is theirs.
    - Weights are Megatron's for N experts. The authors' are the probabilities, not renormalised:
      ``moe_router_pre_softmax``.
    - The dynamic loss is averaged over the tokens of each layer; the paper writes it for one.
    - A selection bias changes which experts are taken, not how many: N follows from the
      probabilities.
    """

    has_loss = True

    def __init__(self, settings: RouterSettings) -> None:
        super().__init__(settings)
        if settings.score_function != "softmax":
            raise ConfigError(
                "moe_router_score_function",
                f"{settings.score_function} with uar.policy=top_p, which adds up probabilities",
                allowed="softmax",
            )
        settings.refuse_groups("top_p")
        self.is_per_token = True

    def route(
        self,
        logits_TE: torch.Tensor,
        uncertainty: Uncertainty,
        bias_E: torch.Tensor | None,
        step: int,
        batch_size: int,
    ) -> RoutingDecision:
        """See :class:`~uar_megatron.policies.base.RoutingPolicy`."""
        budget = self.settings.budget
        with torch.no_grad():
            probs_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
            largest_TK = probs_TE.topk(self.max_k, dim=-1).values
            # The n-th expert is needed where those before it fall short of p.
            before_TK = largest_TK.cumsum(dim=-1) - largest_TK
            k_T = (before_TK < self.settings.uar.top_p.p).sum(dim=-1)
            k_T = k_T.clamp(budget.k_min, budget.k_max)
        return route_variable_k(logits_TE, k_T, self.max_k, bias_E, self.settings)

    def loss(
        self,
        logits_TE: torch.Tensor,
        routed_TE: torch.Tensor,
        valid_T: torch.Tensor | None,
        tokens: torch.Tensor,
        sum_over_ranks: SumOverRanks,
    ) -> PolicyLoss | None:
        """The mean entropy of the router's probabilities, nats (the dynamic loss of the paper)."""
        coeff = self.settings.uar.top_p.entropy_coeff
        if coeff == 0:
            return None
        # Not of the probabilities: one that underflows to 0 would have a gradient of 0·∞.
        log_probs_TE = torch.log_softmax(logits_TE.float(), dim=-1)
        entropy_T = -(log_probs_TE.exp() * log_probs_TE).sum(dim=-1)
        if valid_T is not None:
            entropy_T = entropy_T * valid_T
        return PolicyLoss(entropy_T.sum() / tokens.clamp_min(1.0), coeff)
