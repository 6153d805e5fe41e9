"""The UAR section of a configuration: typed, frozen, every field with its meaning and source.

Equations and tables are the paper's ("Uncertainty-Aware Routing for Principled Alignment with MoE
Dynamics"). A bad value is refused with a :class:`~uar_megatron.errors.ConfigError` that lists every
bad field at once.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from uar_megatron.errors import ConfigError

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
ROUNDING: dict[str, Callable[[float], int]] = {
    "floor": math.floor,
    "nearest": round,
    "ceil": math.ceil,
}


class Section(BaseModel):
    """Base of all sections: frozen, and a key that is not a field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class StatisticsConfig(Section):
    """Moving statistics ū and σ_u of Eq. 5."""

    momentum: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.9
    """Weight of the past in the moving average, per optimizer step; 0 is the last step alone. The
    paper gives no value. 0.9 is short on purpose: a lagging ū makes k follow the trend of u."""


class BudgetConfig(Section):
    """Adaptive Expansion: k = clamp(round(α·ẑ + β), K_min, K_max) (Eq. 5)."""

    mode: Literal["free"] = "free"
    """``free``: Eq. 5 as it is; the mean of k is whatever the data make it."""
    alpha: Finite = 1.0
    """α (the paper's Table 3: a), experts per σ of uncertainty; 0 gives every token the same k."""
    beta: Finite = 2.0
    """β (Table 3: b), experts of a token of average uncertainty, before rounding."""
    k_min: Annotated[int, Field(ge=0)] = 1
    """Fewest experts of a token; 0 leaves it to the residual path. Not in the paper."""
    k_max: Annotated[int, Field(ge=1)] = 4
    """Most experts of a token. Not in the paper."""
    rounding: Literal["floor", "nearest", "ceil"] = "floor"
    """``floor`` is printed in Eq. 5; it yields fewer experts than Table 3 reports (see README)."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.k_min > self.k_max:
            raise ValueError(f"k_min|k_min is {self.k_min}, above k_max = {self.k_max}|0 … k_max")
        return self

    def constant_k(self) -> int | None:
        """Return the k that every token gets, or None if tokens differ (α ≠ 0)."""
        if self.alpha != 0:
            return None
        return max(self.k_min, min(self.k_max, ROUNDING[self.rounding](self.beta)))


class CLBConfig(Section):
    """Calibrated Load Balancing: the epistemic mask ω (Eq. 6) and its threshold θ_t."""

    enabled: bool = False
    """Weight the auxiliary loss by ω and the bias update by λ."""
    start_step: Annotated[int, Field(ge=0)] = 0
    """First optimizer step with a mask (Table 2: Start@10k, 20k); before it ω ≡ 1 and λ ≡ 1."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which θ_t goes linearly from ``theta_start`` to ``theta`` (Table 2: Warmup)."""
    theta_start: Finite = -3.0
    """θ at ``start_step``, in σ_u: so low that almost no token is shielded. Not in the paper."""
    theta: Finite = 0.0
    """Final θ, in σ_u: tokens below it are shielded from balancing. Not in the paper."""
    width: Positive = 0.25
    """Width s of the sigmoid ω = sigmoid((ẑ − θ_t)/s), in σ_u. Not in the paper."""
    lambda_hi: NonNegative = 1.0
    """λ_hi of Eq. 7: weight of tokens with ẑ > θ_t in the bias update."""
    lambda_lo: NonNegative = 0.1
    """λ_lo of Eq. 7: weight of the others; the paper asks for λ_hi ≫ λ_lo."""
    epsilon: Positive = 1e-6
    """ε of Eq. 6."""

    @model_validator(mode="after")
    def _lambdas_in_order(self) -> Self:
        if self.lambda_lo > self.lambda_hi:
            raise ValueError(
                f"lambda_lo|lambda_lo is {self.lambda_lo}, above lambda_hi = {self.lambda_hi}"
                "|0 … lambda_hi"
            )
        return self


