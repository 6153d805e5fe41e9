"""What every routing policy provides, and what the router gives it to work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from uar_kernels.routing import Budget
from uar_megatron.config import ExpansionConfig, LayerBudget
from uar_megatron.decision import RoutingDecision, Uncertainty

FixedTopK = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class RouterSettings:
    """What a policy needs to know of Megatron's settings, under Megatron's names, and of the layer.

    Attributes:
        num_experts: E.
        topk: ``moe_router_topk``.
        score_function: ``softmax``, ``sigmoid`` or ``sqrtsoftplus``.
        use_pre_softmax: weights are the softmax over all experts, without renormalisation.
        scaling_factor: ``moe_router_topk_scaling_factor``, None for 1.
        num_groups: ``moe_router_num_groups``, None without group-limited routing.
        group_topk: ``moe_router_group_topk``.
        weights: ``uar.weights``.
        fixed_topk: Megatron's own routing for a number of experts common to all tokens:
            ``(logits_TE, k) -> (probs_TE, routing_map_TE)``.
        budget: the layer's budget.
        expansion: when it sets in.
        device: where state lives.
    """

    num_experts: int
    topk: int
    score_function: str
    use_pre_softmax: bool
    scaling_factor: float | None
    num_groups: int | None
    group_topk: int | None
    weights: str
    fixed_topk: FixedTopK
    budget: LayerBudget
    expansion: ExpansionConfig
    device: torch.device | str | int

    def has_stock_weights(self, k: int) -> bool:
        """Whether ``weights`` names what Megatron does anyway for ``k`` experts per token."""
        if self.score_function == "softmax":
            stock = "softmax_all" if self.use_pre_softmax else "renormalised"
        else:
            stock = "renormalised" if k > 1 else "megatron"
        return self.weights in ("megatron", stock)


class PolicyState(Protocol):
    """A module with a policy's state: summed in the forward, moved once per step on all ranks.

    Attributes:
        beta: the steered β, a scalar, or None where nothing is steered.
    """

    beta: torch.Tensor | None

    def accumulate(self, k_T: torch.Tensor, valid_T: torch.Tensor | None) -> None:
        """Add a micro-batch's decision; padding (``valid_T`` False) is left out."""
        ...

    def pending(self) -> torch.Tensor:
        """This rank's sums since the last commit, float64, one-dimensional."""
        ...

    def commit(self, total: torch.Tensor, tokens: torch.Tensor, step: int) -> None:
        """Move the state by the sums of all ranks and start a new step.

        Args:
            total: :meth:`pending` summed over every rank that holds tokens of this layer.
            tokens: number of those tokens, padding left out; a scalar.
            step: the optimizer step that ends.
        """
        ...


class RoutingPolicy(Protocol):
    """Turns logits and uncertainty into a decision. Built once per layer.

    Attributes:
        max_k: the largest number of experts a token can get.
        fixed_k: that number if it is the same for every token at every step, else None.
        state: what the policy keeps in the checkpoint and moves at the step boundary, or None.
    """

    max_k: int
    fixed_k: int | None
    state: PolicyState | None

    def __init__(self, settings: RouterSettings) -> None: ...

    def is_stock(self, step: int) -> bool:
        """Whether at this step the decision is the one Megatron would take."""
        ...

    def total_slots(self, tokens: int, step: int) -> int | None:
        """Σk over ``tokens`` tokens where it is known without looking at them, else None."""
        ...

    def most_slots(self, tokens: int) -> int:
        """The largest Σk possible over ``tokens`` tokens, at any step."""
        ...

    def line(self, step: int) -> Budget | None:
        """Eq. 5 at this step, where a token's k depends on its own ẑ alone; else None."""
        ...

    def experts_of(
        self, zscore_T: torch.Tensor, step: int, batch_size: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """k of each token, and what it would be without a bound on the rows (None: the same).

        Arguments as in :meth:`route`.
        """
        ...

    def route(
        self,
        logits_TE: torch.Tensor,
        uncertainty: Uncertainty,
        bias_E: torch.Tensor | None,
        step: int,
        batch_size: int,
    ) -> RoutingDecision:
        """Decide.

        Args:
            logits_TE: router logits (differentiable).
            uncertainty: of the same tokens.
            bias_E: selection bias, added to the scores for choosing but not for weighting.
            step: optimizer steps taken so far.
            batch_size: sequences in the micro-batch; tokens are ordered ``[sequence, batch]``.
        """
        ...
