"""Megatron's three auxiliary losses for a variable k and under the epistemic mask (Eq. 6)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from uar_megatron.balance import BalancingSums, masked_balancing_loss
from uar_megatron.mcore.compat import TopKRouter


class AuxLoss(NamedTuple):
    """One of ``moe_router_load_balancing_type``."""

    name: str
    logged_as: str
    per_sequence: bool
    is_global: bool


AUX_LOSSES = (
    AuxLoss("aux_loss", "load_balancing_loss", per_sequence=False, is_global=False),
    AuxLoss("seq_aux_loss", "seq_load_balancing_loss", per_sequence=True, is_global=False),
    AuxLoss("global_aux_loss", "global_load_balancing_loss", per_sequence=False, is_global=True),
)


class AttachGradient(torch.autograd.Function):
    """Hand on a tensor; in backward, start what hangs on another one, which is not used itself.

    Megatron's losses ride on the tensor they are computed from (``MoEAuxLossAutoScaler``). Where
    that is not what goes on to the experts, it is tied to what does.
    """

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, carrier: torch.Tensor) -> torch.Tensor:
        """Return ``value``."""
        ctx.carrier_shape = carrier.shape
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give ``carrier`` a gradient of zeros, to which its loss adds its own."""
        return grad, grad.new_zeros(ctx.carrier_shape)


class MaskedBalancingRouter(TopKRouter):
    """``TopKRouter`` with auxiliary losses of any routing map and any weights of the tokens."""

    def attach_balancing_losses(
        self,
        probs: torch.Tensor,
        sums_of: Callable[[bool], BalancingSums],
        valid_tokens: torch.Tensor,
        epsilon: float,
    ) -> torch.Tensor:
        """Attach every auxiliary loss that is on, as Megatron scales and logs it (router.py:407).

        Loads are counted from the map that was really routed, before token dropping: an expert
        above its capacity must not look balanced. ``global_aux_loss`` takes its loads from the
        running mean over the micro-batches of the step and all data-parallel ranks, as in Megatron.

        Under ``calculate_per_token_loss`` Megatron multiplies the loss by the ranks' tokens, which
        its averaging divides out again. Where ranks that share a sequence differ in padding, only
        their mean number is right for all of them (Megatron itself takes their sum there, since
        moe_utils.py:272 reduces in place).

        Args:
            probs: what the losses are attached to.
            sums_of: sums over this rank's tokens, for each sequence if asked with True, else for
                all of them together.
            valid_tokens: tokens of this rank that are no padding, ``[1]``.
            epsilon: ε of Eq. 6.

        Returns:
            ``probs`` with the losses attached.
        """
        for loss_type in AUX_LOSSES:
            coeff = self.get_aux_loss_coeff(loss_type.name)
            if coeff == 0:
                continue
            sums = sums_of(loss_type.per_sequence)
            group = self.tp_dp_cp_group if loss_type.is_global else self.tp_cp_group
            slots_BE = sums.slots_BE.float()
            shared = torch.cat((slots_BE.flatten(), sums.omega_B, valid_tokens))
            if group.size() > 1:
                torch.distributed.all_reduce(shared, group=group)
            slots, omega_B, all_valid = shared.split((slots_BE.numel(), len(slots_BE), 1))
            slots_BE = slots.view_as(slots_BE)
            if loss_type.is_global:
                self.global_tokens_per_expert += slots_BE[0]
                self.ga_steps += 1
                slots_BE = (self.global_tokens_per_expert / self.ga_steps).unsqueeze(0)
            loss = masked_balancing_loss(sums.weighted_BE, slots_BE, omega_B, coeff, epsilon)
            probs = self.attach_and_log_load_balancing_loss(
                probs,
                coeff,
                loss,
                loss_type.logged_as,
                group,
                needs_dp_avg=not loss_type.is_global,
                valid_token_count=all_valid[0] / group.size(),
            )
        return probs
