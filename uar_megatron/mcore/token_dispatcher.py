"""Megatron's dispatchers for a number of rows that differs from step to step.

Stock all-to-all sizes its permutation as tokens × ``moe_router_topk`` when it is dropless
(token_dispatcher.py:556); with another number of routed slots, ``permute`` would silently cut rows
off or invent them. Stock all-gather counts from the map already (:289).
"""

from __future__ import annotations

import torch

from uar_megatron.mcore.compat import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher


class UARAlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """All-to-all that moves exactly the rows the routing map names."""

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """As in Megatron, with the number of rows counted from ``routing_map``.

        Counting needs the device-to-host copy one point earlier, as Megatron's token dropping does.
        """
        tokens_per_local_expert = super().preprocess(routing_map)
        if not self.drop_and_pad:
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
}
