"""Evaluations of several runs in the layout of the paper's Table 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from uar_megatron.errors import DataError
from uar_megatron.evaluation.results import load_results
from uar_megatron.evaluation.tasks import benchmarks
from uar_megatron.sweep.render import MISSING, Cells, latex, markdown

Value = Callable[[dict[str, Any]], float | None]


def make_table1(sources: Sequence[Path], form: str = "markdown") -> str:
    """Return the table of evaluations.

    Args:
        sources: files of results, or runs that have some. Those with one run name are seeds of one
            row: their mean and standard error.
        form: ``markdown``, ``csv`` or ``latex``.

    Raises:
        DataError: a source has no results, or those with one name are not of seeds of one run.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for source in sources:
        results = load_results(source)
        of = rows.setdefault(str(results["run"]), [])
        _check_seed(source, results, of)
        of.append(results)
    columns = _columns([r for of in rows.values() for r in of])
    if form == "csv":
        frame = pd.DataFrame(
            [_numbers(columns, of) for of in rows.values()], index=pd.Index(rows, name="run")
        )
        return frame.to_csv().rstrip("\n")
    cells = Cells(
        ["", "seeds", *(title for title, _, _ in columns)],
        [
            [name, str(len(of)), *(_text(value, of, digits) for _, value, digits in columns)]
            for name, of in rows.items()
        ],
        _notes(rows),
    )
    return latex(cells) if form == "latex" else markdown(cells)


def _check_seed(source: Path, results: dict[str, Any], others: list[dict[str, Any]]) -> None:
    for other in others:
        what = _why_no_seed(results, other)
        if what:
            raise DataError(
                f"results: {source} is of run {results['run']} like another one, but {what}\n"
                "  remedy:  evaluate it with a name of its own: run.name=…"
            )


def _why_no_seed(results: dict[str, Any], other: dict[str, Any]) -> str:
    """Why two evaluations are not of two seeds of one run; empty where they are."""
    both = (results, other)
    routings = [[of.get(key) for key in ("policy", "budget", "topk")] for of in both]
    if routings[0] != routings[1]:
        return "with another routing"
    trainings = [Path(of.get("checkpoint") or "").parent for of in both]
    if trainings[0] == trainings[1] and results.get("checkpoint"):
        return "of the same training"
    if results.get("iteration") != other.get("iteration"):
        return f"after {results.get('iteration')} steps, not {other.get('iteration')}"
    return ""


def _columns(found: Sequence[dict[str, Any]]) -> list[tuple[str, Value, int]]:
    """Headings, values and digits: FLOPs, the ten tasks in per cent, their mean; then ours."""
    tasks = benchmarks()
    columns: list[tuple[str, Value, int]] = [("FLOPs", _flops_ratio, 3)]
    columns += [(of.title, _accuracy_of(name), 1) for name, of in tasks.items()]
    columns += [("Avg.", _average, 1), ("k_eff", _k_eff, 2)]
    sets = dict.fromkeys(name for results in found for name in results["perplexity"])
    for name in sets:
        columns.append((f"Perplexity {name}", _of_set(name, "perplexity"), 2))
        columns.append((f"MaxVio global {name}", _of_set(name, "max_vio"), 3))
    return columns


def _accuracy_of(task: str) -> Value:
    def value(results: dict[str, Any]) -> float | None:
        acc = results["tasks"].get(task, {}).get("metrics", {}).get("acc")
        return None if acc is None else 100.0 * float(acc)

    return value


def _average(results: dict[str, Any]) -> float | None:
    """Over all ten tasks; a mean over fewer could not be compared."""
    values = [_accuracy_of(name)(results) for name in benchmarks()]
    return None if None in values else fmean(v for v in values if v is not None)


def _used(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The use of experts by data set: of the benchmarks, or else of what there is."""
    tasks = [results["tasks"][name] for name in benchmarks() if name in results["tasks"]]
    if tasks:
        return [of["usage"] for of in tasks if of.get("usage", {}).get("tokens")]
    return [of for of in results["perplexity"].values() if of.get("tokens")]


def _k_eff(results: dict[str, Any]) -> float | None:
    used = _used(results)
    tokens = sum(of["tokens"] for of in used)
    return sum(of["k_eff"] * of["tokens"] for of in used) / tokens if tokens else None


def _flops_ratio(results: dict[str, Any]) -> float | None:
    """Of all tokens together; one in a long context costs more."""
    used = [of for of in _used(results) if "flops_ratio" in of]
    flops = [of["flops_per_token"] * of["tokens"] for of in used]
    top_k = sum(f / of["flops_ratio"] for f, of in zip(flops, used, strict=True))
    return sum(flops) / top_k if top_k else None


def _of_set(name: str, key: str) -> Value:
    def value(results: dict[str, Any]) -> float | None:
        found = results["perplexity"].get(name, {}).get(key)
        return None if found is None else float(found)

    return value


def _numbers(columns: Sequence[tuple[str, Value, int]], of: list[dict[str, Any]]) -> dict[str, Any]:
    record: dict[str, Any] = {"seeds": len(of)}
    for title, value, _ in columns:
        values = [v for v in map(value, of) if v is not None]
        record[title] = fmean(values) if values else math.nan
        record[f"{title} se"] = _error(values)
    return record


def _text(value: Value, of: list[dict[str, Any]], digits: int) -> str:
    values = [v for v in map(value, of) if v is not None]
    if not values:
        return MISSING
    error = _error(values)
    text = f"{fmean(values):.{digits}f}"
    return text if math.isnan(error) else f"{text} ± {error:.{digits}f}"


def _error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _notes(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "Accuracy in per cent, with the shots of the paper's Table 1 unless noted; FLOPs of a "
        "forward over those of Top-K, and k_eff, over the tokens of the tasks; ± standard error "
        "over seeds."
    ]
    known = benchmarks()
    differing: dict[str, list[str]] = {}
    for name, of in rows.items():
        for results in of:
            if results.get("limit"):
                differing.setdefault(f"only the first {results['limit']} documents", []).append(
                    name
                )
            for task, entry in results["tasks"].items():
                if task not in known:
                    continue
                if entry.get("note"):
                    differing.setdefault(f"{task}: {entry['note']}", []).append(name)
                usage = entry.get("usage", {})
                if "usage_of" in usage:
                    text = f"{usage['usage_of']} of {usage['requests']} requests, the others cached"
                    differing.setdefault(f"{task}: FLOPs and k_eff over {text}", []).append(name)
                if entry["shots"] != known[task].shots:
                    differing.setdefault(f"{task}: {entry['shots']}-shot", []).append(name)
    for text, names in differing.items():
        unique = list(dict.fromkeys(names))
        lines.append(f"- {text} ({'all rows' if len(unique) == len(rows) else ', '.join(unique)})")
    return lines
