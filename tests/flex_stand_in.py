"""STAND-INS for DeepEP, HybridEP and NCCL EP (of Transformer Engine): metadata, not kernels.

Each implements over gloo the contract that its library documents, as Megatron calls it: wrong
dtypes, shapes or numbers are refused as the library's own assertions would, and what a library
leaves undefined is NaN here. Megatron's own ``fused_a2a`` with its autograd functions runs on top.

Not like the libraries: payloads can be fp32 (they take bfloat16 and FP8 only), sums are taken in
the order of the ranks, and nothing is asynchronous.

Contracts are those of deepseek-ai/DeepEP v1.2.1 (``deep_ep/buffer.py``, ``csrc/deep_ep.cpp``,
``csrc/kernels/intranode.cu``), its branch hybrid-ep (``deep_ep/hybrid_ep_buffer.py``) and
NVIDIA/TransformerEngine v2.18 (``transformer_engine/pytorch/ep.py``) with NVIDIA/nccl-extensions.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

MOST_SLOTS = 32


class Exchange:
    """Rows of (token, destination) pairs, sent to the ranks that own the destinations.

    Args:
        pairs_TD: bool ``[tokens, destinations]``; each rank owns an equal, contiguous part.
        group: the process group.
    """

    def __init__(self, pairs_TD: torch.Tensor, group: dist.ProcessGroup) -> None:
        self.group, world = group, group.size()
        self.tokens = pairs_TD.shape[0]
        self.destination_S, self.token_S = pairs_TD.T.nonzero(as_tuple=True)
        sent_RL = pairs_TD.sum(dim=0).view(world, -1)
        received_RL = torch.empty_like(sent_RL)
        dist.all_to_all_single(received_RL, sent_RL, group=group)
        self.sent = sent_RL.sum(dim=1).tolist()
        self.received = received_RL.sum(dim=1).tolist()
        self.counts_L = received_RL.sum(dim=0)
        local = torch.arange(received_RL.shape[1]).repeat(world)
        self.order = local.repeat_interleave(received_RL.flatten()).argsort(stable=True)

    def send(self, rows_S: torch.Tensor) -> torch.Tensor:
        """Return what arrives, by local destination, then source rank, then token."""
        arrived = rows_S.new_empty(sum(self.received), *rows_S.shape[1:])
        rows_S = rows_S.contiguous()
        dist.all_to_all_single(arrived, rows_S, self.received, self.sent, group=self.group)
        return arrived[self.order]

    def send_back(self, rows: torch.Tensor) -> torch.Tensor:
        """The way back; one row for each pair, in the order of ``token_S``."""
        assert rows.shape[0] == sum(self.received)
        ordered = torch.empty_like(rows)
        ordered[self.order] = rows
        returned = rows.new_empty(sum(self.sent), *rows.shape[1:])
        dist.all_to_all_single(returned, ordered, self.sent, self.received, group=self.group)
        return returned

    def add_up(self, rows_S: torch.Tensor) -> torch.Tensor:
        """Sum of each token's rows; 0 for a token without any."""
        total_T = rows_S.new_zeros(self.tokens, *rows_S.shape[1:])
        return total_T.index_add_(0, self.token_S, rows_S)


def check_table(index_TK: torch.Tensor, weights_TK: torch.Tensor, experts: int) -> None:
    """Assert what DeepEP and NCCL EP want of a token's experts."""
    assert index_TK.dtype == torch.int64
    assert weights_TK.dtype == torch.float32
    assert index_TK.dim() == 2
    assert index_TK.shape == weights_TK.shape
    assert index_TK.is_contiguous()
    assert weights_TK.is_contiguous()
    assert 1 <= index_TK.shape[1] <= MOST_SLOTS
    used = index_TK >= 0
    assert torch.equal(index_TK.masked_select(~used), torch.full(((~used).sum(),), -1))
    assert (index_TK < experts).all()
    times_TE = torch.zeros(len(index_TK), experts).scatter_add(1, index_TK.clamp(min=0), used + 0.0)
    assert (times_TE <= 1).all(), "an expert twice for one token"


