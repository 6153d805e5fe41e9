"""Parameters of a model: in total, active per token, and on each pipeline stage of a layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from uar_megatron.flops import layers_with_experts
from uar_megatron.planning.layout import Layout
from uar_megatron.shape import ModelShape


@dataclass(frozen=True)
class Parameters:
    """Parameters by how they are cut; numbers of whole tensors, or of one rank's parts.

    Attributes:
        sharded: cut by tensor parallelism: embeddings, and the matrices of attention, dense
            layers and shared experts with the biases that follow their columns.
        replicated: on every tensor rank: norms, routers, gates of shared experts, other biases,
            projections to a latent width.
        experts: routed experts' matrices, cut by expert and expert tensor parallelism.
        expert_biases: of their outputs, which expert tensor parallelism does not cut.
    """

    sharded: float = 0
    replicated: float = 0
    experts: float = 0
    expert_biases: float = 0

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(
            self.sharded + other.sharded,
            self.replicated + other.replicated,
            self.experts + other.experts,
            self.expert_biases + other.expert_biases,
        )

    @property
    def total(self) -> float:
        """All of them."""
        return self.sharded + self.replicated + self.experts + self.expert_biases

    def on_rank(self, layout: Layout) -> RankParameters:
        """Return what one rank holds of them."""
        experts = self.experts / layout.expert_tensor + self.expert_biases
        return RankParameters(
            self.sharded / layout.tensor + self.replicated, experts / layout.expert
        )


@dataclass(frozen=True)
class RankParameters:
    """Parameters of one rank.

    Attributes:
        dense: everything but routed experts; replicated over data and context ranks.
        experts: routed experts; replicated over the expert-data-parallel ranks.
    """

    dense: float
    experts: float


def layer_parameters(shape: ModelShape, is_moe: bool) -> Parameters:
    """Parameters of one transformer layer."""
    hidden, queries = shape.hidden, shape.heads * shape.head_dim
    qkv = queries + 2 * shape.groups * shape.head_dim
    sharded = hidden * qkv + queries * hidden + shape.has_qkv_bias * qkv
    replicated = 2 * shape.norm_params + shape.qk_norm_params + shape.has_bias * hidden
    columns = 2 if shape.is_gated else 1
    if not is_moe:
        sharded += (columns + 1) * hidden * shape.ffn + shape.has_bias * columns * shape.ffn
        return Parameters(sharded, replicated + shape.has_bias * hidden)
    width, shared = shape.latent or hidden, shape.shared_ffn
    sharded += (columns + 1) * hidden * shared + shape.has_bias * columns * shared
    replicated += shape.has_bias * hidden * (shared > 0) + 2 * hidden * shape.latent
    replicated += hidden * shape.has_shared_gate
    replicated += hidden * shape.experts + shape.has_bias * shape.experts
    matrices = (
        columns + 1
    ) * width * shape.expert_ffn + shape.has_bias * columns * shape.expert_ffn
    biases = shape.has_bias * width * shape.experts
    return Parameters(sharded, replicated, shape.experts * matrices, biases)


def stage_parameters(shape: ModelShape, layout: Layout, stage: int) -> Parameters:
    """Parameters of one pipeline stage; whole tensors.

    Embeddings are on the first stage, the final norm, the output layer and the MTP layers on the
    last, which has a copy of embeddings that it shares or that MTP needs.
    """
    found = Parameters()
    for layer in layout.stages[stage]:
        found += layer_parameters(shape, shape.is_moe[layer])
    embedding = shape.vocab * shape.hidden
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    if is_first or (is_last and shape.mtp_layers):
        found += Parameters(embedding, shape.learned_positions * shape.hidden)
    if is_last:
        found += Parameters(replicated=shape.norm_params)
        needs_copy = not is_first and not shape.mtp_layers
        if not shape.has_tied_embeddings or needs_copy:
            found += Parameters(embedding)
        for _ in range(shape.mtp_layers):
            # Norms of hidden state, embedding and result around a layer; the projection of both.
            found += layer_parameters(shape, shape.is_moe[-1])
            found += Parameters(2 * shape.hidden**2, 3 * shape.norm_params)
    return found


def model_parameters(shape: ModelShape) -> Parameters:
    """Parameters of the whole model, each once."""
    embedding = shape.vocab * shape.hidden
    found = Parameters(
        embedding * (1 if shape.has_tied_embeddings else 2),
        shape.learned_positions * shape.hidden + shape.norm_params,
    )
    for is_moe in shape.is_moe:
        found += layer_parameters(shape, is_moe)
    for _ in range(shape.mtp_layers):
        found += layer_parameters(shape, shape.is_moe[-1])
        found += Parameters(2 * shape.hidden**2, 3 * shape.norm_params)
    return found


def active_parameters(shape: ModelShape, k_of_layer: Sequence[float]) -> float:
    """Parameters that a token meets.

    Args:
        shape: the model.
        k_of_layer: experts of the token in each MoE layer, MTP layers last.
    """
    whole = model_parameters(shape)
    per_expert = (whole.experts + whole.expert_biases) / (
        shape.experts * sum(layers_with_experts(shape))
    )
    return whole.sharded + whole.replicated + sum(k_of_layer) * per_expert
