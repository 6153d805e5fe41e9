"""The parts of a batch that ranks have computed, put together on rank 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Signals:
    """What the routers did with the tokens of a batch; arrays on the host.

    Attributes:
        layers: 1-based numbers of the MoE layers, in order.
        k_LBS: experts of each token, int16 ``[MoE layers, sequences, tokens]``; 0 for padding.
        energy_LBS: F, fp32; NaN for padding.
        entropy_LBS: H in nats, fp32; NaN for padding.
        slots_LE: tokens of each expert, int64 ``[MoE layers, experts]``; padding left out.
    """

    layers: tuple[int, ...]
    k_LBS: np.ndarray
    energy_LBS: np.ndarray
    entropy_LBS: np.ndarray
    slots_LE: np.ndarray


def outputs_of(parts: list[dict[str, Any]], rows: int, data_ranks: int) -> list[np.ndarray]:
    """Return what was asked for of each row.

    Args:
        parts: of every rank.
        rows: of the request.
        data_ranks: data-parallel ranks; row i was run by rank i modulo their number.
    """
    outputs: list[Any] = [None] * rows
    for part in parts:
        if part["output"] is not None:
            outputs[part["data_rank"] :: data_ranks] = part["output"]
    return outputs


def signals_of(
    parts: list[dict[str, Any]], lengths: list[int], width: int, is_left: bool, data_ranks: int
) -> Signals:
    """Return the signals in the order and shape of the request; ranks pad on the right.

    Args:
        parts: of every rank.
        lengths: tokens of each sequence.
        width: tokens of a row of the request.
        is_left: where its padding is.
        data_ranks: as in :func:`outputs_of`.
    """
    numbers = sorted({number for part in parts for number in part["layers"]})
    shape = (len(numbers), len(lengths), width)
    k_LBS = np.zeros(shape, dtype=np.int16)
    energy_LBS, entropy_LBS = (np.full(shape, np.nan, dtype=np.float32) for _ in range(2))
    slots = []
    for layer, number in enumerate(numbers):
        having = [part for part in parts if number in part["layers"]]
        slots.append(sum(part["layers"][number]["slots"] for part in having))
        for data_rank in range(data_ranks):
            mine = sorted(
                (part for part in having if part["data_rank"] == data_rank),
                key=lambda part: part["tensor_rank"],
            )
            batches = zip(*(part["layers"][number]["tokens"] for part in mine), strict=True)
            # Tensor-parallel ranks have a piece of each sequence.
            rows = [row for b in batches for row in np.concatenate(b, axis=2).swapaxes(0, 1)]
            for i, row in zip(range(data_rank, len(lengths), data_ranks), rows, strict=False):
                length = lengths[i]
                own = row[:, :length]
                first = width - length if is_left else 0
                at = slice(first, first + length)
                k_LBS[layer, i, at] = own[0]
                energy_LBS[layer, i, at], entropy_LBS[layer, i, at] = own[1], own[2]
    return Signals(tuple(numbers), k_LBS, energy_LBS, entropy_LBS, np.array(slots))
