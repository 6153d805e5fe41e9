"""The run log's records. One JSON object per line; NaN and infinities are written as strings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

SCHEMA_VERSION = 1


class Record(BaseModel):
    """Base of all records; fields of a newer minor version are ignored."""

    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="strings")

    schema_version: int = Field(
        default=SCHEMA_VERSION, alias="schema", serialization_alias="schema"
    )

    def to_line(self) -> str:
        """Return the record as one line of JSON, with its newline."""
        return self.model_dump_json(by_alias=True) + "\n"


class LayerMetrics(BaseModel):
    """One MoE layer over one logging interval; means are per token."""

    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="strings")

    layer: int
    """1-based, as Megatron counts; MTP layers follow the others."""
    tokens: int
    """Tokens routed, all ranks."""
    energy_mean: float
    energy_std: float
    """Free energy F (Eq. 4), units of the logits."""
    entropy_mean: float
    entropy_std: float
    """Router entropy H (Eq. 3), nats."""
    zscore_mean: float
    zscore_std: float
    """ẑ. Its mean is the lag of the statistics: how far, in σ_u, the tokens lie above the ū they
    were normalised with; under a steady router it is 0 and the std 1."""
    k_eff: float
    """Experts per token, counted from dispatched slots."""
    k_histogram: list[float]
    """Fraction of tokens with k = 0, 1, … experts."""
    states: list[float]
    """Fractions of tokens in the states I consensus, II ambiguity, III stubborn bias, IV vacuum."""
    omega_mean: float
    """Mean epistemic weight ω (Eq. 6); 1 while no mask is active."""
    theta: float | None
    """Threshold θ_t, in σ_u or the units of u; None while no mask is active."""
    load: list[float]
    """Fraction of dispatched slots per expert."""
    utilisation_entropy: float | None = None
    """Entropy of ``load``, nats: ln E when all experts are used alike."""
    max_vio: float
    """Mean over the interval's batches of max_e load_e / mean load − 1."""
    balancing_loss: dict[str, float]
    """Losses that are on, by Megatron's name, without their coefficients; ``policy_loss`` is the
    policy's own: the mean router entropy (``top_p``), the load-balanced L1 norm (``relu``)."""
    bias_mean: float | None
    bias_max_abs: float | None
    """The selection bias; None without one."""
    policy: dict[str, float] = {}
    """What the policy steers: ``beta`` (β, budget mode ``mean``), ``l1_coeff`` (λ of ``relu``)."""
    rows: float
    """Rows computed by experts, all ranks, per optimizer step."""
    trimmed: float = 0.0
    """Slots that ``budget.max_rows_factor`` took away, all ranks, per optimizer step."""
    nonfinite: int
    """Tokens whose energy or entropy was not finite."""
    flops: float | None = None
    """Forward and backward FLOPs of the whole layer (attention, router, experts), all ranks, per
    optimizer step, counted from ``rows``. None where the architecture's sizes are not modelled."""
    flops_ratio: float | None = None
    """``flops`` over those of the same layer under Top-K."""


class Start(Record):
    """A process began, or resumed, training at ``step``."""

    kind: Literal["start"] = "start"
    time: float
    """Seconds since the epoch."""
    run: str
    step: int
    """Optimizer steps already taken: 0 for a fresh run."""
    world_size: int
    tokens_per_step: int
    """Of a full global batch."""
    num_experts: int
    topk: int
    versions: dict[str, str]
    config: dict[str, Any]
    """The resolved configuration."""


class Step(Record):
    """One logging interval that ends at optimizer step ``step``."""

    kind: Literal["step"] = "step"
    step: int
    interval: int
    """Optimizer steps that this record averages over."""
    loss: float | None
    """Mean cross-entropy per token, nats; None on ranks that do not know it."""
    lr: float | None
    grad_norm: float | None
    skipped: int
    """Steps of the interval that the optimizer skipped."""
    seconds_per_step: float
    """Training alone, without validation and checkpoints."""
    tokens_per_second: float
    tokens_per_step: float | None = None
    """Tokens of the global batch, mean over the interval."""
    flops: float | None = None
    """Forward and backward FLOPs of the whole model, all ranks, per optimizer step: Megatron's
    count, with the rows that experts computed in place of K per token."""
    flops_ratio: float | None = None
    """``flops`` over Megatron's count with K rows per token and MoE layer."""
    throughput: float | None = None
    """``flops`` per second and rank, TFLOP/s; Megatron's ``throughput``."""
    k_eff: float | None
    """Mean over MoE layers."""
    layers: list[LayerMetrics]


