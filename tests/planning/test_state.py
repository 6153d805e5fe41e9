"""Parameters and what stays from step to step, against a real model, DDP and optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from real_model import Allocations, build, forward

from uar_megatron.flops import layers_with_experts
from uar_megatron.planning.layout import Layout, layout_of
from uar_megatron.planning.parameters import (
    RankParameters,
    active_parameters,
    model_parameters,
    stage_parameters,
)
from uar_megatron.planning.state import Precision, precision_of, state_bytes
from uar_megatron.shape import shape_of

pytestmark = pytest.mark.usefixtures("model_parallel")

MODELS: dict[str, tuple[str, ...]] = {
    "tied, SwiGLU": (),
    "untied, grouped queries, shared expert, norms of queries and keys": (
        *("untie_embeddings_and_output_weights=true", "qk_layernorm=true"),
        *("num_attention_heads=4", "group_query_attention=true", "num_query_groups=2"),
        *("moe_shared_expert_intermediate_size=40", "kv_channels=24"),
    ),
    "gated shared expert": (
        *("moe_shared_expert_intermediate_size=40", "moe_shared_expert_gate=true"),
    ),
    "multi-token prediction": ("mtp_num_layers=1",),
    "gelu, LayerNorm, biases, learned positions": (
        *("swiglu=false", "normalization=LayerNorm", "disable_bias_linear=false"),
        "position_embedding_type=learned_absolute",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_real_model(name: str, tmp_path: Path) -> None:
    _, args, model = build(tmp_path, *MODELS[name])
    shape = shape_of(args)
    layout = layout_of(args, shape, 1, 8)
    real = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert model_parameters(shape).total == real
    on_rank = stage_parameters(shape, layout, 0).on_rank(layout)
    assert on_rank == RankParameters(real - experts, experts)
    moe_layers = sum(layers_with_experts(shape))
    unused = (shape.experts - 3) / shape.experts * experts
    assert active_parameters(shape, [3.0] * moe_layers) == real - unused


@pytest.mark.parametrize(
    "options",
    [
        ("bf16=true",),
        ("bf16=true", "use_distributed_optimizer=true"),
        ("bf16=true", "grad_reduce_in_bf16=true"),
        (),
        ("use_distributed_optimizer=true",),
        ("fp16=true",),
        ("fp16=true", "use_distributed_optimizer=true"),
        ("fp16=true", "accumulate_allreduce_grads_in_fp32=true"),
    ],
    ids=" ".join,
)
def test_planned_state_is_that_of_a_real_step(options: tuple[str, ...], tmp_path: Path) -> None:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.training.training import get_megatron_ddp_config, get_megatron_optimizer_config

    with Allocations() as allocations:
        _, args, model = build(tmp_path, *options, "hidden_size=64", "vocab_size=1024")
        config = model.config
        model = DistributedDataParallel(config, get_megatron_ddp_config(args), model)
        optimizer = get_megatron_optimizer(get_megatron_optimizer_config(args)[0], [model])
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss = forward(model, args)
        loss.backward()
        model.finish_grad_sync()
        assert optimizer.step()[0]
        del loss
        _forget_buffers(model)
        optimizer.zero_grad()
        measured = allocations.live_bytes()
    shape = shape_of(args)
    layout = layout_of(args, shape, 1, 8)
    state = state_bytes(
        stage_parameters(shape, layout, 0).on_rank(layout), layout, precision_of(args)
    )
    print(f"{options}: planned {state.total:.0f}, measured {measured}")
    assert state.total == pytest.approx(measured, rel=0.02)


def _forget_buffers(model: torch.nn.Module) -> None:
    from megatron.core.parallel_state import get_global_memory_buffer

    get_global_memory_buffer().buffer.clear()
    for module in model.modules():  # what a dispatcher holds on to counts as activations
        if hasattr(module, "token_dispatcher"):
            module.token_dispatcher.__dict__ = {}


def test_bytes_per_parameter_are_megatrons() -> None:
    """18 bytes, or 6 + 12 / DP; experts have their own data parallel size."""
    layout = Layout(
        world=32,
        gpus_per_node=8,
        tensor=2,
        pipeline=1,
        virtual=1,
        context=2,
        expert=8,
        expert_tensor=1,
        has_sequence_parallel=True,
        micro_batch=1,
        global_batch=8,
        seq_length=16,
        stages=((0,),),
        warmup_group=1,
    )
    assert (layout.data, layout.expert_data) == (8, 4)
    counts = RankParameters(dense=1000, experts=100)
    whole = state_bytes(counts, layout, Precision(2, 4, 4, 8, is_distributed=False))
    assert whole.total == 18 * 1100
    cut = state_bytes(counts, layout, Precision(2, 4, 4, 8, is_distributed=True))
    assert cut.total == pytest.approx(6 * 1100 + 12 * 1000 / 16 + 12 * 100 / 4)
