"""Files with the results of evaluations."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uar_megatron.errors import ConfigError, DataError

KIND = "uar evaluation"
VERSION = 1
_MEANING = {"identity": "checkpoint or configuration"}


def save_results(results: Mapping[str, Any], path: Path) -> None:
    """Write results as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    temporary.replace(path)


def kept_results(path: Path, head: Mapping[str, Any], tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tasks and data sets of a file that an evaluation may add to.

    Args:
        path: the file; it need not be there.
        head: what must be as it is there: identity, run, limit.
        tasks: shots and note of the tasks that will be evaluated, which must be as they are there.

    Raises:
        ConfigError: the file is of another evaluation.
        DataError: it is no file of results.
    """
    if not path.exists():
        return {"tasks": {}, "perplexity": {}}
    found = load_results(path)
    differing = [_MEANING.get(key, key) for key, value in head.items() if found.get(key) != value]
    for name, wanted in tasks.items():
        there = found["tasks"].get(name, wanted)
        differing += [f"{key} of {name}" for key in wanted if there.get(key) != wanted[key]]
    if differing:
        raise ConfigError(
            "output",
            f"{path} exists, of another evaluation (another {', '.join(differing)})",
            remedy="name another file with --output, or move this one away",
        )
    return {key: found[key] for key in ("tasks", "perplexity")}


def add_tasks(kept: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return results of tasks with new ones; a task's usage is that over more of its requests.

    An evaluation that a cache answers has less of it than the one before.
    """
    added = dict(kept)
    for name, entry in new.items():
        there = kept.get(name, {}).get("usage")
        is_less = there and _covered(there) > _covered(entry["usage"])
        added[name] = {**entry, "usage": there} if is_less else entry
    return added


def _covered(usage: Mapping[str, Any]) -> float:
    return float(usage.get("usage_of", math.inf))


def is_results(path: Path) -> bool:
    """Whether there are results: a file of them, or a run that has some."""
    return path.suffix == ".json" or (path / "evaluation").is_dir()


def load_results(path: Path) -> dict[str, Any]:
    """Read a file of results, or the newest of a run.

    Raises:
        DataError: it is not such a file.
    """
    if path.is_dir():
        found = sorted((path / "evaluation").glob("*.json"))
        if not found:
            raise DataError(
                f"results: {path} has no evaluation\n  remedy:  uar eval {path} --tasks uar"
            )
        path = found[-1]
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"results: {path} cannot be read ({error})") from error
    if not isinstance(results, dict) or results.get("kind") != KIND:
        raise DataError(f"results: {path} is no file that `uar eval` has written")
    if results.get("version") != VERSION:
        raise DataError(
            f"results: {path} has version {results.get('version')}\n  allowed: {VERSION}\n"
            "  remedy:  evaluate again"
        )
    return results
