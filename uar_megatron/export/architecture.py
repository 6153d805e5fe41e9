"""What of a Megatron model the exported one can be; everything else is refused by name."""

from __future__ import annotations

import argparse
from typing import Any

from uar_megatron.errors import ConfigError
from uar_megatron.export.routing import router_specs, shared_routing
from uar_megatron.export.source import Source
from uar_megatron.shape import capacity_factor, shape_of

# Options that change what the model computes, and that the modelling file does not know.
_UNKNOWN = {
    "multi_latent_attention": "attention is grouped-query attention",
    "experimental_attention_variant": "attention is grouped-query attention",
    "linear_attention_freq": "every layer has softmax attention",
    "attention_output_gate": "attention has no gate",
    "window_size": "every token sees all tokens before it",
    "no_rope_freq": "every layer rotates its queries and keys",
    "use_rope_scaling": "rotation is plain",
    "qk_l2_norm": "queries and keys are normalised by qk_layernorm or not at all",
    "apply_residual_connection_post_layernorm": "residuals are taken before the norm",
    "fp32_residual_connection": "residuals have the dtype of the weights",
    "use_mup": "there are no multipliers",
    "quick_geglu": "activations are SwiGLU, GELU and squared ReLU",
    "openai_gelu": "activations are SwiGLU, GELU and squared ReLU",
    "glu_linear_offset": "a gate has no offset",
    "activation_func_clamp_value": "activations are not clamped",
    "moe_mlp_glu_interleave_size": "gates lie above inputs",
    "moe_shared_expert_glu_interleave_size": "gates lie above inputs",
    "moe_latent_size": "experts read the hidden state itself",
    "moe_apply_probs_on_input": "weights come after the activation",
    "moe_input_jitter_eps": "a forward has no noise",
    "moe_router_force_load_balancing": "routers are not random",
    "moe_router_force_biased": "routers are not random",
    "add_bias_linear": "only queries, keys and values have biases (add_qkv_bias)",
    "mtp_num_layers": "there are no layers for multi-token prediction",
    "heterogeneous_layers_config_path": "layers are alike but for their experts",
    "heterogeneous_layers_config_encoded_json": "layers are alike but for their experts",
    "hybrid_layer_pattern": "layers are alike but for their experts",
}
_ALLOWED = {
    "normalization": ("RMSNorm", "LayerNorm"),
    "position_embedding_type": ("rope", "learned_absolute", "none"),
    "softmax_type": ("vanilla",),
}
_LOSSES = ("sinkhorn", "quantile_balancing")


def check_architecture(args: argparse.Namespace) -> None:
    """Refuse what the modelling file does not compute.

    Raises:
        ConfigError: naming the first such option.
    """
    for name, instead in _UNKNOWN.items():
        value = getattr(args, name, None)
        if value:
            raise ConfigError(
                name, f"{value!r} cannot be exported: in the exported model {instead}"
            )
    if (factor := capacity_factor(args)) is not None:
        raise ConfigError(
            "moe_expert_capacity_factor",
            f"{factor:g} cannot be exported: in the exported model no token is dropped, while "
            "training drops some in a forward",
        )
    for name, allowed in _ALLOWED.items():
        value = getattr(args, name, allowed[0])
        if value not in allowed:
            raise ConfigError(
                name, f"{value!r} cannot be exported", allowed=", ".join(map(str, allowed))
            )
    types = args.moe_router_load_balancing_type
    for loss in types if isinstance(types, list | tuple) else [types]:
        if loss in _LOSSES:
            raise ConfigError(
                "moe_router_load_balancing_type",
                f"{loss} cannot be exported: it assigns experts by the tokens of a batch",
            )


def model_config(source: Source, vocab: int) -> dict[str, Any]:
    """Return ``config.json`` of the exported model, without what the tokenizer knows.

    Args:
        source: the checkpoint.
        vocab: entries of the vocabulary, without padding.

    Raises:
        ConfigError: an option or a policy that cannot be exported.
    """
    args = source.args
    check_architecture(args)
    shape = shape_of(args)
    routers = router_specs(source)
    dtype = source.tensors["embedding.word_embeddings.weight"].dtype
    return {
        "model_type": "uar_moe",
        "architectures": ["UARMoEForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_uar_moe.UARMoEConfig",
            "AutoModelForCausalLM": "modeling_uar_moe.UARMoEForCausalLM",
        },
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn,
        "moe_intermediate_size": shape.expert_ffn,
        "shared_expert_intermediate_size": shape.shared_ffn,
        "shared_expert_gate": bool(getattr(args, "moe_shared_expert_gate", False)),
        "num_experts": shape.experts,
        "hidden_act": "silu" if args.swiglu else "relu2" if args.squared_relu else "gelu",
        "is_gated": shape.is_gated,
        "norm": "rms" if args.normalization == "RMSNorm" else "layer",
        "norm_eps": args.layernorm_epsilon,
        "is_norm_zero_centered": args.layernorm_zero_centered_gamma,
        "qk_norm": args.qk_layernorm,
        "qkv_bias": shape.has_qkv_bias,
        "position_embedding": args.position_embedding_type.removesuffix("_absolute"),
        "max_position_embeddings": args.max_position_embeddings,
        "rope": {
            "theta": args.rotary_base,
            "dim": int(shape.head_dim * args.rotary_percent),
            "interleaved": args.rotary_interleaved,
            "interpolation": args.rotary_seq_len_interpolation_factor or 1.0,
        },
        "tie_word_embeddings": shape.has_tied_embeddings,
        "initializer_range": args.init_method_std,
        "routers": routers,
        "routing": shared_routing(source),
    }
