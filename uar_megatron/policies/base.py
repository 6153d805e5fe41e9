"""What every routing policy provides, and what the router gives it to work with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch

from uar_kernels.routing import Budget
from uar_megatron.config import LayerBudget, UARConfig
from uar_megatron.decision import RoutingDecision, Uncertainty
from uar_megatron.errors import ConfigError

FixedTopK = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
SumOverRanks = Callable[[torch.Tensor], torch.Tensor]


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
        num_moe_layers: MoE layers of the whole model, those for multi-token prediction included.
        uar: the whole section; ``uar.options`` holds the settings of a policy from outside.
        fixed_topk: Megatron's own routing for a number of experts common to all tokens:
            ``(logits_TE, k) -> (probs_TE, routing_map_TE)``.
        budget: the layer's budget.
        device: where state lives.
    """

    num_experts: int
    topk: int
    score_function: str
    use_pre_softmax: bool
    scaling_factor: float | None
    num_groups: int | None
    group_topk: int | None
    num_moe_layers: int
    uar: UARConfig
    fixed_topk: FixedTopK
    budget: LayerBudget
    device: torch.device | str | int

    def has_stock_weights(self, k: int) -> bool:
        """Whether ``weights`` names what Megatron does anyway for ``k`` experts per token."""
        if self.score_function == "softmax":
            stock = "softmax_all" if self.use_pre_softmax else "renormalised"
        else:
            stock = "renormalised" if k > 1 else "megatron"
        return self.uar.weights in ("megatron", stock)

    def refuse_groups(self, policy: str) -> None:
        """Raise ConfigError if tokens are limited to groups of experts."""
        if self.group_topk:
            raise ConfigError(
                "moe_router_group_topk",
                f"{self.group_topk}: uar.policy={policy} counts a token's experts over all groups",
                remedy="remove moe_router_group_topk and moe_router_num_groups",
            )


class PolicyState(Protocol):
    """A module with a policy's state: summed in the forward, moved once per step on all ranks.

    Attributes:
        spans_layers: the state is the same in every layer, and :meth:`commit` gets the sums over
            all MoE layers of the model.
    """

    spans_layers: bool

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

    def logged(self) -> dict[str, torch.Tensor]:
        """Scalars for the run log, of the names in :attr:`RoutingPolicy.logged`."""
        ...


class PolicyLoss(NamedTuple):
    """A loss of the policy's own, to be added to the model's.

    Attributes:
        value: this rank's summand (differentiable scalar); the sum over the ranks that share the
            micro-batch is the loss.
        coeff: what it is multiplied by; a number, or a scalar on the device.
    """

    value: torch.Tensor
    coeff: float | torch.Tensor


class RoutingPolicy(ABC):
    """Turns logits and uncertainty into a decision. Built once per layer, and once more at
    start-up, where ``__init__`` refuses what it cannot work with by a ``ConfigError``.

    The defaults here are those of a policy without state and without a loss of its own, whose
    number of experts is known only when the tokens are.

    Attributes:
        own_balance: how the policy balances loads by itself; auxiliary losses, selection biases and
            CLB are then refused for this reason. None where it leaves that to them.
        has_loss: whether :meth:`loss` is to be asked.
        logged: names of what its state logs.
        settings: Megatron's and the layer's.
        max_k: the largest number of experts a token can get.
        fixed_k: that number if it is the same for every token at every step, else None.
        mean_bound: Σk over tokens is at most this times their number, at any step.
        segment: tokens of one sequence that are decided over together, which no layout of the ranks
            may cut; None where it does not matter, or must not.
        state: what the policy keeps in the checkpoint and moves at the step boundary, or None.
        is_per_token: whether in an evaluation a token's decision depends on no other token. Where
            it does, an evaluation runs sequences one by one.
        is_off: whether the decision is Megatron's own at every step.
        is_training: whether it is for training; the router says so before it asks.
    """

    own_balance: ClassVar[str | None] = None
    has_loss: ClassVar[bool] = False
    logged: ClassVar[tuple[str, ...]] = ()

    max_k: int
    fixed_k: int | None
    mean_bound: float
    segment: int | None
    state: PolicyState | None
    is_per_token: bool
    is_off: bool
    is_training: bool

    def __init__(self, settings: RouterSettings) -> None:
        self.settings = settings
        self.max_k = settings.budget.k_max
        self.fixed_k = None
        self.mean_bound = float(self.max_k)
        self.segment = None
        self.state = None
        self.is_per_token = False
        self.is_off = False
        self.is_training = True

    def is_stock(self, step: int) -> bool:
        """Whether at this step the decision is the one Megatron would take."""
        return False

    def total_slots(self, tokens: int, step: int) -> int | None:
        """Σk over ``tokens`` tokens where it is known without looking at them, else None."""
        return None

    @abstractmethod
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

    def loss(
        self,
        logits_TE: torch.Tensor,
        routed_TE: torch.Tensor,
        valid_T: torch.Tensor | None,
        tokens: torch.Tensor,
        sum_over_ranks: SumOverRanks,
    ) -> PolicyLoss | None:
        """Return the policy's own loss of a micro-batch, or None; asked where ``has_loss``.

        Args:
            logits_TE: router logits (differentiable).
            routed_TE: the routed map before token dropping, False for padding.
            valid_T: False for padding, or None.
            tokens: tokens of the micro-batch over all ranks that share it, padding left out.
            sum_over_ranks: sums a tensor, without gradients, over those ranks; all must call it.
        """
        return None


class KernelPolicy(RoutingPolicy):
    """A policy that the fused kernels can carry out: a token's k follows from its ẑ."""

    @abstractmethod
    def most_slots(self, tokens: int) -> int:
        """The largest Σk possible over ``tokens`` tokens, at any step."""

    @abstractmethod
    def line(self, step: int) -> Budget | None:
        """Eq. 5 at this step, where a token's k depends on its own ẑ alone; else None."""

    @abstractmethod
    def experts_of(
        self, zscore_T: torch.Tensor, step: int, batch_size: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """k of each token, and what it would be without a bound on the rows (None: the same).

        Arguments as in :meth:`route`.
        """
