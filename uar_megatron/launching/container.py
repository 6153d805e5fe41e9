"""What a run in a container would not find there: only the current folder and ``--mounts`` are."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uar_megatron.errors import ConfigError
from uar_megatron.experiment import Experiment

_PATHS = (
    *("save", "tensorboard_dir", "data_cache_path", "pretrained_checkpoint"),
    *("tokenizer_model", "per_split_data_args_path"),
)
_DATA = ("data_path", "train_data_path", "valid_data_path", "test_data_path")


def refuse_what_is_not_mounted(run: Experiment, mounts: str | None) -> None:
    """Refuse a run whose files or folders its container would not have.

    A path must be in a mount by its name and, where it leads over links, by where they end.

    Args:
        run: to be started in a container.
        mounts: ``SRC:DST,…``, beside the current folder.

    Raises:
        ConfigError: a path is outside; the message has the missing mounts.
    """
    ends = [end for mount in (mounts or "").split(",") for end in mount.split(":")[:2] if end]
    mounted = [Path.cwd(), *(form for end in ends for form in _forms(end))]
    outside = [
        (field, form, is_prefix)
        for field, path, is_prefix in _paths(run)
        for form in _forms(path)
        if not any(form.is_relative_to(folder) for folder in mounted)
    ]
    if not outside:
        return
    folders = [
        form.parent if is_prefix or form.is_file() else form for _, form, is_prefix in outside
    ]
    missing = dict.fromkeys(f"{folder}:{folder}" for folder in folders)
    field, form, _ = outside[0]
    raise ConfigError(
        field,
        f"{form} is not in the container, which has {', '.join(map(str, mounted))}",
        remedy="--mounts " + ",".join([*([mounts] if mounts else []), *missing]),
    )


def _forms(path: str) -> list[Path]:
    """A path as it is named, from the root, and where it leads."""
    named = Path.cwd() / path
    return list(dict.fromkeys([named, named.resolve()]))


def _paths(run: Experiment) -> Iterator[tuple[str, str, bool]]:
    """Field, path, and whether that is the beginning of files' names."""
    yield "run.dir", run.run.dir, False
    for field in _PATHS:
        if run.megatron.get(field):
            yield field, run.megatron[field], False
    for field in _DATA:
        for prefix in _prefixes(run.megatron.get(field)):
            yield field, prefix, True
    blend = run.megatron.get("per_split_data_args_path")
    # One that cannot be read is refused with the data.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        for words in json.loads(Path(blend).read_text(encoding="utf-8")).values() if blend else ():
            for prefix in _prefixes(words):
                yield "per_split_data_args_path", prefix, True


def _prefixes(words: Any) -> Iterator[str]:
    """Those among Megatron's words of a blend, whose weights are numbers."""
    for word in words.split() if isinstance(words, str) else words or ():
        try:
            float(word)
        except ValueError:
            yield word
