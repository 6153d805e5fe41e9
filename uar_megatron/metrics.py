"""Per-layer sums over a logging interval, and the numbers a reader wants from them.

A rank only ever adds to one small vector per layer; the vectors of all layers and ranks are summed
once per logging interval, and nothing is read back from the device before that.
"""

from __future__ import annotations

import math

import torch

from uar_megatron.config import StatesConfig
from uar_megatron.decision import CompactDecision, RoutingDecision, Uncertainty

POLICY_LOSS = "policy_loss"
LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss", POLICY_LOSS)
# Per token; the sums of their products are kept, of which these are some: Σ counted·energy = ΣF,
# Σ energy·energy = ΣF², Σ high_entropy·high_energy = tokens in the vacuum.
_ROWS = ("counted", "energy", "entropy", "zscore", "omega", "high_entropy", "high_energy")
_ROW = {name: i for i, name in enumerate(_ROWS)}
_SCALARS = (
    "valid",
    "rows",
    "trimmed",
    *(f"{part}_{loss}" for loss in LOSSES for part in ("sum", "terms")),
)
_INDEX = {name: len(_ROWS) ** 2 + i for i, name in enumerate(_SCALARS)}
_SUMS = len(_ROWS) ** 2 + len(_SCALARS)


def state_thresholds(
    states: StatesConfig, num_experts: int, temperature: float
) -> tuple[float, float]:
    """Return (H*, F*), the borders between the four routing states (Figure 3 of the paper).

    The paper draws the quadrants without values. Defaults: H* = ½·ln E, half of the largest
    entropy; F* = −τ·ln E, the energy of a router whose logits are all zero.
    """
    entropy = 0.5 * math.log(num_experts) if states.entropy is None else states.entropy
    energy = -temperature * math.log(num_experts) if states.energy is None else states.energy
    return entropy, energy


