"""Signals of single steps: sums over the tokens of a layer, and what a probe says of its experts.

Shape legend as in ``decision.py``; ``C`` classes of tokens, ``A`` ways to class them (a token has
at most one class of each), ``N`` segments, ``S`` tokens of a segment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from uar_kernels.uncertainty import energy_and_entropy

DECILES = 10
NO_CLASS = -1
_SCALARS = ("tokens", "logit_sum", "logit_sum_squares")
_PER_CLASS = ("tokens", "energy", "entropy", "k")


@dataclass(frozen=True)
class Bins:
    """Equal bins from ``low`` to ``high``; what lies outside is in the first and the last."""

    low: float
    high: float
    count: int

    def index(self, value_T: torch.Tensor) -> torch.Tensor:
        """The bin of each value (finite), int64."""
        position_T = (value_T - self.low) * (self.count / (self.high - self.low))
        return position_T.floor().clamp(0, self.count - 1).long()


def entropy_bins(num_experts: int) -> Bins:
    """H, nats: all that it can be."""
    return Bins(0.0, math.log(num_experts), 20)


def energy_bins(num_experts: int, temperature: float) -> Bins:
    """F, a quarter of τ each, around that of a router that says nothing, −τ·ln E.

    Below it are tokens with evidence; F is above it only where the mean logit is negative.
    """
    nothing = -temperature * math.log(num_experts)
    return Bins(nothing - 8.0 * temperature, nothing + 4.0 * temperature, 48)


class TokenSignals:
    """Sums over the tokens of one layer and one optimizer step, on one rank.

    Args:
        num_experts: E.
        temperature: τ.
        num_classes: C.
        device: where the sums live.
    """

    def __init__(
        self,
        num_experts: int,
        temperature: float,
        num_classes: int,
        device: torch.device | str | int,
    ) -> None:
        self.num_experts = num_experts
        self.temperature = temperature
        self.num_classes = num_classes
        self._entropy = entropy_bins(num_experts)
        self._energy = energy_bins(num_experts, temperature)
        self._sums = torch.zeros(
            self.width(num_experts, num_classes), dtype=torch.float64, device=device
        )

    @staticmethod
    def width(num_experts: int, num_classes: int) -> int:
        """Length of :meth:`flat`."""
        cells = entropy_bins(num_experts).count * energy_bins(num_experts, 1.0).count
        return cells + len(_SCALARS) + num_classes * len(_PER_CLASS)

    @torch.no_grad()
    def add(
        self,
        logits_TE: torch.Tensor,
        k_T: torch.Tensor,
        valid_T: torch.Tensor | None = None,
        class_AT: torch.Tensor | None = None,
    ) -> None:
        """Add one micro-batch.

        Args:
            logits_TE: router logits.
            k_T: experts that each token is dispatched to.
            valid_T: False for padding, which is left out, as are tokens that are not finite.
            class_AT: int64 numbers below C, or ``NO_CLASS``.
        """
        energy_T, entropy_T = energy_and_entropy(logits_TE.detach(), self.temperature)
        counted_T = energy_T.abs() < math.inf
        if valid_T is not None:
            counted_T = counted_T & valid_T
        logit_sum_T = logits_TE.detach().sum(dim=-1, dtype=torch.float64)
        rows_T = (energy_T, entropy_T, logit_sum_T, k_T)
        energy_T, entropy_T, logit_sum_T, k_T = (
            row_T.double().masked_fill(~counted_T, 0.0) for row_T in rows_T
        )
        weight_T = counted_T.double()
        cells = self._entropy.count * self._energy.count
        cell_T = self._entropy.index(entropy_T) * self._energy.count + self._energy.index(energy_T)
        self._sums[:cells].scatter_add_(0, cell_T, weight_T)
        scalars = torch.stack((weight_T.sum(), logit_sum_T.sum(), logit_sum_T.square().sum()))
        self._sums[cells : cells + len(_SCALARS)] += scalars
        if class_AT is not None and self.num_classes:
            values_T4 = torch.stack((weight_T, energy_T, entropy_T, k_T), dim=-1)
            # Tokens of no class go to one row more.
            sums_C4 = values_T4.new_zeros(self.num_classes + 1, len(_PER_CLASS))
            for class_T in class_AT:
                row_T = class_T.masked_fill(class_T == NO_CLASS, self.num_classes)
                sums_C4.index_add_(0, row_T, values_T4)
            self._sums[cells + len(_SCALARS) :] += sums_C4[:-1].flatten()

    def flat(self) -> torch.Tensor:
        """The sums since the last :meth:`clear`, to be added up over ranks."""
        return self._sums

    def clear(self) -> None:
        """Start again."""
        self._sums.zero_()


def describe_tokens(
    total: torch.Tensor, num_experts: int, class_names: Sequence[str]
) -> dict[str, Any]:
    """Turn the sum of :meth:`TokenSignals.flat` over all ranks into the run log's numbers.

    Args:
        total: float64 on the CPU.
        num_experts: E.
        class_names: of the C classes.

    Returns:
        Under the names of ``reporting.schema.LayerObservation``; classes without tokens are left
        out, and ``classes`` is None if all are.
    """
    rows, columns = entropy_bins(num_experts).count, energy_bins(num_experts, 1.0).count
    histogram, rest = total[: rows * columns].view(rows, columns), total[rows * columns :]
    count, logit_sum, squares = rest[: len(_SCALARS)].tolist()
    tokens = max(count, 1.0)
    mean = logit_sum / tokens
    classes = [
        {
            "name": name,
            "tokens": int(sums[0]),
            "energy_mean": sums[1] / sums[0],
            "entropy_mean": sums[2] / sums[0],
            "k_eff": sums[3] / sums[0],
        }
        for name, sums in zip(
            class_names, rest[len(_SCALARS) :].view(-1, len(_PER_CLASS)).tolist(), strict=True
        )
        if sums[0]
    ]
    return {
        "tokens": int(count),
        "histogram": histogram.long().tolist(),
        "logit_sum_mean": mean,
        "logit_sum_std": math.sqrt(max(squares / tokens - mean**2, 0.0)),
        "classes": classes or None,
    }


def decile_of_ids(counts_V: torch.Tensor) -> torch.Tensor:
    """The frequency decile of each token id, uint8 from 0 (the rarest) to 9.

    Ids in order of their count; each decile has a tenth of the tokens, as far as one id does not
    have more. Ids that were not counted are among the rarest.

    Args:
        counts_V: how often each id occurs; at least one does.
    """
    order_V = torch.argsort(counts_V, stable=True)
    sorted_V = counts_V[order_V].double()
    middle_V = (sorted_V.cumsum(0) - 0.5 * sorted_V) / sorted_V.sum()
    decile_V = torch.empty(len(counts_V), dtype=torch.uint8, device=counts_V.device)
    decile_V[order_V] = (middle_V * DECILES).floor().clamp(0, DECILES - 1).to(torch.uint8)
    return decile_V


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Vectors along the last dimension at length 1, float32; zeros stay zeros."""
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float64)
    return (rows / norms.clamp_min(1e-300)).float()


