"""Where records go: the run log, the console, TensorBoard, wandb."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol

from uar_megatron.reporting.schema import (
    End,
    LayerMetrics,
    LayerObservation,
    Observation,
    Record,
    Start,
    Step,
    Validation,
)

_NOT_SCALARS = {"layer", "tokens", "k_histogram", "states", "load", "balancing_loss", "policy"}
STATES = ("consensus", "ambiguity", "stubborn", "vacuum")


class Sink(Protocol):
    """Takes records; ``RunLogWriter`` is one."""

    def write(self, record: Record) -> None:
        """Take one record."""

    def close(self) -> None:
        """Give back what the sink holds."""


class FanOut:
    """Hands each record to every sink; one that fails is reported once and then left out."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)

    def write(self, record: Record) -> None:
        """Hand the record on."""
        for sink in list(self._sinks):
            try:
                sink.write(record)
            # Whatever a logging service raises, the training it watches goes on.
            except Exception as error:
                name = type(sink).__name__
                print(f"{name} failed and is left out from now on: {error!r}", file=sys.stderr)
                self._sinks.remove(sink)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()


class ConsoleSink:
    """One line per record that a person can read."""

    def write(self, record: Record) -> None:
        """Print the record."""
        line = console_line(record)
        if line:
            print(line, flush=True)

    def close(self) -> None:
        """Nothing to give back."""


def console_line(record: Record) -> str | None:
    """Return the console's line for a record."""
    if isinstance(record, Start):
        verb = "resumes" if record.step else "starts"
        return f" uar | {record.run} {verb} at step {record.step} on {record.world_size} ranks"
    if isinstance(record, End):
        return f" uar | stopped at step {record.step}: {record.reason}"
    if isinstance(record, Validation):
        losses = " | ".join(f"{name} {loss:.4f}" for name, loss in record.losses.items())
        return f" uar | step {record.step} | validation loss | {losses}"
    if isinstance(record, Step):
        return f" uar | step {record.step} | loss {_number(record.loss)}" + _routing(record)
    return None


def _routing(step: Step) -> str:
    if not step.layers:
        return ""
    ks = " ".join(f"L{m.layer} {m.k_eff:.2f}" for m in step.layers)
    parts = [
        f"k {_number(step.k_eff)} ({ks})",
        f"energy {_mean(step.layers, 'energy_mean'):.2f}",
        f"entropy {_mean(step.layers, 'entropy_mean'):.2f}",
        f"MaxVio {_mean(step.layers, 'max_vio'):.2f}",
    ]
    if step.layers[0].theta is not None:
        omega = _mean(step.layers, "omega_mean")
        parts.append(f"ω {omega:.2f} θ {step.layers[0].theta:.2f}")
    if step.layers[0].bias_max_abs is not None:
        parts.append(f"|bias| {max(m.bias_max_abs or 0.0 for m in step.layers):.3f}")
    trimmed = sum(m.trimmed for m in step.layers)
    if trimmed:
        parts.append(f"{trimmed:.0f} slots trimmed")
    if step.flops_ratio is not None:
        parts.append(f"FLOPs {step.flops_ratio:.3f} × top-k")
    parts.append(f"{step.tokens_per_second / 1000:.1f}k tok/s")
    if step.throughput is not None:
        parts.append(f"{step.throughput:.3g} TFLOP/s per rank")
    return "".join(f" | {part}" for part in parts)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _mean(layers: Sequence[LayerMetrics], name: str) -> float:
    return sum(getattr(m, name) for m in layers) / len(layers)


def scalars(record: Record) -> dict[str, float]:
    """Return a record's numbers under flat names, for TensorBoard and wandb."""
    if isinstance(record, Validation):
        values = {f"uar/validation_loss/{name}": loss for name, loss in record.losses.items()}
        for name, layers in record.layers.items():
            for m in layers:
                values[f"uar/validation_max_vio/{name}/layer_{m.layer}"] = m.max_vio
                values[f"uar/validation_k_eff/{name}/layer_{m.layer}"] = m.k_eff
        return values
    if isinstance(record, Observation):
        return {
            f"uar/{name}/layer_{layer.layer}": value
            for layer in record.layers
            for name, value in _observed(layer).items()
        }
    if not isinstance(record, Step):
        return {}
    values = {}
    for name in ("tokens_per_second", "k_eff", "flops", "flops_ratio", "throughput"):
        value = getattr(record, name)
        if value is not None:
            values[f"uar/{name}"] = float(value)
    for layer in record.layers:
        numbers = layer.model_dump(exclude=_NOT_SCALARS)
        numbers |= layer.balancing_loss | layer.policy
        numbers |= dict(zip(STATES, layer.states, strict=False))
        for name, value in numbers.items():
            if value is not None:
                values[f"uar/{name}/layer_{layer.layer}"] = float(value)
    return values


_OBSERVED = (
    *("logit_sum_mean", "logit_sum_std", "router_norm"),
    *("weight_similarity", "output_similarity", "stability"),
)


def _observed(layer: LayerObservation) -> dict[str, float]:
    numbers = {name: getattr(layer, name) for name in _OBSERVED}
    numbers |= {f"cache_hit_rate_{n}": hit for n, hit in (layer.cache_hit_rates or {}).items()}
    for group in layer.classes or ():
        for name in ("energy_mean", "entropy_mean", "k_eff"):
            numbers[f"{name}/{group.name}"] = getattr(group, name)
    return {name: value for name, value in numbers.items() if value is not None}


class TensorBoardSink:
    """Scalars to an open ``SummaryWriter``, which stays its owner's."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, record: Record) -> None:
        """Add the record's scalars at its step."""
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.step)  # type: ignore[attr-defined]

    def close(self) -> None:
        """The writer's owner closes it."""


class WandbSink:
    """Scalars to a running wandb run, which stays its owner's."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def write(self, record: Record) -> None:
        """Log the record's scalars at its step, in one call."""
        values = scalars(record)
        if values:
            self._run.log(values, record.step)  # type: ignore[attr-defined]

    def close(self) -> None:
        """The run's owner finishes it."""
