"""The table of Megatron's options is complete, and what it refuses is refused."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from uar_megatron.config import UARConfig
from uar_megatron.errors import ConfigError
from uar_megatron.mcore.arguments import megatron_parser
from uar_megatron.mcore.compatibility import check_compatible, is_off, varies
from uar_megatron.mcore.options import OPTIONS


def test_every_option_of_the_installed_megatron_is_in_the_table() -> None:
    listed = {name for option in OPTIONS for name in option.names}
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    arguments = {action.dest for action in megatron_parser()._actions}
    assert {f for f in fields | arguments if "moe_" in f} <= listed
    assert listed <= fields | arguments


def test_every_refusal_says_why_and_what_to_do() -> None:
    for option in OPTIONS:
        assert option.note
        assert (option.refused == "never") == (option.in_use is None) == (not option.remedy)


def megatron_args(**changes: Any) -> SimpleNamespace:
    defaults = {a.dest: a.default for a in megatron_parser()._actions}
    settings = {"num_experts": 8, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.01}
    kind = {"moe_router_load_balancing_type": "aux_loss", "transformer_impl": "local"}
    depth = {"num_layers": 2, "moe_layer_freq": 1, "add_bias_linear": False}
    return SimpleNamespace(
        **{
            **defaults,
            **settings,
            **kind,
            **depth,
            "moe_token_dispatcher_type": "alltoall",
            **changes,
        }
    )


AE = {"policy": "uar"}
LOAD = "moe_router_load_balancing_type"
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"num_experts": None}, "num_experts"),
    ({"policy": "uar", "budget": {"k_max": 9}}, {}, "uar.budget.k_max"),
    (
        {"policy": "uar", "budget": {"k_max": 5}},
        {"moe_router_group_topk": 2, "moe_router_num_groups": 4},
        "uar.budget.k_max",
    ),
    (AE, {"moe_router_group_topk": 3, "moe_router_num_groups": 4}, "moe_router_group_topk"),
    (
        {"policy": "uar", "budget": {"k_min": 3}, "expansion": {"ramp_steps": 5}},
        {},
        "uar.expansion.ramp_steps",
    ),
    (
        {"policy": "uar", "budget": {"mode": "exact", "segment": 16}},
        {"seq_length": 32, "tensor_model_parallel_size": 4},
        "uar.budget.segment",
    ),
    (
        {"policy": "uar", "budget": {"max_rows_factor": 1.5, "segment": 16}},
        {"seq_length": 32, "context_parallel_size": 2},
        "uar.budget.segment",
    ),
    (AE, {"moe_ncclep_static_shape": True}, "moe_ncclep_static_shape"),
    (AE, {"moe_router_fusion": True}, "moe_router_fusion"),
    (AE, {"moe_enable_routing_replay": True}, "moe_enable_routing_replay"),
    (AE, {LOAD: "sinkhorn"}, LOAD),
    (AE, {LOAD: ["aux_loss", "quantile_balancing"]}, LOAD),
    (AE, {"moe_apply_probs_on_input": True}, "moe_apply_probs_on_input"),
    (AE, {"cuda_graph_impl": "local"}, "cuda_graph_impl"),
    (AE, {"cuda_graph_impl": "local", "cuda_graph_modules": ["attn", "moe"]}, "cuda_graph_impl"),
    ({}, {"cuda_graph_impl": "full_iteration"}, "cuda_graph_impl"),
    ({}, {"transformer_impl": "inference_optimized"}, "transformer_impl"),
    (AE, {"overlap_moe_expert_parallel_comm": True}, "overlap_moe_expert_parallel_comm"),
    (AE, {"moe_paged_stash": True}, "moe_expert_rank_capacity_factor"),
    (AE, {"moe_routing_trace_path": "here"}, "moe_routing_trace_path"),
    (AE, {"rerun_mode": "report_stats"}, "rerun_mode"),
    (AE, {"moe_use_upcycling": True}, "moe_use_upcycling"),
    (
        AE,
        {"moe_pad_experts_for_cuda_graph_inference": True},
        "moe_pad_experts_for_cuda_graph_inference",
    ),
    ({}, {"moe_grouped_gemm": True, "add_bias_linear": True}, "moe_grouped_gemm"),
    ({"clb": {"enabled": True}}, {"moe_aux_loss_coeff": 0.0}, "uar.clb.enabled"),
    ({"bias": {"enabled": True}}, {"moe_router_enable_expert_bias": True}, "uar.bias.enabled"),
    ({"statistics": {"mode": "batch"}}, {"mtp_use_repeated_layer": True}, "uar.statistics.mode"),
    ({"weights": "softmax_all"}, {"moe_router_score_function": "sigmoid"}, "uar.weights"),
]


@pytest.mark.parametrize(("uar", "changes", "field"), REFUSED, ids=lambda v: str(v)[:40])
def test_combinations_that_cannot_work(uar: dict, changes: dict, field: str) -> None:
    config = UARConfig.model_validate(uar)
    with pytest.raises(ConfigError) as error:
        check_compatible(config, megatron_args(**changes))
    assert error.value.field == field
    if uar:
        check_compatible(UARConfig(), megatron_args(**changes))  # stock may do all of it


def test_every_refusal_is_tried() -> None:
    refusing = [option for option in OPTIONS if option.in_use is not None]
    for option in refusing:
        assert any(
            option.in_use(megatron_args(**changes)) and field == option.names[0]
            for _, changes, field in REFUSED
        ), option.names


@pytest.mark.parametrize(
    "changes",
    [
        {LOAD: ["seq_aux_loss", "global_aux_loss"], "moe_aux_loss_coeff": [0.1, 0.2]},
        {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
        {"moe_router_group_topk": 2, "moe_router_num_groups": 4},
        {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"},
        {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": ["attn"]},
        {"moe_grouped_gemm": True},
    ],
    ids=str,
)
def test_what_the_table_calls_supported_is_not_refused(changes: dict) -> None:
    check_compatible(UARConfig.model_validate(AE), megatron_args(**changes))


def test_a_segment_that_nothing_counts_in_fits_every_layout() -> None:
    uar = UARConfig.model_validate({"policy": "uar", "budget": {"segment": 16}})
    check_compatible(uar, megatron_args(seq_length=32, tensor_model_parallel_size=4))


def test_off_and_variable() -> None:
    args = megatron_args()
    off = {"policy": "uar", "budget": {"alpha": 0.0, "beta": 2.4}}
    other_k = {"policy": "uar", "budget": {"alpha": 0.0, "beta": [2.0, 3.0]}}
    cases = [({}, True, False), (off, True, False), (other_k, False, True), (AE, False, True)]
    cases += [({"clb": {"enabled": True}}, False, False), ({"weights": "renormalised_to_K"}, 0, 0)]
    for fields, expected_off, expected_varies in cases:
        uar = UARConfig.model_validate(fields)
        assert is_off(uar, args) == expected_off
        assert varies(uar, args) == expected_varies
