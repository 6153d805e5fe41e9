"""The table of Megatron's options is complete, and what it refuses is refused."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from uar_megatron.config import UARConfig, parse_section
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
NO_LOSS = {LOAD: "none"}
RELU = {"moe_router_pre_softmax": True, **NO_LOSS}
CLB = {"clb": {"enabled": True}}
BIAS = {"bias": {"enabled": True}}
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
    ({}, {"cuda_graph_impl": "local"}, "cuda_graph_impl"),
    ({}, {"cuda_graph_impl": "local", "cuda_graph_modules": ["attn", "moe"]}, "cuda_graph_impl"),
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
    (
        {"observe": {"interval": 5}},
        {"num_microbatches_with_partial_activation_checkpoints": 2},
        "uar.observe.interval",
    ),
    ({"weights": "softmax_all"}, {"moe_router_score_function": "sigmoid"}, "uar.weights"),
    ({"policy": "top_p", "budget": {"k_max": 9}}, {}, "uar.budget.k_max"),
    ({"policy": "seq_topk", "budget": {"k_max": 9}}, {}, "uar.budget.k_max"),
    (
        {"policy": "top_p"},
        {"moe_router_score_function": "sigmoid"},
        "moe_router_score_function",
    ),
    ({"policy": "relu"}, NO_LOSS, "moe_router_pre_softmax"),
    ({"policy": "sinkhorn_selective"}, RELU, "moe_router_pre_softmax"),
    ({"policy": "relu", "budget": {"target_mean_k": 9}}, RELU, "uar.budget.target_mean_k"),
    ({"policy": "seq_topk", "budget": {"target_mean_k": 5}}, {}, "uar.budget.target_mean_k"),
    (
        {"policy": "seq_topk", "budget": {"segment": 16}},
        {"seq_length": 32, "tensor_model_parallel_size": 4},
        "uar.budget.segment",
    ),
    *(
        (
            {"policy": policy},
            {"moe_router_group_topk": 2, "moe_router_num_groups": 4, **options},
            "moe_router_group_topk",
        )
        for policy, options in {
            "top_p": {},
            "relu": RELU,
            "seq_topk": {},
            "sinkhorn_selective": NO_LOSS,
        }.items()
    ),
    *(
        ({"policy": policy, **balance}, {**options, **changes}, field)
        for policy, options in {"relu": RELU, "sinkhorn_selective": NO_LOSS}.items()
        for balance, changes, field in (
            (CLB, {}, "uar.clb.enabled"),
            (CLB, {LOAD: "aux_loss"}, "uar.clb.enabled"),
            (BIAS, {}, "uar.bias.enabled"),
            ({}, {"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias"),
            ({}, {LOAD: "aux_loss"}, "moe_aux_loss_coeff"),
            (
                {},
                {LOAD: ["none", "seq_aux_loss"], "moe_aux_loss_coeff": [0, 1]},
                "moe_aux_loss_coeff",
            ),
        )
    ),
    ({"policy": "sinkhorn_selective"}, {LOAD: "sinkhorn"}, LOAD),
    ({"policy": "relu"}, {**RELU, "moe_apply_probs_on_input": True}, "moe_apply_probs_on_input"),
    *(
        ({"policy": policy, "kernel_backend": "triton"}, options, "uar.kernel_backend")
        for policy, options in {
            "top_p": {},
            "relu": RELU,
            "seq_topk": {},
            "sinkhorn_selective": NO_LOSS,
        }.items()
    ),
    ({"policy": "top_k"}, {}, "uar.policy"),
    ({"policy": "no_such_module:Mine"}, {}, "uar.policy"),
    ({"policy": "math:pi"}, {}, "uar.policy"),
]


@pytest.mark.parametrize(("uar", "changes", "field"), REFUSED, ids=lambda v: str(v)[:40])
def test_combinations_that_cannot_work(uar: dict, changes: dict, field: str) -> None:
    config = UARConfig.model_validate(uar)
    with pytest.raises(ConfigError) as error:
        check_compatible(config, megatron_args(**changes))
    assert error.value.field == field
    if uar:
        check_compatible(UARConfig(), megatron_args(**changes))  # stock may do all of it


@pytest.mark.parametrize(("policy", "options"), [("relu", RELU), ("sinkhorn_selective", NO_LOSS)])
def test_what_a_policy_that_balances_itself_refuses_says_why(policy: str, options: dict) -> None:
    """Also CLB where there is no other loss: adding one is no remedy."""
    for balance in (CLB, BIAS):
        uar = UARConfig.model_validate({"policy": policy, **balance})
        with pytest.raises(ConfigError, match="balances loads by its") as error:
            check_compatible(uar, megatron_args(**options))
        assert f"uar.policy={policy}" in str(error.value)
        assert "aux_loss_coeff above 0" not in str(error.value)
    args = megatron_args(**{**options, LOAD: "aux_loss"})
    with pytest.raises(ConfigError, match="balances loads by its") as error:
        check_compatible(UARConfig.model_validate({"policy": policy}), args)
    assert "none" in str(error.value)


@pytest.mark.parametrize(
    ("uar", "changes"),
    [
        ({"policy": "top_p", "budget": {"k_max": 8}, **CLB}, {}),
        ({"policy": "top_p", "top_p": {"p": 1.0}, **BIAS}, NO_LOSS),
        ({"policy": "seq_topk", "budget": {"target_mean_k": 2.5}, **CLB, **BIAS}, {}),
        ({"policy": "seq_topk"}, {"moe_router_score_function": "sigmoid"}),
        ({"policy": "relu", "budget": {"target_mean_k": 8}}, {**RELU, "moe_z_loss_coeff": 0.1}),
        ({"policy": "relu"}, {**RELU, "num_experts": 3}),
        ({"policy": "sinkhorn_selective"}, NO_LOSS),
        ({"policy": "sinkhorn_selective"}, {"moe_aux_loss_coeff": 0.0}),
        *(({"policy": p, "kernel_backend": "auto"}, o) for p, o in (("top_p", {}), ("relu", RELU))),
    ],
    ids=str,
)
def test_what_goes_together_is_not_refused(uar: dict, changes: dict) -> None:
    check_compatible(UARConfig.model_validate(uar), megatron_args(**changes))


@pytest.mark.parametrize("p", [0, -0.1, 1.01, ".nan", "half"])
def test_p_is_a_probability_above_0(p: object) -> None:
    with pytest.raises(ConfigError) as error:
        parse_section(UARConfig, {"policy": "top_p", "top_p": {"p": p}}, "uar")
    assert error.value.field == "uar.top_p.p"


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"relu": {"initial_coeff": 0}}, "uar.relu.initial_coeff"),
        ({"relu": {"multiplier": 1}}, "uar.relu.multiplier"),
        ({"top_p": {"entropy_coeff": -1}}, "uar.top_p.entropy_coeff"),
        ({"sinkhorn": {"probability": 1.5}}, "uar.sinkhorn.probability"),
        ({"sinkhorn": {"xi": 0}}, "uar.sinkhorn.xi"),
        ({"sinkhorn": {"iterations": 0}}, "uar.sinkhorn.iterations"),
        ({"sinkhorn": {"cost": "energy"}}, "uar.sinkhorn.cost"),
        ({"top_p": {"P": 0.5}}, "uar.top_p.P"),
        ({"options": 3}, "uar.options"),
    ],
)
def test_settings_of_the_policies_are_checked(section: dict, field: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_section(UARConfig, section, "uar")
    assert error.value.field == field


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