class LayerMetrics:
    """The sums of one layer on one rank.

    Args:
        num_experts: E.
        max_k: largest number of experts a token can get; the histogram has ``max_k + 1`` bins.
        thresholds: (H*, F*) of :func:`state_thresholds`.
        device: where the sums live.
    """

    def __init__(
        self,
        num_experts: int,
        max_k: int,
        thresholds: tuple[float, float],
        device: torch.device | str | int,
    ) -> None:
        self.num_experts = num_experts
        self.max_k = max_k
        self.thresholds = thresholds
        # Set by whoever reads the sums; without a reader they would grow for ever.
        self.has_reader = False
        self._sums = torch.zeros(_SUMS + max_k + 1, dtype=torch.float64, device=device)
        self._step_sums = torch.zeros_like(self._sums)
        self._step_slots_E = torch.zeros(num_experts, dtype=torch.float64, device=device)
        self._slots_of_steps: list[torch.Tensor] = []
        self._evaluated = torch.zeros(num_experts + 1, dtype=torch.float64, device=device)

    @staticmethod
    def width(num_experts: int, max_k: int, steps: int) -> int:
        """Length of :meth:`flat` for an interval of ``steps`` optimizer steps."""
        return _SUMS + max_k + 1 + steps * num_experts

    @torch.no_grad()
    def add(
        self,
        uncertainty: Uncertainty,
        dispatched: RoutingDecision | CompactDecision,
        omega_T: torch.Tensor | None,
        valid_T: torch.Tensor | None,
    ) -> None:
        """Add one micro-batch; tokens with ``valid_T`` False (padding) are left out.

        Args:
            uncertainty: of the tokens.
            dispatched: the slots that are computed, after token dropping.
            omega_T: ω, or None for 1.
            valid_T: False for padding, or None.
        """
        finite_T = uncertainty.finite_T
        counted_T = finite_T if valid_T is None else finite_T & valid_T
        weight_T = counted_T.float()
        energy_T, entropy_T = uncertainty.energy_T, uncertainty.entropy_T
        rows_RT = torch.stack(
            (
                weight_T,
                energy_T,
                entropy_T,
                uncertainty.zscore_T,
                weight_T if omega_T is None else omega_T,
                (entropy_T > self.thresholds[0]).float(),
                (energy_T > self.thresholds[1]).float(),
            )
        ).double()
        rows_RT = rows_RT.masked_fill(~counted_T, 0.0)
        self._step_slots_E += dispatched.slots(counted_T)
        k_T = dispatched.k_T.long().clamp_max(self.max_k)
        products = len(_ROWS) ** 2
        self._step_sums[:products] += (rows_RT @ rows_RT.T).flatten()
        self._step_sums[_SUMS:].scatter_add_(0, k_T, rows_RT[0])
        valid = finite_T.numel() if valid_T is None else valid_T.sum()
        self._step_sums[_INDEX["valid"]] += valid

    @torch.no_grad()
    def add_evaluated(
        self,
        uncertainty: Uncertainty,
        dispatched: RoutingDecision | CompactDecision,
        valid_T: torch.Tensor | None,
    ) -> None:
        """Add one micro-batch of an evaluation; arguments as for :meth:`add`."""
        if not self.has_reader:
            return
        finite_T = uncertainty.finite_T
        counted_T = finite_T if valid_T is None else finite_T & valid_T
        self._evaluated[:-1] += dispatched.slots(counted_T)
        self._evaluated[-1] += counted_T.sum()

    def take_evaluated(self) -> torch.Tensor:
        """Slots of each expert and the number of tokens since the last call, ``[experts + 1]``."""
        evaluated, self._evaluated = self._evaluated, torch.zeros_like(self._evaluated)
        return evaluated

    @torch.no_grad()
    def add_loss(self, name: str, loss: torch.Tensor, share: float) -> None:
        """Add one rank's summand of a balancing loss (without its coefficient).

        Args:
            name: its ``moe_router_load_balancing_type``, or ``POLICY_LOSS``.
            loss: the summand.
            share: the part of a loss that this rank contributes, 1 / (ranks that share its tokens).
        """
        self._step_sums[_INDEX[f"sum_{name}"]] += loss.detach().double().reshape(())
        self._step_sums[_INDEX[f"terms_{name}"]] += share

    def add_rows(self, rows: float | torch.Tensor) -> None:
        """Add the rows that this rank's experts computed for one micro-batch."""
        self._step_sums[_INDEX["rows"]] += rows

    def add_trimmed(self, slots: torch.Tensor) -> None:
        """Add the slots of one micro-batch that ``budget.max_rows_factor`` took away."""
        self._step_sums[_INDEX["trimmed"]] += slots

    def end_step(self) -> None:
        """Close an optimizer step: its load per expert is kept apart, for MaxVio per batch."""
        if self.has_reader:
            # New objects, so that a snapshot can hold the old ones.
            self._sums = self._sums + self._step_sums
            self._slots_of_steps = [*self._slots_of_steps, self._step_slots_E.clone()]
        self._clear_step()

    def snapshot(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The closed steps of the interval, for :meth:`restore`; copies nothing."""
        return self._sums, self._slots_of_steps

    def restore(self, snapshot: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
        """Forget what came after a snapshot."""
        self._sums, self._slots_of_steps = snapshot
        self._clear_step()

    def flat(self, max_k: int) -> torch.Tensor:
        """The sums since the last :meth:`clear` as one vector, to be added up over ranks.

        Args:
            max_k: the histogram is padded to ``max_k + 1`` bins, so that layers line up.
        """
        padding = self._sums.new_zeros(max_k - self.max_k)
        return torch.cat((self._sums + self._step_sums, padding, *self._slots_of_steps))

    def clear(self) -> None:
        """Start a new logging interval."""
        self._sums = torch.zeros_like(self._sums)
        self._slots_of_steps = []
        self._clear_step()

    def _clear_step(self) -> None:
        self._step_sums.zero_()
        self._step_slots_E.zero_()


def describe(total: torch.Tensor, num_experts: int, max_k: int, steps: int) -> dict[str, object]:
    """Turn the sum of :meth:`LayerMetrics.flat` over all ranks into the run log's numbers.

    Args:
        total: float64 on the CPU, ``LayerMetrics.width(num_experts, max_k, steps)`` long.
        num_experts: E.
        max_k: largest number of experts a token can get.
        steps: optimizer steps in the interval.

    Returns:
        Means per token, load fractions, the mean over steps of MaxVio (max_e load_e / mean load
        − 1) and rows per step, under the names of ``reporting.schema.LayerMetrics``. Without a
        token means and MaxVio are NaN, as a calm and balanced layer's are 0.
    """
    products = total[: len(_ROWS) ** 2].view(len(_ROWS), len(_ROWS)).tolist()
    sums = {name: float(total[i]) for name, i in _INDEX.items()}

    def product(first: str, second: str) -> float:
        return float(products[_ROW[first]][_ROW[second]])

    counted = product("counted", "counted")
    tokens = max(counted, 1.0)
    high_h, high_f = product("counted", "high_entropy"), product("counted", "high_energy")
    vacuum = product("high_entropy", "high_energy")
    states = (counted - high_h - high_f + vacuum, high_h - vacuum, high_f - vacuum, vacuum)
    histogram = total[_SUMS : _SUMS + max_k + 1]
    slots_SE = total[_SUMS + max_k + 1 :].reshape(steps, num_experts)
    mean_load_S = slots_SE.mean(dim=1).clamp_min(1e-12)
    violations_S = slots_SE.amax(dim=1) / mean_load_S - 1.0
    busy_S = slots_SE.sum(dim=1) > 0
    slots_E = slots_SE.sum(dim=0)
    load_E = slots_E / slots_E.sum().clamp_min(1.0)

    def mean(name: str) -> float:
        return _ratio(product("counted", name), counted)

    def spread(name: str) -> float:
        variance = _ratio(product(name, name), counted) - mean(name) ** 2
        return math.sqrt(variance if not variance < 0 else 0.0)

    return {
        "tokens": int(counted),
        "energy_mean": mean("energy"),
        "energy_std": spread("energy"),
        "entropy_mean": mean("entropy"),
        "entropy_std": spread("entropy"),
        "zscore_mean": mean("zscore"),
        "zscore_std": spread("zscore"),
        "k_eff": _ratio(float(slots_E.sum()), counted),
        "k_histogram": (histogram / tokens).tolist(),
        "states": [state / tokens for state in states],
        "omega_mean": mean("omega"),
        "load": load_E.tolist(),
        "utilisation_entropy": float(torch.special.entr(load_E).sum()),
        "max_vio": float(violations_S[busy_S].mean()) if bool(busy_S.any()) else math.nan,
        "balancing_loss": {
            loss: sums[f"sum_{loss}"] / sums[f"terms_{loss}"]
            for loss in LOSSES
            if sums[f"terms_{loss}"] > 0
        },
        "rows": sums["rows"] / steps,
        "trimmed": sums["trimmed"] / steps,
        "nonfinite": int(sums["valid"] - counted),
    }


def interval_statistics(total: torch.Tensor, measure: str, mean: torch.Tensor) -> torch.Tensor:
    """What ``UncertaintyStatistics.commit`` takes, from the sums of an interval over all ranks.

    Args:
        total: as in :func:`describe`, on the device.
        measure: ``energy`` or ``entropy``.
        mean: the ū that deviations are taken from.
    """
    row, counted = _ROW[measure], _ROW["counted"]
    products = total[: len(_ROWS) ** 2].view(len(_ROWS), len(_ROWS))
    count, first, second = products[counted, counted], products[counted, row], products[row, row]
    shift = first - count * mean
    squares = second - 2.0 * mean * first + count * mean.square()
    return torch.stack((shift, squares, count, total[_INDEX["valid"]] - count))


def describe_evaluation(total: torch.Tensor) -> dict[str, object]:
    """Turn :meth:`LayerMetrics.take_evaluated`, summed over all ranks, into the run log's numbers.

    Returns:
        Under the names of ``reporting.schema.LayerValidation``; MaxVio is of the loads over the
        whole set, unlike that of :func:`describe`.
    """
    slots_E, tokens = total[:-1], float(total[-1])
    mean_load = float(slots_E.mean())
    return {
        "tokens": int(tokens),
        "k_eff": _ratio(float(slots_E.sum()), tokens),
        "load": (slots_E / slots_E.sum().clamp_min(1.0)).tolist(),
        "max_vio": _ratio(float(slots_E.max()), mean_load) - 1.0,
    }


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan
