"""How many experts a token gets (Eq. 5: Adaptive Expansion), and the modes that hold the mean."""

from __future__ import annotations

import math

import torch

from uar_megatron.config import ExpansionConfig, LayerBudget
from uar_megatron.errors import UARError
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
    zscore_GN: torch.Tensor, alpha: float, bounds: tuple[int, int], total: int | torch.Tensor
) -> torch.Tensor:
    """Return k = clamp(⌊α·ẑ + s⌋, K_min, K_max), int64, with the s for which Σ_N k = ``total``.

    The j-th expert of a token costs the shift j − α·ẑ; the ``total − N·K_min`` cheapest are bought.
    What the largest possible shift leaves over goes to the largest fractional parts, which is the
    order in which their next expert would be bought. Nothing is read back from the device. Of equal
    tokens the ones with the lower index get more.

    Args:
        zscore_GN: normalised uncertainty ẑ, finite, ``[groups, tokens]``; each group by itself.
        alpha: α.
        bounds: (K_min, K_max).
        total: Σk of each group, between N·K_min and N·K_max: one number on the host, or int64
            ``[groups]`` on the device.
    """
    low, high = bounds
    # Sorted by α·ẑ first, so that costs which rounding makes equal go to the more uncertain token.
    x_GN, order_GN = torch.sort(alpha * zscore_GN.double(), dim=-1, descending=True, stable=True)
    steps_J = torch.arange(low + 1, high + 1, device=zscore_GN.device, dtype=torch.float64)
    cheapest_GP = torch.argsort((steps_J - x_GN.unsqueeze(-1)).flatten(1), dim=-1, stable=True)
    to_buy = total - zscore_GN.shape[1] * low
    if isinstance(to_buy, int):
        cheapest_GP = cheapest_GP[:, :to_buy]
        bought_GP = torch.ones_like(cheapest_GP)
    else:
        position_P = torch.arange(cheapest_GP.shape[1], device=zscore_GN.device)
        bought_GP = (position_P < to_buy.unsqueeze(-1)).long()
    token_GP = order_GN.gather(1, cheapest_GP // max(high - low, 1))
    return torch.full_like(order_GN, low).scatter_add_(1, token_GP, bought_GP)


def by_segment(of_T: torch.Tensor, segment: int | None, batch_size: int) -> torch.Tensor:
    """``[tokens, …]``, ordered ``[sequence, batch]``, as ``[segments, tokens of a segment, …]``.

    Args:
        of_T: a value of each token.
        segment: consecutive tokens of one sequence that belong together; None for all tokens.
        batch_size: sequences in the micro-batch.

    Raises:
        UARError: the sequence is not a whole number of segments.
    """
    if segment is None:
        return of_T.unsqueeze(0)
    length = of_T.shape[0] // batch_size
    if length % segment:
        raise UARError(
            f"uar.budget.segment: this rank has {length} tokens of a sequence, which is no "
            f"whole number of segments of {segment} tokens\n"
            "  remedy:  choose a segment that divides it"
        )
    shape, rest = (length // segment, segment, batch_size), of_T.shape[1:]
    return of_T.view(*shape, *rest).transpose(1, 2).flatten(0, 1)


def by_token(of_GN: torch.Tensor, batch_size: int | None) -> torch.Tensor:
    """The inverse of :func:`by_segment`; ``batch_size`` None where all tokens were one segment."""
    if batch_size is None:
        return of_GN.squeeze(0)
    segments, segment = of_GN.shape
    shape = (segments // batch_size, batch_size, segment)
    return of_GN.view(shape).transpose(1, 2).flatten()


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

    spans_layers = False

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
            torch.zeros(0 if self.beta is None else 1, dtype=torch.float64, device=device),
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
        """Σk of ``tokens`` tokens, whole segments, in mode ``exact``; known on the host."""
        mean_k = self.topk + self.progress(step) * (self.budget.target_mean_k - self.topk)
        segment = self.budget.segment or max(tokens, 1)
        return tokens // segment * round(segment * mean_k)

    def line(self, step: int) -> tuple[float, float | torch.Tensor]:
        """Return (α, β) of Eq. 5 at this step, in the modes ``free`` and ``mean``."""
        budget, progress = self.budget, self.progress(step)
        start = self.topk + _MIDDLE[budget.rounding]
        beta = budget.beta if self.beta is None else self.beta
        beta = start + progress * (beta - start) if progress < 1.0 else beta
        return progress * budget.alpha, beta

    def experts_of(
        self, zscore_T: torch.Tensor, step: int, batch_size: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return k of each token, int64, and what it would be without ``max_rows_factor``.

        Args:
            zscore_T: normalised uncertainty ẑ, finite; tokens are ordered ``[sequence, batch]``.
            step: optimizer steps taken so far.
            batch_size: sequences in the micro-batch.

        Raises:
            UARError: the sequence is not a whole number of the segments that are counted in.
        """
        budget, bounds = self.budget, (self.budget.k_min, self.budget.k_max)
        if budget.mode == "exact":
            zscore_GN = by_segment(zscore_T, budget.segment, batch_size)
            total = self.exact_total(zscore_GN.shape[1], step)
            alpha = self.progress(step) * budget.alpha
            k_GN = exact_budget(zscore_GN, alpha, bounds, total)
            return by_token(k_GN, batch_size if budget.segment else None), None
        alpha, beta = self.line(step)
        k_T = free_budget(zscore_T, alpha, beta, bounds, budget.rounding)
        if budget.max_rows_factor is None:
            return k_T, None
        zscore_GN = by_segment(zscore_T, budget.segment, batch_size)
        wanted_GN = by_segment(k_T, budget.segment, batch_size)
        wanted_G = wanted_GN.sum(dim=-1)
        most = math.floor(budget.max_rows_factor * self.topk * zscore_GN.shape[1])
        most_G = wanted_G.clamp_max(most)
        trimmed_GN = exact_budget(zscore_GN, alpha, bounds, most_G)
        # Rounding differs between the two forms: what need not be trimmed stays as Eq. 5 has it.
        within_GN = (most_G == wanted_G).unsqueeze(-1)
        k_GN = torch.where(within_GN, wanted_GN, trimmed_GN)
        return by_token(k_GN, batch_size if budget.segment else None), k_T

    @torch.no_grad()
    def accumulate(self, k_T: torch.Tensor, valid_T: torch.Tensor | None) -> None:
        """Add a micro-batch to Σk; padding (``valid_T`` False) is left out."""
        if self.beta is not None:
            self._pending += k_T.sum() if valid_T is None else (k_T * valid_T).sum()

    def pending(self) -> torch.Tensor:
        """This rank's Σk since the last commit, float64 ``[1]``; ``[0]`` where it is not needed."""
        return self._pending

    @torch.no_grad()
    def commit(self, total: torch.Tensor, tokens: torch.Tensor, step: int) -> None:
        """Move β towards the target and start a new step.

        Args:
            total: :meth:`pending` summed over every rank that holds tokens of this layer.
            tokens: number of those tokens, padding left out; a scalar.
            step: the optimizer step that ends; β rests while expansion has not fully set in.
        """
        if self.beta is not None and self.progress(step) == 1.0:
            budget = self.budget
            mean_k = total[0] / tokens.clamp_min(1.0)
            change = budget.gain * (budget.target_mean_k - mean_k)
            # Beyond four σ everybody is clamped: β would wind up without an effect.
            reach = 4.0 * abs(budget.alpha) + 1.0
            moved = (self.beta + change).clamp(budget.k_min - reach, budget.k_max + reach)
            # A new tensor, as in UncertaintyStatistics.commit.
            self.beta = torch.where(tokens > 0, moved, self.beta)
        self._pending.zero_()

    def logged(self) -> dict[str, torch.Tensor]:
        """β where it is steered."""
        return {} if self.beta is None else {"beta": self.beta}
