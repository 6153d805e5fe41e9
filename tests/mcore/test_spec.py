"""Specs: ours are copies, dense layers stay, stock routers are noticed."""

from __future__ import annotations

import copy

import pytest
from moe_cases import stock_layer, transformer_config, uar_layer

from uar_megatron.config import UARConfig
from uar_megatron.errors import ConfigError, UARError
from uar_megatron.mcore.compat import MoELayer, default_layer_spec
from uar_megatron.mcore.moe_layer import UARMoELayer
from uar_megatron.mcore.spec import assert_uar_routers, uar_layer_spec
from uar_megatron.mcore.step import StepBoundary

pytestmark = pytest.mark.usefixtures("model_parallel")


def test_replaces_moe_layers_in_a_copy() -> None:
    config = transformer_config(num_layers=3, moe_layer_freq=[0, 1, 1], transformer_impl="local")
    stock = default_layer_spec(config, None)
    before = copy.copy([layer.submodules.mlp for layer in stock.layer_specs])
    block = uar_layer_spec(UARConfig(policy="uar"))(config)
    builders = [layer.submodules.mlp for layer in block.layer_specs]
    assert builders[0].func == before[0].func
    assert [b.func for b in builders[1:]] == [UARMoELayer, UARMoELayer]
    assert [m.func for m in before[1:]] == [MoELayer, MoELayer]
    assert isinstance(config.finalize_model_grads_func, StepBoundary)
    uar_layer_spec(UARConfig(policy="uar"))(config)
    assert not isinstance(config.finalize_model_grads_func.finalize, StepBoundary)


def test_keeps_a_finalize_function_that_is_there() -> None:
    calls = []
    config = transformer_config(transformer_impl="local")
    config.finalize_model_grads_func = lambda model, *args: calls.append((model, args))
    uar_layer_spec(UARConfig())(config)
    config.finalize_model_grads_func([], "tokens")
    assert calls == [([], ("tokens",))]


def test_stock_routers_are_noticed() -> None:
    config = transformer_config()
    stock = stock_layer(config)
    assert_uar_routers([uar_layer(config, {}, like=stock)])
    with pytest.raises(UARError, match="TopKRouter"):
        assert_uar_routers([stock])


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"moe_token_dispatcher_type": "flex"}, "moe_token_dispatcher_type"),
        ({"moe_enable_routing_replay": True}, "moe_enable_routing_replay"),
    ],
)
def test_what_cannot_do_a_variable_k_is_refused(options: dict, field: str) -> None:
    config = transformer_config(**options)
    with pytest.raises(ConfigError, match=field):
        uar_layer_spec(UARConfig(policy="uar"))(config)


def test_state_is_saved_and_loaded() -> None:
    config = transformer_config()
    uar = {"policy": "uar", "bias": {"enabled": True}, "clb": {"enabled": True}}
    layer = uar_layer(config, uar, like=stock_layer(config))
    layer.router.uar_statistics.mean.fill_(3.0)
    layer.router.uar_bias.value[2] = 0.5
    layer.router.uar_step.fill_(41)
    state = copy.deepcopy(layer.state_dict())
    assert {k for k in state if "uar_" in k} == {
        "router.uar_step",
        "router.uar_bias.value",
        "router.uar_statistics.mean",
        "router.uar_statistics.var",
        "router.uar_statistics.num_updates",
        "router.uar_statistics.measured",
    }
    other = uar_layer(config, uar, like=stock_layer(config))
    other.load_state_dict(state)
    assert other.router.uar_statistics.mean == 3.0
    assert other.router.uar_bias.value[2] == 0.5
    assert other.router.step == layer.router.step == 41
    sharded = other.sharded_state_dict(prefix="mlp.")
    assert "mlp.router.uar_statistics.mean" in sharded
