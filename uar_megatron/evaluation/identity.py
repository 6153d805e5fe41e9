"""What an evaluation's answers depend on, as a digest: results and caches of others are told."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from uar_megatron.evaluation.checkpoint import Located, evaluation_only
from uar_megatron.experiment import Experiment

_TOKENIZER_FILES = ("tokenizer_model", "vocab_file", "merge_file", "metadata_path")


def identity_of(located: Located, experiment: Experiment) -> str:
    """Return a digest of the checkpoint, of the configuration and of the tokenizer.

    The layout is not in it: it does not change what a model says.

    Args:
        located: the checkpoint.
        experiment: the configuration, as evaluated.
    """
    tokenizer = [experiment.megatron.get(name) for name in _TOKENIZER_FILES]
    content = {
        "checkpoint": [str(located.folder), _states(located.folder)],
        "uar": experiment.uar.model_dump(mode="json"),
        "megatron": evaluation_only(experiment.megatron),
        "tokenizer": [_states(Path(str(path))) for path in tokenizer if path],
    }
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _states(path: Path) -> dict[str, list[int]]:
    """Size and time of change of each file; none of what is not there (a tokenizer of a hub)."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = {str(file): file.stat() for file in files if file.is_file()}
    return {file: [state.st_size, state.st_mtime_ns] for file, state in found.items()}