class LayerValidation(BaseModel):
    """One MoE layer over one validation set."""

    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="strings")

    layer: int
    tokens: int
    k_eff: float
    """Experts per token, counted from dispatched slots."""
    load: list[float]
    """Fraction of dispatched slots per expert."""
    max_vio: float
    """Global MaxVio: max_e load_e / mean load − 1 of the loads over the whole set."""


class Validation(Record):
    """Losses of the validation sets after ``step`` optimizer steps."""

    kind: Literal["validation"] = "validation"
    step: int
    losses: dict[str, float]
    """Cross-entropy per token by set, nats; its exponential is the perplexity."""
    layers: dict[str, list[LayerValidation]] = {}
    """Routing by set."""


class Edges(BaseModel):
    """Equal bins from ``low`` to ``high``; what lies outside is in the first and the last."""

    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="strings")

    low: float
    high: float
    bins: int


class TokenClass(BaseModel):
    """Tokens of one class in one MoE layer."""

    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="strings")

    name: str
    """``decile_1`` (the rarest token ids) to ``decile_10`` (the most frequent: each decile has a
    tenth of the training tokens), ``domain_<i>`` (i-th data set of the blend)."""
    tokens: int
    energy_mean: float
    entropy_mean: float
    k_eff: float


class LayerObservation(BaseModel):
    """One MoE layer at one step; what was not measured at it is None."""

    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="strings")

    layer: int
    """1-based, as Megatron counts; MTP layers follow the others."""
    tokens: int | None = None
    """Tokens of the step that the token-level signals below are of, all ranks."""
    histogram: list[list[int]] | None = None
    """Tokens by entropy (rows) and energy (columns), in the bins of ``Observation``."""
    logit_sum_mean: float | None = None
    logit_sum_std: float | None = None
    """Σ_e z_e per token: the potential evidence of the paper's appendix G.1."""
    classes: list[TokenClass] | None = None
    """None on pipeline stages that never see token ids."""
    router_norm: float | None = None
    """Frobenius norm of the router's weight."""
    router_row_norms: list[float] | None = None
    """Norm of each expert's row of it."""
    bias: list[float] | None = None
    """Selection bias of each expert; None without one."""
    weight_similarity: float | None = None
    """Mean cosine similarity of the weights of two experts, over all pairs."""
    output_similarity: float | None = None
    """The same of their outputs for the probe batch, mean over tokens."""
    stability: float | None = None
    """Jaccard overlap of the experts of a probe token with those at the last probe, mean over
    tokens; None at the first of a process."""
    cache_hit_rates: dict[str, float] | None = None
    """Local routing consistency: by cache size (number of experts), the part of the slots of a
    segment of the probe batch that its most used experts serve, mean over segments."""


class Observation(Record):
    """Signals that are measured at single steps.

    Those of tokens, norms and the bias are of the forward of step ``step``, so after one update
    less; those of the probe batch and of the experts' weights after the step.
    """

    kind: Literal["observation"] = "observation"
    step: int
    entropy_bins: Edges | None = None
    """Of ``LayerObservation.histogram``, nats: 0 … ln E."""
    energy_bins: Edges | None = None
    """Likewise, units of the logits."""
    segment: int | None = None
    """Tokens of a segment of ``cache_hit_rates``."""
    layers: list[LayerObservation]


class End(Record):
    """A process stopped training; a killed one leaves no such record."""

    kind: Literal["end"] = "end"
    step: int
    """Optimizer steps taken."""
    reason: str
    """``finished``, ``SIGTERM``, the error, or why Megatron stopped early."""


AnyRecord = Start | Step | Validation | Observation | End
_ADAPTER: TypeAdapter[AnyRecord] = TypeAdapter(Annotated[AnyRecord, Field(discriminator="kind")])


def parse_record(line: str | bytes) -> AnyRecord:
    """Read one line; raises pydantic's ValidationError when it is not a record."""
    return _ADAPTER.validate_json(line)
