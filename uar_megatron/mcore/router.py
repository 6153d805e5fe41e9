"""Megatron's router with uncertainty: statistics, policies, masked balancing, bias, metrics."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch

from uar_megatron.balance import BalancingBias, balancing_sums, epistemic_weight, threshold
from uar_megatron.config import UARConfig
from uar_megatron.decision import CompactDecision, RoutingDecision, Uncertainty
from uar_megatron.mcore.balancing import AUX_LOSSES, AttachGradient, MaskedBalancingRouter
from uar_megatron.mcore.compat import (
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from uar_megatron.mcore.kernels import takes_indices, uses_kernels
from uar_megatron.mcore.policies import router_settings
from uar_megatron.metrics import POLICY_LOSS, LayerMetrics, state_thresholds
from uar_megatron.policies import find_policy
from uar_megatron.policies.base import KernelPolicy
from uar_megatron.policies.fused import route_fused
from uar_megatron.uncertainty import UncertaintyStatistics

_LOSS_OF_LOG_NAME = {loss.logged_as: loss.name for loss in AUX_LOSSES}


class UARRouter(MaskedBalancingRouter):
    """``TopKRouter`` whose decision, balancing losses and bias follow the router's own uncertainty.

    Megatron's forward, gating, jitter, z-loss, loss attachment and scaling are inherited; what is
    replaced is :meth:`routing`. At every step at which the policy decides as Megatron would and
    neither CLB nor our bias acts, ``routing`` is Megatron's, called as it is, and this class only
    watches.

    State in the checkpoint (replicated over tensor, data and context ranks): ``uar_statistics``,
    ``uar_bias``, ``uar_policy`` and ``uar_step``. All change only in :meth:`commit`, at the step
    boundary.

    Args:
        config: Megatron's transformer configuration.
        pg_collection: its process groups.
        is_mtp_layer: as in Megatron.
        uar: the UAR section.
        layer_number: 1-based number of the transformer layer, for budgets that differ over depth.
    """

    uar_step: torch.Tensor

    def __init__(
        self,
        config: Any,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        *,
        uar: UARConfig,
        layer_number: int | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        device = torch.cuda.current_device()
        self.uar = uar
        self.settings = router_settings(
            uar,
            config,
            layer_number,
            is_mtp_layer=is_mtp_layer,
            device=device,
            fixed_topk=self._fixed_topk,
        )
        self.policy = find_policy(uar.policy)(self.settings)
        self.has_kernels = uses_kernels(uar, config)
        self.uar_policy = self.policy.state
        self.uar_statistics = UncertaintyStatistics(
            uar, device, functools.partial(torch.distributed.all_reduce, group=self.tp_dp_cp_group)
        )
        self.uar_bias = (
            BalancingBias(uar.bias, self.num_experts, device) if uar.bias.enabled else None
        )
        self.register_buffer("uar_step", torch.zeros((), dtype=torch.int64, device=device))
        # θ_t is a number on the host; reading the buffer each forward would be a device sync.
        self._host_step: int | None = 0
        self.applied_theta: float | None = None
        self.metrics = LayerMetrics(
            self.num_experts,
            self.policy.max_k,
            state_thresholds(uar.states, self.num_experts, uar.temperature),
            device,
        )

    @property
    def is_off(self) -> bool:
        """Whether every step is stock Megatron's."""
        return self.policy.is_off and not self.uar.clb.enabled and self.uar_bias is None

    @property
    def step(self) -> int:
        """Optimizer steps that this router has taken with UAR on."""
        if self._host_step is None:
            self._host_step = int(self.uar_step.item())
        return self._host_step

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decide where tokens go and attach the balancing losses.

        Args:
            logits: ``[sequence, batch, experts]``.
            padding_mask: ``[sequence, batch]``, True for padding (as Megatron's code, not its
                docstring, reads it), or None.

        Returns:
            ``(probs_TE, routing_map_TE)``; with the kernels and a dispatcher that takes them
            as they are, ``(probs_TK, index_TK)``.
        """
        valid_T = None if padding_mask is None else ~padding_mask.reshape(-1)
        theta = threshold(self.step, self.uar.clb)
        self.policy.is_training = self.training
        is_stock = self.policy.is_stock(self.step) and theta is None and self.uar_bias is None
        if self.has_kernels and not is_stock:
            return self._fused_routing(logits, padding_mask, valid_T, theta)
        uncertainty = self.uar_statistics.measure(
            logits.detach().view(-1, self.num_experts), valid_T
        )
        omega_T = None if theta is None else epistemic_weight(uncertainty, theta, self.uar.clb)
        if is_stock:
            probs_TE, routing_map_TE = super().routing(logits, padding_mask)
            routed_TE = routing_map_TE
            if self.config.moe_pad_expert_input_to_capacity:
                # Slots that only fill up an expert's capacity have no weight.
                routed_TE = routed_TE & (probs_TE != 0)
            routed = dispatched = RoutingDecision(probs_TE, routed_TE, routed_TE.sum(dim=-1))
        else:
            routed, dispatched, probs_TE, routing_map_TE = self._uar_routing(
                logits, padding_mask, valid_T, uncertainty, omega_T
            )
        self._accumulate(uncertainty, routed, dispatched, theta, omega_T, valid_T)
        return probs_TE, routing_map_TE

    def _fused_routing(
        self,
        logits: torch.Tensor,
        padding_mask: torch.Tensor | None,
        valid_T: torch.Tensor | None,
        theta: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`_uar_routing`, by the kernels."""
        assert isinstance(self.policy, KernelPolicy)  # as uses_kernels has checked
        per_sequence = self.get_aux_loss_coeff("seq_aux_loss") > 0
        found = route_fused(
            logits.view(-1, self.num_experts),
            self.policy,
            self.settings,
            self.uar_statistics,
            self.uar.clb,
            theta=theta,
            bias_E=self.expert_bias if self.uar_bias is None else self.uar_bias.value,
            valid_T=valid_T,
            step=self.step,
            batch_size=logits.shape[1],
            sequences=logits.shape[1] if per_sequence else 1,
        )
        routed, sums = found.routed, found.balancing
        probs_TK = routed.probs_TK
        if self.training and torch.is_grad_enabled():
            if self.config.moe_z_loss_coeff is not None:
                # The logsumexp of one number is the number itself.
                padding_T = None if padding_mask is None else padding_mask.reshape(-1)
                lse_T1 = self.apply_z_loss(found.lse_T.unsqueeze(-1), padding_mask=padding_T)
                probs_TK = AttachGradient.apply(probs_TK, lse_T1)
            if self.is_aux_loss_enabled():
                probs_TK = self.attach_balancing_losses(
                    probs_TK,
                    lambda apart: sums if apart else sums.together(),
                    UncertaintyStatistics.tokens(found.sums).float().reshape(1),
                    self.uar.clb.epsilon,
                )
        self._apply_expert_bias(routed.slots_E.unsqueeze(0))  # which only sums over the tokens
        uncertainty = found.uncertainty
        omega_T = None if theta is None else epistemic_weight(uncertainty, theta, self.uar.clb)
        self._accumulate(uncertainty, routed, routed, theta, omega_T, valid_T, found.sums)
        routed = dataclasses.replace(routed, probs_TK=probs_TK)
        is_compact = takes_indices(self.config)
        return (probs_TK, routed.index_TK) if is_compact else routed.densify()

    def _uar_routing(
        self,
        logits: torch.Tensor,
        padding_mask: torch.Tensor | None,
        valid_T: torch.Tensor | None,
        uncertainty: Uncertainty,
        omega_T: torch.Tensor | None,
    ) -> tuple[RoutingDecision, RoutingDecision, torch.Tensor, torch.Tensor]:
        """Return the decision, what token dropping leaves of it, and what is dispatched."""
        batch_size = logits.shape[1]
        logits_TE = logits.view(-1, self.num_experts)
        padding_T = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TE = self.apply_z_loss(logits_TE, padding_mask=padding_T)
        # Megatron's own bias, or ours; never both.
        bias_E = self.expert_bias if self.uar_bias is None else self.uar_bias.value
        routed = self.policy.route(logits_TE, uncertainty, bias_E, self.step, batch_size)
        routed_TE = routed.routing_map_TE
        if valid_T is not None:
            routed_TE = routed_TE & valid_T.unsqueeze(-1)
        probs_TE, routing_map_TE = routed.probs_TE, routed.routing_map_TE
        dispatched = routed
        if self.config.moe_expert_capacity_factor is not None:
            # Capacities count moe_router_topk experts per token, whatever each token's k.
            probs_TE, routing_map_TE = apply_router_token_dropping(
                probs_TE,
                routing_map_TE,
                router_topk=self.topk,
                capacity_factor=self.config.moe_expert_capacity_factor,
                drop_policy=self.config.moe_token_drop_policy,
                pad_to_capacity=self.config.moe_pad_expert_input_to_capacity,
            )
            # Padding to capacity dispatches slots that nobody was routed to.
            kept_TE = routing_map_TE & routed.routing_map_TE
            dispatched = RoutingDecision(probs_TE, kept_TE, kept_TE.sum(dim=-1))
        if self.training and torch.is_grad_enabled() and self.policy.has_loss:
            probs_TE = self._attach_policy_loss(probs_TE, logits_TE, routed_TE, valid_T)
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            # Megatron takes a fixed top-k of the scores again for its losses; here the losses see
            # the map that was routed, so only the scores are used.
            _, scores_TE = compute_routing_scores_for_aux_loss(
                logits_TE, self.topk, self.score_function, padding_mask=padding_T
            )
            weight_T = scores_TE.new_ones(scores_TE.shape[0]) if omega_T is None else omega_T
            is_valid_T = torch.ones_like(weight_T) if valid_T is None else valid_T
            weight_T = weight_T * is_valid_T
            probs_TE = self.attach_balancing_losses(
                probs_TE,
                lambda apart: balancing_sums(
                    scores_TE, routed_TE, weight_T, batch_size if apart else 1
                ),
                is_valid_T.sum(dim=0, keepdim=True),
                self.uar.clb.epsilon,
            )
        # Padding is masked here: with a padding mask Megatron's own line fails (router.py:738).
        self._apply_expert_bias(routed_TE)
        return routed, dispatched, probs_TE, routing_map_TE

    def _attach_policy_loss(
        self,
        probs_TE: torch.Tensor,
        logits_TE: torch.Tensor,
        routed_TE: torch.Tensor,
        valid_T: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attach the policy's own loss, scaled and logged as Megatron's are."""

        def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
            if self.tp_cp_group.size() > 1:
                torch.distributed.all_reduce(value, group=self.tp_cp_group)
            return value

        # Not in the dtype of the weights: bf16 has no 1027.
        every = torch.full((), len(probs_TE), dtype=torch.float32, device=probs_TE.device)
        tokens = sum_over_ranks(every if valid_T is None else valid_T.sum().float())
        loss = self.policy.loss(logits_TE, routed_TE, valid_T, tokens, sum_over_ranks)
        if loss is None:
            return probs_TE
        return self.attach_and_log_load_balancing_loss(
            probs_TE,
            loss.coeff,
            loss.coeff * loss.value,
            POLICY_LOSS,
            self.tp_cp_group,
            valid_token_count=tokens / self.tp_cp_group.size(),
        )

    def attach_and_log_load_balancing_loss(
        self,
        activation: torch.Tensor,
        aux_loss_coeff: float | torch.Tensor,
        aux_loss: torch.Tensor,
        aux_loss_name: str,
        reduce_group: torch.distributed.ProcessGroup,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As in Megatron, and add the loss to this layer's metrics."""
        name = _LOSS_OF_LOG_NAME.get(aux_loss_name, aux_loss_name)
        self.metrics.add_loss(name, aux_loss / aux_loss_coeff, 1.0 / reduce_group.size())
        return super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss, aux_loss_name, reduce_group, **kwargs
        )

    def _accumulate(
        self,
        uncertainty: Uncertainty,
        routed: RoutingDecision | CompactDecision,
        dispatched: RoutingDecision | CompactDecision,
        theta: float | None,
        omega_T: torch.Tensor | None,
        valid_T: torch.Tensor | None,
        sums: torch.Tensor | None = None,
    ) -> None:
        # Only a forward that will be differentiated counts: neither evaluation nor the first,
        # gradient-free pass of activation recomputation.
        if not self.training:
            self.metrics.add_evaluated(uncertainty, dispatched, valid_T)
        if not (self.training and torch.is_grad_enabled()):
            return
        self.applied_theta = theta
        self.uar_statistics.accumulate(uncertainty, valid_T, sums)
        if self.uar_policy is not None:
            self.uar_policy.accumulate(routed.k_T, valid_T)
        if self.uar_bias is not None:
            self.uar_bias.accumulate(routed, uncertainty, theta, self.uar.clb, valid_T)
        self.metrics.add(uncertainty, dispatched, omega_T, valid_T)
        if routed.wanted_k_T is not None:
            trimmed_T = routed.wanted_k_T - routed.k_T
            self.metrics.add_trimmed((trimmed_T if valid_T is None else trimmed_T * valid_T).sum())

    def pending(self) -> torch.Tensor:
        """This rank's sums of the step: statistics, then bias and policy; float64."""
        parts = [self.uar_statistics, self.uar_bias, self.uar_policy]
        return torch.cat([part.pending() for part in parts if part is not None])

    def commit(self, total: torch.Tensor, of_model: torch.Tensor | None = None) -> None:
        """End an optimizer step: move statistics, bias and step count; close the step's metrics.

        Args:
            total: :meth:`pending`, summed over the tensor, data and context ranks.
            of_model: :meth:`policy_sums` of ``total``, summed over the MoE layers of the model;
                None where the policy's state does not span layers.
        """
        statistics, rest = total.tensor_split([UncertaintyStatistics.PENDING_SIZE])
        self.uar_statistics.commit(statistics)
        if self.uar_bias is not None:
            self.uar_bias.commit(rest[: self.num_experts])
        if self.uar_policy is not None:
            sums = self.policy_sums(total) if of_model is None else of_model
            self.uar_policy.commit(sums[:-1], sums[-1], self.step)
        if not self.is_off:
            # Schedules count from where UAR was switched on.
            self._host_step = self.step + 1
            self.uar_step = self.uar_step + 1
        self.metrics.end_step()

    def policy_sums(self, total: torch.Tensor) -> torch.Tensor:
        """The policy's part of a sum of :meth:`pending`, and the number of tokens after it."""
        statistics, rest = total.tensor_split([UncertaintyStatistics.PENDING_SIZE])
        if self.uar_bias is not None:
            rest = rest[self.num_experts :]
        return torch.cat((rest, UncertaintyStatistics.tokens(statistics).reshape(1)))

    def snapshot(self) -> dict[str, Any]:
        """What :meth:`commit` moves, for :meth:`restore`; holds references, copies nothing."""
        return {
            "host_step": self._host_step,
            "buffers": dict(self._state_buffers()),
            "metrics": self.metrics.snapshot(),
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go back to a snapshot: the step that was committed since is repeated or given up."""
        self._host_step = snapshot["host_step"]
        self.metrics.restore(snapshot["metrics"])
        for name, value in snapshot["buffers"].items():
            owner, _, buffer = name.rpartition(".")
            setattr(self.get_submodule(owner), buffer, value)

    def _state_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        saved = self.state_dict(keep_vars=True)
        return ((n, b) for n, b in self.named_buffers() if n.startswith("uar_") and n in saved)

    def _fixed_topk(self, logits_TE: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Megatron's routing with every one of its options (router.py:759)."""
        return topk_routing_with_score_function(
            logits_TE,
            k,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            num_groups=self.config.moe_router_num_groups,
            group_topk=self.config.moe_router_group_topk,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
            fused=self.config.moe_router_fusion,
            router_replay=self.router_replay,
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._host_step = None
