"""Megatron's router with uncertainty: statistics, policies, masked balancing, bias, metrics."""

from __future__ import annotations

from typing import Any

import torch

from uar_megatron.balance import BalancingBias, epistemic_weight, masked_balancing_loss, threshold
from uar_megatron.config import UARConfig
from uar_megatron.decision import RoutingDecision, Uncertainty
from uar_megatron.mcore.compat import (
    TopKRouter,
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from uar_megatron.metrics import LayerMetrics, state_thresholds
from uar_megatron.policies import POLICIES, RouterSettings
from uar_megatron.uncertainty import MovingStatistics


class UARRouter(TopKRouter):
    """``TopKRouter`` whose decision, balancing loss and bias follow the router's own uncertainty.

    Megatron's forward, gating, jitter, z-loss, loss attachment and scaling are inherited; what is
    replaced is :meth:`routing`. With policy ``topk`` and neither CLB nor bias, ``routing`` is
    Megatron's, called as it is, and this class only watches.

    State in the checkpoint (replicated over tensor, data and context ranks): ``uar_statistics``,
    ``uar_bias`` and ``uar_step``. All change only in :meth:`commit`, at the step boundary.

    Args:
        config: Megatron's transformer configuration.
        pg_collection: its process groups.
        is_mtp_layer: as in Megatron.
        uar: the UAR section.
    """

    uar_step: torch.Tensor

    def __init__(
        self, config: Any, pg_collection: Any = None, is_mtp_layer: bool = False, *, uar: UARConfig
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        device = torch.cuda.current_device()
        self.uar = uar
        self.policy = POLICIES[uar.policy](
            uar,
            RouterSettings(
                num_experts=self.num_experts,
                topk=self.topk,
                score_function=self.score_function,
                use_pre_softmax=config.moe_router_pre_softmax,
                scaling_factor=config.moe_router_topk_scaling_factor,
                fixed_topk=self._fixed_topk,
            ),
        )
        self.uar_statistics = MovingStatistics(uar, device)
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
    def is_stock(self) -> bool:
        """Whether every decision is Megatron's own and this class only watches."""
        return self.uar.policy == "topk" and not self.uar.clb.enabled and self.uar_bias is None

    @property
    def theta(self) -> float | None:
        """θ_t of the current step in units of σ_u, None while no mask is active."""
        if self._host_step is None:
            self._host_step = int(self.uar_step.item())
        return threshold(self._host_step, self.uar.clb)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decide where tokens go and attach the balancing losses.

        Args:
            logits: ``[sequence, batch, experts]``.
            padding_mask: ``[sequence, batch]``, True for padding (as Megatron's code, not its
                docstring, reads it), or None.

        Returns:
            ``(probs_TE, routing_map_TE)``.
        """
        valid_T = None if padding_mask is None else ~padding_mask.reshape(-1)
        uncertainty = self.uar_statistics.measure(logits.detach().view(-1, self.num_experts))
        theta = self.theta
        omega_T = (
            None
            if theta is None
            else epistemic_weight(uncertainty.zscore_T, theta, self.uar.clb.width)
        )
        if self.is_stock:
            probs_TE, routing_map_TE = super().routing(logits, padding_mask)
            decision = RoutingDecision(probs_TE, routing_map_TE, routing_map_TE.sum(dim=-1))
        else:
            decision = self._uar_routing(logits, padding_mask, valid_T, uncertainty, omega_T)
        # Only a forward that will be differentiated counts: neither evaluation nor the first,
        # gradient-free pass of activation recomputation.
        if self.training and torch.is_grad_enabled():
            self._accumulate(uncertainty, decision, theta, omega_T, valid_T)
        return decision.probs_TE, decision.routing_map_TE

    def _uar_routing(
        self,
        logits: torch.Tensor,
        padding_mask: torch.Tensor | None,
        valid_T: torch.Tensor | None,
        uncertainty: Uncertainty,
        omega_T: torch.Tensor | None,
    ) -> RoutingDecision:
        logits_TE = logits.view(-1, self.num_experts)
        padding_T = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TE = self.apply_z_loss(logits_TE, padding_mask=padding_T)
        bias_E = None if self.uar_bias is None else self.uar_bias.value
        decision = self.policy.route(logits_TE, uncertainty, bias_E)
        probs_TE = decision.probs_TE
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            # Megatron takes a fixed top-k of the scores again for its losses; here the loss always
            # sees the map that is dispatched, so only the scores are used.
            _, scores_TE = compute_routing_scores_for_aux_loss(
                logits_TE, self.topk, self.score_function, padding_mask=padding_T
            )
            dispatched_TE = decision.routing_map_TE
            if valid_T is not None:
                dispatched_TE = dispatched_TE & valid_T.unsqueeze(-1)
            if omega_T is None and self.policy.fixed_k == self.topk:
                probs_TE = self._apply_aux_loss(
                    probs_TE, scores_TE, dispatched_TE, with_padding_mask=valid_T is not None
                )
            else:
                probs_TE = self._apply_weighted_aux_loss(
                    probs_TE, scores_TE, dispatched_TE, valid_T, omega_T
                )
        self._apply_expert_bias(decision.routing_map_TE, padding_mask=padding_T)
        return RoutingDecision(probs_TE, decision.routing_map_TE, decision.k_T)

    def _apply_weighted_aux_loss(
        self,
        probs_TE: torch.Tensor,
        scores_TE: torch.Tensor,
        dispatched_TE: torch.Tensor,
        valid_T: torch.Tensor | None,
        omega_T: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attach Eq. 6, which with ω ≡ 1 is the auxiliary loss for a variable k."""
        coeff = self.get_aux_loss_coeff("aux_loss")
        if coeff == 0:
            return probs_TE
        weight_T = scores_TE.new_ones(scores_TE.shape[0]) if omega_T is None else omega_T
        if valid_T is not None:
            weight_T = weight_T * valid_T
        shared = torch.cat((dispatched_TE.sum(dim=0).float(), weight_T.sum().reshape(1)))
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(shared, group=self.tp_cp_group)
        loss = masked_balancing_loss(
            scores_TE, weight_T, shared[:-1], shared[-1], coeff, self.uar.clb.epsilon
        )
        return self.attach_and_log_load_balancing_loss(
            probs_TE,
            coeff,
            loss,
            "load_balancing_loss",
            self.tp_cp_group,
            valid_token_count=scores_TE.shape[0] if valid_T is None else valid_T.sum(),
        )

    def attach_and_log_load_balancing_loss(
        self,
        activation: torch.Tensor,
        aux_loss_coeff: float,
        aux_loss: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As in Megatron, and add the loss to this layer's metrics."""
        self.metrics.add_loss(aux_loss / aux_loss_coeff, 1.0 / self.tp_cp_group.size())
        return super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss, *args, **kwargs
        )

    def _accumulate(
        self,
        uncertainty: Uncertainty,
        decision: RoutingDecision,
        theta: float | None,
        omega_T: torch.Tensor | None,
        valid_T: torch.Tensor | None,
    ) -> None:
        self.applied_theta = theta
        self.uar_statistics.accumulate(uncertainty, valid_T)
        if self.uar_bias is not None:
            counted_TE = decision.routing_map_TE
            if valid_T is not None:
                counted_TE = counted_TE & valid_T.unsqueeze(-1)
            self.uar_bias.accumulate(counted_TE, uncertainty.zscore_T, theta, self.uar.clb)
        self.metrics.add(uncertainty, decision, omega_T, valid_T)

    def pending(self) -> torch.Tensor:
        """This rank's sums of the step, float64 ``[4]`` or ``[4 + experts]`` with a bias."""
        parts = [self.uar_statistics.pending()]
        if self.uar_bias is not None:
            parts.append(self.uar_bias.pending())
        return torch.cat(parts)

    def commit(self, total: torch.Tensor) -> None:
        """End an optimizer step: move statistics, bias and step count; close the step's metrics.

        Args:
            total: :meth:`pending`, summed over the tensor, data and context ranks.
        """
        size = MovingStatistics.PENDING_SIZE
        self.uar_statistics.commit(total[:size])
        if self.uar_bias is not None:
            self.uar_bias.commit(total[size:])
        self.uar_step += 1
        if self._host_step is not None:
            self._host_step += 1
        self.metrics.end_step()

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
