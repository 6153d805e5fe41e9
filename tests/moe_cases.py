"""Small MoE layers for tests: stock ones and ours, with the same weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig

from uar_megatron.config import UARConfig
from uar_megatron.mcore.moe_layer import UARMoELayer
from uar_megatron.mcore.router import UARRouter
from uar_megatron.mcore.spec import with_uar_moe_layer

HIDDEN = 16


def transformer_config(**options: Any) -> TransformerConfig:
    """A two-layer, 8-expert configuration that runs on the CPU."""
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 12,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.01,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "bias_activation_fusion": False,
        "gradient_accumulation_fusion": False,
        "use_cpu_initialization": True,
    }
    return TransformerConfig(**(settings | options))


def stock_layer(config: TransformerConfig) -> MoELayer:
    """Megatron's own MoE layer."""
    return _build(_spec(config), config)


def uar_layer(config: TransformerConfig, uar: dict[str, Any], like: MoELayer) -> UARMoELayer:
    """Our MoE layer with the weights of ``like``."""
    layer = _build(with_uar_moe_layer(_spec(config), UARConfig.model_validate(uar)), config)
    missing, unexpected = layer.load_state_dict(like.state_dict(), strict=False)
    assert not unexpected
    assert all("uar_" in name for name in missing)
    assert isinstance(layer.router, UARRouter)
    return layer


def _spec(config: TransformerConfig) -> functools.partial:
    return get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts)


def _build(spec: functools.partial, config: TransformerConfig) -> Any:
    torch.manual_seed(3)
    layer = spec(config=config, layer_number=1)
    layer.set_layer_number(1)
    return layer


def hidden_states(tokens: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    """Random input ``[tokens / batch, batch, hidden]`` that wants a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens // batch, batch, HIDDEN, generator=generator).requires_grad_()


def run(layer: Any, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Forward and backward; return everything that parity is about."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    inputs = inputs.detach().clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    get_moe_metrics_tracker()._metrics.clear()
    probs, routing_map = layer.router(inputs)
    losses = {name: m.values.clone() for name, m in get_moe_metrics_tracker().metrics.items()}
    output, _ = layer(inputs)
    output.square().sum().backward()
    grads = {f"grad.{n}": p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    return {
        "probs": probs.detach(),
        "routing_map": routing_map,
        "output": output.detach(),
        "grad.input": inputs.grad,
        **grads,
        **{f"loss.{name}": value for name, value in losses.items()},
    }


def assert_bit_equal(ours: dict[str, torch.Tensor], stock: dict[str, torch.Tensor]) -> None:
    """Same keys, same values, to the last bit."""
    assert ours.keys() == stock.keys()
    for name, expected in stock.items():
        assert torch.equal(ours[name], expected), name