def mean_pair_cosine(
    sum_square: torch.Tensor, count: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """Mean cosine similarity over all pairs of experts, from the sum of their unit vectors v.

    Σ_{i≠j} cos(i, j) = ‖Σ v‖² − Σ ‖v‖²: no pair is ever formed. A zero vector is similar to none.

    Args:
        sum_square: ‖Σ v‖².
        count: experts whose vector is not zero, Σ ‖v‖².
        num_experts: E.
    """
    return (sum_square - count) / max(num_experts * (num_experts - 1), 1)


def overlap(first_TE: torch.Tensor, second_TE: torch.Tensor) -> torch.Tensor:
    """Jaccard overlap of the experts of each token in two bool maps, float64; 1 if both are empty.

    The mean over tokens is the token–expert stability between two probes.
    """
    shared_T = (first_TE & second_TE).sum(dim=-1).double()
    either_T = (first_TE | second_TE).sum(dim=-1).double()
    return torch.where(either_T > 0, shared_T / either_T.clamp_min(1.0), torch.ones_like(shared_T))


def cache_sizes(topk: int, num_experts: int) -> tuple[int, ...]:
    """Cache sizes, in experts, that local routing consistency is told for: K, 2K and ½E."""
    return tuple(sorted({min(size, num_experts) for size in (topk, 2 * topk, num_experts // 2)}))


def served_parts(map_NSE: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """The part of each segment's slots that its most used experts serve, float64 ``[N, sizes]``.

    The segment cache hit rate of "Not All Models Suit Expert Offloading" (arXiv 2505.16056v1) with
    a cache that is refilled once per segment. Segments without slots are left out.

    Args:
        map_NSE: bool, the experts of each token.
        sizes: experts in the cache.
    """
    slots_NE = map_NSE.sum(dim=1).double().sort(dim=-1, descending=True).values
    slots_NE = slots_NE[slots_NE.sum(dim=-1) > 0]
    served_NE = slots_NE.cumsum(dim=-1) / slots_NE.sum(dim=-1, keepdim=True)
    return served_NE[:, [size - 1 for size in sizes]]
