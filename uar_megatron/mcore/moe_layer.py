"""The MoE layer with a dispatcher for variable k. Megatron has no slot for the dispatcher."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from uar_megatron.mcore.compat import MoELayer, MoESubmodules, get_default_pg_collection
from uar_megatron.mcore.compatibility import varies
from uar_megatron.mcore.flex_dispatcher import slot_bounds
from uar_megatron.mcore.router import UARRouter
from uar_megatron.mcore.token_dispatcher import (
    VARIABLE_K_DISPATCHERS,
    UARAlltoAllTokenDispatcher,
)
from uar_megatron.policies.base import KernelPolicy


class UARMoELayer(MoELayer):
    """``MoELayer`` that exchanges its dispatcher and counts the rows its experts compute.

    The dispatcher stays Megatron's own where the number of experts per token is
    ``moe_router_topk`` for every token and no kernels route.
    """

    router: UARRouter

    def __init__(
        self,
        config: Any,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: Any = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        if pg_collection is None:
            pg_collection = get_default_pg_collection()
        if submodules is not None:
            router = functools.partial(submodules.router, layer_number=layer_number)
            submodules = dataclasses.replace(submodules, router=router)
        super().__init__(config, submodules, layer_number, pg_collection, is_mtp_layer, name)
        has_kernels = self.router.has_kernels and not self.router.is_off
        is_stock = self.router.policy.fixed_k == config.moe_router_topk and not has_kernels
        slots = {}
        if config.moe_token_dispatcher_type == "flex":
            # NCCL-EP has one width for all layers, those of stock's k included.
            is_stock = is_stock and not varies(self.router.uar, config)
            slots["slots"] = slot_bounds(self.router.uar, config)
        if not is_stock:
            dispatcher = VARIABLE_K_DISPATCHERS[config.moe_token_dispatcher_type]
            self.token_dispatcher = dispatcher(
                self.num_local_experts,
                self.local_expert_indices,
                config=config,
                pg_collection=pg_collection,
                **slots,
            )
            if isinstance(self.token_dispatcher, UARAlltoAllTokenDispatcher):
                self.token_dispatcher.total_slots = self._total_slots
                if isinstance(self.router.policy, KernelPolicy):
                    self.token_dispatcher.most_slots = self.router.policy.most_slots
            if self.shared_expert_overlap:
                self.token_dispatcher.set_shared_experts(self.shared_experts)
        self.experts.register_forward_pre_hook(self._count_rows)

    def _total_slots(self, tokens: int) -> int | None:
        return self.router.policy.total_slots(tokens, self.router.step)

    def _count_rows(self, experts: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Count what the experts really get, whatever the dispatcher says it sent."""
        if self.training and torch.is_grad_enabled():
            # Ranks of expert tensor parallelism each compute a part of every row.
            self.router.metrics.add_rows(
                inputs[0].shape[0] / self.config.expert_tensor_parallel_size
            )
