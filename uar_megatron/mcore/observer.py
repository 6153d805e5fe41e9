"""The observatory at work: what is observed at which step, and on which data."""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch

from uar_megatron.config import UARConfig
from uar_megatron.errors import ConfigError
from uar_megatron.mcore.compat import (
    current_iteration,
    get_data_parallel_rank,
    get_data_parallel_world_size,
    train_data_sets,
)
from uar_megatron.mcore.loop import TrainingLoop
from uar_megatron.mcore.observation import ObservedSteps
from uar_megatron.mcore.probe import Probe
from uar_megatron.mcore.token_classes import TokenClasses
from uar_megatron.mcore.watching import moe_layers
from uar_megatron.observatory import decile_of_ids, energy_bins, entropy_bins

logger = logging.getLogger(__name__)

COUNTED_TOKENS = 1 << 20
COUNTED_SEQUENCES = 512
"""Bounds on the training data that token frequencies are counted on."""


class Observer:
    """Measures what ``uar.observe`` asks for. Made on every rank once the model is built.

    Args:
        model: this rank's chunks.
        uar: the section with ``observe`` and the temperature.
        args: Megatron's validated arguments.

    Raises:
        ConfigError: the layout or the schedule does not go with the probe.
    """

    def __init__(
        self, model: list[torch.nn.Module], uar: UARConfig, args: argparse.Namespace
    ) -> None:
        check_observe(uar, args)
        self.observe, self.args, self.temperature = uar.observe, args, uar.temperature
        self._num_layers = args.num_layers + (args.mtp_num_layers or 0)
        self.loop = TrainingLoop(self._on_start)
        self._classes = None
        self._steps = self._probe = None
        if self.observe.interval and args.overlap_moe_expert_parallel_comm:
            logger.warning(
                "overlap_moe_expert_parallel_comm runs the model without calling it: tokens have "
                "no classes"
            )
        if self.observe.interval:
            self._classes = TokenClasses(model, train_data_sets(args), self._is_observed)
            self._steps = ObservedSteps(
                [layer.router for layer in moe_layers(model)],
                self._num_layers,
                args.num_experts,
                uar.temperature,
                self._classes,
                self._is_observed,
            )
        if self.observe.probe_interval:
            self._probe = Probe(
                model,
                self._num_layers,
                args.num_experts,
                args.moe_router_topk,
                self.observe.segment,
                self._run_probe_batch,
            )

    def probes(self, step: int) -> bool:
        """Whether the model is run on the probe batch after this step."""
        return self._probe is not None and step % self.observe.probe_interval == 0

    def on_step(self, step: int) -> dict[str, Any] | None:
        """Return the fields of an ``Observation`` where one is due; called on every rank."""
        observed = self._steps is not None and step % self.observe.interval == 0
        record: dict[str, Any] = {"step": step}
        layers: dict[int, dict[str, Any]] = {}
        if observed:
            assert self._steps is not None
            for name, bins in (
                ("entropy_bins", entropy_bins(self.args.num_experts)),
                ("energy_bins", energy_bins(self.args.num_experts, self.temperature)),
            ):
                record[name] = {"low": bins.low, "high": bins.high, "bins": bins.count}
            layers = self._steps.take()
        if self.probes(step):
            assert self._probe is not None
            record["segment"] = self.observe.segment
            for row, fields in self._probe.run().items():
                layers.setdefault(row, {}).update(fields)
        if not layers:
            return None
        record["layers"] = [{"layer": row + 1, **layers[row]} for row in sorted(layers)]
        return record

    def _run_probe_batch(self) -> None:
        first = get_data_parallel_rank() * self.observe.probe_sequences
        self.loop.forward_only(range(first, first + self.observe.probe_sequences))

    def _is_observed(self) -> bool:
        return current_iteration() % self.observe.interval == 0

    def _on_start(self) -> None:
        """Count token ids and see that there is a probe batch, when the data are there."""
        # Rank 0 reads data in every layout; what it finds is what every rank goes by.
        found = torch.zeros(
            self.args.padded_vocab_size + 1, dtype=torch.int64, device=torch.cuda.current_device()
        )
        data, wanted = self.loop.data, 0
        if self._probe is not None:
            wanted = self.observe.probe_sequences * get_data_parallel_world_size()
        if torch.distributed.get_rank() == 0 and _can_be_indexed(data):
            found[-1] = len(data)
            if self._classes is not None:
                found[:-1] = count_ids(data, self.args.padded_vocab_size)
        torch.distributed.broadcast(found, 0)
        counts_V, sequences = found[:-1], int(found[-1])
        if sequences < wanted:
            raise ConfigError(
                "uar.observe.probe_interval",
                f"the probe takes {wanted} sequences of the training data; there are {sequences} "
                "that can be read by number",
                remedy="set uar.observe.probe_interval=0, or fewer uar.observe.probe_sequences, or "
                "train on a data set with a length and items",
            )
        if self._classes is not None and counts_V.any():
            self._classes.decile_V = decile_of_ids(counts_V)
        elif self._classes is not None:
            logger.warning("token ids of the training data cannot be counted: no frequency classes")


