"""Megatron's three auxiliary losses for a variable k and under the epistemic mask (Eq. 6)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from uar_megatron.balance import masked_balancing_loss
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


class MaskedBalancingRouter(TopKRouter):
    """``TopKRouter`` with auxiliary losses of any routing map and any weights of the tokens."""

    def attach_balancing_losses(
        self,
        probs_TE: torch.Tensor,
        scores_TE: torch.Tensor,
        routed_TE: torch.Tensor,
        omega_T: torch.Tensor,
        valid_tokens: torch.Tensor,
        batch_size: int,
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
            probs_TE: what the losses are attached to.
            scores_TE: normalised scores p (differentiable), padding rows 0.
            routed_TE: routed map, padding rows False.
            omega_T: ω of each token, 1 without a mask; padding 0.
            valid_tokens: tokens of this rank that are no padding, ``[1]``.
            batch_size: sequences in the micro-batch; tokens are ordered ``[sequence, batch]``.
            epsilon: ε of Eq. 6.

        Returns:
            ``probs_TE`` with the losses attached.
        """
        experts = routed_TE.shape[-1]
        for loss_type in AUX_LOSSES:
            coeff = self.get_aux_loss_coeff(loss_type.name)
            if coeff == 0:
                continue
            parts = batch_size if loss_type.per_sequence else 1
            group = self.tp_dp_cp_group if loss_type.is_global else self.tp_cp_group
            slots_BE = routed_TE.view(-1, parts, experts).sum(dim=0).float()
            omega_SB = omega_T.view(-1, parts)
            shared = torch.cat((slots_BE.flatten(), omega_SB.sum(dim=0), valid_tokens))
            if group.size() > 1:
                torch.distributed.all_reduce(shared, group=group)
            slots, omega_B, all_valid = shared.split((parts * experts, parts, 1))
            slots_BE = slots.view(parts, experts)
            if loss_type.is_global:
                self.global_tokens_per_expert += slots_BE[0]
                self.ga_steps += 1
                slots_BE = (self.global_tokens_per_expert / self.ga_steps).unsqueeze(0)
            loss = masked_balancing_loss(
                scores_TE.view(-1, parts, experts),
                omega_SB,
                slots_BE,
                omega_B,
                coeff,
                epsilon,
            )
            probs_TE = self.attach_and_log_load_balancing_loss(
                probs_TE,
                coeff,
                loss,
                loss_type.logged_as,
                group,
                needs_dp_avg=not loss_type.is_global,
                valid_token_count=all_valid[0] / group.size(),
            )
        return probs_TE
