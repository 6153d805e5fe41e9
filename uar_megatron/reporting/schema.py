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
    max_vio: float
    """Mean over the interval's batches of max_e load_e / mean load − 1."""
    balancing_loss: dict[str, float]
    """Auxiliary losses that are on, by Megatron's name, without their coefficients."""
    bias_mean: float | None
    bias_max_abs: float | None
    """The selection bias; None without one."""
    beta: float | None
    """β as steered by the budget mode ``mean``; None in the others."""
    rows: float
    """Rows computed by experts, all ranks, per optimizer step."""
    trimmed: float = 0.0
    """Slots that ``budget.max_rows_factor`` took away, all ranks, per optimizer step."""
    nonfinite: int
    """Tokens whose energy or entropy was not finite."""


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
    k_eff: float | None
    """Mean over MoE layers."""
    layers: list[LayerMetrics]


class Validation(Record):
    """Losses of the validation sets after ``step`` optimizer steps."""

    kind: Literal["validation"] = "validation"
    step: int
    losses: dict[str, float]
    """Cross-entropy per token by set, nats; its exponential is the perplexity."""


class End(Record):
    """A process stopped training; a killed one leaves no such record."""

    kind: Literal["end"] = "end"
    step: int
    """Optimizer steps taken."""
    reason: str
    """``finished``, ``SIGTERM``, the error, or why Megatron stopped early."""


AnyRecord = Start | Step | Validation | End
_ADAPTER: TypeAdapter[AnyRecord] = TypeAdapter(Annotated[AnyRecord, Field(discriminator="kind")])


def parse_record(line: str | bytes) -> AnyRecord:
    """Read one line; raises pydantic's ValidationError when it is not a record."""
    return _ADAPTER.validate_json(line)
