"""The sizes of a GPT model with experts, read from Megatron's arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from uar_megatron.errors import ConfigError


@dataclass(frozen=True)
class ModelShape:
    """Everything that parameters, FLOPs and memory of a model depend on; plain numbers.

    Attributes:
        hidden: ``hidden_size``.
        heads: attention heads.
        groups: query groups (key-value heads); ``heads`` without grouped queries.
        head_dim: ``kv_channels``.
        ffn: width of a dense feed-forward layer.
        expert_ffn: width of an expert.
        shared_ffn: width of the shared experts together, 0 without.
        experts: E.
        topk: ``moe_router_topk``.
        is_moe: for each decoder layer whether it has experts.
        mtp_layers: layers for multi-token prediction, shaped like the last decoder layer.
        vocab: padded vocabulary.
        seq_length: tokens of a sequence.
        is_gated: the feed-forward layers have two input projections (SwiGLU, GEGLU).
        has_bias: linear layers have biases.
        has_qkv_bias: so has the projection to queries, keys and values.
        has_tied_embeddings: input and output embeddings are one matrix.
        learned_positions: entries of a learned position embedding, 0 for rotary or none.
        norm_params: parameters of one norm over ``hidden``.
        qk_norm_params: parameters of the norms of queries and keys in one layer, 0 without.
        latent: ``moe_latent_size``, the width that routed experts read and write; 0 for ``hidden``.
        has_shared_gate: a gate weights the shared experts' output (``moe_shared_expert_gate``).
    """

    hidden: int
    heads: int
    groups: int
    head_dim: int
    ffn: int
    expert_ffn: int
    shared_ffn: int
    experts: int
    topk: int
    is_moe: tuple[bool, ...]
    mtp_layers: int
    vocab: int
    seq_length: int
    is_gated: bool
    has_bias: bool
    has_qkv_bias: bool
    has_tied_embeddings: bool
    learned_positions: int
    norm_params: int
    qk_norm_params: int
    latent: int = 0
    has_shared_gate: bool = False


def moe_pattern(args: Any) -> tuple[bool, ...]:
    """Return for each decoder layer whether it has experts (``moe_layer_freq``).

    Args:
        args: Megatron's arguments or its ``TransformerConfig``.

    Raises:
        ConfigError: no such pattern: Megatron asserts so where it builds the layers
            (gpt_layer_specs.py:653).
    """
    frequency, layers = args.moe_layer_freq, args.num_layers
    if isinstance(frequency, int):
        if frequency < 1:
            raise ConfigError(
                "moe_layer_freq",
                f"{frequency} is not allowed",
                allowed="n ≥ 1, for experts in every n-th layer, or a list of 0 and 1",
                remedy="1 gives every layer experts",
            )
        return tuple(i % frequency == 0 for i in range(layers))
    if len(frequency) != layers:
        raise ConfigError(
            "moe_layer_freq",
            f"the list has {len(frequency)} entries, num_layers is {layers}",
            allowed="one entry for each layer",
            remedy=f'write for example "[0]+[1]*{layers - 1}", or set num_layers',
        )
    if any(entry not in (0, 1) for entry in frequency):
        raise ConfigError(
            "moe_layer_freq",
            f"{frequency} has other entries than 0 and 1",
            remedy="write 1 for a layer with experts, 0 for a dense one",
        )
    return tuple(bool(is_moe) for is_moe in frequency)


def capacity_factor(args: Any) -> float | None:
    """Return ``moe_expert_capacity_factor``; None where no token is dropped.

    A negative one means none: Megatron's ``TransformerConfig`` sets it to None
    (transformer_config.py:1661), but the arguments keep it.

    Args:
        args: Megatron's arguments or its ``TransformerConfig``.
    """
    factor = args.moe_expert_capacity_factor
    return None if factor is None or factor < 0 else float(factor)


def shape_of(args: Any) -> ModelShape:
    """Return the shape that Megatron's arguments describe; derived ones may still be unset.

    What is None takes the value that Megatron's validation would give it (arguments.py).

    Args:
        args: Megatron's parsed arguments, validated or not.

    Raises:
        ConfigError: an architecture whose sizes are not known here.
    """
    if getattr(args, "multi_latent_attention", False):
        raise ConfigError(
            "multi_latent_attention",
            "parameters, FLOPs and memory of latent attention are not modelled",
            remedy="plan with grouped-query attention of the same size",
        )
    for name in ("attention_output_gate", "experimental_attention_variant", "hybrid_layer_pattern"):
        if getattr(args, name, None):
            raise ConfigError(
                name,
                "parameters, FLOPs and memory of this architecture are not modelled",
                remedy=f"plan without {name}",
            )
    shared_ffn = args.moe_shared_expert_intermediate_size or 0
    hidden, heads = args.hidden_size, args.num_attention_heads
    head_dim = args.kv_channels or hidden // heads
    ffn = args.ffn_hidden_size
    if ffn is None:
        ffn = int(4 * hidden * 2 / 3 / 64) * 64 if args.swiglu else 4 * hidden
    norms = 1 if args.normalization == "RMSNorm" else 2
    has_learned = args.position_embedding_type == "learned_absolute"
    return ModelShape(
        hidden=hidden,
        heads=heads,
        groups=args.num_query_groups if args.group_query_attention else heads,
        head_dim=head_dim,
        ffn=ffn,
        expert_ffn=args.moe_ffn_hidden_size or ffn,
        shared_ffn=shared_ffn,
        experts=args.num_experts,
        topk=args.moe_router_topk,
        is_moe=moe_pattern(args),
        mtp_layers=args.mtp_num_layers or 0,
        vocab=padded_vocabulary(args),
        seq_length=args.seq_length,
        is_gated=args.swiglu or args.quick_geglu,
        has_bias=args.add_bias_linear,
        has_qkv_bias=args.add_bias_linear or args.add_qkv_bias,
        has_tied_embeddings=not args.untie_embeddings_and_output_weights,
        learned_positions=args.max_position_embeddings if has_learned else 0,
        norm_params=norms * hidden,
        qk_norm_params=2 * norms * head_dim if args.qk_layernorm else 0,
        latent=args.moe_latent_size or 0,
        has_shared_gate=bool(shared_ffn and args.moe_shared_expert_gate),
    )


def padded_vocabulary(args: Any) -> int:
    """Return the size of the embedding: a multiple of the divisor × the tensor parallel size.

    Raises:
        ConfigError: neither ``padded_vocab_size`` nor ``vocab_size`` is known.
    """
    if getattr(args, "padded_vocab_size", None):
        return int(args.padded_vocab_size)
    if args.vocab_size is None:
        raise ConfigError(
            "vocab_size",
            "the size of the vocabulary is not known without the tokenizer",
            remedy="set vocab_size",
        )
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return -(-int(args.vocab_size) // multiple) * multiple