def _can_be_indexed(data: Any) -> bool:
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def count_ids(data: Any, vocab_size: int) -> torch.Tensor:
    """How often each token id occurs in evenly spread sequences of a data set, int64.

    A bounded sample, the same in every run; zeros where samples have no ``tokens``.
    """
    counts_V = torch.zeros(vocab_size, dtype=torch.int64)
    if not len(data):
        return counts_V
    first = data[0]
    length = len(first["tokens"]) if isinstance(first, dict) and "tokens" in first else 0
    if not length:
        return counts_V
    sequences = max(min(len(data), COUNTED_SEQUENCES, COUNTED_TOKENS // length), 1)
    for i in range(sequences):
        tokens = torch.as_tensor(data[i * len(data) // sequences]["tokens"])
        counts_V += torch.bincount(tokens.flatten().long(), minlength=vocab_size)
    return counts_V


def check_observe(uar: UARConfig, args: argparse.Namespace) -> None:
    """Refuse a probe that the layout cannot run.

    Raises:
        ConfigError: naming the field and what is allowed.
    """
    observe = uar.observe
    if not observe.probe_interval:
        return
    for name, is_in_use, why in (
        ("cuda_graph_impl", args.cuda_graph_impl != "none", "its graphs are of training batches"),
        ("use_megatron_fsdp", args.use_megatron_fsdp, "no rank has an expert's weights"),
        ("use_torch_fsdp2", args.use_torch_fsdp2, "no rank has an expert's weights"),
        (
            "gtp_weight_remat_size",
            getattr(args, "gtp_weight_remat_size", 1) > 1,
            "no rank has an expert's weights",
        ),
    ):
        if is_in_use:
            raise ConfigError(
                "uar.observe.probe_interval",
                f"the probe cannot run with {name}: {why}",
                remedy="set uar.observe.probe_interval=0",
            )
    stages = args.pipeline_model_parallel_size
    if args.virtual_pipeline_model_parallel_size is not None:
        group = args.microbatch_group_size_per_vp_stage or stages
        if observe.probe_sequences % stages or observe.probe_sequences < group:
            raise ConfigError(
                "uar.observe.probe_sequences",
                f"{observe.probe_sequences}, but {stages} pipeline stages with virtual ones run "
                f"micro-batches in groups of {group}",
                allowed=f"a multiple of {stages}, {group} or more",
            )
    cp, tp = args.context_parallel_size, args.tensor_model_parallel_size
    # Context parallelism gives each rank two pieces of every sequence.
    pieces = cp * tp * (2 if cp > 1 and tp % 2 else 1)
    if observe.segment > args.seq_length // pieces:
        raise ConfigError(
            "uar.observe.segment",
            f"{observe.segment}, but this layout cuts sequences of {args.seq_length} tokens into "
            f"{pieces} pieces",
            allowed=f"1 … {args.seq_length // pieces}",
        )
