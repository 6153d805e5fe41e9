"""Megatron's dispatchers for a number of rows that differs from step to step.

Stock all-to-all sizes its permutation as tokens × ``moe_router_topk`` when it is dropless
(token_dispatcher.py:556); with another number of routed slots, ``permute`` would silently cut rows
off or invent them. Stock all-gather counts from the map already (:289).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from uar_kernels.permutation import Permuted, begin_permute, unpermute
from uar_kernels.plan import Plan, plan
from uar_megatron.mcore.compat import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher
from uar_megatron.mcore.flex_dispatcher import UARFlexTokenDispatcher


class UARAlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """All-to-all that moves exactly the rows the routing map names.

    In place of a map it takes the kernels' compact ``index_TK`` (and ``probs_TK``), which it plans,
    permutes and unpermutes with kernels of their own. Where rows are exchanged, it allocates by the
    bound on their number and cuts at the point where Megatron waits for the device anyway; where
    none are, it waits first, since experts keep the buffer for their backward pass.

    Attributes:
        total_slots: Σk for a number of tokens where it is known on the host, else None.
        most_slots: the largest Σk possible for a number of tokens.
    """

    total_slots: Callable[[int], int | None] = staticmethod(lambda tokens: None)
    most_slots: Callable[[int], int]
    _plan: Plan | None = None
    _permuted: Permuted | None = None

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in Megatron; with compact indices the rows may come out later, in the dispatch.

        Args:
            hidden_states: ``[sequence, batch, hidden]``.
            routing_map: bool ``[tokens, experts]``, or int32 ``index_TK``.
            probs: as the map: ``[tokens, experts]`` or ``probs_TK``.
        """
        self._plan = self._permuted = None
        if routing_map.dtype == torch.bool:
            return super().dispatch_preprocess(hidden_states, routing_map, probs)
        self.hidden_shape, self.probs, self.routing_map = hidden_states.shape, probs, routing_map
        hidden_TH = hidden_states.view(-1, hidden_states.shape[-1])
        tokens = hidden_TH.shape[0]
        self._plan = plan(routing_map, self.num_experts, self.ep_size, backend="triton")
        loads_E = self._plan.tokens_per_expert_E
        # Megatron's own only sums the map over the tokens.
        self.tokens_per_expert = super().preprocess(loads_E.unsqueeze(0))
        total = self.total_slots(tokens)
        is_exchanged = self.ep_size > 1 or self.tp_size > 1
        self.num_out_tokens: int | torch.Tensor
        if total is None and not is_exchanged:
            self.num_out_tokens = loads_E.sum()
            self._maybe_update_cuda_sync_point("before_permutation_1")
        else:
            self.num_out_tokens = self.most_slots(tokens) if total is None else total
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize(
            "before_permutation_1", self.tokens_per_expert
        )
        rows = int(self.num_out_tokens)
        permuted = begin_permute(
            hidden_TH, probs, self._plan.row_id_TK, loads_E, rows, backend="triton"
        )
        if total is None and is_exchanged:
            self._permuted = permuted
            return hidden_TH, probs
        return permuted.take(rows)

    def token_dispatch(
        self, permutated_local_input_tokens: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in Megatron, of the rows in use."""
        if self._permuted is not None:
            self.tokens_per_expert = self._maybe_dtoh_and_synchronize(
                "before_ep_alltoall", self.tokens_per_expert
            )
            rows = int(self.input_splits.sum())
            permutated_local_input_tokens, permuted_probs = self._permuted.take(rows)
            self._permuted = None
        return super().token_dispatch(permutated_local_input_tokens, permuted_probs)

    def combine_postprocess(self, permutated_local_input_tokens: torch.Tensor) -> torch.Tensor:
        """As in Megatron; with compact indices a token's rows are added up in fp32."""
        if self._plan is None:
            return super().combine_postprocess(permutated_local_input_tokens)
        row_id_TK = self._plan.row_id_TK
        output = unpermute(permutated_local_input_tokens, row_id_TK, backend="triton")
        output = output.view(self.hidden_shape)
        return output if self.shared_experts is None else output + self.shared_experts.get_output()

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
