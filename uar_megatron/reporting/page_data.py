"""What the page's scripts draw from: bounded, rounded, the same bytes for the same log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from uar_megatron.reporting.schema import Observation
from uar_megatron.reporting.series import Array, Series, mean
from uar_megatron.reporting.view import View

STEPS = 240
"""Steps that a curve is drawn with at most."""
CELLS = 120_000
"""Numbers of all layer metrics of a run at most."""
_LOAD_CELLS = 40_000
_HISTOGRAM_CELLS = 120_000

METRICS: dict[str, tuple[str, str]] = {
    "energy_mean": ("Free energy F, mean", "units of the logits"),
    "energy_std": ("Free energy F, std", "units of the logits"),
    "entropy_mean": ("Router entropy H, mean", "nats"),
    "entropy_std": ("Router entropy H, std", "nats"),
    "k_eff": ("Active experts k", "experts per token"),
    "vacuum": ("Share of state IV (vacuum)", "share of tokens"),
    "max_vio": ("Load violation MaxVio", "max / mean − 1"),
    "utilisation_entropy": ("Entropy of the use of experts", "nats"),
    "balancing_loss": ("Balancing loss", "without coefficient"),
    "bias_max_abs": ("Selection bias, largest", "score units"),
    "bias_mean": ("Selection bias, mean", "score units"),
    "omega_mean": ("Epistemic weight ω, mean", ""),
    "zscore_mean": ("Lag of the statistics, mean ẑ", "σ"),
    "flops_ratio": ("FLOPs over Top-K", ""),
}
"""Name → what it is, and its unit."""


class Signal(NamedTuple):
    """What an observed signal is, its unit, and the setting that turns it on."""

    title: str
    unit: str
    setting: str


SIGNALS: dict[str, Signal] = {
    "logit_sum_mean": Signal("Evidence Σz, mean", "units of the logits", "uar.observe.interval"),
    "router_norm": Signal("Norm of the router", "Frobenius norm", "uar.observe.interval"),
    "weight_similarity": Signal(
        "Similarity of expert weights", "mean cosine of two experts", "uar.observe.probe_interval"
    ),
    "output_similarity": Signal(
        "Similarity of expert outputs", "mean cosine of two experts", "uar.observe.probe_interval"
    ),
    "stability": Signal(
        "Stability of routing between probes", "Jaccard overlap", "uar.observe.probe_interval"
    ),
}
"""Fields of ``LayerObservation`` with one number for each layer."""


def page_data(views: Sequence[View]) -> dict[str, Any]:
    """Everything the page draws, as JSON values."""
    return {
        "metrics": METRICS,
        "signals": SIGNALS,
        "runs": [_run(view) for view in views],
    }


def metric(series: Series, name: str) -> Array:
    """One of ``METRICS``: steps × layers."""
    if name == "vacuum":
        return series.states()[:, :, 3]
    if name == "balancing_loss":
        return series.balancing_loss()
    return series.of_layer(name)


def thresholds(view: View) -> tuple[float, float]:
    """H* and F* of the four states, as configured or by default."""
    start = view.run.starts[-1] if view.run.starts else None
    uar = start.config.get("uar", {}) if start else {}
    states = uar.get("states") or {}
    log_experts = math.log(start.num_experts) if start and start.num_experts > 0 else 0.0
    entropy, energy = states.get("entropy"), states.get("energy")
    temperature = uar.get("temperature", 1.0)
    return (
        0.5 * log_experts if entropy is None else entropy,
        -temperature * log_experts if energy is None else energy,
    )


def _run(view: View) -> dict[str, Any]:
    series = view.series
    tables = {name: metric(series, name) for name in METRICS} if series.layers else {}
    tables = {name: table for name, table in tables.items() if np.isfinite(table).any()}
    width = max(1, len(series.layers) * max(1, len(tables)))
    rows = _evenly(len(series.steps), max(40, min(STEPS, CELLS // width)))
    overall, _ = view.phases
    start = view.run.starts[-1] if view.run.starts else None
    entropy, energy = thresholds(view)
    return {
        "label": view.label,
        "layers": series.layers,
        "experts": start.num_experts if start else series.loads.shape[2],
        "topk": start.topk if start else None,
        "entropy_threshold": _rounded(entropy),
        "energy_threshold": _rounded(energy),
        "steps": [series.steps[i] for i in rows],
        "loss": _rounded(series.of_step("loss")[rows]),
        "metrics": {name: _rounded(table[rows]) for name, table in tables.items()},
        "states": _rounded(series.states()[rows]) if tables else [],
        "loads": _loads(series),
        "resumed": view.run.resumed_at,
        "phases": overall.spans,
        "validations": {
            name: [
                [v.step, _rounded(v.losses[name])] for v in view.run.validations if name in v.losses
            ]
            for name in dict.fromkeys(n for v in view.run.validations for n in v.losses)
        },
        "observations": _observations(view),
    }


def _loads(series: Series) -> dict[str, Any]:
    loads = series.loads
    if not loads.size:
        return {"steps": [], "values": []}
    rows = _evenly(len(loads), max(4, min(48, _LOAD_CELLS // (loads.shape[1] * loads.shape[2]))))
    return {"steps": [series.steps[i] for i in rows], "values": _rounded(loads[rows], 3)}


def _observations(view: View) -> dict[str, Any]:
    found = view.run.observations
    rows = _evenly(len(found), 120)
    tables = {name: view.series.observed(name) for name in SIGNALS}
    return {
        "steps": [found[i].step for i in rows],
        "signals": {n: _rounded(t[rows]) for n, t in tables.items() if np.isfinite(t).any()},
        "histograms": _histograms(found, view.series.layers),
        "classes": _classes(found),
        "cache": _cache(found, view.series.layers),
    }


def _histograms(found: Sequence[Observation], layers: Sequence[int]) -> list[dict[str, Any]]:
    """Histograms of few observations, as [row, column, tokens] of the cells that hold some."""
    there = [o for o in found if o.entropy_bins and any(m.histogram for m in o.layers)]
    if not there:
        return []
    filled = max(sum(1 for m in there[-1].layers for row in m.histogram or [] for n in row if n), 1)
    parts = []
    for i in _evenly(len(there), max(2, min(24, _HISTOGRAM_CELLS // (3 * filled)))):
        observation = there[i]
        tables = {m.layer: m.histogram for m in observation.layers}
        parts.append(
            {
                "step": observation.step,
                "entropy": _edges(observation.entropy_bins),
                "energy": _edges(observation.energy_bins),
                "layers": [_sparse(tables.get(layer)) for layer in layers],
            }
        )
    return parts


def _sparse(table: list[list[int]] | None) -> list[int] | None:
    """Row, column, tokens, row, column, tokens, …"""
    if table is None:
        return None
    return [n for i, row in enumerate(table) for j, v in enumerate(row) if v for n in (i, j, v)]


def _edges(edges: Any) -> list[float] | None:
    return None if edges is None else [edges.low, edges.high, edges.bins]


def _classes(found: Sequence[Observation]) -> dict[str, Any] | None:
    """Token classes at the last observation that has them, mean over layers."""
    last = next((o for o in reversed(found) if any(m.classes for m in o.layers)), None)
    if last is None:
        return None
    by_name: dict[str, list[tuple[float, ...]]] = {}
    for m in last.layers:
        for c in m.classes or []:
            numbers = (c.tokens, c.energy_mean, c.entropy_mean, c.k_eff)
            by_name.setdefault(c.name, []).append(numbers)
    rows = [
        [name, *(_rounded(sum(column) / len(column)) for column in zip(*values, strict=True))]
        for name, values in by_name.items()
    ]
    return {"step": last.step, "rows": rows}


def _cache(found: Sequence[Observation], layers: Sequence[int]) -> dict[str, Any] | None:
    """Cache hit rates at the last probe: by size, of each layer."""
    last = next((o for o in reversed(found) if any(m.cache_hit_rates for m in o.layers)), None)
    if last is None:
        return None
    rates = {m.layer: m.cache_hit_rates or {} for m in last.layers}
    sizes = sorted({size for rate in rates.values() for size in rate}, key=lambda s: int(s))
    return {
        "step": last.step,
        "segment": last.segment,
        "sizes": sizes,
        "rates": [[_rounded(rates.get(n, {}).get(size)) for size in sizes] for n in layers],
    }


def layer_mean(series: Series, name: str) -> Array:
    """A metric's mean over layers: one number per step."""
    return mean(metric(series, name), 1)


def _evenly(count: int, most: int) -> list[int]:
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _rounded(values: Any, digits: int = 4) -> Any:
    """Numbers with few digits; None for what is not finite."""
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, list):
        return [_rounded(value, digits) for value in values]
    if values is None or not math.isfinite(values):
        return None
    short = float(f"{values:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short
