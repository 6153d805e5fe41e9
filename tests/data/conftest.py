"""Tokenizers that several tests of the data pipeline share."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from uar_megatron.data.bpe import train_bpe

PROSE = ("The quick brown fox jumps\n\tover the  lazy dog.\n", "Zwölf Boxkämpfer; def f(x): pass\n")


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real byte-level BPE; read only."""
    return train_bpe(PROSE, 300, tmp_path_factory.mktemp("bpe") / "tokenizer")


@pytest.fixture(scope="session")
def tiktoken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Iterable[str]], Path]:
    """Writes a vocabulary in Megatron's JSON form: the 256 bytes, then the words given."""

    def write(words: Iterable[str]) -> Path:
        tokens = [*(bytes([i]) for i in range(256)), *(word.encode() for word in words)]
        entries = [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": ""}
            for rank, token in enumerate(tokens)
        ]
        path = tmp_path_factory.mktemp("tiktoken") / "vocabulary.json"
        path.write_text(json.dumps(entries))
        return path

    return write
