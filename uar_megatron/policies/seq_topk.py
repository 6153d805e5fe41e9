"""Top-k by sequence: the experts of a whole sequence are given to its tokens by score."""

from __future__ import annotations

import torch

from uar_megatron.budget import by_segment, by_token
from uar_megatron.decision import RoutingDecision, Uncertainty
from uar_megatron.errors import ConfigError
from uar_megatron.policies.base import RouterSettings, RoutingPolicy
from uar_megatron.policies.scores import route_variable_k, scores_of


class SeqTopKPolicy(RoutingPolicy):
    """The best tokens · K (token, expert) pairs of each sequence, at most k_max for a token.

    From "Route Experts by Sequence, Not by Token" (SeqTopK, arXiv 2511.06494): the pairs of a
    sequence compete with each other by score, so that the total is fixed and tokens are not.
    Choices where the paper is silent, or could not be read:

    - Bounds of a token are ``uar.budget.k_min`` and ``k_max``; the paper's are said to be 1 and
      K + 2, our defaults for K = 2. k_min experts of each token are taken first, the rest by score.
    - K is ``uar.budget.target_mean_k``; its product with the tokens is rounded.
    - Pairs are ranked by the score over all experts (plus the bias), also with a softmax after the
      selection: logits of different tokens cannot be compared.
    - Of equal scores the earlier token's, then the lower expert's is taken. (Equal logits may have
      sigmoids that differ in the last bit, on a CPU by their place.)
    - A sequence is ``uar.budget.segment`` tokens of it, or what this rank has of it. Padding counts
      as tokens.
    - Later tokens take experts from earlier ones, in training and in evaluation alike. Generation
      token by token cannot reproduce that; the paper's own online variant is not built.
    """

    def __init__(self, settings: RouterSettings) -> None:
        super().__init__(settings)
        settings.refuse_groups("seq_topk")
        budget = settings.budget
        self.target = budget.target_mean_k
        if not budget.k_min <= self.target <= budget.k_max:
            raise ConfigError(
                "uar.budget.target_mean_k",
                f"{self.target:g} cannot be reached between k_min and k_max",
                allowed=f"{budget.k_min} … {budget.k_max}",
                remedy="it is moe_router_topk unless set",
            )
        self.segment = budget.segment
        # Rounding gives a segment at most half a slot more.
        self.mean_bound = min(self.target + 0.5 / (self.segment or 1), float(self.max_k))
        if self.target.is_integer():
            self.mean_bound = self.target

    def total_slots(self, tokens: int, step: int) -> int | None:
        """See :class:`~uar_megatron.policies.base.RoutingPolicy`."""
        if self.target.is_integer():
            return tokens * int(self.target)
        segment = self.segment
        return None if segment is None else tokens // segment * round(segment * self.target)

    def route(
        self,
        logits_TE: torch.Tensor,
        uncertainty: Uncertainty,
        bias_E: torch.Tensor | None,
        step: int,
        batch_size: int,
    ) -> RoutingDecision:
        """See :class:`~uar_megatron.policies.base.RoutingPolicy`."""
        low, high = self.settings.budget.k_min, self.settings.budget.k_max
        with torch.no_grad():
            scores_TE = scores_of(logits_TE, self.settings.score_function)
            if bias_E is not None:
                scores_TE = scores_TE + bias_E
            best_TK = scores_TE.topk(high, dim=-1).values[:, low:]
            length = logits_TE.shape[0] // max(batch_size, 1)
            segment = self.segment or max(length, 1)
            best_GNK = by_segment(best_TK, segment, batch_size)
            to_give = round(segment * self.target) - segment * low
            # A token's scores descend, so a stable sort takes its pairs in order.
            order_GP = best_GNK.flatten(1).argsort(dim=-1, descending=True, stable=True)
            token_GP = order_GP[:, :to_give] // max(high - low, 1)
            k_GN = torch.full(best_GNK.shape[:2], low, device=logits_TE.device)
            k_GN = k_GN.scatter_add(1, token_GP, torch.ones_like(token_GP))
            k_T = by_token(k_GN, batch_size)
        return route_variable_k(logits_TE, k_T, self.max_k, bias_E, self.settings)
