"""Whole plans, from the shipped configuration of 256 experts."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
from plans import planned

from uar_megatron.errors import ConfigError
from uar_megatron.planning.memory import stage_memory


def test_256a8_from_8_to_1024_gpus() -> None:
    began = time.monotonic()
    plans = {gpus: planned(gpus) for gpus in (8, 16, 32, 64, 128, 256, 512, 1024)}
    print(f"8 plans in {time.monotonic() - began:.2f} s")
    found = plans[64]
    hidden, width, vocab = 1024, 320, 32000
    attention, norms = 4 * hidden**2, 2 * hidden
    expert = 3 * hidden * width
    dense = 8 * (attention + norms) + 3 * hidden * 2560 + 7 * hidden * 256
    total = dense + 7 * 256 * expert + 2 * vocab * hidden + hidden
    assert found.parameters == total
    assert found.active["expected"] == total - 7 * 248 * expert
    assert found.flops_per_token["K_max"] - found.flops_per_token["K_min"] == pytest.approx(
        7 * (16 - 4) * 6 * expert
    )
    # 7 · 32 experts on each rank of 8; weights bf16, gradients fp32, optimizer over data ranks.
    on_rank = total - 7 * 224 * expert
    assert found.expected.state.weights == 2 * on_rank
    assert found.expected.state.gradients == 4 * on_rank
    experts = 7 * 32 * expert
    assert found.expected.state.optimizer == pytest.approx(
        12 * ((on_rank - experts) / 64 + experts / 8)
    )
    assert found.traffic.exchange.dispatch == 4096 * 8 * hidden * 2
    assert found.traffic.exchange.between_nodes == 0
    totals = [one.time.total for one in plans.values()]
    assert totals == sorted(totals, reverse=True)
    assert plans[8].days > 8 * plans[64].days * 0.9
    assert not found.warnings


def test_time_of_a_step_is_flops_and_bytes_over_speeds() -> None:
    """By hand: computation at even load, the all-to-all, and gradients that nothing hides."""
    found = planned(64, "overlap_grad_reduce=false", "overlap_param_gather=false")
    time, tokens = found.time, 1024 * 4096
    flops = found.flops_per_token["expected"] * tokens / 64
    assert time.dense + time.experts == pytest.approx(flops / (989e12 * 0.35))
    rows = 4096 * 8 * (2 * 1024 * 2 + 4)  # tokens there and back, and weights
    assert time.all_to_all == pytest.approx(7 * 16 * 2 * rows * 7 / 8 / 160e9)
    experts = 7 * 32 * 3 * 1024 * 320
    dense = found.parameters - 8 * experts
    # 4 bytes of gradient scattered and 2 of weight gathered, between nodes in both groups.
    per_parameter = (4 + 2) / 50e9
    assert time.gradients == pytest.approx(per_parameter * (dense * 63 / 64 + experts * 7 / 8))
    assert time.bubble == time.tensor_parallel == time.recomputation == 0
    assert found.tokens_per_second == pytest.approx(tokens / time.total)
    assert found.days == pytest.approx(23842 * time.total / 86400)
    hidden = planned(64).time.gradients
    assert 0 < hidden < time.gradients
    two_nodes = planned(64, "expert_model_parallel_size=16").traffic.exchange
    assert two_nodes.between_nodes == 1 / 2


def test_variable_rows_cost_memory_and_time() -> None:
    few = planned(64, "uar.budget.target_mean_k=8")
    many = planned(64, "uar.budget.target_mean_k=12")
    assert many.worst.total == few.worst.total
    rows = ("dispatched rows", "experts")
    for part in rows:
        ratio = many.expected.activations[part] / few.expected.activations[part]
        assert ratio == pytest.approx(12 / 8)
    assert many.time.experts / few.time.experts == pytest.approx(12 / 8)
    assert many.time.all_to_all / few.time.all_to_all == pytest.approx(12 / 8)
    assert many.time.dense == few.time.dense


def test_uneven_load_costs_memory_and_time() -> None:
    even, uneven = planned(64), planned(64, concentration=0.5)
    imbalance = uneven.job.imbalance[0]
    assert imbalance.expected > 1.1
    assert uneven.time.experts / even.time.experts == pytest.approx(imbalance.expected)
    part = "experts"
    assert uneven.worst.activations[part] / even.worst.activations[part] == pytest.approx(
        imbalance.worst
    )


@pytest.mark.parametrize(
    ("overrides", "setting", "remedy"),
    [
        (
            ("uar.budget.k_max=128",),
            "uar.budget.k_max = 128",
            "uar.budget.max_rows_factor={factor}",
        ),
        (
            ("uar.budget.k_max=128", "uar.budget.max_rows_factor=15.0"),
            "uar.budget.max_rows_factor = 15",
            "uar.budget.max_rows_factor={factor}",
        ),
        (
            ("uar.budget.mode=exact", "uar.budget.k_max=128", "uar.budget.target_mean_k=120"),
            "uar.budget.mode = exact",
            "uar.budget.target_mean_k={rows}",
        ),
        (
            ("uar.policy=top_p", "uar.budget.mode=free", "uar.budget.k_max=128"),
            "uar.budget.k_max = 128",
            "uar.budget.k_max={rows}",
        ),
        (
            ("routing=relu", "uar.budget.mode=free", "moe_router_load_balancing_type=none"),
            "uar.policy = relu, 256 experts",
            "moe_expert_capacity_factor={factor}",
        ),
    ],
)
def test_what_does_not_fit_names_its_bound_and_the_remedy_fits(
    overrides: tuple[str, ...], setting: str, remedy: str
) -> None:
    large = ("micro_batch_size=16", "global_batch_size=1024", *overrides)
    found = planned(64, *large)
    assert found.worst.total > found.job.usable_memory
    first, *_, last = found.warnings
    assert setting in first
    rows = float(last.split()[0])
    assert f"lower {remedy.partition('=')[0]} to" in last
    lower = remedy.format(factor=int(rows / 8 * 100) / 100, rows=int(rows))
    fitting = planned(64, *large, lower)
    assert not fitting.warnings
    assert fitting.worst.total > 0.9 * fitting.job.usable_memory


def test_the_gate_of_shared_experts_counts() -> None:
    """A hidden vector in each of seven MoE layers, and its product with every token."""
    shared = "moe_shared_expert_intermediate_size=320"
    plain, gated = planned(64, shared), planned(64, shared, "moe_shared_expert_gate=true")
    assert gated.parameters - plain.parameters == 7 * 1024
    more = gated.flops_per_token["expected"] - plain.flops_per_token["expected"]
    assert more == pytest.approx(3 * 7 * 2 * 1024)


def test_a_negative_capacity_drops_no_token() -> None:
    """Megatron trains dropless with it, so the kernels route as well."""
    plain, negative = planned(64), planned(64, "moe_expert_capacity_factor=-1")
    assert negative.k == plain.k
    assert negative.worst.total == plain.worst.total
    assert negative.job.how.routing == plain.job.how.routing == "kernels"


def test_recompute_activations_is_selective_recomputation() -> None:
    short = planned(64, "recompute_activations=true")
    full = planned(64, "recompute_granularity=selective", "recompute_modules=[core_attn]")
    assert short.job.how.recompute == {"core_attn"}
    assert short.time.recomputation == full.time.recomputation > 0
    over = planned(64, "recompute_granularity=full", "recompute_activations=true")
    assert over.job.how == short.job.how


def test_a_model_that_never_fits_says_so() -> None:
    found = planned(
        8, "num_layers=64", 'moe_layer_freq="[0]+[1]*63"', "expert_model_parallel_size=1"
    )
    assert "with any number of experts per token" in found.warnings[-1]


def test_json_holds_every_figure() -> None:
    found = planned(64)
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["expected"]["total"] == pytest.approx(found.expected.total)
    assert plain["fits"] == {"expected": True, "worst": True}
    assert plain["job"]["layout"]["expert_data"] == 8
    assert plain["time"]["total"] == found.time.total
    assert plain["days"] == found.days


def test_budgets_of_tokens() -> None:
    whole = planned(64)
    assert whole.job.tokens == 23842 * 1024 * 4096
    assert planned(64, tokens=whole.job.tokens / 2).days == pytest.approx(whole.days / 2)
    assert planned(64, "train_iters=null").days is None


def test_a_stage_holds_micro_batches_in_flight() -> None:
    """Stage 0 of 2 has layers 0 to 3, of which 3 have experts, for two micro-batches at once."""
    whole, job = planned(64), planned(64, "pipeline_model_parallel_size=2").job
    rows = job.rows_of_layer([8.0] * 7, [1.0] * 7)
    torch = dataclasses.replace(job.how, routing="torch")
    for stage, layers, in_flight in ((0, 3, 2), (1, 4, 1)):
        memory = stage_memory(job.shape, job.how, job.layout, job.precision, stage, rows, 0)
        dense = stage_memory(job.shape, torch, job.layout, job.precision, stage, rows, 0)
        # Weights in fp32 and a map of 4096 tokens and 256 experts: whatever is in flight.
        assert dense.activations["held by dispatchers"] == layers * 4096 * 256 * (4 + 1)
        expected = whole.expected.activations["experts"] * layers / 7 * in_flight
        assert memory.activations["experts"] == pytest.approx(expected)
        assert ("logits and loss" in memory.activations) == (stage == 1)


def test_pipelines_wait_and_recomputation_costs() -> None:
    plain = planned(64)
    cut = planned(64, "pipeline_model_parallel_size=2")
    assert plain.time.bubble == 0
    busy = cut.time.total - cut.time.bubble - cut.time.gradients
    assert cut.time.bubble == pytest.approx(busy / cut.job.layout.micro_batches)
    full = ("recompute_granularity=full", "recompute_method=uniform", "recompute_num_layers=1")
    again = planned(64, *full)
    assert again.time.all_to_all == pytest.approx(1.5 * plain.time.all_to_all)
    assert sum(again.expected.activations.values()) < sum(plain.expected.activations.values()) / 2


@pytest.mark.parametrize(
    ("overrides", "options", "words"),
    [
        (("vocab_size=null", "tokenizer_type=HuggingFaceTokenizer"), {}, "vocab_size"),
        (("moe_token_dispatcher_type=allgather",), {}, "alltoall"),
        (("optimizer=sgd",), {}, "adam"),
        (("mtp_use_repeated_layer=true",), {}, "mtp_use_repeated_layer"),
        (("num_distributed_optimizer_instances=2",), {}, "num_distributed_optimizer_instances: 2"),
        (("num_experts=null",), {}, "num_experts"),
        (("num_layers=null",), {}, "num_layers"),
        (("num_layers=32",), {}, "8 entries, num_layers is 32"),
        (('moe_layer_freq="[0]+[1]*3"',), {}, "4 entries, num_layers is 8"),
        (("moe_layer_freq=0",), {}, "moe_layer_freq: 0 is not allowed"),
        (('moe_layer_freq="[0]*8"',), {}, "no layer has experts"),
        (("tensor_model_parallel_size=0",), {}, "tensor_model_parallel_size: 0 is not allowed"),
        (("pipeline_model_parallel_size=0",), {}, "pipeline_model_parallel_size: 0"),
        (("expert_model_parallel_size=0",), {}, "expert_model_parallel_size: 0"),
        (("context_parallel_size=0",), {}, "context_parallel_size: 0"),
        (("context_parallel_size=-1",), {}, "context_parallel_size: -1"),
        (("num_attention_heads=0",), {}, "num_attention_heads: 0"),
        (("make_vocab_size_divisible_by=0",), {}, "make_vocab_size_divisible_by: 0"),
        (("micro_batch_size=0",), {}, "micro_batch_size: 0"),
        (("micro_batch_size=-1",), {}, "micro_batch_size: -1"),
        (("global_batch_size=0",), {}, "global_batch_size: 0"),
        (("seq_length=0",), {}, "seq_length: 0"),
        (("hidden_size=0",), {}, "hidden_size: 0"),
        (("vocab_size=0",), {}, "vocab_size: 0"),
        (("mtp_num_layers=-1",), {}, "mtp_num_layers: -1"),
        (
            ("num_attention_heads=32", "group_query_attention=true", "num_query_groups=3"),
            {},
            "num_query_groups: 3 does not divide num_attention_heads = 32",
        ),
        (
            ("num_attention_heads=32", "hidden_size=1000", "kv_channels=null"),
            {},
            "hidden_size: 1000 is not a multiple of num_attention_heads = 32",
        ),
        ((), {"tokens": float("inf")}, "--tokens"),
        ((), {"mfu": 1e-310}, "the step takes for ever"),
        (("uar.budget.k_max=300",), {}, "k_max is 300"),
        (("multi_latent_attention=true",), {}, "multi_latent_attention"),
        ((), {"mfu": 0.0}, "--mfu"),
        ((), {"tokens": -1.0}, "--tokens"),
        ((), {"load": Path("no/such/run"), "concentration": 1.0}, "--dirichlet"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    overrides: tuple[str, ...], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        planned(64, *overrides, **options)
