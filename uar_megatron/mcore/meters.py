"""What the run log is fed with: a meter at each router, our own or Megatron's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch

from uar_megatron.config import StatesConfig, StatisticsConfig, UARConfig
from uar_megatron.decision import RoutingDecision
from uar_megatron.mcore.balancing import AUX_LOSSES
from uar_megatron.mcore.compat import MoELayer, TopKRouter, keep_state_over_reruns
from uar_megatron.mcore.router import UARRouter
from uar_megatron.mcore.watching import (
    dispatched_map,
    moe_layers,
    row_of,
    selection_bias,
    valid_tokens,
    watch_routing,
)
from uar_megatron.metrics import LayerMetrics, interval_statistics, state_thresholds
from uar_megatron.uncertainty import UncertaintyStatistics

_LOSS_OF_LOG_NAME = {loss.logged_as: loss.name for loss in AUX_LOSSES}


class Meter(Protocol):
    """One router's sums.

    Attributes:
        row: of the layer, 0-based, as ``watching.row_of`` counts.
        metrics: the sums.
    """

    row: int
    metrics: LayerMetrics

    def shared_values(self) -> dict[str, torch.Tensor | float]:
        """Values that every rank of the layer has alike."""

    def end_step(self) -> None:
        """An optimizer step is over; after its step boundary."""

    def end_interval(self, total: torch.Tensor) -> None:
        """A logging interval is over, whose sums over all ranks these are."""


class UARMeter:
    """Reads a UAR router, which measures for its own sake."""

    def __init__(self, router: UARRouter) -> None:
        self.router = router
        self.row = row_of(router)
        self.metrics = router.metrics

    def shared_values(self) -> dict[str, torch.Tensor | float]:
        """Bias, θ_t, and what the policy steers."""
        router = self.router
        values = bias_values(router)
        if router.applied_theta is not None:
            values["theta"] = router.applied_theta
        if router.uar_policy is not None:
            values |= router.uar_policy.logged()
        return values

    def end_step(self) -> None:
        """Nothing: the step boundary has told the router."""

    def end_interval(self, total: torch.Tensor) -> None:
        """Start a new interval."""
        self.metrics.clear()


class StockMeter:
    """Measures one of Megatron's own routers and changes nothing of it.

    ū and σ_u, which only ẑ in the run log needs here, are those of the last logging interval; so
    the one reduction per interval is all the communication there is.

    Args:
        layer: the MoE layer.
        temperature: τ.
    """

    def __init__(self, layer: MoELayer, temperature: float) -> None:
        router = layer.router
        device = torch.cuda.current_device()
        uar = UARConfig(temperature=temperature, statistics=StatisticsConfig(momentum=0.0))
        self.router, self.row = router, row_of(router)
        self.statistics = UncertaintyStatistics(uar, device)
        thresholds = state_thresholds(StatesConfig(), router.num_experts, temperature)
        self.metrics = LayerMetrics(router.num_experts, router.topk, thresholds, device)
        watch_routing(router, self._look)
        self._watch_losses()
        layer.experts.register_forward_pre_hook(self._count_rows)

    def shared_values(self) -> dict[str, torch.Tensor | float]:
        """Megatron's own selection bias."""
        return bias_values(self.router)

    def end_step(self) -> None:
        """Close the step's sums."""
        self.metrics.end_step()

    def end_interval(self, total: torch.Tensor) -> None:
        """Start a new interval, with ū and σ_u of the one that is over."""
        sums = interval_statistics(total, self.statistics.measure_name, self.statistics.mean)
        self.statistics.commit(sums)
        self.metrics.clear()

    def _look(
        self,
        logits: torch.Tensor,
        padding_mask: torch.Tensor | None,
        probs: torch.Tensor,
        routed: torch.Tensor,
    ) -> None:
        with_gradients = self.router.training and torch.is_grad_enabled()
        if self.router.training and not with_gradients:
            return  # the first pass of activation recomputation
        with torch.no_grad():
            valid_T = valid_tokens(padding_mask)
            logits_TE = logits.detach().view(-1, self.router.num_experts)
            uncertainty = self.statistics.measure(logits_TE, valid_T)
            routed_TE = dispatched_map(self.router, probs.detach(), routed)
            decision = RoutingDecision(probs.detach(), routed_TE, routed_TE.sum(dim=-1))
            if with_gradients:
                self.metrics.add(uncertainty, decision, None, valid_T)
            else:
                self.metrics.add_evaluated(uncertainty, decision, valid_T)

    def _watch_losses(self) -> None:
        attach = self.router.attach_and_log_load_balancing_loss

        def attach_and_add(
            activation: torch.Tensor,
            aux_loss_coeff: Any,
            aux_loss: torch.Tensor,
            aux_loss_name: str,
            reduce_group: torch.distributed.ProcessGroup,
            **kwargs: Any,
        ) -> torch.Tensor:
            name = _LOSS_OF_LOG_NAME.get(aux_loss_name)
            if name is not None:
                self.metrics.add_loss(name, aux_loss / aux_loss_coeff, 1.0 / reduce_group.size())
            return attach(
                activation, aux_loss_coeff, aux_loss, aux_loss_name, reduce_group, **kwargs
            )

        self.router.attach_and_log_load_balancing_loss = attach_and_add

    def _count_rows(self, experts: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if self.router.training and torch.is_grad_enabled():
            sharing = self.router.config.expert_tensor_parallel_size
            self.metrics.add_rows(inputs[0].shape[0] / sharing)


def bias_values(router: TopKRouter) -> dict[str, torch.Tensor | float]:
    """How the run log describes a router's selection bias; nothing where there is none."""
    bias_E = selection_bias(router)
    if bias_E is None:
        return {}
    return {"bias_mean": bias_E.double().mean(), "bias_max_abs": bias_E.double().abs().max()}


def meters_of(model: Iterable[torch.nn.Module], temperature: float) -> list[Meter]:
    """Attach a meter to each router of this rank's model chunks. Once per model.

    Args:
        model: the built chunks.
        temperature: τ for routers that are not ours.
    """
    layers = moe_layers(model)
    ours = [UARMeter(la.router) for la in layers if isinstance(la.router, UARRouter)]
    stock = [StockMeter(la, temperature) for la in layers if not isinstance(la.router, UARRouter)]
    if stock:

        def restore(snapshots: list[Any]) -> None:
            for meter, snapshot in zip(stock, snapshots, strict=True):
                meter.metrics.restore(snapshot)

        keep_state_over_reruns(lambda: [m.metrics.snapshot() for m in stock], restore)
    return [*ours, *stock]
