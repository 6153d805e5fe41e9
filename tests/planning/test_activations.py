"""The model of activation memory against what a real forward leaves allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from real_model import Allocations, build, count_rows, forget_score_buffer, forward

from uar_megatron.config import UARConfig
from uar_megatron.flops import layers_with_experts
from uar_megatron.mcore.policies import layer_policies
from uar_megatron.planning.activations import Rows, implementation_of, score_buffer_bytes
from uar_megatron.planning.experts_per_token import layers_of
from uar_megatron.planning.layout import layout_of
from uar_megatron.planning.memory import RankMemory, stage_memory
from uar_megatron.planning.state import precision_of
from uar_megatron.shape import shape_of

pytestmark = pytest.mark.usefixtures("model_parallel")

UAR = ("uar.policy=uar", "uar.budget.beta=2.5")
TOP_P = ("uar.policy=top_p", "uar.budget.k_max=4", "num_experts=64")
SINKHORN = (
    *("uar.policy=sinkhorn_selective", "uar.sinkhorn.probability=1"),
    "moe_router_load_balancing_type=none",
)
CASES: dict[str, tuple[str, ...]] = {
    "top-k": ("uar.policy=topk",),
    "variable k": UAR,
    "many experts, softmax first": (*UAR, "num_experts=64", "moe_router_pre_softmax=true"),
    "larger micro-batch": (
        *UAR,
        "micro_batch_size=4",
        "seq_length=64",
        "max_position_embeddings=64",
    ),
    "grouped queries, untied": (
        *(*UAR, "num_attention_heads=4", "group_query_attention=true", "num_query_groups=2"),
        "untie_embeddings_and_output_weights=true",
    ),
    "k = 4, mode exact": (
        *("uar.policy=uar", "uar.budget.mode=exact", "uar.budget.target_mean_k=4"),
        "uar.budget.k_max=8",
    ),
    "bf16": (*UAR, "bf16=true", "moe_router_dtype=fp32", "uar.bias.enabled=true"),
    "fused SwiGLU, shared expert": (
        *(*UAR, "bf16=true", "no_bias_swiglu_fusion=false"),
        "moe_shared_expert_intermediate_size=24",
    ),
    "gelu, LayerNorm, dropout, learned positions": (
        *("swiglu=false", "normalization=LayerNorm", "hidden_dropout=0.1"),
        *("attention_dropout=0.1", "position_embedding_type=learned_absolute"),
    ),
    "sigmoid, grouped GEMM": (
        *(*UAR, "moe_grouped_gemm=true", "moe_router_score_function=sigmoid"),
    ),
    "bf16, bf16 router": (*UAR, "bf16=true", "num_experts=64"),
    "bf16, fp64 router": (*UAR, "bf16=true", "moe_router_dtype=fp64", "num_experts=64"),
    "fp16": (*UAR, "fp16=true", "moe_router_dtype=fp32"),
    "gated shared expert": (
        *(*UAR, "moe_shared_expert_intermediate_size=24", "moe_shared_expert_gate=true"),
    ),
    "gated shared expert, bf16": (
        *(*UAR, "moe_shared_expert_intermediate_size=24", "moe_shared_expert_gate=true"),
        "bf16=true",
    ),
    "top-p, entropy loss": TOP_P,
    "top-p, entropy loss, bf16": (*TOP_P, "bf16=true"),
    "top-p, entropy loss, 256 experts": (*TOP_P, "num_experts=256"),
    "top-p, no loss": (*TOP_P, "num_experts=256", "uar.top_p.entropy_coeff=0"),
    "sinkhorn, a drawn step": (*SINKHORN, "num_experts=64"),
    "sinkhorn, a drawn step, 256 experts, bf16": (*SINKHORN, "num_experts=256", "bf16=true"),
    "multi-token prediction": (*UAR, "mtp_num_layers=1"),
    "multi-token prediction, bf16": (*UAR, "mtp_num_layers=1", "bf16=true"),
    "multi-token prediction, LayerNorm": (*UAR, "mtp_num_layers=1", "normalization=LayerNorm"),
    "multi-token prediction, recomputed": (
        *(*UAR, "mtp_num_layers=1", "recompute_granularity=full", "recompute_method=uniform"),
        "recompute_num_layers=1",
    ),
    "multi-token prediction beside a recomputed block": (
        *(*UAR, "mtp_num_layers=1", "recompute_granularity=full", "recompute_method=block"),
        "recompute_num_layers=3",
    ),
    "kernels": (*UAR, "uar.kernel_backend=triton", "num_experts=32"),
    "all layers with experts": (*UAR, "moe_layer_freq=1"),
    "recomputed core attention and MoE": (
        *(*UAR, "recompute_granularity=selective", "recompute_modules=[core_attn,moe]"),
    ),
    "recomputed dense MLP": (
        *(*UAR, "recompute_granularity=selective", "recompute_modules=[mlp]"),
    ),
    "recomputed layers": (
        *(*UAR, "recompute_granularity=full", "recompute_method=uniform"),
        "recompute_num_layers=1",
    ),
    "two recomputed layers of a block": (
        *(*UAR, "recompute_granularity=full", "recompute_method=block"),
        "recompute_num_layers=2",
    ),
}


PEAKS: dict[str, tuple[str, ...]] = {
    "rows": (*UAR, "uar.budget.k_min=4", "moe_layer_freq=1"),
    "logits": (*UAR, "bf16=true", "vocab_size=4096"),
    "recomputed layers": (
        *(*UAR, "bf16=true", "moe_layer_freq=1", "num_layers=6"),
        *("recompute_granularity=full", "recompute_method=uniform", "recompute_num_layers=1"),
    ),
    "recomputed MoE": (
        *(*UAR, "num_layers=6", "moe_layer_freq=1"),
        *("recompute_granularity=selective", "recompute_modules=[moe]"),
    ),
}


def plan_of(args: Any, uar: UARConfig, rows: list[int]) -> RankMemory:
    """The plan's memory of a micro-batch whose experts got these rows."""
    shape = shape_of(args)
    layout = layout_of(args, shape, 1, 8)
    routing = {"auto": "torch", "triton": "kernels"}[uar.kernel_backend]
    how = implementation_of(args, uar, "stock" if uar.policy == "topk" else routing)
    ks = layers_of(uar, shape, layer_policies(uar, args))
    numbers = [layer for layer, is_moe in enumerate(layers_with_experts(shape)) if is_moe]
    rows_of_layer = {
        layer: Rows(layout.routed_tokens, k.k_max, count, count)
        for layer, k, count in zip(numbers, ks, rows, strict=True)
    }
    return stage_memory(shape, how, layout, precision_of(args), 0, rows_of_layer, 0)


