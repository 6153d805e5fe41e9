"""Uncertainty of tokens and its statistics (ū and σ_u of Eq. 5)."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from uar_kernels.uncertainty import energy_and_entropy
from uar_megatron.config import UARConfig
from uar_megatron.decision import Uncertainty

logger = logging.getLogger(__name__)

# A spread below this is treated as none, so that rounding noise is not blown up into ẑ.
SIGMA_FLOOR = 1e-6


class FixedPrecisionModule(torch.nn.Module):
    """A module whose buffers follow the model's device but never its dtype.

    ``Float16Module`` converts every floating-point buffer to bf16, where a bias that moves by 1e-3
    a step would stop moving. (Megatron guards its ``expert_bias`` likewise, router.py:263.)
    """

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> torch.nn.Module:
        def move_only(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device=fn(tensor.new_empty(0)).device)

        return super()._apply(move_only, recurse)


class UncertaintyStatistics(FixedPrecisionModule):
    """ū and σ_u of one layer's uncertainty, the same for all ranks and every recomputation.

    Mode ``moving``: frozen within an optimizer step. During a forward that will be differentiated,
    deviations from ū are summed locally (:meth:`accumulate`); at the step boundary the caller
    reduces :meth:`pending` over the ranks that share the layer and hands the total to
    :meth:`commit`.

    Mode ``batch``: in training each micro-batch is normalised by its own values, reduced over those
    ranks in the forward. Activation recomputation meets the values of the first pass again: they
    are kept from a forward without gradients to the next one with gradients, first in first out,
    the order in which pipeline schedules run micro-batches backward. The moving values are kept as
    well; evaluation uses them.

    Buffers (persistent): ``mean``, ``var`` (float64 scalars), ``num_updates`` (int64 scalar), and
    ``measured`` (float64 ``[2]``): which u they belong to, and at which temperature.

    Args:
        config: the UAR section.
        device: where the buffers live.
        reduce: sums a tensor in place over the ranks that share the layer; for mode ``batch``.
    """

    PENDING_SIZE = 4  # Σ(u−ū), Σ(u−ū)², number of finite tokens, number of non-finite tokens

    mean: torch.Tensor
    var: torch.Tensor
    num_updates: torch.Tensor
    measured: torch.Tensor
    _pending: torch.Tensor

    def __init__(
        self,
        config: UARConfig,
        device: torch.device | str | int,
        reduce: Callable[[torch.Tensor], object] | None = None,
    ) -> None:
        super().__init__()
        self.measure_name = config.uncertainty
        self.temperature = config.temperature
        self.momentum = config.statistics.momentum
        self.of_batch = config.statistics.mode == "batch"
        self.reduce = reduce
        self._inverse: tuple[torch.Tensor | None, int, torch.Tensor | None] = (None, 0, None)
        self._first_passes: deque[tuple[torch.Tensor, torch.Tensor]] = deque()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64, device=device))
        self.register_buffer("var", torch.zeros((), dtype=torch.float64, device=device))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64, device=device))
        what = (("energy", "entropy").index(config.uncertainty), config.temperature)
        self.register_buffer("measured", torch.tensor(what, dtype=torch.float64, device=device))
        self.register_buffer(
            "_pending",
            torch.zeros(self.PENDING_SIZE, dtype=torch.float64, device=device),
            persistent=False,
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Statistics of another u, or at another temperature, are of no use: start fresh."""
        saved = state_dict.get(f"{prefix}measured")
        if saved is not None and not torch.equal(saved.cpu(), self.measured.cpu()):
            logger.warning("%s: saved for another uncertainty or temperature; starts fresh", prefix)
            for name in ("mean", "var", "num_updates", "measured"):
                state_dict[f"{prefix}{name}"] = getattr(self, name).clone()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def measure(self, logits_TE: torch.Tensor, valid_T: torch.Tensor | None = None) -> Uncertainty:
        """Return energy, entropy, u and ẑ of each token.

        Args:
            logits_TE: router logits.
            valid_T: False for padding, which has no part in a micro-batch's own values.
        """
        with torch.no_grad():
            energy_T, entropy_T = energy_and_entropy(logits_TE, self.temperature)
        return self.normalise(energy_T, entropy_T, valid_T)

    def normalise(
        self,
        energy_T: torch.Tensor,
        entropy_T: torch.Tensor,
        valid_T: torch.Tensor | None = None,
        sums: torch.Tensor | None = None,
    ) -> Uncertainty:
        """Return u and ẑ of tokens whose energy and entropy are known, as :meth:`measure`.

        Args:
            energy_T: F.
            entropy_T: H.
            valid_T: False for padding.
            sums: of these tokens, as :meth:`pending` has them, where they are known.
        """
        is_recomputed_or_only_pass = torch.is_grad_enabled()
        with torch.no_grad():
            u_T = energy_T if self.measure_name == "energy" else entropy_T
            finite_T = energy_T.abs() < math.inf
            if self.of_batch and self.training:
                total = self._sums(u_T, finite_T, valid_T) if sums is None else sums.clone()
                mean, var = self._batch_values(total, is_recomputed_or_only_pass)
                inverse = _inverse_sigma(var)
            else:
                mean, inverse = self.frozen()
            zscore_T = ((u_T - mean) * inverse).float().masked_fill(~finite_T, 0.0)
            energy_T, entropy_T, u_T = energy_T.float(), entropy_T.float(), u_T.float()
            return Uncertainty(energy_T, entropy_T, u_T, zscore_T, finite_T, mean, inverse)

    @torch.no_grad()
    def frozen(self) -> tuple[torch.Tensor, Any]:
        """Return the moving ū and 1/σ_u, scalars; the latter is computed once per step."""
        of, version, inverse = self._inverse
        if of is not self.var or version != self.var._version:  # loading changes it in place
            inverse = _inverse_sigma(self.var)
            self._inverse = (self.var, self.var._version, inverse)
        return self.mean, inverse

    def _batch_values(
        self, total: torch.Tensor, with_gradients: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if with_gradients and self._first_passes:
            return self._first_passes.popleft()
        if self.reduce is not None:
            self.reduce(total)
        values = _mean_shift_and_variance(total)
        if not with_gradients:
            self._first_passes.append((self.mean + values[0], values[1]))
        return self.mean + values[0], values[1]

    def _sums(
        self, u_T: torch.Tensor, finite_T: torch.Tensor, valid_T: torch.Tensor | None
    ) -> torch.Tensor:
        """Sums over a micro-batch's tokens, float64 ``[PENDING_SIZE]``."""
        counted_T = finite_T if valid_T is None else finite_T & valid_T
        deviation_T = (u_T - self.mean).masked_fill(~counted_T, 0.0)
        # Every sum wanted is a product of two of these rows: one launch for all.
        rows_2T = torch.stack((deviation_T, counted_T.to(deviation_T))).double()
        (squares, shift), (_, count) = rows_2T @ rows_2T.T
        valid = finite_T.numel() if valid_T is None else valid_T.sum()
        return torch.stack((shift, squares, count, valid - count))

    @torch.no_grad()
    def accumulate(
        self,
        uncertainty: Uncertainty,
        valid_T: torch.Tensor | None = None,
        sums: torch.Tensor | None = None,
    ) -> None:
        """Add this micro-batch's deviations; padding (``valid_T`` False) is left out.

        Args:
            uncertainty: of the tokens.
            valid_T: False for padding.
            sums: of these tokens, as :meth:`pending` has them, where they are known.
        """
        if sums is None:
            sums = self._sums(uncertainty.measure_T, uncertainty.finite_T, valid_T)
        self._pending += sums

    def pending(self) -> torch.Tensor:
        """This rank's sums since the last commit, float64 ``[PENDING_SIZE]``."""
        return self._pending

    @staticmethod
    def tokens(total: torch.Tensor) -> torch.Tensor:
        """The number of tokens in a sum of :meth:`pending`, finite or not; padding is left out."""
        return total[2] + total[3]

    def nonfinite_tokens(self) -> int:
        """Non-finite tokens since the last commit on this rank; waits for the device."""
        return int(self._pending[-1])

    @torch.no_grad()
    def commit(self, total: torch.Tensor) -> None:
        """Fold the sums of all ranks into ū and σ² and start a new step.

        The moving average is bias-corrected: the first commit sets the values, the t-th has weight
        (1−m)/(1−mᵗ). A step without a finite token changes nothing.

        Args:
            total: :meth:`pending` summed over every rank that holds tokens of this layer.
        """
        has_tokens = total[2] > 0
        shift, variance = _mean_shift_and_variance(total)
        updates = self.num_updates + has_tokens
        weight = (1.0 - self.momentum) / (1.0 - self.momentum ** updates.clamp_min(1).double())
        weight = torch.where(has_tokens, weight, torch.zeros_like(weight))
        # New tensors, so that whoever kept the old ones can go back (UARRouter.snapshot).
        self.mean = self.mean + weight * shift
        self.var = self.var + weight * (variance - self.var)
        self.num_updates = updates
        self._pending.zero_()
        self._first_passes.clear()


def _inverse_sigma(var: torch.Tensor) -> torch.Tensor:
    """1/σ; 0 where there is no spread, or are no statistics yet: every token is average then."""
    return (var > SIGMA_FLOOR**2) * var.clamp_min(SIGMA_FLOOR**2).rsqrt()


def _mean_shift_and_variance(total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean's distance from ū, and the variance, of the tokens that were summed."""
    count = total[2].clamp_min(1.0)
    shift = total[0] / count
    return shift, (total[1] / count - shift.square()).clamp_min(0.0)
