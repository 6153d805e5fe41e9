"""Uncertainty of tokens and its moving statistics (ū and σ_u of Eq. 5)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from uar_kernels.uncertainty import energy_and_entropy
from uar_megatron.config import UARConfig
from uar_megatron.decision import Uncertainty

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


class MovingStatistics(FixedPrecisionModule):
    """ū and σ_u of one layer's uncertainty, frozen within an optimizer step.

    Every micro-batch, every rank and every recomputation of a step sees the same values, so all
    agree on k. During a forward that will be differentiated, deviations from ū are summed locally
    (:meth:`accumulate`); at the step boundary the caller reduces :meth:`pending` over the ranks
    that share the layer and hands the total to :meth:`commit`.

    Buffers (persistent, scalars): ``mean``, ``var`` (float64), ``num_updates`` (int64).
    """

    PENDING_SIZE = 4  # Σ(u−ū), Σ(u−ū)², number of finite tokens, number of non-finite tokens

    mean: torch.Tensor
    var: torch.Tensor
    num_updates: torch.Tensor
    _pending: torch.Tensor

    def __init__(self, config: UARConfig, device: torch.device | str | int) -> None:
        super().__init__()
        self.measure_name = config.uncertainty
        self.temperature = config.temperature
        self.momentum = config.statistics.momentum
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64, device=device))
        self.register_buffer("var", torch.zeros((), dtype=torch.float64, device=device))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer(
            "_pending",
            torch.zeros(self.PENDING_SIZE, dtype=torch.float64, device=device),
            persistent=False,
        )

    @torch.no_grad()
    def measure(self, logits_TE: torch.Tensor) -> Uncertainty:
        """Return energy, entropy and ẑ of each token under the frozen statistics."""
        energy_T, entropy_T = energy_and_entropy(logits_TE, self.temperature)
        u_T = self._select(energy_T, entropy_T)
        sigma = self.var.sqrt()
        # No statistics yet, or no spread: every token is average.
        inverse = torch.where(
            (self.num_updates > 0) & (sigma > SIGMA_FLOOR), 1.0 / sigma, torch.zeros_like(sigma)
        )
        zscore_T = ((u_T - self.mean) * inverse).float()
        zscore_T = torch.where(torch.isfinite(u_T), zscore_T, torch.zeros_like(zscore_T))
        return Uncertainty(energy_T.float(), entropy_T.float(), zscore_T)

    @torch.no_grad()
    def accumulate(self, uncertainty: Uncertainty, valid_T: torch.Tensor | None = None) -> None:
        """Add this micro-batch's deviations; padding (``valid_T`` False) is left out."""
        u_T = self._select(uncertainty.energy_T, uncertainty.entropy_T).double()
        finite_T = torch.isfinite(u_T)
        counted_T = finite_T if valid_T is None else finite_T & valid_T
        ignored_T = ~finite_T if valid_T is None else ~finite_T & valid_T
        deviation_T = torch.where(counted_T, u_T - self.mean, torch.zeros_like(u_T))
        self._pending += torch.stack(
            (
                deviation_T.sum(),
                deviation_T.square().sum(),
                counted_T.sum().double(),
                ignored_T.sum().double(),
            )
        )

    def pending(self) -> torch.Tensor:
        """This rank's sums since the last commit, float64 ``[PENDING_SIZE]``."""
        return self._pending

    @torch.no_grad()
    def commit(self, total: torch.Tensor) -> None:
        """Fold the sums of all ranks into ū and σ² and start a new step.

        The moving average is bias-corrected: the first commit sets the values, the t-th has weight
        (1−m)/(1−mᵗ). A step without a finite token changes nothing.

        Args:
            total: :meth:`pending` summed over every rank that holds tokens of this layer.
        """
        count = total[2]
        has_tokens = count > 0
        shift = total[0] / count.clamp_min(1.0)
        variance = (total[1] / count.clamp_min(1.0) - shift.square()).clamp_min(0.0)
        updates = self.num_updates + has_tokens
        weight = (1.0 - self.momentum) / (1.0 - self.momentum ** updates.clamp_min(1).double())
        weight = torch.where(has_tokens, weight, torch.zeros_like(weight))
        self.mean += weight * shift
        self.var += weight * (variance - self.var)
        self.num_updates.copy_(updates)
        self._pending.zero_()

    def _select(self, energy_T: torch.Tensor, entropy_T: torch.Tensor) -> torch.Tensor:
        return energy_T if self.measure_name == "energy" else entropy_T
