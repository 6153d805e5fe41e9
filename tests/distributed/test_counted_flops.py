"""FLOPs of real trainings: against torch's counter, and where Megatron shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jobs import TESTS, TINY, train_arguments, warm_torchrun
from megatron.core.dist_checkpointing import load_common_state_dict
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from uar_megatron.flops import forward_flops, layers_with_experts, step_flops
from uar_megatron.mcore.compat import flops_function
from uar_megatron.reporting.runlog import read_run
from uar_megatron.reporting.schema import Step
from uar_megatron.shape import ModelShape, shape_of

pytestmark = pytest.mark.slow

VARIABLE = ("uar.policy=uar", "uar.budget.alpha=1.5", "uar.budget.beta=3.0", "uar.budget.k_max=6")
SHARED = "moe_shared_expert_intermediate_size=40"
GQA = ("num_attention_heads=4", "group_query_attention=true", "num_query_groups=2")
MODELS: dict[str, tuple[int, tuple[str, ...]]] = {
    "plain": (1, ()),
    "GQA, shared experts, MTP, not gated": (
        *(1,),
        (*GQA, "kv_channels=16", SHARED, "mtp_num_layers=1", "swiglu=false"),
    ),
    "TP2 × EP2, grouped GEMM": (
        *(2,),
        (
            *("tensor_model_parallel_size=2", "sequence_parallel=true"),
            *("expert_model_parallel_size=2", "expert_tensor_parallel_size=1"),
            *("moe_grouped_gemm=true", "make_vocab_size_divisible_by=32"),
        ),
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_equal_torchs_counter(model: str, tmp_path: Path) -> None:
    """Totals of all ranks within 1 %; without tensor parallelism every part exactly.

    Unfused attention multiplies the whole square. What the counter sees beyond the model are the
    products in which routers sum up their metrics, about 100 FLOPs per token and MoE layer.
    """
    ranks, options = MODELS[model]
    options = (*VARIABLE, *options, "train_iters=3", "save_interval=3")
    arguments = train_arguments(ranks, tmp_path, *options)[4:]
    script = (str(TESTS / "counted_pretrain.py"), f"{tmp_path}/flops", str(TINY))
    job = warm_torchrun(ranks, *script, *arguments)
    assert job.returncode == 0, job.stderr[-6000:]
    counted = [json.loads((tmp_path / f"flops.{rank}").read_text()) for rank in range(ranks)]
    shape = shape_of(saved(tmp_path, 3)["args"])
    steps = read_run(tmp_path / "run.jsonl").steps
    assert len(steps) == 3
    for i, step in enumerate(steps):
        rows = [layer.rows for layer in step.layers]
        assert all(n != 2 * step.tokens_per_step for n in rows)
        total = sum(modules[i]["Global"] for modules in counted)
        ours = step_flops(shape, step.tokens_per_step, rows, attention="full")
        assert ours.total == pytest.approx(total, rel=0.01)
        extra = total - ours.total
        assert 0 <= extra < 150 * step.tokens_per_step * len(rows)
        if ranks == 1:
            check_parts(shape, step, counted[0][i])


def check_parts(shape: ModelShape, step: Step, modules: dict[str, int]) -> None:
    root, tokens = "DistributedDataParallel.module", step.tokens_per_step
    parts = forward_flops(shape, "full")
    layers = {layer.layer: layer.rows for layer in step.layers}
    for number, is_moe in enumerate(layers_with_experts(shape), start=1):
        name = f"{root}.decoder.layers.{number - 1}"
        if number > len(shape.is_moe):
            name = f"{root}.mtp.layers.0.mtp_model_layer"
            assert modules[f"{root}.mtp.layers.0.eh_proj"] == 3 * tokens * parts.mtp_projection
        attention = f"{name}.self_attention"
        assert modules[f"{attention}.linear_qkv"] == 3 * tokens * parts.qkv_projection
        assert modules[f"{attention}.core_attention"] == 3 * tokens * parts.attention_core
        assert modules[f"{attention}.linear_proj"] == 3 * tokens * parts.output_projection
        if not is_moe:
            assert modules[f"{name}.mlp"] == 3 * tokens * parts.dense_mlp
            continue
        experts = modules[f"{name}.mlp.experts"]
        assert experts == 3 * layers[number] * parts.expert_row
        shared = modules.get(f"{name}.mlp.shared_experts", 0)
        assert shared == 3 * tokens * parts.shared_experts
        router = modules[f"{name}.mlp"] - experts - shared
        assert 0 <= router - 3 * tokens * parts.router < 150 * tokens
    logits = 3 * tokens * parts.logits * (1 + shape.mtp_layers)
    assert modules[f"{root}.output_layer"] == logits


def test_megatron_shows_counted_flops(tmp_path: Path) -> None:
    """In its line, TensorBoard and checkpoints: the last interval's rows, on every rank."""
    printed, shown, steps = train_with_throughput(tmp_path, *VARIABLE)
    checkpoint = saved(tmp_path, 6)
    static = flops_function()(checkpoint["args"], 8)
    row = 3 * 2 * 32 * 24 * 3
    for step in steps:
        extra = sum(layer.rows - 2 * 8 * 32 for layer in step.layers)
        assert extra > 0
        assert step.flops == static + extra * row
        assert step.flops_ratio == step.flops / static > 1.01
        # The line of step 2 has the rows of steps 1 and 2 already: they are reduced before it.
        seconds = shown["iteration-time"][step.step]
        assert shown["throughput"][step.step] * seconds * 2e12 == pytest.approx(step.flops, 1e-5)
        assert shown["uar/flops"][step.step] == pytest.approx(step.flops, 1e-6)
        assert shown["uar/flops_ratio"][step.step] == pytest.approx(step.flops_ratio, 1e-6)
        expected = step.flops / step.seconds_per_step / 2e12
        assert step.throughput == pytest.approx(expected, 1e-12)
    assert printed == [f"{shown['throughput'][step]:.1f}" for step in (1, 2, 4, 6)]
    # Rank 0 wrote this, and the last rank the run log. Between records the last one holds.
    so_far = 2 * static + 2 * steps[0].flops + 2 * steps[1].flops
    assert checkpoint["num_floating_point_operations_so_far"] == so_far