def map_of(index_TK: torch.Tensor, experts: int) -> torch.Tensor:
    """Bool ``[tokens, experts]`` of a table with −1 for unused slots."""
    map_TE = torch.zeros(len(index_TK), experts + 1, dtype=torch.bool)
    return map_TE.scatter(1, index_TK % (experts + 1), True)[:, :experts]


class Event:
    """``EventHandle`` and ``EventOverlap``: everything has happened already."""

    def __init__(self, event: Any = None) -> None: ...
    def current_stream_wait(self) -> None: ...


class Config:
    """Size hints that only have to exist."""

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        return hidden_bytes * ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        return 0


class Buffer:
    """Stand-in for ``deep_ep.Buffer``: a token goes once to each rank that has experts of it."""

    last_table: torch.Tensor | None = None

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        assert group.size() > 1
        self.group = group
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def set_num_sms(number: int) -> None:
        assert number % 2 == 0

    @staticmethod
    def get_dispatch_config(ranks: int) -> Config:
        assert ranks in (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(
        self, topk_idx: torch.Tensor, num_experts: int, **events: Any
    ) -> tuple[torch.Tensor, None, torch.Tensor, torch.Tensor, Event]:
        assert topk_idx.dtype == torch.int64
        map_TE = map_of(topk_idx, num_experts)
        in_rank_TR = map_TE.view(len(map_TE), self.group.size(), -1).any(dim=-1)
        per_rank, per_expert = in_rank_TR.sum(0).int(), map_TE.sum(0).int()
        return per_rank, None, per_expert, in_rank_TR, Event()

    def dispatch(
        self,
        x: torch.Tensor,
        handle: Exchange | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        **events: Any,
    ) -> tuple[Any, ...]:
        assert x.dim() == 2
        assert x.is_contiguous()
        assert x.shape[1] * x.element_size() % 16 == 0
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            assert len(x) == handle.tokens
            return handle.send(x[handle.token_S]), None, None, None, None, Event()
        experts = len(num_tokens_per_expert)
        check_table(topk_idx, topk_weights, experts)
        assert len(topk_idx) == len(x)
        Buffer.last_table = topk_idx
        exchange = Exchange(is_token_in_rank, self.group)
        local_experts = experts // self.group.size()
        # Experts are numbered within the receiving rank; those of other ranks become −1.
        index_SK = topk_idx[exchange.token_S]
        local_SK = index_SK - exchange.destination_S.unsqueeze(-1) * local_experts
        is_there_SK = (index_SK >= 0) & (local_SK >= 0) & (local_SK < local_experts)
        index = exchange.send(local_SK.masked_fill(~is_there_SK, -1))
        weights = exchange.send(topk_weights[exchange.token_S].masked_fill(~is_there_SK, 0.0))
        counts = map_of(index, local_experts).sum(dim=0)
        total_E = num_tokens_per_expert.clone()
        dist.all_reduce(total_E, group=self.group)
        begin = self.group.rank() * local_experts
        assert torch.equal(total_E[begin : begin + local_experts], counts.int())
        rows = exchange.send(x[exchange.token_S])
        return rows, index, weights, counts.tolist(), exchange, Event()

    def combine(
        self,
        x: torch.Tensor,
        handle: Exchange,
        topk_weights: torch.Tensor | None = None,
        **events: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Event]:
        assert x.is_contiguous()
        rows = handle.add_up(handle.send_back(x))
        if topk_weights is None:
            return rows, None, Event()
        assert topk_weights.dtype == torch.float32
        return rows, handle.add_up(handle.send_back(topk_weights)), Event()


class HybridEPBuffer:
    """Stand-in for ``deep_ep.HybridEPBuffer``: rows by local expert; equal tokens on all ranks."""

    def __init__(self, group: dist.ProcessGroup, **settings: Any) -> None:
        self.group = group

    def dispatch_with_permute(
        self,
        *,
        hidden: torch.Tensor,
        scaling_factor: None,
        routing_map: torch.Tensor | None = None,
        probs: torch.Tensor | None = None,
        num_of_experts_per_rank: int | None = None,
        pad_multiple: int | None = None,
        num_permuted_tokens: int | torch.Tensor | None = None,
        non_blocking: bool = False,
        handle: tuple[Exchange, torch.Tensor] | None = None,
    ) -> tuple[Any, ...]:
        assert pad_multiple is None
        weights = None
        if handle is None:
            assert routing_map.dtype == torch.bool
            assert probs.dtype == torch.float32
            assert routing_map.shape == probs.shape
            assert len(routing_map) == len(hidden)
            assert routing_map.shape[1] == num_of_experts_per_rank * self.group.size()
            assert num_permuted_tokens is None
            assert not non_blocking
            counts = [None] * self.group.size()
            dist.all_gather_object(counts, len(hidden), group=self.group)
            assert len(set(counts)) == 1, f"tokens per rank differ: {counts}"
            exchange = Exchange(routing_map, self.group)
            weights = exchange.send(probs[exchange.token_S, exchange.destination_S])
            handle = (exchange, torch.zeros(1, dtype=torch.int32))
        else:
            exchange = handle[0]
            assert int(num_permuted_tokens) == sum(exchange.received)
        rows = exchange.send(hidden[exchange.token_S])
        return rows, weights, None, exchange.counts_L.int(), handle

    def combine_with_unpermute(
        self,
        *,
        hidden: torch.Tensor,
        handle: tuple[Exchange, torch.Tensor],
        probs: torch.Tensor | None = None,
        pad_multiple: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        exchange = handle[0]
        rows = exchange.add_up(exchange.send_back(hidden))
        if probs is None:
            return rows, None
        experts = len(exchange.counts_L) * self.group.size()
        weights_TE = torch.zeros(exchange.tokens, experts)
        weights_TE[exchange.token_S, exchange.destination_S] = exchange.send_back(probs)
        return rows, weights_TE


class EpBuffer:
    """Stand-in for ``te_ep.EpBuffer``: settings of one dispatch and its combine."""

    def __init__(self, ep: NcclEp, top_k: int, alignment: int, **settings: Any) -> None:
        assert ep._BOOTSTRAPPED
        assert alignment == 0
        # "EP prepare top_k disagrees with process-wide cached top_k" (ep_backend.cpp).
        ep.top_k = ep.top_k or top_k
        assert top_k == ep.top_k
        self.ep, self.top_k = ep, top_k
        self.capacity: int = settings["recv_capacity_per_rank"]
        assert self.capacity == ep.settings["recv_capacity_per_rank"]
        self.exchange: Exchange


class NcclEp(ModuleType):
    """Stand-in for ``transformer_engine.pytorch.ep``: rows by local expert in a fixed buffer."""

    _BOOTSTRAPPED = False

    def __init__(self) -> None:
        super().__init__("transformer_engine.pytorch.ep")
        self.top_k: int | None = None
        self.settings: dict[str, Any] = {}
        self.last_table: torch.Tensor | None = None

    def ep_bootstrap(self, ep_group: dist.ProcessGroup, **settings: Any) -> None:
        assert not self._BOOTSTRAPPED
        assert ep_group.size() > 1
        assert settings["max_tokens_per_rank"] % 64 == 0
        assert isinstance(settings["recv_capacity_per_rank"], int)
        assert settings["recv_capacity_per_rank"] >= settings["max_tokens_per_rank"]
        self.group, self.settings, self._BOOTSTRAPPED = ep_group, settings, True

    def ep_finalize(self) -> None:
        self._BOOTSTRAPPED, self.top_k = False, None

    def EpBuffer(self, **settings: Any) -> EpBuffer:  # noqa: N802 - the library's name
        return EpBuffer(self, **settings)

    def ep_dispatch(
        self,
        buffer: EpBuffer,
        tokens: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        *,
        recv_tokens: None,
        recv_topk_weights: None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        experts = self.settings["num_experts"]
        check_table(topk_idx, topk_weights, experts)
        assert topk_idx.shape == (len(tokens), buffer.top_k)
        assert len(tokens) <= self.settings["max_tokens_per_rank"]
        self.last_table = topk_idx
        buffer.exchange = Exchange(map_of(topk_idx, experts), self.group)
        assert sum(buffer.exchange.received) <= buffer.capacity, "receive buffer overflow: trap"
        rows, weights = _EpDispatch.apply(tokens, topk_weights, topk_idx, buffer)
        return rows, weights, buffer.exchange.counts_L

    def ep_combine(
        self,
        buffer: EpBuffer,
        expert_out: torch.Tensor,
        *,
        num_local_tokens: int,
        grad_out: None,
    ) -> torch.Tensor:
        assert len(expert_out) == buffer.capacity
        assert num_local_tokens == buffer.exchange.tokens
        return _EpCombine.apply(expert_out, buffer)


class _EpDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, topk_weights, topk_idx, buffer):  # type: ignore[no-untyped-def]
        exchange = buffer.exchange
        is_slot_SK = topk_idx[exchange.token_S] == exchange.destination_S.unsqueeze(-1)
        ctx.slot_S, ctx.shape = is_slot_SK.int().argmax(dim=1), topk_weights.shape
        ctx.exchange = exchange
        rows = exchange.send(tokens[exchange.token_S])
        weights = exchange.send(topk_weights[exchange.token_S, ctx.slot_S])
        return _fill_up(rows, buffer.capacity), _fill_up(weights, buffer.capacity)

    @staticmethod
    def backward(ctx, grad_rows, grad_weights):  # type: ignore[no-untyped-def]
        exchange, valid = ctx.exchange, sum(ctx.exchange.received)
        grad_tokens = exchange.add_up(exchange.send_back(grad_rows[:valid]))
        # Transformer Engine allocates this with torch.empty.
        grad_table = torch.full(ctx.shape, torch.nan)
        grad_table[exchange.token_S, ctx.slot_S] = exchange.send_back(grad_weights[:valid])
        return grad_tokens, grad_table, None, None


class _EpCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, expert_out, buffer):  # type: ignore[no-untyped-def]
        ctx.exchange, ctx.capacity = buffer.exchange, buffer.capacity
        valid = sum(ctx.exchange.received)
        return ctx.exchange.add_up(ctx.exchange.send_back(expert_out[:valid]))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        rows = ctx.exchange.send(grad[ctx.exchange.token_S])
        return _fill_up(rows, ctx.capacity), None


def _fill_up(rows: torch.Tensor, capacity: int) -> torch.Tensor:
    filled = rows.new_full((capacity, *rows.shape[1:]), torch.nan)
    filled[: len(rows)] = rows
    return filled


def install(set_attribute: Callable[[Any, str, Any], None] = setattr) -> ModuleType:
    """Have Megatron's flex dispatcher use the stand-ins; return its ``fused_a2a`` on top of them.

    A second copy of ``fused_a2a`` is loaded while the stand-ins are to be imported, so nothing else
    in the process takes them for the libraries.

    Args:
        set_attribute: ``monkeypatch.setattr`` in a test that others follow.
    """
    from megatron.core.transformer.moe import fused_a2a, token_dispatcher

    libraries = {
        "deep_ep": _module("deep_ep", Buffer=Buffer, HybridEPBuffer=HybridEPBuffer),
        "deep_ep.utils": _module("deep_ep.utils", EventHandle=Event, EventOverlap=Event),
        "transformer_engine": _module("transformer_engine"),
        "transformer_engine.pytorch": _module("transformer_engine.pytorch", ep=NcclEp()),
    }
    spec = importlib.util.spec_from_file_location("fused_a2a_on_stand_ins", fused_a2a.__file__)
    on_top = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, libraries):
        spec.loader.exec_module(on_top)
    for name in vars(on_top).keys() & vars(token_dispatcher).keys():
        if getattr(vars(on_top)[name], "__module__", None) == on_top.__name__:
            set_attribute(token_dispatcher, name, vars(on_top)[name])
    return on_top


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(members)
    return module
