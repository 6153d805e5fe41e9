"""Connects the training loop to the run log: from trackers to records to sinks."""

from __future__ import annotations

import argparse
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from uar_megatron.experiment import Experiment
from uar_megatron.mcore.compat import current_global_batch_size, observe_training
from uar_megatron.mcore.step import routers_of
from uar_megatron.mcore.tracker import RoutingTracker
from uar_megatron.reporting.runlog import RUN_LOG, RunLogWriter
from uar_megatron.reporting.schema import End, Record, Start, Step, Validation
from uar_megatron.reporting.sinks import ConsoleSink, FanOut, Sink, TensorBoardSink, WandbSink


class RunRecorder:
    """Records a run on the last rank, where Megatron keeps TensorBoard and wandb too.

    Args:
        experiment: the configuration, for the run's folder and the start record.
        args: Megatron's validated arguments.
    """

    def __init__(self, experiment: Experiment, args: argparse.Namespace) -> None:
        self.experiment = experiment
        self.args = args
        self._sink: Sink | None = None
        self._step = 0

    def attach(self, model: list[torch.nn.Module]) -> None:
        """Observe the training of a built model. Called once, on every rank."""
        args = self.args
        tracker = RoutingTracker(
            routers_of(model),
            num_layers=args.num_layers + (args.mtp_num_layers or 0),
            num_experts=args.num_experts,
            log_interval=args.log_interval,
            tokens_per_step=lambda: current_global_batch_size() * args.seq_length,
            emit=lambda fields: self._emit(fields["step"], Step(**fields)),
        )

        def on_step(call: dict[str, Any], seconds: float) -> None:
            self._begin(call["iteration"] - 1)
            self._step = call["iteration"]
            tracker.on_step(call, seconds)

        observe_training(
            on_step, lambda step, losses: self._emit(step, Validation(step=step, losses=losses))
        )

    def close(self, reason: str) -> None:
        """Record why training ended, and close the sinks; safe to call at any time."""
        if self._sink is not None:
            self._sink.write(End(step=self._step, reason=reason))
            self._sink.close()
            self._sink = None

    def _emit(self, step: int, record: Record) -> None:
        self._begin(step)
        if self._sink is not None:
            self._sink.write(record)

    def _begin(self, step: int) -> None:
        """Open the sinks at the first record: only then is the step of a resumed run known."""
        if self._sink is not None or self.args.rank != self.args.world_size - 1:
            return
        from megatron.training import get_tensorboard_writer, get_wandb_writer

        sinks: list[Sink] = [
            RunLogWriter(Path(self.experiment.run.dir) / RUN_LOG),
            ConsoleSink(),
        ]
        if get_tensorboard_writer() is not None:
            sinks.append(TensorBoardSink(get_tensorboard_writer()))
        if get_wandb_writer() is not None:
            sinks.append(WandbSink(get_wandb_writer()))
        self._sink = FanOut(sinks)
        self._sink.write(
            Start(
                time=time.time(),
                run=self.experiment.run.name,
                step=step,
                world_size=self.args.world_size,
                tokens_per_step=self.args.global_batch_size * self.args.seq_length,
                num_experts=self.args.num_experts,
                topk=self.args.moe_router_topk,
                versions={
                    "python": platform.python_version(),
                    **{name: metadata.version(name) for name in ("torch", "megatron-core")},
                },
                config=self.experiment.resolved,
            )
        )
