"""Bytes that the all-to-all dispatcher moves in one MoE layer, and the time they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from uar_megatron.planning.hardware import Hardware
from uar_megatron.planning.layout import Layout

COUNT_BYTES = 8
"""Of the number of rows for one expert, int64 (token_dispatcher.py:537)."""


@dataclass(frozen=True)
class Exchange:
    """Bytes that one rank hands to collectives in one MoE layer, for one micro-batch.

    Attributes:
        dispatch: tokens on their way to experts; in backward the gradients of their outputs.
        combine: experts' outputs on their way back; in backward the gradients of their inputs.
        weights: routing weights that go with the tokens.
        weight_gradients: their gradients, on their way back.
        counts: rows for each expert, gathered from all ranks; in the forward only.
        gathered: rows and weights that expert tensor ranks exchange after the dispatch (an
            all-gather, a rank's input; its gradient is a reduce-scatter of as much).
        leaving: fraction of ``dispatch`` that goes to other ranks.
        between_nodes: fraction that goes to other nodes.
    """

    dispatch: float
    combine: float
    weights: float
    weight_gradients: float
    counts: float
    gathered: float
    leaving: float
    between_nodes: float

    @property
    def forward(self) -> float:
        """All-to-all bytes of the forward, those for the rank itself included."""
        return self.dispatch + self.weights + self.combine

    @property
    def backward(self) -> float:
        """All-to-all bytes of the backward: the same exchanges the other way round."""
        return self.dispatch + self.combine + self.weight_gradients


def exchange(
    rows_to: Sequence[float],
    rows_from: Sequence[float],
    rank: int,
    layout: Layout,
    *,
    experts: int,
    width: int,
    element: int,
    weight: int,
) -> Exchange:
    """Return what one rank of an expert-parallel group exchanges.

    Args:
        rows_to: rows that it sends to each rank of the group; its own are in it.
        rows_from: rows that it receives from each.
        rank: its place in the group.
        layout: expert sizes and nodes.
        experts: E.
        width: elements of a row.
        element: bytes of an element.
        weight: bytes of a routing weight.
    """
    sent, received = sum(rows_to), sum(rows_from)
    exchanges = layout.expert > 1
    gathers = layout.expert_tensor > 1
    nodes = [global_rank // layout.gpus_per_node for global_rank in layout.expert_group]
    away = [rows for other, rows in enumerate(rows_to) if nodes[other] != nodes[rank]]
    return Exchange(
        dispatch=exchanges * sent * width * element,
        combine=exchanges * received * width * element,
        weights=exchanges * sent * weight,
        weight_gradients=exchanges * received * weight,
        counts=(exchanges or gathers) * experts * COUNT_BYTES,
        gathered=gathers * received * (width * element + weight),
        leaving=1 - rows_to[rank] / sent if sent else 0.0,
        between_nodes=sum(away) / sent if sent else 0.0,
    )


def even_exchange(
    rows: float, layout: Layout, *, experts: int, width: int, element: int, weight: int
) -> Exchange:
    """Return what a rank exchanges that sends ``rows`` evenly; of the rank that crosses most."""
    each = [rows / layout.expert] * layout.expert
    found = [
        exchange(
            each, each, rank, layout, experts=experts, width=width, element=element, weight=weight
        )
        for rank in range(layout.expert)
    ]
    return max(found, key=lambda one: one.between_nodes)


def all_to_all_seconds(size: float, found: Exchange, hardware: Hardware) -> float:
    """Time of an all-to-all at link bandwidth: both links work at once, the slower one counts.

    Args:
        size: bytes that the rank hands in.
        found: where they go.
        hardware: its links.
    """
    between = size * found.between_nodes
    within = size * (found.leaving - found.between_nodes)
    return max(within / hardware.nvlink, between / hardware.network)


def ring_seconds(size: float, ranks: int, bandwidth: float) -> float:
    """Time of an all-gather or reduce-scatter: size · (n − 1)/n over the bandwidth.

    Args:
        size: bytes of the whole buffer.
        ranks: n.
        bandwidth: bytes/s.
    """
    return size * (ranks - 1) / ranks / bandwidth
