"""What a routing is computed with, and what it returns.

Shapes: ``T`` tokens, ``E`` experts, ``K`` columns of a selection, ``G`` sequences. Tokens are
ordered ``[sequence position, sequence]``: token t belongs to sequence t % G.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MEASURES = ("energy", "entropy")
ROUNDINGS = ("floor", "nearest", "ceil")
UNITS = ("sigma", "absolute")
# Score function -> the weight rules that uar_megatron/policies/scores.py can pair it with.
WEIGHTS = {"softmax": ("as_they_are", "softmax_after"), "sigmoid": ("as_they_are", "renormalised")}


@dataclass(frozen=True)
class Measure:
    """What u is, and how it becomes ẑ = (u − ū)/σ_u.

    Attributes:
        name: u is F (``energy``) or H (``entropy``).
        temperature: τ > 0.
        mean: ū, a scalar tensor (fp32 or fp64) on the logits' device, where the kernel reads it;
            None is 0.
        inverse_sigma: 1/σ_u likewise; 0 where there is no spread. None: every ẑ is 0.
    """

    name: str = "energy"
    temperature: float = 1.0
    mean: torch.Tensor | None = None
    inverse_sigma: torch.Tensor | None = None

    def __post_init__(self) -> None:
        _one_of("measure", self.name, MEASURES)
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive; got {self.temperature}")


@dataclass(frozen=True)
class Budget:
    """k = clamp(round(α·ẑ + β), K_min, K_max) (Eq. 5).

    Attributes:
        alpha: α.
        beta: β, a number or a scalar tensor (fp32 or fp64) on the logits' device.
        k_min: K_min ≥ 0.
        k_max: K_max, at most the width of the selection.
        rounding: ``floor``, ``nearest`` (halves to even) or ``ceil``.
    """

    alpha: float
    beta: float | torch.Tensor
    k_min: int
    k_max: int
    rounding: str = "floor"

    def __post_init__(self) -> None:
        _one_of("rounding", self.rounding, ROUNDINGS)
        if not 0 <= self.k_min <= self.k_max:
            raise ValueError(f"need 0 <= k_min <= k_max; got {self.k_min} and {self.k_max}")


@dataclass(frozen=True)
class Scoring:
    """What experts are chosen by, and the weights of those chosen.

    Attributes:
        function: scores are softmax(z) or sigmoid(z).
        weights: ``as_they_are``: the scores. ``softmax_after`` (with softmax): softmax over the
            chosen logits. ``renormalised`` (with sigmoid): the scores over their chosen sum.
            (Softmax scores over their chosen sum are ``softmax_after``.)
        scaling_factor: multiplies the weights.
        bias_E: fp32, added to the scores for the selection only, or None.
    """

    function: str = "softmax"
    weights: str = "as_they_are"
    scaling_factor: float = 1.0
    bias_E: torch.Tensor | None = None

    def __post_init__(self) -> None:
        _one_of("score function", self.function, tuple(WEIGHTS))
        _one_of(f"weights of {self.function} scores", self.weights, WEIGHTS[self.function])

    @property
    def ranks_logits(self) -> bool:
        """Whether experts are ordered by logits: as in Megatron, where p may underflow to ties."""
        return self.weights == "softmax_after" and self.bias_E is None


@dataclass(frozen=True)
class Mask:
    """ω = floor + (1 − floor)·sigmoid((x − θ)/width) (Eq. 6).

    Attributes:
        theta: θ.
        width: how soft the threshold is, > 0.
        floor: the least ω, in [0, 1].
        units: x is ẑ (``sigma``) or u (``absolute``).
    """

    theta: float
    width: float
    floor: float = 0.0
    units: str = "sigma"

    def __post_init__(self) -> None:
        _one_of("units", self.units, UNITS)
        if not (self.width > 0 and 0 <= self.floor <= 1):
            raise ValueError(
                f"need width > 0 and 0 <= floor <= 1; got {self.width} and {self.floor}"
            )


@dataclass(frozen=True)
class Routed:
    """A routing and what the losses need of it.

    A token is *finite* when logsumexp of its logits is. One that is not has F, H and lse NaN,
    ẑ = 0 and ω = 0, takes the experts 0, 1, 2, … and gives them the weight NaN.

    Attributes:
        index_TK: int32 experts in descending score, ties to the lower index; −1 from k on.
        probs_TK: fp32 weights (differentiable); 0 from k on.
        k_T: int32.
        energy_T: F, fp32.
        entropy_T: H, fp32.
        lse_T: fp32 logsumexp(z) (differentiable).
        statistics: fp64 ``[4]``: Σ(u−ū), Σ(u−ū)² and the number of finite tokens, the number of
            tokens that are not; padding is left out.
        slots_GE: int32 routed slots, padding left out.
        weighted_GE: fp32 Σ_t ω·p (differentiable), p = the scores over their sum; padding left out.
        omega_G: fp32 Σ_t ω; padding left out.
    """

    index_TK: torch.Tensor
    probs_TK: torch.Tensor
    k_T: torch.Tensor
    energy_T: torch.Tensor
    entropy_T: torch.Tensor
    lse_T: torch.Tensor
    statistics: torch.Tensor
    slots_GE: torch.Tensor
    weighted_GE: torch.Tensor
    omega_G: torch.Tensor


@dataclass(frozen=True)
class Measured:
    """The first of two passes, where k depends on all tokens: ``Routed``'s fields of that name."""

    energy_T: torch.Tensor
    entropy_T: torch.Tensor
    statistics: torch.Tensor


def check(
    logits_TE: torch.Tensor, width: int, budget: Budget | torch.Tensor, sequences: int
) -> None:
    """Raise ValueError where sizes do not fit together."""
    tokens, experts = logits_TE.shape
    if not 1 <= width <= experts:
        raise ValueError(f"width must be in [1, {experts}], the number of experts; got {width}")
    if isinstance(budget, Budget) and budget.k_max > width:
        raise ValueError(f"k_max {budget.k_max} exceeds the width of the selection, {width}")
    if isinstance(budget, torch.Tensor) and budget.shape != (tokens,):
        raise ValueError(f"k_T must have shape ({tokens},); got {tuple(budget.shape)}")
    if sequences < 1 or tokens % sequences:
        raise ValueError(f"{tokens} tokens are no whole number of {sequences} sequences")


def _one_of(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what}: one of {', '.join(allowed)}; got {value!r}")
