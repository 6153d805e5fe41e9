"""Memory of activations: what the backward of one micro-batch needs, and what is held besides.

Each function lists the tensors that Megatron's layers keep, in elements per token times bytes. The
layers of ``transformer_impl: local`` in plain torch were read off real allocations
(tests/planning/test_activations.py holds them to it); those of Transformer Engine and flash
attention follow from what their backward needs, and have not been compared with a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from uar_megatron.config import UARConfig
from uar_megatron.planning.layout import Layout
from uar_megatron.shape import ModelShape

FP32, INT64, INT32 = 4, 8, 4


@dataclass(frozen=True)
class Implementation:
    """What of Megatron's many ways changes memory.

    Attributes:
        element: bytes of an activation.
        logit: bytes of a router logit, and of a routing weight.
        has_fused_norms: no fp32 copies around a norm (Transformer Engine).
        is_layer_norm: LayerNorm; in plain torch it is one operation, RMSNorm several.
        has_flash_attention: no tokens × tokens matrices.
        has_fp32_softmax: attention's softmax is kept in fp32 as well.
        has_rotary: queries and keys are rotated copies.
        has_fused_activation: one operation from the first to the second linear layer.
        hidden_dropout: there is dropout after attention and feed-forward.
        attention_dropout: and in attention.
        dropout_mask: bytes of an element of a dropout mask.
        routing: who routes: ``stock`` Megatron, ours in plain ``torch``, or our ``kernels``.
        keeps_scores: the selection keeps a score of every expert (softmax before, or sigmoid).
        has_transport_plan: ``sinkhorn_selective`` routes.
        has_auxiliary_loss: scores of all experts are kept for it.
        has_entropy_loss: so are the probabilities and their logarithms, for that of ``top_p``.
        has_fused_permutation: Transformer Engine's.
        stacks_weights: grouped GEMM in torch stacks a copy of the experts' weights.
        recompute: ``recompute_modules`` under selective recomputation.
        recomputed_layers: None, or for full recomputation (method, layers).
    """

    element: int
    logit: int
    has_fused_norms: bool
    is_layer_norm: bool
    has_flash_attention: bool
    has_fp32_softmax: bool
    has_rotary: bool
    has_fused_activation: bool
    hidden_dropout: bool
    attention_dropout: bool
    dropout_mask: int
    routing: str
    keeps_scores: bool
    has_transport_plan: bool
    has_auxiliary_loss: bool
    has_entropy_loss: bool
    has_fused_permutation: bool
    stacks_weights: bool
    recompute: frozenset[str]
    recomputed_layers: tuple[str, int] | None

    def recomputed_groups(
        self, layout: Layout, stage: int, mtp_layers: int
    ) -> list[tuple[int, ...]]:
        """Layers of a pipeline rank that full recomputation runs at once, for each input it keeps.

        Every model chunk counts its layers anew, so groups end with chunks (core/recompute.py:167).
        MTP layers are alone, and ``block`` leaves them out (multi_token_prediction.py:1424).
        """
        if self.recomputed_layers is None:
            return []
        method, count = self.recomputed_layers
        chunks = layout.chunks_of(stage)
        if method == "block":
            return [(layer,) for chunk in chunks for layer in chunk[:count]]
        groups = [chunk[i : i + count] for chunk in chunks for i in range(0, len(chunk), count)]
        mtp = layout.layers_of(stage, mtp_layers)[len(layout.stages[stage]) :]
        return groups + [(layer,) for layer in mtp]

    def recomputed_on(self, layout: Layout, stage: int, mtp_layers: int) -> set[int]:
        """Layers of a pipeline rank that full recomputation covers."""
        groups = self.recomputed_groups(layout, stage, mtp_layers)
        return {layer for group in groups for layer in group}


def implementation_of(args: Any, uar: UARConfig, routing: str) -> Implementation:
    """Read it from Megatron's arguments and ours.

    Args:
        args: parsed arguments.
        uar: the UAR section.
        routing: as the attribute.
    """
    element = 2 if args.bf16 or args.fp16 else FP32
    is_te = args.transformer_impl != "local"
    backend = getattr(args.attention_backend, "name", str(args.attention_backend))
    granularity = args.recompute_granularity
    if getattr(args, "recompute_activations", False):
        granularity = "selective"  # as Megatron's validation has it (arguments.py:589)
    modules = args.recompute_modules or ["core_attn"]
    layers = (args.recompute_method or "uniform", args.recompute_num_layers or 1)
    types = args.moe_router_load_balancing_type
    types = types if isinstance(types, list) else [types]
    coefficients = args.moe_aux_loss_coeff
    coefficients = coefficients if isinstance(coefficients, list) else [coefficients]
    return Implementation(
        element=element,
        logit={"fp32": 4, "fp64": 8}.get(args.moe_router_dtype, element),
        has_fused_norms=is_te,
        is_layer_norm=args.normalization == "LayerNorm",
        has_flash_attention=is_te and backend != "unfused",
        has_fp32_softmax=bool(args.attention_softmax_in_fp32) and element < FP32,
        has_rotary=args.position_embedding_type in ("rope", "yarn", "mrope"),
        has_fused_activation=bool(args.swiglu and args.bias_swiglu_fusion),
        hidden_dropout=args.hidden_dropout > 0,
        attention_dropout=args.attention_dropout > 0,
        dropout_mask=1 if is_te else element,
        routing=routing,
        keeps_scores=args.moe_router_pre_softmax or args.moe_router_score_function != "softmax",
        has_transport_plan=uar.policy == "sinkhorn_selective",
        has_auxiliary_loss=any(t.endswith("aux_loss") for t in types) and any(coefficients),
        has_entropy_loss=uar.policy == "top_p" and uar.top_p.entropy_coeff > 0,
        has_fused_permutation=bool(args.moe_permute_fusion),
        stacks_weights=bool(args.moe_grouped_gemm) and not is_te,
        recompute=frozenset(modules if granularity == "selective" else ()),
        recomputed_layers=layers if granularity == "full" else None,
    )


@dataclass(frozen=True)
class Rows:
    """What one rank has of a micro-batch in one MoE layer.

    Attributes:
        tokens: that it routes.
        k_max: columns of the compact selection: the largest k of a token.
        sent: rows that its tokens are routed to.
        received: rows that its experts compute.
    """

    tokens: float
    k_max: int
    sent: float
    received: float


def norm_bytes(shape: ModelShape, how: Implementation, tokens: float) -> float:
    """A norm's input and statistics; its output belongs to what reads it.

    In plain torch RMSNorm keeps an fp32 input and the fp32 normalised input.
    """
    if how.has_fused_norms or how.is_layer_norm:
        statistics = FP32 * (2 if how.is_layer_norm else 1)
        return tokens * (shape.hidden * how.element + statistics)
    return tokens * (2 * FP32 * shape.hidden + FP32)


def attention_bytes(
    shape: ModelShape, how: Implementation, layout: Layout, is_recomputed: bool = False
) -> float:
    """Projections, core attention and the dropout after it, without the norm before.

    Args:
        shape: the model.
        how: its implementation.
        layout: tokens and the tensor parallel size.
        is_recomputed: core attention keeps its inputs only.
    """
    tokens, width = layout.tokens, how.element / layout.tensor
    queries, keys = shape.heads * shape.head_dim, shape.groups * shape.head_dim
    scores = tokens * shape.heads * shape.seq_length / layout.tensor
    keeps_repeated = (
        not how.has_flash_attention and not is_recomputed and shape.groups < shape.heads
    )
    if keeps_repeated:
        # Keys and values are repeated for each query; what they came from is not needed.
        found = tokens * width * 3 * queries
        if not how.has_rotary:
            found += tokens * width * 2 * keys  # the queries are a view of the projection
    else:
        found = tokens * width * (queries + 2 * keys)  # values are a view of the projection
        if how.has_rotary:
            found += tokens * width * (queries + keys)
    if how.has_rotary:
        # Cosines and sines for queries and for keys.
        found += 4 * layout.seq_length / layout.context * shape.head_dim * how.element
    found += tokens * width * queries  # the output of core attention
    if how.has_flash_attention:
        found += tokens * shape.heads / layout.tensor * FP32  # logsumexp of the scores
    elif not is_recomputed:
        found += scores * (how.element + how.has_fp32_softmax * FP32)
        if how.attention_dropout:
            found += scores * (how.element + how.dropout_mask)
    return found + dropout_bytes(shape, how, layout)


def dropout_bytes(shape: ModelShape, how: Implementation, layout: Layout) -> float:
    """The mask of a dropout over the hidden state."""
    return how.hidden_dropout * layout.routed_tokens * shape.hidden * how.dropout_mask


def feed_forward_elements(shape: ModelShape, how: Implementation) -> int:
    """Elements kept per unit of width between the two linear layers.

    Gated in plain torch: both halves, their activation and the linear half plus its offset, and
    the product.
    """
    if not shape.is_gated:
        return 2
    return 3 if how.has_fused_activation else 5


def router_bytes(shape: ModelShape, how: Implementation, rows: Rows) -> float:
    """What routing keeps for its backward.

    Of ``sinkhorn_selective`` a step that its transport plan routes: others keep less.
    """
    experts = shape.experts
    scores = experts * FP32 * how.has_auxiliary_loss
    if how.routing == "kernels":
        # Logits; indices, weights and rows of the selection; the sum of the weights.
        return rows.tokens * (experts * how.logit + rows.k_max * (2 * INT32 + FP32) + FP32)
    if how.routing == "stock":
        chosen = rows.k_max * INT64
        kept = experts * FP32 if how.keeps_scores else rows.k_max * FP32
        return rows.tokens * (chosen + kept + scores)
    # The sort of all experts is kept whole; its first columns are the selection.
    if how.has_transport_plan:
        # The probabilities, the rows of the plan whose selected entries the softmax takes.
        return rows.tokens * (2 * experts * FP32 + rows.k_max * (INT64 + FP32))
    # Scores, or the logits whose selected ones the softmax takes, are in fp32 in any router dtype.
    kept = experts * FP32 + (not how.keeps_scores) * rows.k_max * FP32
    kept += 2 * experts * FP32 * how.has_entropy_loss
    return rows.tokens * (experts * INT64 + rows.k_max + FP32 + kept + scores)


def held_bytes(shape: ModelShape, how: Implementation, rows: Rows, is_recomputed: bool) -> float:
    """What the dispatcher of a layer holds on to until its next forward overwrites it.

    So it is there once, however many micro-batches are in flight: the dense weights and map, which
    no backward needs, and the rows' indices, which the backward has anyway where it keeps them.

    Args:
        shape: the model.
        how: its implementation.
        rows: of the layer.
        is_recomputed: the whole layer is, in the backward.
    """
    if how.routing == "kernels":
        return 0.0
    keeps_indices = not is_recomputed and "moe" not in how.recompute
    indices = 0.0 if keeps_indices else _index_bytes(how, rows)
    return rows.tokens * shape.experts * (how.logit + 1) + indices


def _index_bytes(how: Implementation, rows: Rows) -> float:
    """Of each row the token it is of; Transformer Engine's permutation has a map instead."""
    return 0.0 if how.has_fused_permutation else rows.sent * INT64


