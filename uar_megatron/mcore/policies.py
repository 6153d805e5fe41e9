"""The routing policies of a model's layers, from Megatron's options and the UAR section."""

from __future__ import annotations

from typing import Any

import torch

from uar_megatron.config import UARConfig
from uar_megatron.mcore.compat import topk_routing_with_score_function
from uar_megatron.mcore.depth import layer_budget, moe_layers
from uar_megatron.policies import RouterSettings, RoutingPolicy, find_policy
from uar_megatron.policies.base import FixedTopK
from uar_megatron.shape import moe_pattern


def router_settings(
    uar: UARConfig,
    config: Any,
    layer_number: int | None,
    *,
    is_mtp_layer: bool,
    device: torch.device | str | int,
    fixed_topk: FixedTopK = topk_routing_with_score_function,
) -> RouterSettings:
    """Return what the policy of one layer is told.

    Args:
        uar: the UAR section.
        config: Megatron's arguments or its ``TransformerConfig``.
        layer_number: 1-based number of the transformer layer, None for the first MoE layer.
        is_mtp_layer: whether it is for multi-token prediction.
        device: where state lives.
        fixed_topk: Megatron's routing with all of its options.
    """
    pattern = moe_pattern(config)
    return RouterSettings(
        num_experts=num_experts(config),
        topk=config.moe_router_topk,
        score_function=config.moe_router_score_function,
        use_pre_softmax=config.moe_router_pre_softmax,
        scaling_factor=config.moe_router_topk_scaling_factor,
        num_groups=config.moe_router_num_groups,
        group_topk=config.moe_router_group_topk,
        # MTP layers are built like the last decoder layer (gpt_layer_specs.py:769).
        num_moe_layers=sum(pattern + pattern[-1:] * (config.mtp_num_layers or 0)),
        uar=uar,
        fixed_topk=fixed_topk,
        budget=layer_budget(uar, config, layer_number, is_mtp_layer),
        device=device,
    )


def layer_policies(uar: UARConfig, config: Any) -> list[RoutingPolicy]:
    """Return the policy of each MoE layer, built on the CPU to be asked what it will do.

    Args:
        uar: the UAR section.
        config: Megatron's arguments or its ``TransformerConfig``.

    Raises:
        ConfigError: the policy is not known, or refuses its settings.
    """
    policy = find_policy(uar.policy)
    numbers: list[int | None] = [*moe_layers(config)] or [None]
    return [
        policy(router_settings(uar, config, number, is_mtp_layer=False, device="cpu"))
        for number in numbers
    ]


def num_experts(config: Any) -> int:
    """E, from Megatron's arguments or its ``TransformerConfig``."""
    experts = config.num_experts if hasattr(config, "num_experts") else config.num_moe_experts
    return int(experts)
