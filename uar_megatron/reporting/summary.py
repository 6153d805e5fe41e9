"""A run in a few numbers, as JSON and as text."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from uar_megatron.errors import UARError
from uar_megatron.reporting.runlog import Run
from uar_megatron.reporting.schema import Step


def summarise(run: Run, unigram: dict[str, float] | None = None) -> dict[str, Any]:
    """Return the numbers of a run.

    Args:
        run: the run.
        unigram: perplexity of a unigram model of the training data on each validation set.

    Returns:
        Under ``validation``, for each set: final and best loss, perplexity, whether the loss fell
        at every evaluation, and the unigram model's perplexity over the final one. Beside it
        steps, resumes, k_eff early (first tenth) and late (last quarter), MaxVio late, tokens per
        second.
    """
    late = _part(run.steps, 0.75, 1.0)
    return {
        "run": run.starts[-1].run if run.starts else None,
        "steps": run.steps[-1].step if run.steps else 0,
        "resumed_at": run.resumed_at,
        "train_loss": run.steps[-1].loss if run.steps else None,
        "validation": {
            name: _validation(run, name, (unigram or {}).get(name)) for name in _set_names(run)
        },
        "k_eff": {"early": _k_eff(_part(run.steps, 0.0, 0.1)), "late": _k_eff(late)},
        "max_vio_late": _mean([m.max_vio for s in late for m in s.layers]),
        "tokens_per_second": _mean([s.tokens_per_second for s in run.steps]),
    }


def write_summary(run: Run, folder: Path, manifest: Path | None = None) -> str:
    """Write ``summary.json`` and ``summary.md`` into ``folder``; return the text.

    Args:
        run: the run.
        folder: where to write.
        manifest: ``manifest.json`` of the corpus, whose unigram perplexities are compared with.

    Raises:
        UARError: the manifest cannot be read.
    """
    summary = summarise(run, _unigram(manifest) if manifest else None)
    text = _text(summary)
    _replace(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    _replace(folder / "summary.md", text + "\n")
    return text


def _validation(run: Run, name: str, unigram: float | None) -> dict[str, Any]:
    losses = [v.losses[name] for v in run.validations if name in v.losses]
    perplexity = math.exp(losses[-1])
    return {
        "evaluations": len(losses),
        "final_loss": losses[-1],
        "best_loss": min(losses),
        "perplexity": perplexity,
        "fell_at_every_evaluation": all(b < a for a, b in itertools.pairwise(losses)),
        "unigram_perplexity": unigram,
        "unigram_over_model": None if unigram is None else unigram / perplexity,
    }


def _set_names(run: Run) -> list[str]:
    return list(dict.fromkeys(name for v in run.validations for name in v.losses))


def _part(steps: Sequence[Step], start: float, end: float) -> Sequence[Step]:
    """The records between two fractions of a run; at least one."""
    first = min(int(len(steps) * start), max(len(steps) - 1, 0))
    return steps[first : max(int(len(steps) * end), first + 1)]


def _k_eff(steps: Sequence[Step]) -> float | None:
    return _mean([s.k_eff for s in steps if s.k_eff is not None])


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _unigram(manifest: Path) -> dict[str, float]:
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))["unigram"]
    except (OSError, ValueError, KeyError) as error:
        raise UARError(f"{manifest}: not a corpus manifest with unigram figures") from error
    return {split.removeprefix("valid_"): values["perplexity"] for split, values in entries.items()}


def _text(summary: dict[str, Any]) -> str:
    resumed = ", ".join(map(str, summary["resumed_at"])) or "never"
    lines = [
        f"# Run {summary['run']}",
        "",
        f"{summary['steps']} steps, resumed at: {resumed}; "
        f"{_shown(summary['tokens_per_second'], 0)} tokens/s",
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
        f"MaxVio per batch in the last quarter: {_shown(summary['max_vio_late'], 2)}.",
    ]
    return "\n".join(lines)


def _shown(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
