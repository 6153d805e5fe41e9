"""Megatron's dispatchers for a number of rows that differs from step to step.

Stock all-to-all sizes its permutation as tokens × ``moe_router_topk`` when it is dropless
(token_dispatcher.py:556); with another number of routed slots, ``permute`` would silently cut rows
off or invent them. Stock all-gather counts from the map already (:289).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from uar_megatron.mcore.compat import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher
from uar_megatron.mcore.flex_dispatcher import UARFlexTokenDispatcher


class UARAlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """All-to-all that moves exactly the rows the routing map names.

    Attributes:
        total_slots: Σk for a number of tokens where it is known on the host, else None.
    """

    total_slots: Callable[[int], int | None] = staticmethod(lambda tokens: None)

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """As in Megatron, with the number of rows that ``routing_map`` has.

        Where it must be counted, the device-to-host copy is needed one point earlier, as in
        Megatron's token dropping; where it is known, Megatron's own points stay.
        """
        tokens_per_local_expert = super().preprocess(routing_map)
        is_as_routed = (
            self.config.moe_expert_capacity_factor is None
            and not self.config.moe_router_padding_for_quantization
        )
        total = self.total_slots(routing_map.shape[0]) if is_as_routed else None
        if total is not None:
            self.num_out_tokens = total
        elif not self.drop_and_pad:
            # input_splits is set exactly where there is someone to exchange rows with.
            exchanged = self.ep_size > 1 or self.tp_size > 1
            self.num_out_tokens = (
                self.input_splits if exchanged else tokens_per_local_expert
            ).sum()
            self._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_local_expert


VARIABLE_K_DISPATCHERS = {
    "alltoall": UARAlltoAllTokenDispatcher,
    "allgather": MoEAllGatherTokenDispatcher,
    "flex": UARFlexTokenDispatcher,
}
