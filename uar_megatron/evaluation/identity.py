"""What an evaluation's answers depend on, as a digest: results and caches of others are told."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from uar_megatron.evaluation.checkpoint import Located, evaluation_only
from uar_megatron.experiment import Experiment


def identity_of(located: Located, experiment: Experiment) -> str:
    """Return a digest of the checkpoint, of the configuration and of the tokenizer.

    The layout is not in it: it does not change what a model says.

    Args:
        located: the checkpoint.
        experiment: the configuration, as evaluated.
    """
    tokenizer = experiment.megatron.get("tokenizer_model")
    content = {
        "checkpoint": [str(located.folder), _state(located.folder / ".metadata")],
        "uar": experiment.uar.model_dump(mode="json"),
        "megatron": evaluation_only(experiment.megatron),
        "tokenizer": _states(Path(str(tokenizer))) if tokenizer else None,
    }
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _state(path: Path) -> list[int] | None:
    """Size and time of change; None of what is not there (a release, a tokenizer of a hub)."""
    if not path.is_file():
        return None
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _states(path: Path) -> dict[str, Any]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {str(file): _state(file) for file in files}
