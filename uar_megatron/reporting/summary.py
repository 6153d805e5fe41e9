"""Runs in a few numbers, as JSON and as text."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from uar_megatron.errors import UARError
from uar_megatron.reporting.phases import Phases
from uar_megatron.reporting.runlog import Run
from uar_megatron.reporting.schema import Step
from uar_megatron.reporting.view import View


def summarise(run: Run, unigram: dict[str, float] | None = None) -> dict[str, Any]:
    """Return the numbers of a run.

    Args:
        run: the run.
        unigram: perplexity of a unigram model of the training data on each validation set.

    Returns:
        Under ``validation``, for each set: final and best loss, perplexity, whether the loss fell
        at every evaluation, and the unigram model's perplexity over the final one. Beside it
        steps, resumes, k_eff early (first tenth) and late (last quarter), MaxVio late, FLOPs over
        those of Top-K late, tokens per second, TFLOP/s per rank.
    """
    late = run.steps[run.part(0.75, 1.0)]
    return {
        "run": run.starts[-1].run if run.starts else None,
        "steps": run.steps[-1].step if run.steps else 0,
        "resumed_at": run.resumed_at,
        "train_loss": run.steps[-1].loss if run.steps else None,
        "validation": {
            name: _validation(run, name, (unigram or {}).get(name)) for name in _set_names(run)
        },
        "k_eff": {"early": _k_eff(run.steps[run.part(0.0, 0.1)]), "late": _k_eff(late)},
        "max_vio_late": _mean([m.max_vio for s in late for m in s.layers]),
        "flops_ratio_late": _mean([s.flops_ratio for s in late if s.flops_ratio is not None]),
        "tokens_per_second": _mean([s.tokens_per_second for s in run.steps]),
        "throughput": _mean([s.throughput for s in run.steps if s.throughput is not None]),
    }


def describe(view: View, unigram: dict[str, float] | None = None) -> dict[str, Any]:
    """Return what ``summarise`` does, with phases, findings, and notes on what is missing."""
    overall, layers = view.phases
    return summarise(view.run, unigram) | {
        "run": view.label,
        "phases": {"mean": asdict(overall), "layers": [asdict(p) for p in layers]},
        "findings": [asdict(f) for f in view.findings],
        "notes": view.notes,
    }


def perplexity(loss: float) -> float:
    """The exponential of a loss; infinite where it is too large for a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def write_summary(
    views: Sequence[View], folder: Path, name: str, unigram: dict[str, float] | None = None
) -> str:
    """Write ``name.json`` and ``name.md`` into ``folder``; return the text.

    The JSON is an object for one run and a list for several; what is not finite is null.
    """
    summaries = [describe(view, unigram) for view in views]
    text = "\n\n".join(_text(s, v) for s, v in zip(summaries, views, strict=True))
    data = _finite(summaries[0] if len(summaries) == 1 else summaries)
    replace_text(folder / f"{name}.json", json.dumps(data, indent=1, allow_nan=False) + "\n")
    replace_text(folder / f"{name}.md", text + "\n")
    return text


def read_unigram(manifest: Path) -> dict[str, float]:
    """Perplexities of a unigram model by validation set, from a corpus' ``manifest.json``.

    Raises:
        UARError: the manifest cannot be read.
    """
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))["unigram"]
    except (OSError, ValueError, KeyError) as error:
        raise UARError(f"{manifest}: not a corpus manifest with unigram figures") from error
    return {split.removeprefix("valid_"): values["perplexity"] for split, values in entries.items()}


def replace_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _validation(run: Run, name: str, unigram: float | None) -> dict[str, Any]:
    losses = [v.losses[name] for v in run.validations if name in v.losses]
    final = perplexity(losses[-1])
    # One evaluation that was not finite hides no other.
    finite = [loss for loss in losses if math.isfinite(loss)]
    return {
        "evaluations": len(losses),
        "final_loss": losses[-1],
        "best_loss": min(finite, default=None),
        "perplexity": final,
        "fell_at_every_evaluation": all(b < a for a, b in itertools.pairwise(losses)),
        "unigram_perplexity": unigram,
        "unigram_over_model": None if unigram is None else unigram / final,
    }


def _set_names(run: Run) -> list[str]:
    return list(dict.fromkeys(name for v in run.validations for name in v.losses))


def _k_eff(steps: Sequence[Step]) -> float | None:
    return _mean([s.k_eff for s in steps if s.k_eff is not None])


def _mean(values: Sequence[float]) -> float | None:
    """Mean of the finite ones; None without any."""
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else None


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(summary: dict[str, Any], view: View) -> str:
    resumed = ", ".join(map(str, summary["resumed_at"])) or "never"
    lines = [
        f"# Run {summary['run']}",
        "",
        f"{summary['steps']} steps, resumed at: {resumed}; "
        f"{_shown(summary['tokens_per_second'], 0)} tokens/s, "
        f"{_shown(summary['throughput'], 3)} TFLOP/s per rank",
        "",
        "| validation set | loss | perplexity | unigram perplexity | ratio | fell every time |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name, values in summary["validation"].items():
        fell = "yes" if values["fell_at_every_evaluation"] else "no"
        lines.append(
            f"| {name} | {values['final_loss']:.4f} | {values['perplexity']:.2f} "
            f"| {_shown(values['unigram_perplexity'], 1)} "
            f"| {_shown(values['unigram_over_model'], 2)} "
            f"| {fell} ({values['evaluations']} evaluations) |"
        )
    k_eff = summary["k_eff"]
    lines += [
        "",
        f"Active experts per token: {_shown(k_eff['early'], 2)} in the first tenth of the run, "
        f"{_shown(k_eff['late'], 2)} in the last quarter; "
        f"MaxVio per batch in the last quarter: {_shown(summary['max_vio_late'], 2)}; "
        f"FLOPs over those of Top-K: {_shown(summary['flops_ratio_late'], 3)}.",
        "",
        f"Phases of the mean energy: {phases_text(view.phases[0])}",
    ]
    remarks = [finding.text for finding in view.findings] + view.notes
    if remarks:
        lines += ["", *(f"* {remark}" for remark in remarks)]
    return "\n".join(lines)


def phases_text(phases: Phases) -> str:
    """Phases in one sentence."""
    if phases.reason:
        return f"not yet distinguishable ({phases.reason})."
    spans = ", ".join(f"{name} {start}–{end}" for name, start, end in phases.spans)
    peak = (
        "no energy peak"
        if phases.peak is None
        else (f"energy peak {phases.peak:.3f} at step {phases.peak_step}")
    )
    plateau = "" if phases.plateau is None else f"; plateau {phases.plateau:.3f}"
    return f"{spans}; {peak}{plateau}; confidence {phases.confidence:.0%}."


def _shown(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