@pytest.mark.parametrize("case", CASES)
def test_planned_activations_are_those_of_a_real_forward(case: str, tmp_path: Path) -> None:
    experiment, args, model = build(tmp_path, *CASES[case])
    rows = count_rows(model)
    forward(model, args).backward()  # buffers of metrics and statistics are there from now on
    forget_score_buffer()
    rows.clear()
    with Allocations(apart_from=model) as allocations:
        loss = forward(model, args, seed=1)
        measured = allocations.live_bytes()
    shape = shape_of(args)
    how = implementation_of(args, experiment.uar, "torch")
    buffer = score_buffer_bytes(shape, how, layout_of(args, shape, 1, 8))
    planned = sum(plan_of(args, experiment.uar, rows).activations.values()) + buffer
    print(f"{case}: planned {planned:.0f}, measured {measured}: {planned / measured - 1:+.2%}")
    assert planned == pytest.approx(measured, rel=0.02)
    del loss


IN_FLIGHT: dict[str, tuple[str, ...]] = {
    "top-k": ("uar.policy=topk", "num_experts=256"),
    "variable k": (*UAR, "num_experts=256"),
    "kernels": (*UAR, "num_experts=64", "uar.kernel_backend=triton"),
    "recomputed layers": (
        *(*UAR, "num_experts=256", "recompute_granularity=full", "recompute_method=uniform"),
        "recompute_num_layers=1",
    ),
    "recomputed MoE": (
        *(*UAR, "num_experts=256", "recompute_granularity=selective", "recompute_modules=[moe]"),
    ),
}


@pytest.mark.parametrize("case", IN_FLIGHT)
def test_planned_micro_batches_in_flight_are_those_of_real_forwards(
    case: str, tmp_path: Path
) -> None:
    """Another forward before the backward adds all but what the dispatchers hold on to."""
    experiment, args, model = build(tmp_path, *IN_FLIGHT[case])
    rows = count_rows(model)
    forward(model, args).backward()
    rows.clear()
    with Allocations(apart_from=model) as allocations:
        losses = [forward(model, args, seed=1)]
        first = allocations.live_bytes()
        losses.append(forward(model, args, seed=1))
        measured = allocations.live_bytes() - first
    planned = plan_of(args, experiment.uar, rows[: len(rows) // 2]).activations
    held = planned.pop("held by dispatchers")
    more = sum(planned.values())
    print(f"{case}: planned {more:.0f}, measured {measured}: {more / measured - 1:+.2%}")
    assert more == pytest.approx(measured, rel=0.02)
    assert (held > 0) == (case != "kernels")
    del losses


@pytest.mark.slow
@pytest.mark.parametrize("case", PEAKS)
def test_planned_peak_is_that_of_a_real_forward_and_backward(case: str, tmp_path: Path) -> None:
    experiment, args, model = build(tmp_path, *PEAKS[case])
    rows = count_rows(model)
    forward(model, args).backward()
    forget_score_buffer()
    for parameter in model.parameters():
        if parameter.grad is None:  # of an expert that got no row
            parameter.grad = torch.zeros_like(parameter)
    rows.clear()
    with Allocations(apart_from=model, finds_peak=True) as allocations:
        forward(model, args, seed=1).backward()
    memory = plan_of(args, experiment.uar, rows[: sum(shape_of(args).is_moe)])
    planned, measured = sum(memory.activations.values()) + memory.passing, allocations.peak
    print(
        f"peak, {case}: planned {planned:.0f}, measured {measured}: {planned / measured - 1:+.2%}"
    )
    assert planned == pytest.approx(measured, rel=0.1)
