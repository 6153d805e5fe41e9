"""Which of the model's MoE layers a layer is, for budgets that differ over depth."""

from __future__ import annotations

from typing import Any

from uar_megatron.config import LayerBudget, UARConfig
from uar_megatron.shape import moe_pattern


def moe_layers(config: Any) -> list[int]:
    """Return the 1-based numbers of the decoder's MoE layers (``moe_layer_freq``), in order.

    Args:
        config: Megatron's arguments or its ``TransformerConfig``.
    """
    return [i + 1 for i, is_moe in enumerate(moe_pattern(config)) if is_moe]


def layer_budget(
    uar: UARConfig, config: Any, layer_number: int | None, is_mtp_layer: bool
) -> LayerBudget:
    """Return the budget of one layer.

    Args:
        uar: the UAR section.
        config: Megatron's ``TransformerConfig``.
        layer_number: 1-based number of the transformer layer, None for the first MoE layer.
        is_mtp_layer: layers for multi-token prediction have the budget of the last MoE layer.
    """
    numbers = moe_layers(config)
    budgets = uar.budget.layers(max(len(numbers), 1), config.moe_router_topk)
    if is_mtp_layer:
        return budgets[-1]
    return budgets[numbers.index(layer_number) if layer_number in numbers else 0]
