"""The JSON file beside a dataset that says what it was made from."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class Tokenizer(Protocol):
    """The facts of a tokenizer that a sidecar keeps; an ``Encoder`` has them."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> Path | None: ...
    @property
    def sha256(self) -> str | None: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def eod(self) -> int: ...


class Counts(Protocol):
    """What was counted while a dataset was written."""

    dtype: str
    documents: int
    tokens: int
    empty: int
    text_bytes: int


def sidecar(
    prefix: Path,
    tokenizer: Tokenizer,
    files: Sequence[tuple[Path, int]],
    counts: Counts,
    append_eod: bool,
) -> dict[str, Any]:
    """The content of ``PREFIX.json``.

    Paths are relative to the sidecar, so that a corpus folder can be moved as a whole.

    Args:
        prefix: of the dataset.
        tokenizer: that made it.
        files: the text's files with their sizes in bytes.
        counts: of the dataset.
        append_eod: whether documents end with the end-of-document id.
    """
    return {
        "tokenizer": {
            "name": tokenizer.name,
            "path": relative(tokenizer.path, prefix.parent) if tokenizer.path else None,
            "sha256": tokenizer.sha256,
        },
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "append_eod": append_eod,
        "dtype": counts.dtype,
        "documents": counts.documents,
        "tokens": counts.tokens,
        "empty_documents": counts.empty,
        "text_bytes": counts.text_bytes,
        "sources": [{"path": relative(f, prefix.parent), "bytes": size} for f, size in files],
    }


def relative(path: Path, folder: Path) -> str:
    """The path as seen from a folder."""
    return os.path.relpath(path, folder)
