"""FLOPs against numbers worked out by hand and against Megatron's own count."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from uar_megatron.flops import (
    ForwardFlops,
    expert_row_flops,
    forward_flops,
    layers_with_experts,
    step_flops,
)
from uar_megatron.mcore.compat import add_megatron_arguments, flops_function
from uar_megatron.shape import ModelShape, shape_of

# A dense and a MoE layer, one MTP layer, four query heads on two key-value heads.
SHAPE = ModelShape(
    hidden=10, heads=4, groups=2, head_dim=3, ffn=20, expert_ffn=7, shared_ffn=5, experts=6,
    topk=2, is_moe=(False, True), mtp_layers=1, vocab=50, seq_length=8, is_gated=True,
    has_bias=False, has_qkv_bias=False, has_tied_embeddings=False, learned_positions=0,
    norm_params=10, qk_norm_params=0,
)  # fmt: skip


def test_parts_by_hand() -> None:
    assert forward_flops(SHAPE) == ForwardFlops(
        qkv_projection=2 * 10 * (12 + 6 + 6),
        attention_core=8 * 12 * 2,  # on average half of 8 keys, twice, two FLOPs each
        output_projection=2 * 12 * 10,
        dense_mlp=2 * 10 * 20 * 3,
        router=2 * 10 * 6,
        expert_row=2 * 10 * 7 * 3,
        shared_experts=2 * 10 * 5 * 3,
        latent_projections=0,
        mtp_projection=2 * 20 * 10,
        logits=2 * 10 * 50,
    )
    assert forward_flops(SHAPE, "full").attention_core == 2 * 8 * 12 * 2
    plain = dataclasses.replace(SHAPE, is_gated=False, latent=4)
    assert expert_row_flops(plain) == 2 * 4 * 7 * 2
    assert forward_flops(plain).latent_projections == 2 * 10 * 4 * 2
    gated = dataclasses.replace(SHAPE, has_shared_gate=True)
    assert forward_flops(gated).shared_experts == 2 * 10 * 5 * 3 + 2 * 10


def test_a_step_by_hand() -> None:
    step = step_flops(SHAPE, tokens=16, rows_per_moe_layer=[40, 24])
    attention = 480 + 192 + 240
    dense = 3 * 16 * (attention + 1200)
    moe = 3 * (16 * (attention + 120 + 300) + 40 * 420)
    mtp = 3 * (16 * (attention + 120 + 300 + 400) + 24 * 420)
    assert step.per_layer == (dense, moe, mtp)
    assert step.logits == 3 * 16 * 1000 * 2
    assert step.total == dense + moe + mtp + step.logits
    # 2 × 16 rows are Top-K's: 8 more here make up for 8 fewer there.
    assert step.top_k_total == step.total
    assert step.layer_ratios == (1, moe / (moe - 3 * 8 * 420), mtp / (mtp + 3 * 8 * 420))
    more = step_flops(SHAPE, tokens=16, rows_per_moe_layer=[40, 32])
    assert more.ratio == more.total / step.top_k_total
    assert step_flops(SHAPE, tokens=16, rows_per_moe_layer=[32, 32]).ratio == 1


def test_every_moe_layer_needs_its_rows() -> None:
    with pytest.raises(ValueError, match="1 entries for 2 MoE layers"):
        step_flops(SHAPE, tokens=16, rows_per_moe_layer=[40])


SHAPES = {
    "mha": "",
    "gqa, wide heads": "--group-query-attention --num-query-groups 2 --kv-channels 24",
    "swiglu": "--swiglu",
    "shared experts": "--swiglu --moe-shared-expert-intermediate-size 56",
    "gated shared experts": (
        "--swiglu --moe-shared-expert-intermediate-size 56 --moe-shared-expert-gate"
    ),
    "gate without shared experts": "--swiglu --moe-shared-expert-gate",
    "dense first layer": "--moe-layer-freq [0]+[1]*3",
    "every second layer": "--moe-layer-freq 2",
    "two MTP layers": "--mtp-num-layers 2 --swiglu",
    "dense MTP layer": "--mtp-num-layers 1 --moe-layer-freq [1]*3+[0]",
    "latent experts": "--moe-latent-size 32 --swiglu",
}


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_top_k_equals_megatrons_count(options: str) -> None:
    """But for routers and gates, which Megatron leaves out, and norms of MTP layers."""
    args = arguments(options)
    shape, tokens = shape_of(args), 6 * args.seq_length
    megatron = flops_function()(args, 6)
    moe_layers = sum(layers_with_experts(shape))
    step = step_flops(shape, tokens, [tokens * shape.topk] * moe_layers)
    routers = 3 * tokens * 2 * shape.hidden * shape.experts * moe_layers
    mtp_norms = 3 * tokens * 2 * 3 * shape.hidden * shape.mtp_layers
    gates = 3 * tokens * 2 * shape.hidden * moe_layers * shape.has_shared_gate
    assert step.total - routers - gates == pytest.approx(megatron - mtp_norms, rel=1e-12)
    assert step.total == step.top_k_total
    # The correction of Megatron's figure for other rows is the same difference.
    args.moe_router_topk += 1
    more = step_flops(shape, tokens, [tokens * (shape.topk + 1)] * moe_layers)
    difference = flops_function()(args, 6) - megatron
    assert more.total - step.total == pytest.approx(difference, rel=1e-9)


def arguments(options: str) -> argparse.Namespace:
    """Megatron's arguments, with what its validation would derive."""
    sizes = (
        "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 160 "
        "--num-experts 8 --moe-ffn-hidden-size 48 --moe-router-topk 3 --seq-length 32 "
        "--max-position-embeddings 32 --vocab-size 100"
    )
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args = parser.parse_args([*sizes.split(), *options.split()])
    args.kv_channels = args.kv_channels or args.hidden_size // args.num_attention_heads
    args.padded_vocab_size = 128
    return args
