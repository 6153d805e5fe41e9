"""Which tensor of a checkpoint is which in the exported model, and how it is cut.

Nothing is computed: rows are cut apart and joined again, so that the way back gives equal bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from uar_megatron.errors import UARError

STATE = "megatron."
"""Begins the names of what the exported model does not need and the way back does."""
_PADDING = f"{STATE}padding."

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# Of a layer. Norms have a name of Megatron's own layers and one of Transformer Engine's.
_WHOLE = {
    "input_layernorm.": "input_layernorm.",
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "self_attention.linear_proj.": "self_attn.o_proj.",
    "self_attention.q_layernorm.": "self_attn.q_norm.",
    "self_attention.k_layernorm.": "self_attn.k_norm.",
    "pre_mlp_layernorm.": "post_attention_layernorm.",
    "mlp.linear_fc1.layer_norm_": "post_attention_layernorm.",
    "mlp.linear_fc2.": "mlp.down_proj.",
    "mlp.router.weight": "mlp.router.weight",
    "mlp.router.expert_bias": "mlp.router.frozen.bias",
    "mlp.router.uar_bias.value": "mlp.router.frozen.bias",
    "mlp.router.uar_statistics.mean": "mlp.router.frozen.mean",
    "mlp.router.uar_statistics.var": "mlp.router.frozen.var",
    "mlp.experts.experts.linear_fc1.weight": "mlp.experts.up_proj",
    "mlp.experts.experts.linear_fc2.weight": "mlp.experts.down_proj",
    "mlp.shared_experts.linear_fc2.": "mlp.shared_expert.down_proj.",
    "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight",
}
_GATED = {
    "mlp.linear_fc1.": "mlp.",
    "mlp.shared_experts.linear_fc1.": "mlp.shared_expert.",
}
_OTHER = {
    "embedding.position_embeddings.": "model.embed_positions.",
    "decoder.final_layernorm.": "model.norm.",
    "decoder.final_norm.": "model.norm.",
}
_VOCABULARY = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
}


@dataclass(frozen=True)
class Cuts:
    """The sizes at which tensors are cut.

    Attributes:
        heads: attention heads.
        groups: query groups (key-value heads).
        head_dim: ``kv_channels``.
        is_gated: feed-forward layers have a gate.
        vocab: entries of the vocabulary, without padding.
    """

    heads: int
    groups: int
    head_dim: int
    is_gated: bool
    vocab: int


@dataclass(frozen=True)
class Piece:
    """One tensor of a checkpoint in the exported model.

    Attributes:
        targets: names of its parts there.
        split: the tensor to its parts, in the order of ``targets``.
        join: the parts to the tensor.
    """

    targets: tuple[str, ...]
    split: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    join: Callable[[Sequence[torch.Tensor]], torch.Tensor]


def piece_of(name: str, cuts: Cuts) -> Piece:
    """Say what becomes of the tensor ``name`` of a checkpoint (with a layer's number).

    Raises:
        UARError: the exported model has no such part.
    """
    if name in _VOCABULARY:
        targets = (_VOCABULARY[name], _PADDING + name)
        return Piece(targets, lambda t: (t[: cuts.vocab], t[cuts.vocab :]), _joined)
    match = _LAYER.fullmatch(name)
    if match is None:
        target = _renamed(name, _OTHER)
        if target is not None:
            return _whole(target)
        raise UARError(f"export: the checkpoint holds {name}, which the exported model has not")
    layer, rest = f"model.layers.{match[1]}.", match[2]
    target = _renamed(rest, _WHOLE)
    if target is not None:
        return _whole(layer + target)
    if rest.startswith("mlp.router.uar_"):
        return _whole(STATE + name)
    if re.fullmatch(r"self_attention\.linear_qkv\.(weight|bias)", rest):
        return _queries_keys_values(layer, rest.rpartition(".")[2], cuts)
    gated = _renamed(rest, _GATED)
    if gated is not None:
        prefix, _, kind = gated.rpartition(".")
        parts = ("gate_proj", "up_proj") if cuts.is_gated else ("up_proj",)
        names = tuple(f"{layer}{prefix}.{part}.{kind}" for part in parts)
        return Piece(names, lambda t: t.chunk(len(parts)), _joined)
    raise UARError(f"export: the checkpoint holds {name}, which the exported model has not")


def _renamed(name: str, table: Mapping[str, str]) -> str | None:
    for ours, theirs in table.items():
        if name == ours or (ours[-1] in "._" and name.startswith(ours)):
            return theirs + name.removeprefix(ours)
    return None


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(parts))


def _whole(target: str) -> Piece:
    return Piece((target,), lambda tensor: (tensor,), lambda parts: parts[0])


def _queries_keys_values(layer: str, kind: str, cuts: Cuts) -> Piece:
    """Megatron interleaves them: for each group its queries, a key and a value."""
    targets = tuple(f"{layer}self_attn.{part}_proj.{kind}" for part in "qkv")
    queries = cuts.heads // cuts.groups

    def split(tensor: torch.Tensor) -> list[torch.Tensor]:
        grouped = tensor.view(cuts.groups, queries + 2, cuts.head_dim, *tensor.shape[1:])
        return [part.flatten(0, 2) for part in grouped.split((queries, 1, 1), dim=1)]

    def join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        shape = (cuts.groups, -1, cuts.head_dim, *parts[0].shape[1:])
        return torch.cat([part.reshape(shape) for part in parts], dim=1).flatten(0, 2)

    return Piece(targets, split, join)