def dispatch_bytes(shape: ModelShape, how: Implementation, rows: Rows) -> float:
    """The experts' input with its weights, and what the permutation keeps."""
    width = shape.latent or shape.hidden
    received = rows.received * (width * how.element + how.logit)
    if how.routing == "kernels":
        return received
    if how.has_fused_permutation:
        return received + rows.tokens * (2 * shape.experts + 1) * INT32
    sort = rows.tokens * shape.experts * INT64  # of the whole map
    return received + sort + _index_bytes(how, rows)


def expert_bytes(shape: ModelShape, how: Implementation, rows: Rows, layout: Layout) -> float:
    """Inside the routed experts: the two linear layers and the weighting between them."""
    elements = feed_forward_elements(shape, how)
    if not how.has_fused_activation:
        elements += 1  # the activation times the routing weight
    if "moe_act" in how.recompute:
        elements = 2 if shape.is_gated else 1
    width = shape.expert_ffn / layout.expert_tensor * how.element
    found = rows.received * elements * width
    if how.stacks_weights:
        matrices = 3 if shape.is_gated else 2
        experts = shape.experts / layout.expert
        found += experts * matrices * (shape.latent or shape.hidden) * width
    return found


def moe_bytes(
    shape: ModelShape, how: Implementation, rows: Rows, layout: Layout
) -> dict[str, float]:
    """A MoE layer after its norm, by part."""
    if "moe" in how.recompute:
        return {}
    shared = 0.0
    if shape.shared_ffn and "shared_experts" not in how.recompute:
        width = shape.shared_ffn / layout.tensor * how.element
        shared = layout.tokens * width * feed_forward_elements(shape, how)
        # The gate, and what it is multiplied with.
        shared += shape.has_shared_gate * rows.tokens * (shape.hidden + 1) * how.element
    latent = rows.tokens * shape.latent * how.element
    return {
        "routing": router_bytes(shape, how, rows),
        "dispatched rows": dispatch_bytes(shape, how, rows),
        "experts": expert_bytes(shape, how, rows, layout),
        "shared experts": shared + latent,
    }


