"""A GPT with uncertainty-aware routing, for transformers; needs nothing but torch and transformers.

Written by `uar export` next to the weights:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

A router measures how uncertain it is about a token (its free energy or entropy), compares that with
statistics that were frozen when training stopped, and gives uncertain tokens more experts. The
statistics are buffers, in float64 whatever the dtype of the model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_uar_moe import UARMoEConfig
from .routing_uar_moe import Router

CACHE = "cache" if hasattr(CausalLMOutputWithPast(), "cache") else "past_key_values"
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu2": lambda x: F.relu(x).square(),
}

Rotation = tuple[torch.Tensor, torch.Tensor]


@dataclass
class UARMoEOutput(CausalLMOutputWithPast):
    """Output of the model.

    Attributes:
        experts_per_token: with ``output_routing=True``: k of each MoE layer, int64
            ``[batch, sequence]``.
        router_energy: likewise the routers' free energy, float32; high means uncertain.
    """

    experts_per_token: tuple | None = None
    router_energy: tuple | None = None


class Norm(nn.Module):
    """RMSNorm or LayerNorm; Megatron's zero-centred weights are added to 1."""

    def __init__(self, config: UARMoEConfig, size: int) -> None:
        super().__init__()
        self.eps, self.offset = config.norm_eps, float(config.is_norm_zero_centered)
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if config.norm == "layer" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight + self.offset if self.offset else self.weight
        if self.bias is None:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, self.bias, self.eps)


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, config: UARMoEConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.rope = layer, config.head_dim, config.rope
        heads = config.num_attention_heads * config.head_dim
        groups = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, groups, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, groups, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=False)
        self.q_norm = Norm(config, config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = Norm(config, config.head_dim) if config.qk_norm else nn.Identity()

    def forward(
        self, x: torch.Tensor, rotation: Rotation | None, mask: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        shape = (*x.shape[:2], -1, self.head_dim)
        query = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        value = self.v_proj(x).view(shape).transpose(1, 2)
        if rotation is not None:
            interleaved = self.rope["interleaved"]
            query = rotate(query, *rotation, interleaved)
            key = rotate(key, *rotation, interleaved)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


def rotation_of(positions: torch.Tensor, rope: dict[str, Any], dtype: torch.dtype) -> Rotation:
    """Cosine and sine of each position, ``[batch, 1, sequence, dim]``."""
    step = torch.arange(0, rope["dim"], 2, dtype=torch.float32, device=positions.device)
    angles = positions.float().unsqueeze(-1) * (1.0 / rope["interpolation"])
    angles = angles * (1.0 / (rope["theta"] ** (step / rope["dim"])))
    if rope["interleaved"]:
        angles = angles.repeat_interleave(2, dim=-1)
    else:
        angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype).unsqueeze(1), angles.sin().to(dtype).unsqueeze(1)


def rotate(
    x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Turn the first dimensions of each head by its position."""
    turned, rest = x[..., : cosine.shape[-1]], x[..., cosine.shape[-1] :]
    if interleaved:
        other = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        other = torch.cat((-second, first), dim=-1)
    return torch.cat((turned * cosine + other * sine, rest), dim=-1)


class MLP(nn.Module):
    """A dense feed-forward layer."""

    def __init__(self, config: UARMoEConfig, width: int) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        gate = nn.Linear(config.hidden_size, width, bias=False) if config.is_gated else None
        self.gate_proj = gate
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)))
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """All experts of a layer; a gated expert's first matrix is its gate above its input."""

    def __init__(self, config: UARMoEConfig) -> None:
        super().__init__()
        experts, width = config.num_experts, config.moe_intermediate_size
        self.act, self.is_gated = ACTIVATIONS[config.hidden_act], config.is_gated
        rows = 2 * width if config.is_gated else width
        self.up_proj = nn.Parameter(torch.empty(experts, rows, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, config.hidden_size, width))

    def forward(
        self, x_TH: torch.Tensor, weight_TE: torch.Tensor, map_TE: torch.Tensor
    ) -> torch.Tensor:
        output_TH = torch.zeros_like(x_TH)
        for expert in map_TE.any(dim=0).nonzero().flatten().tolist():
            tokens = map_TE[:, expert].nonzero().flatten()
            hidden = F.linear(x_TH[tokens], self.up_proj[expert])
            if self.is_gated:
                gate, linear = hidden.chunk(2, dim=-1)
                hidden = self.act(gate) * linear
            else:
                hidden = self.act(hidden)
            hidden = (hidden * weight_TE[tokens, expert].unsqueeze(-1)).to(x_TH.dtype)
            output_TH.index_add_(0, tokens, F.linear(hidden, self.down_proj[expert]))
        return output_TH


class MoE(nn.Module):
    """Routed experts, and those that every token sees."""

    def __init__(self, config: UARMoEConfig, spec: dict[str, Any]) -> None:
        super().__init__()
        self.router = Router(config, spec)
        self.experts = Experts(config)
        shared = config.shared_expert_intermediate_size
        self.shared_expert = MLP(config, shared) if shared else None
        has_gate = bool(shared) and config.shared_expert_gate
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if has_gate else None

    def forward(
        self, x_BSH: torch.Tensor, valid_BS: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight_TE, map_TE, k_T, energy_T = self.router(x_BSH, valid_BS)
        output = self.experts(x_BSH.flatten(0, 1), weight_TE, map_TE).view(x_BSH.shape)
        if self.shared_expert is not None:
            shared = self.shared_expert(x_BSH)
            if self.shared_expert_gate is not None:
                shared = shared * torch.sigmoid(self.shared_expert_gate(x_BSH))
            output = output + shared
        return output, k_T.view(valid_BS.shape), energy_T.view(valid_BS.shape)


class Layer(nn.Module):
    """A transformer layer with the norms before its two halves."""

    def __init__(self, config: UARMoEConfig, layer: int) -> None:
        super().__init__()
        spec = config.routers[layer]
        self.input_layernorm = Norm(config, config.hidden_size)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = Norm(config, config.hidden_size)
        self.mlp = MLP(config, config.intermediate_size) if spec is None else MoE(config, spec)

    def forward(
        self,
        x: torch.Tensor,
        rotation: Rotation | None,
        mask: torch.Tensor,
        cache: Any,
        valid_BS: torch.Tensor,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MLP):
            return x + self.mlp(normed), None
        output, k_BS, energy_BS = self.mlp(normed, valid_BS)
        return x + output, (k_BS, energy_BS)


class Decoder(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: UARMoEConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.position_embedding == "learned"
        positions = config.max_position_embeddings
        self.embed_positions = nn.Embedding(positions, config.hidden_size) if learned else None
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config, config.hidden_size)


class UARMoEForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model."""

    config_class = UARMoEConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: UARMoEConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts | Router):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, std=self.config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_routing: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> UARMoEOutput:
        """As in transformers' models; ``attention_mask`` is ``[batch, past + new tokens]`` or None.

        What earlier releases of transformers call ``past_key_values``, later ones call ``cache``.
        """
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None and not self.training:
            cache = DynamicCache(config=self.config)
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past = 0 if cache is None else cache.get_seq_length()
        mask, valid_BS, positions = self._masks(x, attention_mask, past)
        positions = positions if position_ids is None else position_ids
        rotation = None
        if self.config.position_embedding == "rope":
            rotation = rotation_of(positions, self.config.rope, x.dtype)
        elif self.model.embed_positions is not None:
            x = x + self.model.embed_positions(positions)
        states, decisions = [x], []
        for layer in self.model.layers:
            x, decision = layer(x, rotation, mask, cache, valid_BS)
            states.append(x)
            decisions += [] if decision is None else [decision]
        x = self.model.norm(x)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return UARMoEOutput(
            loss=loss,
            logits=logits,
            hidden_states=(*states[:-1], x) if output_hidden_states else None,
            experts_per_token=tuple(k for k, _ in decisions) if output_routing else None,
            router_energy=tuple(energy for _, energy in decisions) if output_routing else None,
            **({CACHE: cache} if use_cache else {}),
        )

    def _masks(
        self, x: torch.Tensor, attention_mask: torch.Tensor | None, past: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return who sees whom, which new tokens are no padding, and their positions."""
        batch, length = x.shape[:2]
        here = torch.arange(past, past + length, device=x.device)
        sees = torch.arange(past + length, device=x.device) <= here.unsqueeze(-1)
        if attention_mask is None:
            valid_BS = torch.ones(batch, length, dtype=torch.bool, device=x.device)
            return sees.expand(batch, 1, -1, -1), valid_BS, here.expand(batch, -1)
        if attention_mask.dim() != 2:
            raise ValueError("attention_mask must be [batch, tokens so far]")
        valid = attention_mask.bool()
        itself = torch.arange(past + length, device=x.device) == here.unsqueeze(-1)
        mask = (sees & valid[:, None, None, :]) | itself  # so that padding sees something
        positions = (valid.long().cumsum(-1) - 1).clamp_min(0)[:, past:]
        return mask, valid[:, past:], positions
