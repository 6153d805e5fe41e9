"""Sizes and routing of a UAR model; written by `uar export`."""

from typing import Any

from transformers import PreTrainedConfig


class UARMoEConfig(PreTrainedConfig):
    """Sizes by transformers' names, and how each layer routes.

    Args:
        routers: for each layer None (it is dense) or how many experts a token gets: ``rule``
            (``line``, ``exact``, ``top_p``, ``relu``) with the numbers that it needs.
        routing: what all routers share: score function, weights, groups, measure of uncertainty.
        position_embedding: ``rope``, ``learned`` or ``none``.
        rope: ``theta``, ``dim`` (rotated dimensions of a head), ``interleaved``, ``interpolation``.
    """

    model_type = "uar_moe"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 32,
        num_hidden_layers: int = 1,
        num_attention_heads: int = 2,
        num_key_value_heads: int = 2,
        head_dim: int = 16,
        intermediate_size: int = 64,
        moe_intermediate_size: int = 32,
        shared_expert_intermediate_size: int = 0,
        shared_expert_gate: bool = False,
        num_experts: int = 4,
        hidden_act: str = "silu",
        is_gated: bool = True,
        norm: str = "rms",
        norm_eps: float = 1e-5,
        is_norm_zero_centered: bool = False,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        position_embedding: str = "rope",
        max_position_embeddings: int = 2048,
        rope: dict[str, Any] | None = None,
        routers: list[dict[str, Any] | None] | None = None,
        routing: dict[str, Any] | None = None,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.moe_intermediate_size = moe_intermediate_size
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.shared_expert_gate = shared_expert_gate
        self.num_experts = num_experts
        self.hidden_act = hidden_act
        self.is_gated = is_gated
        self.norm = norm
        self.norm_eps = norm_eps
        self.is_norm_zero_centered = is_norm_zero_centered
        self.qk_norm = qk_norm
        self.qkv_bias = qkv_bias
        self.position_embedding = position_embedding
        self.max_position_embeddings = max_position_embeddings
        self.rope = rope or {}
        self.routers: list[dict[str, Any] | None] = routers or [None] * num_hidden_layers
        self.routing = routing or {}
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
