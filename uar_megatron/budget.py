"""How many experts a token gets (Eq. 5: Adaptive Expansion), and the modes that hold the mean."""

from __future__ import annotations

import torch

from uar_megatron.config import ExpansionConfig, LayerBudget
from uar_megatron.uncertainty import FixedPrecisionModule

ROUNDING = {"floor": torch.floor, "nearest": torch.round, "ceil": torch.ceil}
# The middle of the interval of x that rounds to K, relative to K.
_MIDDLE = {"floor": 0.5, "nearest": 0.0, "ceil": -0.5}


def free_budget(
    zscore_T: torch.Tensor,
    alpha: float,
    beta: float | torch.Tensor,
    bounds: tuple[int, int],
    rounding: str,
) -> torch.Tensor:
    """Return k = clamp(round(α·ẑ + β), K_min, K_max), int64 ``[tokens]`` (Eq. 5).

    Args:
        zscore_T: normalised uncertainty ẑ, finite.
        alpha: α.
        beta: β, a number or a scalar tensor.
        bounds: (K_min, K_max).
        rounding: ``floor`` is what the paper prints.
    """
    exact_T = ROUNDING[rounding](alpha * zscore_T + beta)
    return exact_T.clamp(*bounds).long()


def exact_budget(
    zscore_T: torch.Tensor, alpha: float, bounds: tuple[int, int], total: int
) -> torch.Tensor:
    """Return k = clamp(⌊α·ẑ + s⌋, K_min, K_max) with the shift s for which Σk = ``total``.

    The j-th expert of a token costs the shift j − α·ẑ; the ``total − T·K_min`` cheapest are bought.
    What the largest possible shift leaves over goes to the largest fractional parts, which is the
    order in which their next expert would be bought. ``total`` is a number on the host: nothing is
    read back from the device. Of equal tokens the ones with the lower index get more.

    Args:
        zscore_T: normalised uncertainty ẑ, finite, ``[tokens]``.
        alpha: α.
        bounds: (K_min, K_max).
        total: Σk, between tokens · K_min and tokens · K_max.
    """
    low, high = bounds
    # Sorted by α·ẑ first, so that costs which rounding makes equal go to the more uncertain token.
    x_T, order_T = torch.sort(alpha * zscore_T.double(), descending=True, stable=True)
    steps_J = torch.arange(low + 1, high + 1, device=zscore_T.device, dtype=torch.float64)
    cost_TJ = steps_J - x_T.unsqueeze(-1)
    bought = torch.argsort(cost_TJ.flatten(), stable=True)[: total - zscore_T.shape[0] * low]
    k_T = torch.full_like(order_T, low)
    token = order_T[bought // max(high - low, 1)]
    return k_T.scatter_add_(0, token, torch.ones_like(token))


class ExpertBudget(FixedPrecisionModule):
    """The number of experts of each token of one layer, in the layer's mode.

    Buffer (persistent, scalar float64, only in mode ``mean``): ``beta``, which :meth:`commit` moves
    by ``gain`` · (target − mean k of the step). Where no token is clamped the mean of k moves as β
    does, so the offset shrinks by (1 − gain) a step; where half are clamped, by (1 − gain/2).

    Args:
        budget: the layer's budget.
        expansion: when it sets in.
        topk: ``moe_router_topk``, the number of experts before that.
        device: where ``beta`` lives.
    """

    PENDING_SIZE = 2  # Σk, number of tokens

    beta: torch.Tensor | None
    _pending: torch.Tensor

    def __init__(
        self,
        budget: LayerBudget,
        expansion: ExpansionConfig,
        topk: int,
        device: torch.device | str | int,
    ) -> None:
        super().__init__()
        self.budget = budget
        self.expansion = expansion
        self.topk = topk
        begins_later = expansion.start_step > 0 or expansion.ramp_steps > 0
        constant = budget.constant_k()
        self.fixed_k = constant if not begins_later or constant == topk else None
        self.max_k = max(budget.k_max, topk) if begins_later else budget.k_max
        self.register_buffer("beta", None)
        if budget.mode == "mean":
            self.beta = torch.tensor(budget.beta, dtype=torch.float64, device=device)
        self.register_buffer(
            "_pending",
            torch.zeros(self.PENDING_SIZE, dtype=torch.float64, device=device),
            persistent=False,
        )

    def progress(self, step: int) -> float:
        """How far Adaptive Expansion has set in: 0 before its start, 1 when it is complete.

        Args:
            step: optimizer steps taken so far.
        """
        since = step - self.expansion.start_step
        if since < 0:
            return 0.0
        return min(since / self.expansion.ramp_steps, 1.0) if self.expansion.ramp_steps else 1.0

    def exact_total(self, tokens: int, step: int) -> int:
        """Σk of a micro-batch in mode ``exact``, known on the host."""
        mean_k = self.topk + self.progress(step) * (self.budget.target_mean_k - self.topk)
        return round(tokens * mean_k)

    def experts_of(self, zscore_T: torch.Tensor, step: int) -> torch.Tensor:
        """Return k of each token, int64.

        Args:
            zscore_T: normalised uncertainty ẑ, finite.
            step: optimizer steps taken so far.
        """
        budget, progress = self.budget, self.progress(step)
        bounds = (budget.k_min, budget.k_max)
        alpha = progress * budget.alpha
        if budget.mode == "exact":
            return exact_budget(zscore_T, alpha, bounds, self.exact_total(len(zscore_T), step))
        start = self.topk + _MIDDLE[budget.rounding]
        beta = budget.beta if self.beta is None else self.beta
        beta = start + progress * (beta - start) if progress < 1.0 else beta
        return free_budget(zscore_T, alpha, beta, bounds, budget.rounding)

    @torch.no_grad()
    def accumulate(self, k_T: torch.Tensor, valid_T: torch.Tensor | None) -> None:
        """Add a micro-batch to the mean of k; padding (``valid_T`` False) is left out."""
        valid = torch.ones_like(k_T) if valid_T is None else valid_T.to(k_T)
        self._pending += torch.stack(((k_T * valid).sum(), valid.sum())).double()

    def pending(self) -> torch.Tensor:
        """This rank's sums since the last commit, float64 ``[PENDING_SIZE]``."""
        return self._pending

    @torch.no_grad()
    def commit(self, total: torch.Tensor, step: int) -> None:
        """Move β towards the target and start a new step.

        Args:
            total: :meth:`pending` summed over every rank that holds tokens of this layer.
            step: the optimizer step that ends; β rests while expansion has not fully set in.
        """
        if self.beta is not None and self.progress(step) == 1.0:
            budget = self.budget
            mean_k = total[0] / total[1].clamp_min(1.0)
            change = budget.gain * (budget.target_mean_k - mean_k)
            # Beyond four σ everybody is clamped: β would wind up without an effect.
            reach = 4.0 * abs(budget.alpha) + 1.0
            moved = (self.beta + change).clamp(budget.k_min - reach, budget.k_max + reach)
            # A new tensor, as in UncertaintyStatistics.commit.
            self.beta = torch.where(total[1] > 0, moved, self.beta)
        self._pending.zero_()
