"""The exported model computes what Megatron's does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import trained_source
from transformers import AutoModelForCausalLM

from uar_megatron.export.write import export_model
from uar_megatron.mcore.step import routers_of

VOCABULARY = 120
LENGTHS = (16, 11, 5)
MODELS: dict[str, tuple[str, ...]] = {
    "energy": ("routing=uar_ae", "moe_router_pre_softmax=true", "uar.budget.k_max=2"),
    "entropy, steered mean, grouped queries, shared experts, layers alike": (
        *("routing=uar_ae", "uar.uncertainty=entropy", "uar.temperature=0.7"),
        *("uar.budget.mode=mean", "uar.budget.target_mean_k=2.5", "uar.budget.rounding=ceil"),
        *("group_query_attention=true", "num_query_groups=2", "num_attention_heads=4"),
        *("moe_shared_expert_intermediate_size=20", "moe_shared_expert_gate=true"),
        *("untie_embeddings_and_output_weights=true", "moe_layer_freq=1"),
    ),
    "exact, sigmoid, groups, Megatron's bias": (
        *("routing=uar_ae", "uar.budget.mode=exact", "uar.budget.target_mean_k=2"),
        *("moe_router_score_function=sigmoid", "moe_router_enable_expert_bias=true"),
        *("moe_router_num_groups=4", "moe_router_group_topk=2", "moe_router_dtype=fp32"),
        *("moe_router_topk_scaling_factor=2.5", "moe_aux_loss_coeff=0.0"),
        "moe_router_load_balancing_type=none",
    ),
    "top-p, our bias, squared ReLU, LayerNorm, a learned position": (
        *("routing=top_p", "uar.bias.enabled=true", "uar.bias.rate=0.05", "moe_aux_loss_coeff=0"),
        *("swiglu=false", "squared_relu=true", "normalization=LayerNorm", "qk_layernorm=true"),
        *("add_qkv_bias=true", "position_embedding_type=learned_absolute"),
    ),
    "ReLU, part of each head interleaved": (
        *("routing=relu", "rotary_percent=0.5", "rotary_interleaved=true"),
        *("rotary_seq_len_interpolation_factor=2", "moe_router_load_balancing_type=none"),
    ),
    "weights that sum as those of K, budgets by layer, ramp": (
        *("routing=uar_ae", "uar.weights=renormalised_to_K", "uar.budget.k_min=0"),
        *("uar.budget.alpha=[1.0,3.0]", "uar.budget.k_max=[3,5]", "uar.expansion.ramp_steps=5"),
        *("moe_router_score_function=sqrtsoftplus", "moe_router_dtype=fp64"),
    ),
    "top-k": ("routing=topk",),
}


def megatron_forward(
    model: torch.nn.Module, tokens_S: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of one sequence without padding, and k of its tokens in each MoE layer."""
    counts: list[torch.Tensor] = []

    def count(router: torch.nn.Module, inputs: Any, outputs: tuple[torch.Tensor, ...]) -> None:
        counts.append(outputs[1].sum(-1))

    hooks = [router.register_forward_hook(count) for router in routers_of([model])]
    length = len(tokens_S)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with torch.no_grad():
        logits = model(tokens_S.unsqueeze(0), torch.arange(length).unsqueeze(0), mask)
    for hook in hooks:
        hook.remove()
    return logits[0, :, :VOCABULARY], counts


def padded(sequences: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attention mask of a batch; padding is a token like any other."""
    tokens = torch.full((len(sequences), LENGTHS[0]), 7)
    mask = torch.zeros_like(tokens)
    for row, sequence in enumerate(sequences):
        at = slice(-len(sequence), None) if side == "left" else slice(len(sequence))
        tokens[row, at], mask[row, at] = sequence, 1
    return tokens, mask


@pytest.mark.usefixtures("model_parallel")
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_k(name: str, tmp_path: Path) -> None:
    source, megatron = trained_source(tmp_path, *MODELS[name])
    export_model(source, tmp_path / "hf")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    draw = torch.Generator().manual_seed(5)
    sequences = [torch.randint(0, VOCABULARY, (length,), generator=draw) for length in LENGTHS]
    expected = [megatron_forward(megatron, sequence) for sequence in sequences]
    if name != "top-k":
        assert len(torch.cat([k for _, counts in expected for k in counts]).unique()) > 1
    for side in ("left", "right"):
        tokens, mask = padded(sequences, side)
        with torch.no_grad():
            output = exported(tokens, attention_mask=mask, output_routing=True)
        for row, (logits, counts) in enumerate(expected):
            real = mask[row].bool()
            close(output.logits[row, real], logits)
            assert len(output.experts_per_token) == len(counts)
            for ours, theirs in zip(output.experts_per_token, counts, strict=True):
                assert torch.equal(ours[row, real], theirs)
    with torch.no_grad():
        close(exported(sequences[0].unsqueeze(0)).logits[0], expected[0][0])
        if "exact" not in name:
            close(token_by_token(exported, *padded(sequences, "left"))[0], expected[0][0])
            close(token_by_token(exported, *padded(sequences, "left"))[2, -3:], expected[2][0][-3:])
    ids = sequences[0].unsqueeze(0)
    exported.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in exported.parameters())
    if "uar.budget.k_min=0" in MODELS[name]:
        assert any((k == 0).any() for k in expected[0][1]), "no token is without an expert"


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def token_by_token(model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits of a batch that is computed with a cache, one token at a time."""
    cache, parts = None, []
    for i in range(tokens.shape[1]):
        output = model(tokens[:, i : i + 1], attention_mask=mask[:, : i + 1], cache=cache)
        cache = output.cache
        parts.append(output.logits)
    return torch.cat(parts, dim=1)
