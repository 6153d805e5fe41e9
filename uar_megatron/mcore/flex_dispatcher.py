"""Megatron's flex dispatcher for a variable number of experts per token.

Proved with stand-ins for the three libraries over gloo (``tests/flex_stand_in.py``); none of them
has been run on hardware with it.

What each backend asks for, and what it gets here:

========  ==========================================  =========================================
backend   its contract                                variable k
========  ==========================================  =========================================
DeepEP    int64 indices ``[tokens, width]``, −1 for   width is K_max; stock takes the ``topk`` of
          a slot without an expert, float32 weights;  the weights (token_dispatcher.py:1288)
          ``num_topk <= 32`` (intranode.cu,
          internode.cu)
NCCL-EP   as DeepEP, with one width and one receive   width is the largest K_max of all layers;
          buffer in all of the process; more rows     the buffer is sized from Σk where the host
          than it holds stop the job                  knows it; stock has no −1 at all (:1563)
HybridEP  a bool map ``[tokens, experts]`` and float  Megatron's own manager: what it counts, it
          weights of the same shape                   counts from the map, and its own padding
                                                      already sends tokens without experts
========  ==========================================  =========================================
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

import torch

from uar_kernels.plan import deepep_indices
from uar_megatron.config import UARConfig
from uar_megatron.errors import ConfigError, UnsupportedEnvironmentError
from uar_megatron.mcore.compat import (
    MoEFlexTokenDispatcher,
    _DeepepManager,
    _NCCLEPManager,
    flex_backend_is_installed,
)
from uar_megatron.mcore.policies import layer_policies

# One lane of a warp for each slot of a token; counted after folding expert tensor parallelism in.
MOST_SLOTS = 32
_NEEDS = {
    "deepep": "DeepEP (https://github.com/deepseek-ai/DeepEP)",
    "hybridep": "HybridEP (https://github.com/deepseek-ai/DeepEP/tree/hybrid-ep)",
    "ncclep": "Transformer Engine 2.18 built with NVTE_BUILD_WITH_NCCL_EP=1",
}


class SlotBounds(NamedTuple):
    """What the host knows about k without looking at tokens, over all layers and steps.

    Attributes:
        most: the largest k of a token.
        mean: Σk / tokens of a micro-batch is not larger than this.
    """

    most: int
    mean: float


def slot_bounds(uar: UARConfig, config: Any) -> SlotBounds:
    """Return the bounds of a model.

    Args:
        uar: the UAR section.
        config: Megatron's arguments or its ``TransformerConfig``.
    """
    policies = layer_policies(uar, config)
    most = max((p.max_k if p.fixed_k is None else p.fixed_k) for p in policies)
    return SlotBounds(max(most, 1), max(policy.mean_bound for policy in policies))


def check_flex(uar: UARConfig, args: Any) -> None:
    """Refuse what the chosen backend cannot do; nothing for other dispatchers.

    Megatron would raise inside model construction, or stop in a kernel at the first token.

    Args:
        uar: the UAR section.
        args: Megatron's parsed arguments, or a ``TransformerConfig``.

    Raises:
        ConfigError: a setting that the backend cannot work with.
        UnsupportedEnvironmentError: the backend's library is not installed.
    """
    if args.moe_token_dispatcher_type != "flex":
        return
    is_deepep = getattr(args, "moe_enable_deepep", False)
    backend = "deepep" if is_deepep else args.moe_flex_dispatcher_backend
    # Before Megatron validates its arguments it is None, for the tensor parallel size.
    tensor_size = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    if backend != "hybridep":
        if args.expert_model_parallel_size * tensor_size == 1:
            raise ConfigError(
                "expert_model_parallel_size",
                f"1: the flex dispatcher's {backend} exchanges rows between at least two ranks",
                allowed="2 or more",
                remedy="use moe_token_dispatcher_type=alltoall on a single rank",
            )
        _check_slots(uar, args, backend, tensor_size)
    if backend == "ncclep" and args.moe_expert_rank_capacity_factor is None:
        raise ConfigError(
            "moe_expert_rank_capacity_factor",
            "ncclep needs it: it sizes the receive buffer, and more rows than that stop the job",
            remedy="set it with room for imbalance, e.g. 2.0; it is a multiple of a rank's share "
            "(K_max experts per token, target_mean_k in budget.mode=exact)",
        )
    if not flex_backend_is_installed(backend):
        raise UnsupportedEnvironmentError(
            f"moe_flex_dispatcher_backend: {backend} was asked for, but Megatron cannot import "
            f"{_NEEDS[backend]}\n"
            "  remedy:  install it on every node, or use moe_token_dispatcher_type=alltoall"
        )


def _check_slots(uar: UARConfig, args: Any, backend: str, tensor_size: int) -> None:
    most = slot_bounds(uar, args).most
    if most * tensor_size > MOST_SLOTS:
        folded = f" × {tensor_size} ranks of expert tensor parallelism" if tensor_size > 1 else ""
        is_fixed = most == args.moe_router_topk
        raise ConfigError(
            "moe_router_topk" if is_fixed else "uar.budget.k_max",
            f"a token can have {most} experts{folded}; {backend} moves a token to at most "
            f"{MOST_SLOTS}",
            allowed=f"1 … {MOST_SLOTS // tensor_size}",
            remedy="lower it, or use moe_token_dispatcher_type=alltoall, or hybridep",
        )


def expert_slots(
    routing_map_TE: torch.Tensor, probs_TE: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the routed experts of each token as a table, heaviest first as in Megatron.

    The map decides which slots are used: a routed expert's weight can underflow to 0, and with a
    selection bias the largest weights need not be the selected ones. The gradient of an unused slot
    is dropped, whatever a library leaves there.

    Args:
        routing_map_TE: bool ``[tokens, experts]``, at most ``width`` in a row.
        probs_TE: weights of the same shape (differentiable).
        width: columns of the table.

    Returns:
        ``(weights_TK, index_TK)``: 0 and −1 in unused slots; the weights' dtype and int64.
    """
    order_TE = probs_TE.detach().masked_fill(~routing_map_TE, float("-inf"))
    index_TK = torch.topk(order_TE, width, dim=-1).indices
    unused_TK = ~routing_map_TE.gather(1, index_TK)
    weights_TK = probs_TE.gather(1, index_TK).masked_fill(unused_TK, 0.0)
    return weights_TK, index_TK.masked_fill(unused_TK, -1)


