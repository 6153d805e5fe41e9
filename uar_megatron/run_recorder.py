"""Connects the training loop to the run log: from trackers to records to sinks."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from uar_megatron.config import UARConfig
from uar_megatron.experiment import RunConfig
from uar_megatron.mcore.compat import (
    correct_flops,
    current_global_batch_size,
    observe_training,
)
from uar_megatron.mcore.compatibility import varies
from uar_megatron.mcore.counted_flops import CountedFlops
from uar_megatron.mcore.meters import meters_of
from uar_megatron.mcore.observer import Observer
from uar_megatron.mcore.tracker import RoutingTracker
from uar_megatron.policies import find_policy
from uar_megatron.reporting.runlog import RUN_LOG, RunLogWriter
from uar_megatron.reporting.schema import (
    End,
    LayerValidation,
    Observation,
    Record,
    Start,
    Step,
    Validation,
)
from uar_megatron.reporting.sinks import ConsoleSink, FanOut, Sink, TensorBoardSink, WandbSink


class RunRecorder:
    """Records a run on the last rank, where Megatron keeps TensorBoard and wandb too.

    Args:
        run: its name and folder.
        uar: what routes, and what is observed.
        config: the resolved configuration, for the start record.
        args: Megatron's validated arguments.
    """

    def __init__(
        self, run: RunConfig, uar: UARConfig, config: dict[str, Any], args: argparse.Namespace
    ) -> None:
        self.run, self.uar, self.config = run, uar, config
        self.args = args
        self._sink: Sink | None = None
        self._step = 0

    def attach(self, model: list[torch.nn.Module]) -> None:
        """Observe the training of a built model. Called once, on every rank."""
        args = self.args
        counted = CountedFlops(args)
        if varies(self.uar, args):
            correct_flops(counted.correction)

        def emit(fields: dict[str, Any]) -> None:
            counted.add_to(fields)
            self._emit(fields["step"], Step(**fields))

        tracker = RoutingTracker(
            meters_of(model, self.uar.temperature),
            num_layers=args.num_layers + (args.mtp_num_layers or 0),
            num_experts=args.num_experts,
            policy_values=find_policy(self.uar.policy).logged,
            log_interval=args.log_interval,
            tokens_per_step=lambda: current_global_batch_size() * args.seq_length,
            emit=emit,
        )
        observe = self.uar.observe
        is_observing = observe.interval or observe.probe_interval
        observer = Observer(model, self.uar, args) if is_observing else None

        def on_step(call: dict[str, Any], seconds: Callable[[], float]) -> None:
            self._begin(call["iteration"] - 1)
            self._step = call["iteration"]
            tracker.on_step(call, seconds)
            observation = None if observer is None else observer.on_step(self._step)
            if observation is not None:
                tracker.forget_evaluation()  # of the probe
                self._emit(self._step, Observation(**observation))

        def on_validation(
            step: int, losses: dict[str, float], layers: dict[str, list[dict[str, Any]]]
        ) -> None:
            routing = {name: [LayerValidation(**m) for m in of] for name, of in layers.items()}
            self._emit(step, Validation(step=step, losses=losses, layers=routing))

        observe_training(on_step, tracker.on_evaluation, on_validation)

    def close(self, reason: str) -> None:
        """Record why training ended, and close the sinks; safe to call at any time."""
        if reason == "finished":  # perhaps with no step left to take since the last checkpoint
            self._begin(self.args.iteration)
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

        self._step = step
        sinks: list[Sink] = [
            RunLogWriter(Path(self.run.dir) / RUN_LOG),
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
                run=self.run.name,
                step=step,
                world_size=self.args.world_size,
                tokens_per_step=self.args.global_batch_size * self.args.seq_length,
                num_experts=self.args.num_experts,
                topk=self.args.moe_router_topk,
                versions={
                    "python": platform.python_version(),
                    **{name: metadata.version(name) for name in ("torch", "megatron-core")},
                },
                config=self.config,
            )
        )
