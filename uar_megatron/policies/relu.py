"""ReLU routing: an expert is active where its gate is positive; an L1 term holds the mean."""

from __future__ import annotations

import torch

from uar_megatron.config import ReLUConfig
from uar_megatron.decision import RoutingDecision, Uncertainty
from uar_megatron.errors import ConfigError
from uar_megatron.policies.base import PolicyLoss, RouterSettings, RoutingPolicy, SumOverRanks
from uar_megatron.uncertainty import FixedPrecisionModule

# A model that no λ makes dense enough divides it for ever; at 0, in fp32, it could not come back.
COEFF_BOUNDS = (1e-30, 1e30)


class ReLUPolicy(RoutingPolicy):
    """Weights R = ReLU(logits), experts where R > 0 (ReMoE, Wang et al., arXiv 2412.14711).

    The number of experts is steered by a loss, λ/(L·T) Σ_l Σ_t Σ_e f_{l,e}·R_{l,t,e} with
    f_{l,e} = E/(K·T) Σ_t 1[R > 0], which presses most on the most loaded experts and so balances
    them too. One λ for all layers is multiplied by α at each step on which the model is denser than
    1 − K/E and divided by it where it is sparser. With λ tiny at first, training passes through the
    paper's three stages by itself: dense (about E/2 experts, of a router that starts around 0),
    sparsifying, and stable at the target.

    Choices: K is ``uar.budget.target_mean_k``. The 1/L of the paper is kept, which the authors'
    code leaves out; the first stage then takes log(L)/log(α) steps more. Loads and T are those of a
    micro-batch, as in their code. Like there, a token may have no expert, or all of them:
    ``uar.budget.k_min`` and ``k_max`` do not act. A step that meets the target exactly leaves λ.
    """

    own_balance = "ReLU routing balances loads by its own L1 loss, which also holds the sparsity"
    has_loss = True
    logged = ("l1_coeff",)

    def __init__(self, settings: RouterSettings) -> None:
        super().__init__(settings)
        _check(settings)
        self.target = settings.budget.target_mean_k
        self.max_k = settings.num_experts
        self.is_per_token = True
        self.mean_bound = float(self.max_k)
        self.sparsity = SparsityControl(
            settings.uar.relu, self.target, settings.num_experts, settings.device
        )
        self.state = self.sparsity

    def route(
        self,
        logits_TE: torch.Tensor,
        uncertainty: Uncertainty,
        bias_E: torch.Tensor | None,
        step: int,
        batch_size: int,
    ) -> RoutingDecision:
        """See :class:`~uar_megatron.policies.base.RoutingPolicy`."""
        gates_TE = torch.relu(logits_TE)
        is_active_TE = logits_TE.detach() > 0
        if self.settings.scaling_factor:
            gates_TE = gates_TE * self.settings.scaling_factor
        # A NaN has no expert, and must not reach one by its weight either.
        gates_TE = gates_TE.masked_fill(~is_active_TE, 0.0)
        return RoutingDecision(gates_TE, is_active_TE, is_active_TE.sum(dim=-1))

    def loss(
        self,
        logits_TE: torch.Tensor,
        routed_TE: torch.Tensor,
        valid_T: torch.Tensor | None,
        tokens: torch.Tensor,
        sum_over_ranks: SumOverRanks,
    ) -> PolicyLoss:
        """The load-balanced L1 norm of the gates, with λ as its coefficient."""
        settings, tokens = self.settings, tokens.clamp_min(1.0)
        loads_E = sum_over_ranks(routed_TE.sum(dim=0).float())
        fractions_E = settings.num_experts / (self.target * tokens) * loads_E
        gates_TE = torch.relu(logits_TE.float()).masked_fill(~routed_TE, 0.0)
        norm = (fractions_E * gates_TE.sum(dim=0)).sum() / tokens
        return PolicyLoss(norm / settings.num_moe_layers, self.sparsity.coeff.float())


class SparsityControl(FixedPrecisionModule):
    """λ, which is the same in every layer.

    Buffer (persistent, scalar float64): ``coeff``.

    Args:
        config: where λ starts and how fast it moves.
        target: K, experts per token.
        num_experts: E.
        device: where λ lives.
    """

    spans_layers = True

    coeff: torch.Tensor
    _pending: torch.Tensor

    def __init__(
        self,
        config: ReLUConfig,
        target: float,
        num_experts: int,
        device: torch.device | str | int,
    ) -> None:
        super().__init__()
        self.multiplier = config.multiplier
        self.target_sparsity = 1.0 - target / num_experts
        self.num_experts = num_experts
        coeff = torch.tensor(config.initial_coeff, dtype=torch.float64, device=device)
        self.register_buffer("coeff", coeff)
        self.register_buffer(
            "_pending", torch.zeros(1, dtype=torch.float64, device=device), persistent=False
        )

    @torch.no_grad()
    def accumulate(self, k_T: torch.Tensor, valid_T: torch.Tensor | None) -> None:
        """Add a micro-batch's active experts; padding (``valid_T`` False) is left out."""
        self._pending += k_T.sum() if valid_T is None else (k_T * valid_T).sum()

    def pending(self) -> torch.Tensor:
        """This rank's Σk since the last commit, float64 ``[1]``."""
        return self._pending

    @torch.no_grad()
    def commit(self, total: torch.Tensor, tokens: torch.Tensor, step: int) -> None:
        """Multiply λ by α^sign(target − sparsity) and start a new step.

        Args:
            total: Σk over all MoE layers and ranks.
            tokens: tokens over all MoE layers and ranks.
            step: not used.
        """
        sparsity = 1.0 - total[0] / (tokens.clamp_min(1.0) * self.num_experts)
        direction = torch.sign(self.target_sparsity - sparsity) * (tokens > 0)
        # A new tensor, as in UncertaintyStatistics.commit.
        self.coeff = (self.coeff * self.multiplier**direction).clamp(*COEFF_BOUNDS)
        self._pending.zero_()

    def logged(self) -> dict[str, torch.Tensor]:
        """λ."""
        return {"l1_coeff": self.coeff}


def _check(settings: RouterSettings) -> None:
    if settings.score_function != "softmax" or not settings.use_pre_softmax:
        name = settings.score_function
        name = "softmax after the selection" if name == "softmax" else name
        raise ConfigError(
            "moe_router_pre_softmax",
            f"{name} with uar.policy=relu, whose gates are the weights: nothing normalises them "
            "after the selection",
            allowed="moe_router_score_function=softmax with moe_router_pre_softmax=true",
        )
    if settings.uar.weights != "megatron":
        raise ConfigError(
            "uar.weights",
            f"{settings.uar.weights} with uar.policy=relu, whose gates are the weights",
            allowed="megatron",
        )
    settings.refuse_groups("relu")
    target = settings.uar.budget.target_mean_k
    if target is not None and not isinstance(target, int | float):
        raise ConfigError(
            "uar.budget.target_mean_k",
            "differs between layers; with uar.policy=relu one coefficient holds the mean over all",
            allowed="a number",
        )
    mean_k = settings.budget.target_mean_k
    if not 0 < mean_k <= settings.num_experts:
        raise ConfigError(
            "uar.budget.target_mean_k",
            f"{mean_k:g} of {settings.num_experts} experts",
            allowed=f"above 0 … {settings.num_experts}",
            remedy="it is moe_router_topk unless set",
        )
