"""What every routing policy provides, and what the router gives it to work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from uar_megatron.config import UARConfig
from uar_megatron.decision import RoutingDecision, Uncertainty

FixedTopK = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class RouterSettings:
    """The Megatron settings a policy needs, under Megatron's names.

    Attributes:
        num_experts: E.
        topk: ``moe_router_topk``.
        score_function: ``softmax``, ``sigmoid`` or ``sqrtsoftplus``.
        use_pre_softmax: weights are the softmax over all experts, without renormalisation.
        scaling_factor: ``moe_router_topk_scaling_factor``, None for 1.
        fixed_topk: Megatron's own routing for a number of experts common to all tokens:
            ``(logits_TE, k) -> (probs_TE, routing_map_TE)``.
    """

    num_experts: int
    topk: int
    score_function: str
    use_pre_softmax: bool
    scaling_factor: float | None
    fixed_topk: FixedTopK


class RoutingPolicy(Protocol):
    """Turns logits and uncertainty into a decision. Built once per layer.

    Attributes:
        max_k: the largest number of experts a token can get.
        fixed_k: that number if it is the same for every token, else None.
    """

    max_k: int
    fixed_k: int | None

    def __init__(self, config: UARConfig, settings: RouterSettings) -> None: ...

    def route(
        self, logits_TE: torch.Tensor, uncertainty: Uncertainty, bias_E: torch.Tensor | None
    ) -> RoutingDecision:
        """Decide.

        Args:
            logits_TE: router logits (differentiable).
            uncertainty: of the same tokens, under this step's frozen statistics.
            bias_E: selection bias, added to the scores for choosing but not for weighting.
        """
        ...
