"""How long an optimizer step takes: an estimate from FLOPs and link bandwidths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from uar_megatron.flops import FORWARD_AND_BACKWARD, ForwardFlops, forward_flops
from uar_megatron.planning.activations import Implementation, Rows
from uar_megatron.planning.hardware import Hardware
from uar_megatron.planning.layout import Layout
from uar_megatron.planning.parameters import stage_parameters
from uar_megatron.planning.state import Precision
from uar_megatron.planning.traffic import Exchange, all_to_all_seconds, ring_seconds
from uar_megatron.shape import ModelShape

ASSUMPTIONS = (
    "every pipeline stage waits for the slowest one, and every rank for the fullest experts",
    "an all-to-all uses NVLink and network at once at full bandwidth; latency is left out",
    "all-to-all and tensor-parallel communication are not overlapped with computation",
    "gradients, parameters and what tensor-parallel ranks exchange go round one ring, at the "
    "network's bandwidth where it crosses nodes",
    "the exchange of keys and values under context parallelism is left out",
    "optimizer, sends between pipeline stages, data loading, validation and saving are left out",
)


@dataclass(frozen=True)
class Overlap:
    """What runs while something else does: ``overlap_grad_reduce``, ``overlap_param_gather``."""

    gradients: bool
    parameters: bool


def overlap_of(args: Any) -> Overlap:
    """Read it from Megatron's arguments."""
    return Overlap(bool(args.overlap_grad_reduce), bool(args.overlap_param_gather))


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the slowest pipeline stage.

    Attributes:
        dense: matrix products outside of routed experts.
        experts: of routed experts, on the rank whose experts are fullest.
        recomputation: of activations.
        all_to_all: exchange of rows, of recomputed layers too.
        tensor_parallel: collectives of tensor and expert tensor parallelism, of recomputed layers
            too.
        bubble: waiting at the ends of the pipeline.
        gradients: what is left of reducing gradients and gathering parameters.
    """

    dense: float
    experts: float
    recomputation: float
    all_to_all: float
    tensor_parallel: float
    bubble: float
    gradients: float

    @property
    def total(self) -> float:
        """Of the step."""
        busy = self.dense + self.experts + self.recomputation
        return busy + self.all_to_all + self.tensor_parallel + self.bubble + self.gradients


def step_time(
    shape: ModelShape,
    how: Implementation,
    layout: Layout,
    precision: Precision,
    hardware: Hardware,
    mfu: float,
    overlap: Overlap,
    rows_of_layer: Mapping[int, Rows],
    exchange_of_layer: Mapping[int, tuple[Exchange, float]],
) -> StepTime:
    """Return the time of a step.

    Args:
        shape: the model.
        how: its implementation; recomputation costs time.
        layout: its layout.
        precision: bytes of gradients and parameters.
        hardware: peak and links.
        mfu: fraction of the peak that matrix products reach.
        overlap: what is hidden behind computation.
        rows_of_layer: rows of the fullest rank by layer number, MTP layers after the decoder's.
        exchange_of_layer: what a rank exchanges and the imbalance of what the ranks receive.
    """
    flops = forward_flops(shape, "causal" if how.has_flash_attention else "full")
    speed = hardware.peak_flops * mfu
    slowest = None
    for stage in range(layout.pipeline):
        parts = _micro_batch(shape, how, layout, flops, stage, rows_of_layer)
        seconds = [part / speed for part in parts]
        seconds.append(_all_to_all(how, layout, hardware, stage, shape, exchange_of_layer))
        seconds.append(_tensor_parallel(shape, how, layout, hardware, stage, exchange_of_layer))
        if slowest is None or sum(seconds) > sum(slowest[0]):
            slowest = seconds, stage
    assert slowest is not None
    (dense, experts, recomputed, exchanged, tensor), stage = slowest
    micro_batch = dense + experts + recomputed + exchanged + tensor
    count = layout.micro_batches
    return StepTime(
        dense=dense * count,
        experts=experts * count,
        recomputation=recomputed * count,
        all_to_all=exchanged * count,
        tensor_parallel=tensor * count,
        bubble=(layout.pipeline - 1) / layout.virtual * micro_batch,
        gradients=_gradients(shape, layout, precision, hardware, overlap, stage, micro_batch),
    )


def _micro_batch(
    shape: ModelShape,
    how: Implementation,
    layout: Layout,
    flops: ForwardFlops,
    stage: int,
    rows_of_layer: Mapping[int, Rows],
) -> list[float]:
    """FLOPs of one rank for a micro-batch: outside of experts, in experts, recomputed."""
    tokens = layout.tokens / layout.tensor
    dense = experts = recomputed = 0.0
    whole = how.recomputed_on(layout, stage, shape.mtp_layers)
    for layer in layout.layers_of(stage, shape.mtp_layers):
        rows = rows_of_layer.get(layer)
        in_experts = rows.received * flops.expert_row / layout.expert_tensor if rows else 0.0
        outside = tokens * flops.layer(0 if rows else None)
        if layer >= len(shape.is_moe):
            outside += tokens * flops.mtp_projection
        dense += outside
        experts += in_experts
        again = {
            "core_attn": tokens * flops.attention_core,
            "mlp": tokens * flops.dense_mlp * (rows is None),
            "moe": (rows is not None) * tokens * (flops.layer(0) - flops.attention) + in_experts,
            "shared_experts": (rows is not None) * tokens * flops.shared_experts,
        }
        if layer in whole:
            recomputed += outside + in_experts
        else:
            recomputed += sum(again.get(module, 0.0) for module in how.recompute)
    if stage == layout.pipeline - 1:
        dense += tokens * flops.logits * (1 + shape.mtp_layers)
    return [FORWARD_AND_BACKWARD * dense, FORWARD_AND_BACKWARD * experts, recomputed]


def _all_to_all(
    how: Implementation,
    layout: Layout,
    hardware: Hardware,
    stage: int,
    shape: ModelShape,
    exchange_of_layer: Mapping[int, tuple[Exchange, float]],
) -> float:
    seconds = 0.0
    whole = how.recomputed_on(layout, stage, shape.mtp_layers)
    for layer in layout.layers_of(stage, shape.mtp_layers):
        if layer not in exchange_of_layer:
            continue
        found, imbalance = exchange_of_layer[layer]
        is_again = layer in whole or "moe" in how.recompute
        size = found.forward * (1 + is_again) + found.backward
        seconds += all_to_all_seconds(size, found, hardware) * imbalance
    return seconds


def _tensor_parallel(
    shape: ModelShape,
    how: Implementation,
    layout: Layout,
    hardware: Hardware,
    stage: int,
    exchange_of_layer: Mapping[int, tuple[Exchange, float]],
) -> float:
    """Collectives within a tensor-parallel group.

    Under sequence parallelism a block gathers its input and scatters its output, in backward the
    gradients of both, and gathers its input once more for the gradient of the weight. Expert tensor
    ranks gather rows and scatter outputs, and their gradients. Recomputation repeats the forward's.
    """
    hidden = layout.tokens * shape.hidden * how.element
    ring = ring_seconds(hidden, layout.tensor, _bandwidth(layout.tensor, 1, layout, hardware))
    between_experts = _bandwidth(layout.expert_tensor, 1, layout, hardware)
    whole = how.recomputed_on(layout, stage, shape.mtp_layers)
    seconds = 0.0
    for layer in layout.layers_of(stage, shape.mtp_layers):
        is_whole = layer in whole
        seconds += (5 + 2 * is_whole) * ring
        if layer not in exchange_of_layer:
            seconds += (5 + 2 * (is_whole or "mlp" in how.recompute)) * ring
            continue
        is_again = is_whole or "moe" in how.recompute
        if shape.shared_ffn:
            seconds += (5 + 2 * (is_again or "shared_experts" in how.recompute)) * ring
        found, imbalance = exchange_of_layer[layer]
        rows = found.gathered * layout.expert_tensor * imbalance
        seconds += (4 + 2 * is_again) * ring_seconds(rows, layout.expert_tensor, between_experts)
    return seconds


def _bandwidth(ranks: int, stride: int, layout: Layout, hardware: Hardware) -> float:
    """Of a ring of ranks that lie ``stride`` apart: the network's where it crosses nodes."""
    crosses = ranks > 1 and ranks * stride > layout.gpus_per_node
    return hardware.network if crosses else hardware.nvlink


def _gradients(
    shape: ModelShape,
    layout: Layout,
    precision: Precision,
    hardware: Hardware,
    overlap: Overlap,
    stage: int,
    micro_batch: float,
) -> float:
    """Reducing gradients and gathering parameters, less what a micro-batch hides of it.

    An all-reduce is a reduce-scatter and an all-gather; the distributed optimizer gathers
    parameters in place of gradients.
    """
    held = stage_parameters(shape, layout, stage).on_rank(layout)
    model = layout.expert * layout.expert_tensor
    groups = (
        (held.dense, layout.data * layout.context, layout.tensor),
        (held.experts, layout.expert_data, model),
    )
    reduce = gather = 0.0
    gathered = precision.weight if precision.is_distributed else precision.gradient
    for count, ranks, stride in groups:
        bandwidth = _bandwidth(ranks, stride, layout, hardware)
        reduce += ring_seconds(count * precision.gradient, ranks, bandwidth)
        gather += ring_seconds(count * gathered, ranks, bandwidth)
    hides_gather = overlap.parameters if precision.is_distributed else overlap.gradients
    reduce -= overlap.gradients * micro_batch * 2 / 3
    gather -= hides_gather * micro_batch / 3
    return max(reduce, 0.0) + max(gather, 0.0)
