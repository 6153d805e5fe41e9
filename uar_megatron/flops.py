"""FLOPs of a training step, from the rows that experts computed.

Matrix products only, two FLOPs per multiply-add, as Megatron counts
(``num_floating_point_operations``, training.py:390). The backward of a product is two products of
its size: the gradients of its input and of its weight. Norms, activations, softmax, rotary
embeddings, biases and the optimizer are left out, by Megatron too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from uar_megatron.shape import ModelShape

FORWARD_AND_BACKWARD = 3
"""FLOPs of forward and backward over those of the forward."""

Attention = Literal["causal", "full"]
"""How the attention core counts: ``causal`` is the half below the diagonal, what flash attention
computes and Megatron counts (training.py:703); ``full`` is the square that unfused attention
multiplies and ``torch.utils.flop_counter`` sees."""


@dataclass(frozen=True)
class ForwardFlops:
    """Forward FLOPs of one token in each part of a model, and of one row in an expert.

    Attributes:
        qkv_projection: queries, keys and values: 2·hidden·(heads + 2·groups)·head_dim.
        attention_core: QKᵀ and its product with V: 4·seq_length·heads·head_dim, causal half.
        output_projection: 2·heads·head_dim·hidden.
        dense_mlp: feed-forward layer without experts, as :func:`mlp_flops`.
        router: 2·hidden·E. Megatron leaves it out.
        expert_row: one token in one routed expert, as :func:`expert_row_flops`.
        shared_experts: those that see every token, as one layer of their widths together, with
            their gate, 2·hidden. Megatron leaves the gate out.
        latent_projections: down before and up after the routed experts: 4·hidden·latent.
        mtp_projection: one MTP layer's projection of hidden state and embedding: 4·hidden².
        logits: 2·hidden·vocab, for the main loss and for each MTP layer once.
    """

    qkv_projection: float
    attention_core: float
    output_projection: float
    dense_mlp: float
    router: float
    expert_row: float
    shared_experts: float
    latent_projections: float
    mtp_projection: float
    logits: float

    @property
    def attention(self) -> float:
        """The attention of one layer, per token."""
        return self.qkv_projection + self.attention_core + self.output_projection

    def layer(self, rows_per_token: float | None) -> float:
        """One decoder layer, per token.

        Args:
            rows_per_token: rows that its experts compute, over the tokens; None for a dense layer.
        """
        if rows_per_token is None:
            return self.attention + self.dense_mlp
        experts = rows_per_token * self.expert_row
        return (
            self.attention + self.router + self.shared_experts + self.latent_projections + experts
        )


def forward_flops(shape: ModelShape, attention: Attention = "causal") -> ForwardFlops:
    """Return the forward FLOPs of each part.

    Args:
        shape: the model.
        attention: how the attention core counts.
    """
    queries, keys = shape.heads * shape.head_dim, shape.groups * shape.head_dim
    core = 4 * shape.seq_length * queries
    return ForwardFlops(
        qkv_projection=2 * shape.hidden * (queries + 2 * keys),
        attention_core=core / 2 if attention == "causal" else core,
        output_projection=2 * queries * shape.hidden,
        dense_mlp=mlp_flops(shape.hidden, shape.ffn, shape.is_gated),
        router=2 * shape.hidden * shape.experts,
        expert_row=expert_row_flops(shape),
        shared_experts=mlp_flops(shape.hidden, shape.shared_ffn, shape.is_gated)
        + 2 * shape.hidden * shape.has_shared_gate,
        latent_projections=4 * shape.hidden * shape.latent,
        mtp_projection=4 * shape.hidden**2,
        logits=2 * shape.hidden * shape.vocab,
    )


def expert_row_flops(shape: ModelShape) -> float:
    """Forward FLOPs of one row in a routed expert."""
    return mlp_flops(shape.latent or shape.hidden, shape.expert_ffn, shape.is_gated)


def mlp_flops(width: int, ffn: int, is_gated: bool) -> float:
    """Forward FLOPs of one row in a feed-forward layer: 2·(3 gated, 2 not)·width·ffn."""
    return 2 * (3 if is_gated else 2) * width * ffn


@dataclass(frozen=True)
class StepFlops:
    """Forward and backward FLOPs of one optimizer step over the whole model, all ranks.

    Attributes:
        per_layer: of each decoder layer, then of each MTP layer with its projection.
        per_layer_top_k: the same with tokens·K rows in each MoE layer.
        logits: of the output layer, for the main loss and each MTP layer.
    """

    per_layer: tuple[float, ...]
    per_layer_top_k: tuple[float, ...]
    logits: float

    @property
    def total(self) -> float:
        """Of the step."""
        return sum(self.per_layer) + self.logits

    @property
    def top_k_total(self) -> float:
        """Of the step under Top-K routing."""
        return sum(self.per_layer_top_k) + self.logits

    @property
    def ratio(self) -> float:
        """FLOPs over those of Top-K."""
        return self.total / self.top_k_total

    @property
    def layer_ratios(self) -> tuple[float, ...]:
        """Of each layer: FLOPs over those of Top-K; 1 for dense layers."""
        pairs = zip(self.per_layer, self.per_layer_top_k, strict=True)
        return tuple(flops / top_k for flops, top_k in pairs)


def step_flops(
    shape: ModelShape,
    tokens: float,
    rows_per_moe_layer: Sequence[float],
    attention: Attention = "causal",
) -> StepFlops:
    """Return the FLOPs of a step from counted rows.

    Recomputed activations are not counted again: these are the FLOPs that the model needs, those
    of MFU.

    Args:
        shape: the model.
        tokens: of the global batch.
        rows_per_moe_layer: rows computed by the experts of each MoE layer in the step, all ranks;
            decoder layers first, then MTP layers if they have experts.
        attention: how the attention core counts.
    """
    parts = forward_flops(shape, attention)
    layers = layers_with_experts(shape)
    if len(rows_per_moe_layer) != sum(layers):
        raise ValueError(
            f"rows_per_moe_layer: {len(rows_per_moe_layer)} entries for {sum(layers)} MoE layers"
        )
    rows = iter(rows_per_moe_layer)
    counted = [next(rows) / tokens if is_moe else None for is_moe in layers]
    top_k = [shape.topk if is_moe else None for is_moe in layers]

    def per_layer(rows_per_token: Sequence[float | None]) -> tuple[float, ...]:
        return tuple(
            FORWARD_AND_BACKWARD
            * tokens
            * (parts.layer(k) + (parts.mtp_projection if i >= len(shape.is_moe) else 0))
            for i, k in enumerate(rows_per_token)
        )

    return StepFlops(
        per_layer=per_layer(counted),
        per_layer_top_k=per_layer(top_k),
        logits=FORWARD_AND_BACKWARD * tokens * parts.logits * (1 + shape.mtp_layers),
    )


def layers_with_experts(shape: ModelShape) -> tuple[bool, ...]:
    """Whether each decoder layer, then each MTP layer, has experts.

    MTP layers are built like the last decoder layer (gpt_layer_specs.py:769).
    """
    return shape.is_moe + shape.is_moe[-1:] * shape.mtp_layers