class BiasConfig(Section):
    """The aux-loss-free selection bias (Eq. 7), which here works with softmax scores too."""

    enabled: bool = False
    """Keep and update a bias per expert that is added to the scores for selection only."""
    rate: Positive = 1e-3
    """Step of the bias per optimizer step, in score units."""
    update: Literal["sign", "proportional"] = "sign"
    """``sign`` as in Megatron and DeepSeek-V3; ``proportional`` to the relative load offset."""


class StatesConfig(Section):
    """Borders between the four routing states (Figure 3); they only classify, for the run log."""

    entropy: Finite | None = None
    """H*, nats; None for ½·ln E."""
    energy: Finite | None = None
    """F*, in units of the logits; None for −τ·ln E, the energy of a router that says nothing."""


class UARConfig(Section):
    """Everything that uncertainty-aware routing adds to a Megatron run."""

    policy: Literal["topk", "uar"] = "topk"
    """``topk``: Megatron's own routing; ``uar``: Adaptive Expansion by ``budget``."""
    uncertainty: Literal["energy", "entropy"] = "energy"
    """u: the free energy F (Eq. 4) or the router entropy H (Eq. 3)."""
    temperature: Positive = 1.0
    """τ of Eq. 3 and 4."""
    statistics: StatisticsConfig = StatisticsConfig()
    """Moving statistics ū and σ_u."""
    budget: BudgetConfig = BudgetConfig()
    """Adaptive Expansion."""
    clb: CLBConfig = CLBConfig()
    """Calibrated Load Balancing."""
    bias: BiasConfig = BiasConfig()
    """Aux-loss-free bias."""
    states: StatesConfig = StatesConfig()
    """Borders of the routing states."""


def parse_section[AnySection: Section](
    section: type[AnySection], values: Any, prefix: str
) -> AnySection:
    """Build a section from plain values.

    Args:
        section: the class to build.
        values: a mapping (from YAML); None counts as empty.
        prefix: dotted name of the section, for messages.

    Raises:
        ConfigError: naming every bad field, its value, what is allowed and the nearest field.
    """
    try:
        return section.model_validate({} if values is None else values)
    except ValidationError as error:
        problems = [_problem(section, issue, prefix) for issue in error.errors()]
    if len(problems) == 1:
        raise problems[0]
    raise ConfigError(
        prefix, f"{len(problems)} fields are wrong\n" + "\n".join(str(p) for p in problems)
    )


def nearest(name: str, known: Any) -> str | None:
    """Return 'did you mean …?' for the known name most like ``name``, or None."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean '{found[0]}'?" if found else None


def _problem(section: type[Section], issue: Any, prefix: str) -> ConfigError:
    """Say what pydantic found in the user's terms."""
    path = [str(part) for part in issue["loc"]]
    owner = _owner(section, path[:-1])
    if issue["type"] == "value_error":  # from a cross-field check: field|problem|allowed
        field, problem, allowed = str(issue["ctx"]["error"]).split("|")
        return ConfigError(".".join([prefix, *path, field]), problem, allowed=allowed)
    name = ".".join([prefix, *path])
    if issue["type"] == "extra_forbidden":
        known = list(owner.model_fields)
        return ConfigError(
            name, "no such field", allowed=", ".join(known), remedy=nearest(path[-1], known)
        )
    allowed = issue["msg"].removeprefix("Input should be ")
    field_info = owner.model_fields.get(path[-1]) if path else None
    remedy = f"default: {field_info.default}" if field_info is not None else None
    value = issue["input"]
    if isinstance(value, Mapping):
        value = f"a section with {', '.join(map(str, value)) or 'nothing'}"
    return ConfigError(name, f"{value!r} is not allowed", allowed=allowed, remedy=remedy)


def _owner(section: type[Section], path: list[str]) -> type[Section]:
    for part in path:
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, Section))
    return section