def _table(
    routing_map: torch.Tensor, probs: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights and experts of each token, ``width`` columns, of either form of a routing."""
    if routing_map.dtype == torch.bool:
        return expert_slots(routing_map.flatten(1), probs.flatten(1), width)
    missing = (0, width - routing_map.shape[1])
    index_TK = deepep_indices(torch.nn.functional.pad(routing_map, missing, value=-1))
    return torch.nn.functional.pad(probs, missing), index_TK


class VariableKDeepepManager(_DeepepManager):
    """``_DeepepManager`` whose table is ``router_topk`` wide and holds what the map names."""

    def setup_metadata(self, routing_map: torch.Tensor, probs: torch.Tensor) -> None:
        """Set ``token_probs`` and ``token_indices``.

        Args:
            routing_map: bool ``[tokens, ranks, local experts]``, or the kernels' ``index_TK``.
            probs: weights of the same shape.
        """
        self.token_probs, self.token_indices = _table(routing_map, probs, self.router_topk)


class VariableKNCCLEPManager(_NCCLEPManager):
    """``_NCCLEPManager`` likewise.

    Args:
        mean: bound of Σk per token, folded as ``router_topk``. The receive buffer holds
            ``moe_expert_rank_capacity_factor`` times a rank's share of that, but at least a row for
            every token, below which Transformer Engine refuses it.
        **kwargs: Megatron's.
    """

    rank_capacity_factor: Any

    def __init__(self, *, mean: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Megatron multiplies this by tokens and by the width, and cuts the fraction off
        # (token_dispatcher.py:1582): in floating point a row could get lost.
        share = Fraction(self.rank_capacity_factor) * Fraction(mean)
        self.rank_capacity_factor = max(share, Fraction(1)) / self.router_topk

    def setup_metadata(self, routing_map: torch.Tensor, probs: torch.Tensor) -> None:
        """As for DeepEP, and set ``num_local_tokens``."""
        self.token_probs, self.token_indices = _table(routing_map, probs, self.router_topk)
        self.num_local_tokens = routing_map.shape[0]


class UARFlexTokenDispatcher(MoEFlexTokenDispatcher):
    """``MoEFlexTokenDispatcher`` with a manager for variable k.

    Args:
        num_local_experts: experts of this rank.
        local_expert_indices: their numbers.
        config: Megatron's configuration.
        pg_collection: its process groups.
        slots: of the whole model, since NCCL-EP has one width for all layers of a process.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: Any,
        pg_collection: Any = None,
        *,
        slots: SlotBounds,
    ) -> None:
        super().__init__(num_local_experts, local_expert_indices, config, pg_collection)
        # Each rank that shares an expert gets the token: Megatron counts those as experts too.
        settings = {
            "group": self.tp_ep_group,
            "num_local_experts": num_local_experts,
            "router_topk": self.tp_size * slots.most,
            "num_experts": self.tp_size * config.num_moe_experts,
            "config": config,
        }
        if config.moe_flex_dispatcher_backend == "deepep":
            self._comm_manager = VariableKDeepepManager(**settings)
        elif config.moe_flex_dispatcher_backend == "ncclep":
            self._comm_manager = VariableKNCCLEPManager(**settings, mean=self.tp_size * slots.mean)

    def _initialize_metadata(
        self, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in Megatron; compact indices are repeated for ranks that share an expert likewise."""
        if routing_map.dtype == torch.bool:
            return super()._initialize_metadata(routing_map, probs)
        rank_TK, expert_TK = (
            routing_map // self.num_local_experts,
            routing_map % (self.num_local_experts),
        )
        rank_TKR = rank_TK.unsqueeze(-1) * self.tp_size + torch.arange(
            self.tp_size, device=routing_map.device
        )
        index_TKR = rank_TKR * self.num_local_experts + expert_TK.unsqueeze(-1)
        index_TKR = index_TKR.masked_fill((routing_map < 0).unsqueeze(-1), -1)
        probs_TKR = probs.unsqueeze(-1).expand(index_TKR.shape)
        return index_TKR.flatten(1), probs_TKR.flatten(1)
