"""Memory of one rank: what stays from step to step, activations in flight, passing buffers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from uar_megatron.planning.activations import (
    Implementation,
    Rows,
    dropout_bytes,
    held_bytes,
    layer_bytes,
    mtp_bytes,
    norm_bytes,
    output_bytes,
    score_buffer_bytes,
)
from uar_megatron.planning.layout import Layout
from uar_megatron.planning.parameters import stage_parameters
from uar_megatron.planning.state import Precision, State, state_bytes
from uar_megatron.shape import ModelShape


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank of a pipeline stage.

    Attributes:
        stage: the pipeline rank.
        state: weights, gradients and optimizer.
        activations: kept for backward, by part, over all micro-batches in flight; what dispatchers
            hold is there once.
        passing: buffers that live for moments, the largest at one time: rows on their way to
            experts and back, logits and their gradient, a layer that is recomputed, the scores of
            unfused attention.
    """

    stage: int
    state: State
    activations: dict[str, float]
    passing: float

    @property
    def total(self) -> float:
        """All of it at once."""
        return self.state.total + sum(self.activations.values()) + self.passing


def fullest_stage(
    shape: ModelShape,
    how: Implementation,
    layout: Layout,
    precision: Precision,
    rows_of_layer: Mapping[int, Rows],
    most_sent: float,
) -> RankMemory:
    """Return the memory of the pipeline rank that needs most; arguments as :func:`stage_memory`."""
    stages = [
        stage_memory(shape, how, layout, precision, stage, rows_of_layer, most_sent)
        for stage in range(layout.pipeline)
    ]
    return max(stages, key=lambda memory: memory.total)


def stage_memory(
    shape: ModelShape,
    how: Implementation,
    layout: Layout,
    precision: Precision,
    stage: int,
    rows_of_layer: Mapping[int, Rows],
    most_sent: float,
) -> RankMemory:
    """Return the memory of one pipeline rank.

    Args:
        shape: the model.
        how: its implementation.
        layout: its layout.
        precision: bytes per parameter.
        stage: the pipeline rank.
        rows_of_layer: of each decoder layer with experts; of MTP layers from ``len(is_moe)`` on.
        most_sent: rows that the kernels' permutation allocates for, where they permute.
    """
    parameters = stage_parameters(shape, layout, stage).on_rank(layout)
    kept, recomputed = micro_batch_bytes(shape, how, layout, stage, rows_of_layer)
    in_flight = layout.in_flight(stage)
    activations = {name: size * in_flight for name, size in kept.items()}
    again = how.recomputed_on(layout, stage, shape.mtp_layers)
    activations["held by dispatchers"] = sum(
        held_bytes(shape, how, rows_of_layer[layer], layer in again)
        for layer in layout.layers_of(stage, shape.mtp_layers)
        if layer in rows_of_layer
    )
    if stage == layout.pipeline - 1:
        # The last stage takes the backward of a micro-batch right after its forward.
        outputs = 1 + shape.mtp_layers
        activations["logits and loss"] = outputs * output_bytes(shape, how, layout)
        activations["norms"] += norm_bytes(shape, how, layout.routed_tokens)
    on_stage = [
        rows_of_layer[i] for i in layout.layers_of(stage, shape.mtp_layers) if i in rows_of_layer
    ]
    exchanged = max(
        (_exchanged_bytes(shape, how, layout, rows, most_sent) for rows in on_stage), default=0
    )
    has_logits = how.element < 4 and stage == layout.pipeline - 1
    logits = has_logits * layout.tokens * shape.vocab / layout.tensor * how.element
    passing = max(exchanged + recomputed, logits) + score_buffer_bytes(shape, how, layout)
    return RankMemory(stage, state_bytes(parameters, layout, precision), activations, passing)


def _exchanged_bytes(
    shape: ModelShape, how: Implementation, layout: Layout, rows: Rows, most_sent: float
) -> float:
    """Copies of rows that live together in the experts' forward, besides their sorted input.

    Permuted, as received where ranks exchange, and the experts' output in parts and in one.
    """
    sent = max(rows.sent, most_sent) if how.routing == "kernels" else rows.sent
    copies = 2 + (layout.expert * layout.expert_tensor > 1)
    return (sent + copies * rows.received) * (shape.latent or shape.hidden) * how.element


def micro_batch_bytes(
    shape: ModelShape,
    how: Implementation,
    layout: Layout,
    stage: int,
    rows_of_layer: Mapping[int, Rows],
) -> tuple[dict[str, float], float]:
    """Return what the backward of one micro-batch needs, and what it recomputes.

    Without logits, and without what dispatchers hold, which the next micro-batch overwrites.

    Returns:
        Bytes by part; and the bytes of what is recomputed at one time.
    """
    nothing = dataclasses.replace(how, recompute=frozenset())
    layers = layout.layers_of(stage, shape.mtp_layers)

    def parts_of(layer: int, way: Implementation) -> dict[str, float]:
        parts = layer_bytes(shape, way, layout, rows_of_layer.get(layer))
        if layer >= len(shape.is_moe):
            parts["norms"] += mtp_bytes(shape, way, layout)
        return parts

    whole = {layer: sum(parts_of(layer, nothing).values()) for layer in layers}
    groups = how.recomputed_groups(layout, stage, shape.mtp_layers)
    again = how.recomputed_on(layout, stage, shape.mtp_layers)
    recomputed = max((sum(whole[layer] for layer in group) for group in groups), default=0.0)
    layer_input = layout.routed_tokens * shape.hidden * how.element
    # An MTP layer has two: the hidden state and the embedding.
    inputs = len(groups) + sum(layer >= len(shape.is_moe) for layer in again)
    kept = {"layer inputs": layer_input * inputs, "norms": 0.0}
    if stage == 0:
        kept["norms"] += dropout_bytes(shape, how, layout)
    for layer in layers:
        if layer in again:
            continue
        parts = parts_of(layer, how)
        recomputed = max(recomputed, whole[layer] - sum(parts.values()))
        for name, value in parts.items():
            kept[name] = kept.get(name, 0.0) + value
    return kept, recomputed
