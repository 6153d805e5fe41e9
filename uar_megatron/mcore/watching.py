"""Looking at MoE layers from outside: any router's decisions, without a bit of them changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from uar_megatron.mcore.compat import MoELayer, TopKRouter

Look = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor], None]
"""Takes a router's logits ``[sequence, batch, experts]``, its padding mask and what it returned."""


def moe_layers(model: Iterable[torch.nn.Module]) -> list[MoELayer]:
    """Return the MoE layers of this rank's model chunks, in order."""
    return [m for chunk in model for m in chunk.modules() if isinstance(m, MoELayer)]


def row_of(router: TopKRouter) -> int:
    """0-based row of a router; MTP layers, which count from 1 again, come after the others."""
    offset = router.config.num_layers if router.is_mtp_layer else 0
    return int(router.layer_number) - 1 + offset


def watch_routing(router: TopKRouter, look: Look) -> None:
    """Call ``look`` after each decision of this router, whose class and results stay its own."""
    routing = router.routing

    def watched(logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> Any:
        result = routing(logits, padding_mask=padding_mask)
        look(logits, padding_mask, *result)
        return result

    router.routing = watched


def selection_bias(router: TopKRouter) -> torch.Tensor | None:
    """The bias of each expert in the selection, ours or Megatron's (aux-loss-free, quantiles)."""
    ours = getattr(router, "uar_bias", None)
    if ours is not None:
        value: torch.Tensor = ours.value
        return value
    bias_E: torch.Tensor | None = router.expert_bias
    return getattr(router, "qb_beta", None) if bias_E is None else bias_E


def valid_tokens(padding_mask: torch.Tensor | None) -> torch.Tensor | None:
    """False for padding, ``[tokens]``, from a router's padding mask."""
    return None if padding_mask is None else ~padding_mask.reshape(-1)


def dispatched_map(router: TopKRouter, probs: torch.Tensor, routed: torch.Tensor) -> torch.Tensor:
    """Return bool ``[tokens, experts]`` of what a router has returned.

    Slots that only fill up an expert's capacity have no weight and do not count. What the kernels
    route is a list of experts for each token, −1 where it has no more.
    """
    if routed.dtype == torch.bool:
        is_filled = router.config.moe_pad_expert_input_to_capacity
        return routed & (probs != 0) if is_filled else routed
    index_TK = routed.long().masked_fill(routed < 0, router.num_experts)
    shape = (index_TK.shape[0], router.num_experts + 1)
    is_routed_TE = torch.zeros(shape, dtype=torch.bool, device=index_TK.device)
    return is_routed_TE.scatter_(1, index_TK, True)[:, :-1]