def layer_bytes(
    shape: ModelShape, how: Implementation, layout: Layout, rows: Rows | None
) -> dict[str, float]:
    """One transformer layer, by part; its input belongs to its first norm.

    Args:
        shape: the model.
        how: its implementation.
        layout: its layout.
        rows: of a MoE layer; None for a dense one.
    """
    is_recomputed = "core_attn" in how.recompute
    outputs = ("layernorm" not in how.recompute) * shape.hidden * how.element
    norm = norm_bytes(shape, how, layout.routed_tokens) + layout.routed_tokens * outputs
    parts = {
        "norms": 2 * norm,
        "attention": attention_bytes(shape, how, layout, is_recomputed),
    }
    if rows is not None:
        parts |= moe_bytes(shape, how, rows, layout)
    else:
        width = shape.ffn / layout.tensor * how.element
        is_kept = "mlp" not in how.recompute
        parts["dense MLP"] = is_kept * layout.tokens * width * feed_forward_elements(shape, how)
    parts["norms"] += dropout_bytes(shape, how, layout)
    return parts


def mtp_bytes(shape: ModelShape, how: Implementation, layout: Layout) -> float:
    """A layer for multi-token prediction, but for its transformer layer.

    The norms of hidden state, embedding and result, and the first two side by side, which the
    projection reads (multi_token_prediction.py, ``_concat_embeddings``).
    """
    joined = layout.routed_tokens * 2 * shape.hidden * how.element
    return 3 * norm_bytes(shape, how, layout.routed_tokens) + joined


def output_bytes(shape: ModelShape, how: Implementation, layout: Layout) -> float:
    """The input of the output layer, and the logits, of which the loss keeps an fp32 softmax."""
    hidden = layout.routed_tokens * shape.hidden * how.element
    logits = layout.tokens * shape.vocab / layout.tensor * FP32
    targets = layout.tokens * (2 * INT64 + FP32)
    return hidden + logits + targets


def score_buffer_bytes(shape: ModelShape, how: Implementation, layout: Layout) -> float:
    """The buffer that unfused attention computes its scores in, one for all layers."""
    if how.has_flash_attention:
        return 0.0
    scores = layout.tokens * shape.heads * shape.seq_length / layout.tensor
    return scores * how.element