def test_off_leaves_megatrons_figure(tmp_path: Path) -> None:
    """Even where token dropping makes the rows fewer, which the run log shows."""
    dropping = ("moe_expert_capacity_factor=0.5", "moe_token_drop_policy=probs")
    _, shown, steps = train_with_throughput(tmp_path, "uar.policy=topk", *dropping)
    checkpoint = saved(tmp_path, 6)
    static = flops_function()(checkpoint["args"], 8)
    assert checkpoint["num_floating_point_operations_so_far"] == 6 * static
    for step in steps:
        assert step.flops_ratio < 1
        seconds = shown["iteration-time"][step.step]
        assert shown["throughput"][step.step] * seconds * 2e12 == pytest.approx(static, 1e-5)


def train_with_throughput(
    run_dir: Path, *options: str
) -> tuple[list[str], dict[str, dict[int, float]], list[Step]]:
    """Train 6 steps on 2 ranks, in records of 2; return printed throughputs, scalars, records."""
    options = (*options, "train_iters=6", "log_interval=2", "save_interval=6")
    options += ("log_throughput=true", "log_timers_to_tensorboard=true")
    options += ("tensorboard_log_interval=1", "expert_model_parallel_size=2")
    job = warm_torchrun(2, *train_arguments(2, run_dir, *options))
    assert job.returncode == 0, job.stderr[-6000:]
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    names = board.Tags()["scalars"]
    shown = {name: {e.step: e.value for e in board.Scalars(name)} for name in names}
    printed = re.findall(r"throughput per GPU \(TFLOP/s/GPU\): (\S+) ", job.stdout)
    steps = read_run(run_dir / "run.jsonl").steps
    assert [step.step for step in steps] == [2, 4, 6]
    return printed, shown, steps


def saved(run_dir: Path, step: int) -> dict[str, Any]:
    """What a checkpoint holds besides sharded tensors."""
    return load_common_state_dict(run_dir / "checkpoints" / f"iter_{step:07d}")
