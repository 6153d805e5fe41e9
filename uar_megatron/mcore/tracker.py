"""Collects the run log's numbers from the routers and the training loop, once per interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from uar_megatron.mcore.router import UARRouter
from uar_megatron.metrics import LayerMetrics, describe


@dataclass
class _Interval:
    """What this rank has seen since the last log line."""

    steps: int = 0
    skipped: int = 0
    tokens: int = 0
    losses: list[torch.Tensor] = field(default_factory=list)


class RoutingTracker:
    """Turns the routers' sums into one step record per logging interval.

    One all-reduce over all ranks per interval, none otherwise: a table with a row per layer, which
    every rank fills for the layers and tokens it holds. Tokens are never held twice, because
    Megatron trains MoE with tensor parallelism only under sequence parallelism.

    Args:
        routers: this rank's routers; none on a pipeline stage without MoE layers.
        num_layers: rows of the table: transformer layers and MTP layers of the whole model.
        num_experts: E.
        log_interval: optimizer steps per record.
        tokens_per_step: tokens of the current global batch, which Megatron may ramp up.
        emit: called on every rank with the fields of a step record.
    """

    def __init__(
        self,
        routers: list[UARRouter],
        num_layers: int,
        num_experts: int,
        log_interval: int,
        tokens_per_step: Callable[[], int],
        emit: Callable[[dict[str, Any]], None],
    ) -> None:
        self.routers = routers
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.device = torch.cuda.current_device()
        self.max_k = self._largest_k()
        self.log_interval = log_interval
        self.tokens_per_step = tokens_per_step
        self.emit = emit
        for router in routers:
            router.metrics.has_reader = True
        self._interval = _Interval()
        # Megatron's interval timer is not reset after the very first step (training.py:2577).
        self._timed_steps = 0

    def on_step(self, call: dict[str, Any], seconds: float) -> None:
        """Take note of one optimizer step; emit a record at the end of an interval.

        Args:
            call: the arguments of Megatron's ``training_log``, by name.
            seconds: its interval timer.
        """
        interval = self._interval
        interval.steps += 1
        self._timed_steps += 1
        interval.skipped += int(call["skipped_iter"])
        interval.tokens += self.tokens_per_step()
        if "lm loss" in call["loss_dict"]:
            interval.losses.append(call["loss_dict"]["lm loss"].detach().reshape(()))
        if call["iteration"] % self.log_interval == 0:
            self.emit(self._record(call, seconds / self._timed_steps))
            self._interval = _Interval()
            if not call["is_first_iteration"]:
                self._timed_steps = 0

    def _record(self, call: dict[str, Any], seconds_per_step: float) -> dict[str, Any]:
        interval = self._interval
        layers = self._reduce(interval.steps)
        loss = float(torch.stack(interval.losses).mean()) if interval.losses else None
        grad_norm, rate = call["grad_norm"], call["learning_rate"]
        return {
            "step": call["iteration"],
            "interval": interval.steps,
            "loss": loss,
            "lr": None if rate is None else float(rate),
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "skipped": interval.skipped,
            "seconds_per_step": seconds_per_step,
            "tokens_per_second": interval.tokens / interval.steps / max(seconds_per_step, 1e-9),
            "k_eff": sum(m["k_eff"] for m in layers) / len(layers) if layers else None,
            "layers": layers,
        }

    def _largest_k(self) -> int:
        """The largest ``max_k`` of any layer on any rank: the histogram's width everywhere."""
        largest = torch.tensor(
            max((router.policy.max_k for router in self.routers), default=0), device=self.device
        )
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return int(largest)

    def _reduce(self, steps: int) -> list[dict[str, Any]]:
        width = LayerMetrics.width(self.num_experts, self.max_k, steps)
        table = torch.zeros(
            self.num_layers, width + len(_SHARED), dtype=torch.float64, device=self.device
        )
        for router in self.routers:
            row = table[_row(router)]
            row[:width] = router.metrics.flat(self.max_k)
            for column, value in enumerate(_shared_values(router)):
                row[width + column] = value
            router.metrics.clear()
        torch.distributed.all_reduce(table)
        return [
            {"layer": index + 1, **describe(row[:width], self.num_experts, self.max_k, steps)}
            | _shared_record(row[width:])
            for index, row in enumerate(table.cpu())
            if row[:width].any()  # dense layers have no sums
        ]


# Values that every rank of a layer has alike. They are summed with the rest, so each comes with the
# number of ranks that wrote it.
_SHARED = ("bias_mean", "bias_max_abs", "bias_ranks", "theta", "theta_ranks", "beta", "beta_ranks")


def _shared_values(router: UARRouter) -> list[torch.Tensor | float]:
    values: list[torch.Tensor | float] = [0.0] * len(_SHARED)
    if router.uar_bias is not None:
        bias_E = router.uar_bias.value.double()
        values[:3] = [bias_E.mean(), bias_E.abs().max(), 1.0]
    if router.applied_theta is not None:
        values[3:5] = [router.applied_theta, 1.0]
    if router.uar_policy is not None and router.uar_policy.beta is not None:
        values[5:] = [router.uar_policy.beta, 1.0]
    return values


def _shared_record(sums: torch.Tensor) -> dict[str, float | None]:
    bias_mean, bias_max_abs, bias_ranks, theta, theta_ranks, beta, beta_ranks = sums.tolist()
    return {
        "bias_mean": bias_mean / bias_ranks if bias_ranks else None,
        "bias_max_abs": bias_max_abs / bias_ranks if bias_ranks else None,
        "theta": theta / theta_ranks if theta_ranks else None,
        "beta": beta / beta_ranks if beta_ranks else None,
    }


def _row(router: UARRouter) -> int:
    """0-based row of a router; MTP layers, which count from 1 again, come after the others."""
    offset = router.config.num_layers if router.is_mtp_layer else 0
    return int(router.layer_number) - 1 + offset
