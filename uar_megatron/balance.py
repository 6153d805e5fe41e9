"""Calibrated Load Balancing: press only on uncertain tokens (Eq. 2, 6 and 7)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from uar_megatron.config import BiasConfig, CLBConfig
from uar_megatron.decision import CompactDecision, RoutingDecision, Uncertainty
from uar_megatron.uncertainty import FixedPrecisionModule


def threshold(step: int, clb: CLBConfig) -> float | None:
    """Return θ_t in the units of ``clb.units``, or None while no mask is active.

    From ``theta_start`` (so low that almost nobody is masked) at ``start_step`` to ``theta``
    ``warmup_steps`` later. The paper gives start and warm-up (Table 2) but neither end value nor
    shape.

    Args:
        step: optimizer steps taken so far.
        clb: the schedule.
    """
    if not clb.enabled or step < clb.start_step:
        return None
    if clb.warmup_steps == 0:
        return clb.theta
    progress = min((step - clb.start_step) / clb.warmup_steps, 1.0)
    if clb.schedule == "cosine":
        progress = 0.5 * (1.0 - math.cos(math.pi * progress))
    return clb.theta_start + progress * (clb.theta - clb.theta_start)


def masked_quantity(uncertainty: Uncertainty, clb: CLBConfig) -> torch.Tensor:
    """Return what θ_t is compared with: ẑ, or u itself in absolute units."""
    return uncertainty.zscore_T if clb.units == "sigma" else uncertainty.measure_T


def epistemic_weight(uncertainty: Uncertainty, theta: float, clb: CLBConfig) -> torch.Tensor:
    """Return ω = floor + (1 − floor)·sigmoid((ẑ − θ)/width) of each token (the g of Eq. 6).

    A token whose uncertainty is not finite has ω = 0, like no token at all.
    """
    quantity_T = masked_quantity(uncertainty, clb)
    omega_T = clb.floor + (1.0 - clb.floor) * torch.sigmoid((quantity_T - theta) / clb.width)
    return omega_T.masked_fill(~uncertainty.finite_T, 0.0)


class BalancingSums(NamedTuple):
    """What a balancing loss needs of a rank's tokens; padding is left out.

    Attributes:
        slots_BE: slots routed to each expert.
        weighted_BE: Σ_h ω_h·p_{h,e} (differentiable; ω is not).
        omega_B: Σ_h ω_h.
    """

    slots_BE: torch.Tensor
    weighted_BE: torch.Tensor
    omega_B: torch.Tensor

    def together(self) -> BalancingSums:
        """The sums over all sequences, as one."""
        return BalancingSums(*(part.sum(dim=0, keepdim=True) for part in self))


def balancing_sums(
    scores_TE: torch.Tensor, routed_TE: torch.Tensor, omega_T: torch.Tensor, parts: int
) -> BalancingSums:
    """Sum over the tokens of each of ``parts`` sequences, or of all together (1).

    Args:
        scores_TE: router probabilities p (differentiable), fp32.
        routed_TE: routed map, padding rows False.
        omega_T: ω (detached), padding 0.
        parts: tokens are ordered ``[sequence, batch]``; the size of the batch, or 1.
    """
    experts = scores_TE.shape[-1]
    omega_SB = omega_T.view(-1, parts)
    weighted_BE = (omega_SB.unsqueeze(-1) * scores_TE.view(-1, parts, experts)).sum(dim=0)
    slots_BE = routed_TE.view(-1, parts, experts).sum(dim=0)
    return BalancingSums(slots_BE, weighted_BE, omega_SB.sum(dim=0))


def masked_balancing_loss(
    weighted_BE: torch.Tensor,
    slots_BE: torch.Tensor,
    omega_B: torch.Tensor,
    coeff: float,
    epsilon: float,
) -> torch.Tensor:
    """Return coeff · Σ_h ω_h·ℓ_h / (Σ_h ω_h + ε), ℓ_h = E·Σ_e f_e·p_{h,e}, averaged over B.

    Eq. 2 and 6. f_e is the share of routed slots, so it stays right when tokens have different
    numbers of experts. With ω ≡ 1 and a fixed k this is Megatron's
    ``switch_load_balancing_loss_func`` (moe_utils.py:56). B are the parts that are balanced each on
    its own: the sequences for ``seq_aux_loss``, a single part for the others.

    Args:
        weighted_BE: this rank's Σ_h ω_h·p_{h,e}.
        slots_BE: slots routed to each expert, summed over the ranks that share the tokens.
        omega_B: Σ ω over the same ranks.
        coeff: loss coefficient.
        epsilon: keeps the loss 0 where nobody is uncertain.

    Returns:
        This rank's summand of the loss; the sum over those ranks is the loss.
    """
    fractions_BE = slots_BE / slots_BE.sum(dim=-1, keepdim=True).clamp_min(1.0)
    loss_B = (fractions_BE * weighted_BE).sum(dim=-1) / (omega_B + epsilon)
    return coeff * slots_BE.shape[-1] * loss_B.mean()


class BalancingBias(FixedPrecisionModule):
    """A per-expert selection bias that replaces or accompanies the auxiliary loss (Eq. 7).

    Megatron has one (``moe_router_enable_expert_bias``) but refuses it with softmax scores; this
    one works with every score function and can weight tokens by their uncertainty.

    Buffers: ``value`` (float32 ``[experts]``, persistent); local weighted slot counts.
    """

    value: torch.Tensor
    _pending: torch.Tensor

    def __init__(self, config: BiasConfig, num_experts: int, device: torch.device | str | int):
        super().__init__()
        self.rate = config.rate
        self.update_rule = config.update
        self.recentre = config.recentre
        self.register_buffer("value", torch.zeros(num_experts, device=device))
        self.register_buffer(
            "_pending",
            torch.zeros(num_experts, dtype=torch.float64, device=device),
            persistent=False,
        )

    @torch.no_grad()
    def accumulate(
        self,
        routed: RoutingDecision | CompactDecision,
        uncertainty: Uncertainty,
        theta: float | None,
        clb: CLBConfig,
        valid_T: torch.Tensor | None = None,
    ) -> None:
        """Count the slots of each expert, each token's weighted by λ_hi or λ_lo (Eq. 7).

        Args:
            routed: where the tokens go.
            uncertainty: of the same tokens.
            theta: θ_t, or None: every token counts 1, which is the stock update.
            clb: λ_hi for tokens with ẑ > θ (u > θ in absolute units), λ_lo for the rest.
            valid_T: False for padding, which is left out.
        """
        if theta is None:
            self._pending += routed.slots(valid_T)
            return
        is_uncertain_T = masked_quantity(uncertainty, clb) > theta
        # Multiples of 2⁻²⁰: their sums are exact in any order, so that no layout of the ranks can
        # turn the sign of an offset that is zero.
        high, low = (round(2**20 * weight) / 2**20 for weight in (clb.lambda_hi, clb.lambda_lo))
        weight_T = torch.where(is_uncertain_T, high, low)
        if valid_T is not None:
            weight_T = weight_T * valid_T
        self._pending += routed.weighted_slots(weight_T)

    def pending(self) -> torch.Tensor:
        """This rank's weighted slot counts since the last commit, float64 ``[experts]``."""
        return self._pending

    @torch.no_grad()
    def commit(self, total_E: torch.Tensor) -> None:
        """Move the bias towards a balanced load and start a new step.

        ``sign``: b += rate·sign(mean − count), as Megatron does (moe_utils.py:1136).
        ``proportional``: b += rate·(mean − count)/mean; dividing by the mean makes the step
        independent of the batch size, which Eq. 7 leaves open ("∝").

        Args:
            total_E: :meth:`pending` summed over every rank that holds tokens of this layer.
        """
        mean = total_E.mean()
        offset_E = mean - total_E
        if self.update_rule == "sign":
            change_E = torch.sign(offset_E)
        else:
            change_E = offset_E / mean.clamp_min(1e-12)
        # A new tensor, as in UncertaintyStatistics.commit.
        self.value = self.value + self.rate * change_E.float()
        if self.recentre:
            self.value = self.value - self.value.mean()
        self._pending.zero_()
