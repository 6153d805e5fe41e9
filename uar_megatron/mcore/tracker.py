"""Collects the run log's numbers from the meters and the training loop, once per interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from uar_megatron.mcore.meters import Meter
from uar_megatron.metrics import LayerMetrics, describe, describe_evaluation


@dataclass
class _Interval:
    """What this rank has seen since the last log line."""

    steps: int = 0
    skipped: int = 0
    tokens: int = 0
    losses: list[torch.Tensor] = field(default_factory=list)


class RoutingTracker:
    """Turns the meters' sums into one step record per logging interval.

    One all-reduce over all ranks per interval, none otherwise: a table with a row per layer, which
    every rank fills for the layers and tokens it holds. Tokens are never held twice, because
    Megatron trains MoE with tensor parallelism only under sequence parallelism.

    Args:
        meters: at this rank's routers; none on a pipeline stage without MoE layers.
        num_layers: rows of the table: transformer layers and MTP layers of the whole model.
        num_experts: E.
        policy_values: names of what the policy logs.
        log_interval: optimizer steps per record.
        tokens_per_step: tokens of the current global batch, which Megatron may ramp up.
        emit: called on every rank with the fields of a step record.
    """

    def __init__(
        self,
        meters: Sequence[Meter],
        num_layers: int,
        num_experts: int,
        policy_values: Sequence[str],
        log_interval: int,
        tokens_per_step: Callable[[], int],
        emit: Callable[[dict[str, Any]], None],
    ) -> None:
        self.meters = meters
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.policy_values = policy_values
        self.device = torch.cuda.current_device()
        self.max_k = self._largest_k()
        self.log_interval = log_interval
        self.tokens_per_step = tokens_per_step
        self.emit = emit
        for meter in meters:
            meter.metrics.has_reader = True
        self._interval = _Interval()
        # Megatron's interval timer is not reset after the very first step (training.py:2577).
        self._timed_steps = 0

    def on_step(self, call: dict[str, Any], seconds: Callable[[], float]) -> None:
        """Take note of one optimizer step; emit a record at the end of an interval.

        Args:
            call: the arguments of Megatron's ``training_log``, by name.
            seconds: reads its interval timer.
        """
        for meter in self.meters:
            meter.end_step()
        interval = self._interval
        interval.steps += 1
        self._timed_steps += 1
        interval.skipped += int(call["skipped_iter"])
        interval.tokens += self.tokens_per_step()
        if "lm loss" in call["loss_dict"]:
            interval.losses.append(call["loss_dict"]["lm loss"].detach().reshape(()))
        if call["iteration"] % self.log_interval == 0:
            self.emit(self._record(call, seconds() / self._timed_steps))
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
            "tokens_per_step": interval.tokens / interval.steps,
            "k_eff": sum(m["k_eff"] for m in layers) / len(layers) if layers else None,
            "layers": layers,
        }

    def _largest_k(self) -> int:
        """The largest ``max_k`` of any layer on any rank: the histogram's width everywhere."""
        largest = torch.tensor(
            max((meter.metrics.max_k for meter in self.meters), default=0), device=self.device
        )
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return int(largest)

    def _reduce(self, steps: int) -> list[dict[str, Any]]:
        width = LayerMetrics.width(self.num_experts, self.max_k, steps)
        names = (*_BIAS, *_THETA, *self.policy_values)
        table = torch.zeros(
            self.num_layers, width + 2 * len(names), dtype=torch.float64, device=self.device
        )
        for meter in self.meters:
            row = table[meter.row]
            row[:width] = meter.metrics.flat(self.max_k)
            for name, value in meter.shared_values().items():
                column = width + 2 * names.index(name)
                row[column], row[column + 1] = value, 1.0
        torch.distributed.all_reduce(table)
        for meter in self.meters:
            meter.end_interval(table[meter.row, :width])
        return [
            {"layer": index + 1, **describe(row[:width], self.num_experts, self.max_k, steps)}
            | self._shared_record(dict(zip(names, row[width:].view(-1, 2).tolist(), strict=True)))
            for index, row in enumerate(table.cpu())
            if row[:width].any()  # dense layers have no sums
        ]

    def _shared_record(self, sums: dict[str, list[float]]) -> dict[str, Any]:
        values = {name: total / ranks for name, (total, ranks) in sums.items() if ranks}
        return {
            **{name: values.get(name) for name in (*_BIAS, *_THETA)},
            "policy": {name: values[name] for name in self.policy_values if name in values},
        }

    def forget_evaluation(self) -> None:
        """Leave what was evaluated since the last evaluation out of the next one."""
        for meter in self.meters:
            meter.metrics.take_evaluated()

    def on_evaluation(self) -> list[dict[str, Any]]:
        """Return the fields of a ``LayerValidation`` per MoE layer; called on every rank."""
        table = torch.zeros(
            self.num_layers, self.num_experts + 1, dtype=torch.float64, device=self.device
        )
        for meter in self.meters:
            table[meter.row] = meter.metrics.take_evaluated()
        torch.distributed.all_reduce(table)
        return [
            {"layer": index + 1, **describe_evaluation(row)}
            for index, row in enumerate(table.cpu())
            if row.any()
        ]


# Values that every rank of a layer has alike. They are summed with the rest, so each comes with the
# number of ranks that wrote it.
_BIAS = ("bias_mean", "bias_max_abs")
_THETA = ("theta",)
