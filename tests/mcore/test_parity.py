"""Off means off: with UAR switched off, layers equal the installed Megatron's to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
from moe_cases import (
    assert_bit_equal,
    hidden_states,
    run,
    stock_layer,
    transformer_config,
    uar_layer,
)

pytestmark = pytest.mark.usefixtures("model_parallel")

OFF = {
    "topk": {"policy": "topk"},
    # K_max above K must not matter when α is 0.
    "uar": {"policy": "uar", "budget": {"alpha": 0.0, "beta": 2.0, "k_min": 1, "k_max": 6}},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "post-softmax": {},
    "pre-softmax": {"moe_router_pre_softmax": True},
    "scaled": {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "sigmoid+bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
    "sqrtsoftplus": {"moe_router_score_function": "sqrtsoftplus"},
    "fp64 router": {"moe_router_dtype": "fp64"},
    "z-loss": {"moe_z_loss_coeff": 0.1},
    "no aux loss": {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "per-token loss": {"calculate_per_token_loss": True},
}


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tokens", [37, 1])  # stock's gating cannot take 0 tokens
def test_layer_equals_stock(off: str, options: str, tokens: int) -> None:
    config = transformer_config(**OPTIONS[options])
    stock = stock_layer(config)
    ours = uar_layer(config, OFF[off], like=stock)
    inputs = hidden_states(tokens, batch=1)
    assert_bit_equal(run(ours, inputs), run(stock, inputs))


ANY_OPTION: dict[str, dict[str, Any]] = {
    "group-limited": {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
    "seq aux loss": {"moe_router_load_balancing_type": "seq_aux_loss"},
    "global aux loss": {"moe_router_load_balancing_type": "global_aux_loss"},
    "dropping": {"moe_expert_capacity_factor": 1.0},
    "drop and pad": {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
    "sinkhorn": {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0},
}


@pytest.mark.parametrize("options", ANY_OPTION)
def test_policy_topk_leaves_every_megatron_option_alone(options: str) -> None:
    config = transformer_config(**ANY_OPTION[options])
    stock = stock_layer(config)
    ours = uar_layer(config, OFF["topk"], like=stock)
    inputs = hidden_states(36, batch=2)
    assert_bit_equal(run(ours, inputs), run(stock, inputs))


def test_evaluation_equals_stock() -> None:
    config = transformer_config()
    stock = stock_layer(config).eval()
    ours = uar_layer(config, OFF["uar"], like=stock).eval()
    inputs = hidden_states(37)
    assert_bit_equal(run(ours, inputs), run(stock, inputs))
