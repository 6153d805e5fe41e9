"""The UAR section of a configuration: typed, frozen, every field with its meaning and source.

Equations and tables are the paper's ("Uncertainty-Aware Routing for Principled Alignment with MoE
Dynamics"). A bad value is refused with a :class:`~uar_megatron.errors.ConfigError` that lists every
bad field at once.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

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


class Schedule(Section):
    """A value per layer, from the first MoE layer to the last."""

    shape: Literal["constant", "ascending", "descending", "pyramid"]
    """``constant``: the mean of both; ``pyramid``: ``low`` at both ends, ``high`` in the middle."""
    low: Finite
    """Smallest value."""
    high: Finite
    """Largest value."""

    def values(self, count: int) -> list[float]:
        """Return the values of ``count`` layers, linear between ``low`` and ``high``."""
        last = max(count - 1, 1)
        rises = {
            "constant": lambda i: 0.5,
            "ascending": lambda i: i / last,
            "descending": lambda i: 1.0 - i / last,
            "pyramid": lambda i: 1.0 - abs(2.0 * i / last - 1.0),
        }
        rise = rises[self.shape]
        return [self.low + (self.high - self.low) * rise(i) for i in range(count)]


def _form(value: Any) -> str:
    """Which form of a per-layer field a value has: errors then speak of that form alone."""
    if isinstance(value, Mapping | Schedule):
        return "a schedule"
    return "a list" if isinstance(value, list) else "a number"


_FORMS = ("a number", "a list", "a schedule")
PerLayer = Annotated[
    Annotated[Finite, Tag("a number")]
    | Annotated[list[Finite], Tag("a list")]
    | Annotated[Schedule, Tag("a schedule")],
    Discriminator(_form),
]
PerLayerInt = Annotated[
    Annotated[int, Tag("a number")]
    | Annotated[list[int], Tag("a list")]
    | Annotated[Schedule, Tag("a schedule")],
    Discriminator(_form),
]


class StatisticsConfig(Section):
    """ū and σ_u of Eq. 5."""

    mode: Literal["moving", "batch"] = "moving"
    """``moving``: a moving average over optimizer steps; ``batch``: in training the values of the
    micro-batch itself over all ranks that share the layer (one small all-reduce per layer)."""
    momentum: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.9
    """Weight of the past in the moving average, per optimizer step; 0 is the last step alone. The
    paper gives no value. 0.9 is short on purpose: a lagging ū makes k follow the trend of u."""


@dataclass(frozen=True)
class LayerBudget:
    """The budget of one layer; fields as in :class:`BudgetConfig`, in plain numbers."""

    mode: str
    alpha: float
    beta: float
    k_min: int
    k_max: int
    target_mean_k: float
    rounding: str
    gain: float
    segment: int | None
    max_rows_factor: float | None

    def constant_k(self) -> int | None:
        """Return the k that every token gets at every step, or None if tokens can differ."""
        if self.k_min == self.k_max:
            return self.k_min
        if self.mode == "exact" and self.alpha == 0 and self.target_mean_k.is_integer():
            return int(self.target_mean_k)
        if self.mode == "free" and self.alpha == 0:
            return max(self.k_min, min(self.k_max, ROUNDING[self.rounding](self.beta)))
        return None


class BudgetConfig(Section):
    """Adaptive Expansion: k = clamp(round(α·ẑ + β), K_min, K_max) (Eq. 5).

    ``k_min``, ``k_max``, ``target_mean_k`` and ``segment`` hold for other policies too, as those
    say; the rest is of ``policy: uar`` alone.

    α, β, K_min, K_max and the target may differ between layers: a number for all, a list with a
    value for each MoE layer, or a schedule over depth, ``{shape: ascending, low: 1, high: 3}``.
    """

    mode: Literal["free", "mean", "exact"] = "free"
    """``free``: Eq. 5 as it is; the mean of k is whatever the data make it. ``mean``: β moves from
    step to step so that the mean of k meets ``target_mean_k``. ``exact``: in each ``segment`` β is
    shifted so that the k sum to tokens · ``target_mean_k`` (β and ``rounding`` have no effect). The
    last two are not in the paper."""
    alpha: PerLayer = 1.0
    """α (the paper's Table 3: a), experts per σ of uncertainty; 0 gives every token the same k."""
    beta: PerLayer = 2.0
    """β (Table 3: b), experts of a token of average uncertainty, before rounding."""
    k_min: PerLayerInt = 1
    """Fewest experts of a token; 0 leaves it to the residual path. Not in the paper."""
    k_max: PerLayerInt = 4
    """Most experts of a token. Not in the paper."""
    target_mean_k: PerLayer | None = None
    """Mean number of experts in the modes ``mean`` and ``exact``, with ``seq_topk`` and with
    ``relu``; None for ``moe_router_topk``."""
    rounding: Literal["floor", "nearest", "ceil"] = "floor"
    """``floor`` is printed in Eq. 5; it yields fewer experts than Table 3 reports (see README)."""
    gain: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Mode ``mean``: the part of the last step's offset from the target that β is moved by."""
    segment: Annotated[int, Field(ge=1)] | None = None
    """Consecutive tokens of one sequence in which ``exact`` and ``max_rows_factor`` count. None:
    all tokens that a rank has of a micro-batch, so that k depends on the micro-batch size and on
    how tensor and context parallelism cut the sequence; with a segment no layout changes k.
    ``seq_topk`` counts likewise; None: what a rank has of each sequence."""
    max_rows_factor: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """Modes ``free`` and ``mean``: Σk may not exceed this times tokens · ``moe_router_topk``, which
    bounds what a rank sends to experts. Above it β is lowered for that segment: the expansions of
    the least uncertain tokens go first, and the run log counts them. None for no bound."""

    def layers(self, count: int, topk: int) -> list[LayerBudget]:
        """Return the budget of each of ``count`` MoE layers.

        Args:
            count: MoE layers of the whole model, without those for multi-token prediction.
            topk: ``moe_router_topk``.

        Raises:
            ConfigError: a list of another length, K_min > K_max, or a target outside the two.
        """
        target = float(topk) if self.target_mean_k is None else self.target_mean_k
        values = {
            "alpha": _per_layer("alpha", self.alpha, count),
            "beta": _per_layer("beta", self.beta, count),
            "k_min": _per_layer("k_min", self.k_min, count),
            "k_max": _per_layer("k_max", self.k_max, count),
            "target_mean_k": _per_layer("target_mean_k", target, count),
        }
        budgets = [
            LayerBudget(
                mode=self.mode,
                alpha=values["alpha"][i],
                beta=values["beta"][i],
                k_min=round(values["k_min"][i]),
                k_max=round(values["k_max"][i]),
                target_mean_k=values["target_mean_k"][i],
                rounding=self.rounding,
                gain=self.gain,
                segment=self.segment,
                max_rows_factor=self.max_rows_factor,
            )
            for i in range(count)
        ]
        for i, budget in enumerate(budgets):
            where = f" in MoE layer {i + 1} of {count}" if count > 1 else ""
            self._check(budget, where)
            _check_rows(budget, where, topk)
        return budgets

    def _check(self, budget: LayerBudget, where: str) -> None:
        low, high = budget.k_min, budget.k_max
        if low < 0:
            raise ConfigError("uar.budget.k_min", f"{low}{where} is negative", allowed="0 or more")
        if high < 1:
            raise ConfigError("uar.budget.k_max", f"{high}{where} is too low", allowed="1 or more")
        if low > high:
            raise ConfigError(
                "uar.budget.k_min",
                f"k_min is {low}, above k_max = {high}{where}",
                allowed="0 … k_max",
            )
        if self.mode != "free" and not low <= budget.target_mean_k <= high:
            raise ConfigError(
                "uar.budget.target_mean_k",
                f"{budget.target_mean_k:g}{where} cannot be reached between k_min and k_max",
                allowed=f"{low} … {high}",
                remedy="it is moe_router_topk unless set",
            )


def _check_rows(budget: LayerBudget, where: str, topk: int) -> None:
    target, segment = budget.target_mean_k, budget.segment
    if budget.mode == "exact" and segment and not (segment * target).is_integer():
        raise ConfigError(
            "uar.budget.segment",
            f"{segment} tokens · {target:g} experts{where} is no whole number",
            allowed="a segment in which target_mean_k can be met exactly",
        )
    if budget.max_rows_factor is None:
        return
    least = budget.k_min if budget.mode == "free" else max(budget.k_min, target)
    if budget.mode == "exact":
        raise ConfigError(
            "uar.budget.max_rows_factor",
            f"{budget.max_rows_factor:g} in mode exact, whose number of rows is constant",
            remedy="remove it; target_mean_k is the number of rows per token",
        )
    if budget.max_rows_factor * topk < least:
        raise ConfigError(
            "uar.budget.max_rows_factor",
            f"{budget.max_rows_factor:g} · moe_router_topk = {budget.max_rows_factor * topk:g} "
            f"rows per token is less than k_min or target_mean_k = {least:g}{where}",
            allowed=f"{least / topk:g} or more",
        )


def _per_layer(name: str, value: float | list[Any] | Schedule, count: int) -> list[float]:
    if isinstance(value, Schedule):
        return value.values(count)
    if not isinstance(value, list):
        return [float(value)] * count
    if len(value) != count:
        raise ConfigError(
            f"uar.budget.{name}",
            f"a list of {len(value)} values for {count} MoE layers",
            allowed=f"{count} values, one number, or a schedule",
        )
    return [float(v) for v in value]


class ExpansionConfig(Section):
    """When Adaptive Expansion sets in. Steps count from where UAR was switched on."""

    start_step: Annotated[int, Field(ge=0)] = 0
    """Before this optimizer step every token gets ``moe_router_topk`` experts, routed by Megatron's
    own code: a run that UAR is attached to first gathers statistics."""
    ramp_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which α goes linearly from 0, and β from the middle of the interval that rounds to
    ``moe_router_topk``, to their values. Not in the paper."""


class CLBConfig(Section):
    """Calibrated Load Balancing: the epistemic mask ω (Eq. 6) and its threshold θ_t."""

    enabled: bool = False
    """Weight the auxiliary losses by ω and the bias update by λ."""
    start_step: Annotated[int, Field(ge=0)] = 0
    """First optimizer step with a mask (Table 2: Start@10k, 20k); before it ω ≡ 1 and λ ≡ 1."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which θ_t goes from ``theta_start`` to ``theta`` (Table 2: Warmup)."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Shape of that way."""
    units: Literal["sigma", "absolute"] = "sigma"
    """Of θ and ``width``: ``sigma`` compares ẑ, in units of σ_u; ``absolute`` compares u itself, in
    units of the logits (energy) or nats (entropy)."""
    theta_start: Finite = -3.0
    """θ at ``start_step``: so low that almost no token is shielded. Not in the paper."""
    theta: Finite = 0.0
    """Final θ: tokens below it are shielded from balancing. Not in the paper."""
    width: Positive = 0.25
    """Width s of the sigmoid in ω = floor + (1 − floor)·sigmoid((ẑ − θ_t)/s). Not in the paper."""
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Least weight of a token: some balancing is left for the most certain ones."""
    lambda_hi: NonNegative = 1.0
    """λ_hi of Eq. 7: weight of tokens above θ_t in the bias update."""
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
    recentre: bool = False
    """Subtract the mean after each update. Selection does not change; the bias cannot drift."""


class TopPConfig(Section):
    """``policy: top_p``. Bounds are ``budget.k_min`` and ``budget.k_max``."""

    p: Annotated[float, Field(gt=0, le=1)] = 0.4
    """p of Eq. 17: probability that a token's experts must collect; the default is that of "Harder
    Tasks Need More Experts"."""
    entropy_coeff: NonNegative = 1e-4
    """Coefficient of the mean router entropy in the loss (that paper's dynamic loss, its value)."""


class ReLUConfig(Section):
    """``policy: relu``. The experts per token are steered to ``budget.target_mean_k``."""

    initial_coeff: Positive = 1e-8
    """λ of the L1 loss at the first step (ReMoE's value)."""
    multiplier: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 1.2
    """α: what λ is multiplied or divided by at each optimizer step (ReMoE's value)."""


class SinkhornConfig(Section):
    """``policy: sinkhorn_selective``. The paper's own values are not known."""

    probability: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Part of the training steps that are routed by the transport plan."""
    cost: Literal["softmax", "logits"] = "softmax"
    """C: the router's probabilities or its logits."""
    xi: Positive = 0.5
    """ξ, the weight of the plan's entropy, in units of C."""
    iterations: Annotated[int, Field(ge=1)] = 100
    """Sinkhorn iterations."""


class StatesConfig(Section):
    """Borders between the four routing states (Figure 3); they only classify, for the run log."""

    entropy: Finite | None = None
    """H*, nats; None for ½·ln E."""
    energy: Finite | None = None
    """F*, in units of the logits; None for −τ·ln E, the energy of a router that says nothing."""


class ObserveConfig(Section):
    """Signals beyond the run log's, which change nothing of the training."""

    interval: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between observations of a step's tokens: joint histogram of entropy and
    energy, Σz, classes of tokens, router norms, biases. 0 for never."""
    probe_interval: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between the expensive ones: similarity of experts, and how a fixed batch of
    training data is routed (stability, local consistency). 0 for never."""
    probe_sequences: Annotated[int, Field(ge=1)] = 4
    """Sequences of the probe batch, of each data-parallel rank."""
    segment: Annotated[int, Field(ge=1)] = 16
    """Tokens of a segment for local routing consistency."""


class UARConfig(Section):
    """Everything that uncertainty-aware routing adds to a Megatron run."""

    policy: str = "topk"
    """``topk``: Megatron's own routing; ``uar``: Adaptive Expansion by ``budget``; ``top_p``,
    ``relu``, ``seq_topk``, ``sinkhorn_selective``; or ``module:Class``, a policy of your own."""
    uncertainty: Literal["energy", "entropy"] = "energy"
    """u: the free energy F (Eq. 4) or the router entropy H (Eq. 3)."""
    temperature: Positive = 1.0
    """τ of Eq. 3 and 4."""
    statistics: StatisticsConfig = StatisticsConfig()
    """Moving statistics ū and σ_u."""
    budget: BudgetConfig = BudgetConfig()
    """Adaptive Expansion."""
    expansion: ExpansionConfig = ExpansionConfig()
    """When Adaptive Expansion sets in."""
    weights: Literal["megatron", "softmax_all", "renormalised", "renormalised_to_K"] = "megatron"
    """Weights of a token's experts. ``megatron``: by ``moe_router_pre_softmax`` (softmax) or
    normalised (sigmoid, sqrtsoftplus). ``softmax_all``: the softmax over all experts, so that the
    sum grows with k. ``renormalised``: sum 1; one expert alone then gives the router no gradient.
    ``renormalised_to_K``: their sum is that of the best ``moe_router_topk`` whatever k is."""
    clb: CLBConfig = CLBConfig()
    """Calibrated Load Balancing."""
    bias: BiasConfig = BiasConfig()
    """Aux-loss-free bias."""
    top_p: TopPConfig = TopPConfig()
    """Top-p routing."""
    relu: ReLUConfig = ReLUConfig()
    """ReLU routing."""
    sinkhorn: SinkhornConfig = SinkhornConfig()
    """Selective Sinkhorn routing."""
    observe: ObserveConfig = ObserveConfig()
    """The observatory."""
    options: dict[str, Any] = {}
    """Settings of a policy of your own, handed to it as they are."""
    states: StatesConfig = StatesConfig()
    """Borders of the routing states."""
    kernel_backend: Literal["auto", "triton", "torch"] = "auto"
    """What routes and permutes: fused Triton kernels or plain torch. ``auto``: the kernels on a
    GPU, if they know the other settings; the log says which and why. ``triton`` never falls back.
    At steps that are stock Megatron's, Megatron's own code runs."""
    consistency_interval: Annotated[int, Field(ge=0)] = 100
    """Optimizer steps between comparisons of the routing state of all ranks that share a layer; a
    run whose ranks disagree stops and names them. The first step is compared too; 0 for never."""


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
    path = [str(part) for part in issue["loc"] if part not in _FORMS]
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
    if issue["type"] == "missing":
        return ConfigError(name, "is missing", remedy=f"set {path[-1]}")
    allowed = issue["msg"].removeprefix("Input should be ")
    field_info = owner.model_fields.get(path[-1]) if path else None
    has_default = field_info is not None and not field_info.is_required()
    remedy = f"default: {field_info.default}" if has_default and field_info is not None else None
    value = issue["input"]
    if isinstance(value, Mapping):
        value = f"a section with {', '.join(map(str, value)) or 'nothing'}"
    return ConfigError(name, f"{value!r} is not allowed", allowed=allowed, remedy=remedy)


def _owner(section: type[Section], path: list[str]) -> type[Section]:
    """The section that ``path`` leads to; an item of a list belongs to the list's section."""
    for part in path:
        if part.isdigit():
            continue
        field = section.model_fields[part]
        found = [c for c in _types(field.annotation) if issubclass(c, Section)]
        if not found or field.annotation is None:
            return section
        section = found[0]
    return section


def _types(annotation: Any) -> list[type]:
    """The classes that an annotation is made of."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _types(argument)]
