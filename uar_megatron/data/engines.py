"""Libraries that encode with the JSON of a Hugging Face tokenizer, without torch."""

import json
import unicodedata
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from uar_megatron.errors import DataError

ENGINES = ("hf", "gigatoken")
# Where byte-pair libraries are known to differ: white space, contractions, digits, composition,
# scripts, controls, special tokens spelled out, nothing at all.
_PROBE = (
    *("", " ", "  \n\n \t x", "\r\n\r\n\v\f\x85\u2028", "it's IT'S ſ's we'LL 'tis", "\x00\x01\x7f"),
    *(
        "a\u0301 ﬁ ① \u00a0x \u3000 \u200b",
        "中文 测试。日本語テキスト",
        "😀👩👩👧 🇩🇪",
        "1 12 1234567",
    ),
    *("<|endoftext|> b<|endoftext|>", " <|pad|> <|fim_prefix|>|||IP_ADDRESS|||", "İıẞß Ǆ Ω"),
    *("x" * 600, "a" * 20 + " " * 300 + "b", "é" * 70, "def f(x):\n\treturn x**2 # !?\n", "ไทย"),
)


_ASCII = bytes(range(128))
_EMOJI = ((0x1F300, 0x1F650), (0x1F680, 0x1F700), (0x1F900, 0x1FA00))
_BATCHES_PER_CHECK = 16  # a document in so many batches costs some percent


class Engine(Protocol):
    """Encodes as ``tokenizers`` does, the tokenizer's own special tokens included."""

    def encode_many(self, texts: Sequence[str]) -> Sequence[Sequence[int] | np.ndarray]:
        """The ids of each text."""
        ...


class TokenizersEngine:
    """The ``tokenizers`` library, whose ids are Megatron's."""

    def __init__(self, content: str) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(content)
        self._tokenizer.no_truncation()  # Megatron follows neither
        self._tokenizer.no_padding()

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        # Without offsets, which nobody needs here and which cost a third of the time.
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]


class GigatokenEngine:
    """The ``gigatoken`` library: the same ids, many times faster.

    Its tables of letters and of composition are of a later Unicode than those of ``tokenizers``
    (gigatoken 0.10, tokenizers 0.23): documents with characters that they could see
    differently are encoded by ``tokenizers``. The ids are also compared for difficult texts at the
    start, and for a document now and then while it works; where they differ it is refused.
    """

    def __init__(self, content: str) -> None:
        try:
            import gigatoken
        except ModuleNotFoundError as error:
            raise DataError(
                "this tokenizer needs gigatoken, which is not installed\n"
                "  remedy:  pip install 'uar-megatron[fast]', or take hf:PATH"
            ) from error
        try:
            self._tokenizer: Any = gigatoken.Tokenizer.from_json(content)
        except Exception as error:  # a bare one from Rust
            raise DataError(
                f"gigatoken cannot load this tokenizer: {error}\n  remedy:  take hf:PATH"
            ) from error
        self._reference = TokenizersEngine(content)
        self._common = common_characters()
        self._batches = 0
        added = [token["content"] for token in json.loads(content).get("added_tokens") or ()]
        for text in (*_PROBE, *(f"a{token} {token}{token}b" for token in added)):
            self._compare(text)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        if texts and self._batches % _BATCHES_PER_CHECK == 0:
            self._compare(texts[0])
        self._batches += 1
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        if not text.isascii():
            rest = text.encode("utf-8").translate(None, _ASCII).decode("utf-8")
            if not self._common.issuperset(rest):
                return np.array(self._reference.encode_many([text])[0], dtype=np.uint32)
        ids: np.ndarray = self._tokenizer.encode(text)
        return ids

    def _compare(self, text: str) -> None:
        if self._encode(text).tolist() != self._reference.encode_many([text])[0]:
            raise DataError(
                f"gigatoken gives other ids than tokenizers, for one for {text[:40]!r}\n"
                "  remedy:  take hf:PATH"
            )


def common_characters() -> frozenset[str]:
    """Characters that all libraries agree on: those of Unicode 3.2 that never changed, and emoji.

    Later characters are unassigned in one library's tables and letters or combining marks in
    another's.
    """
    old, new = unicodedata.ucd_3_2_0.category, unicodedata.category
    characters = map(chr, range(0x80, 0x110000))
    settled = {c for c in characters if (kind := old(c)) not in ("Cn", "Cs") and kind == new(c)}
    emoji = (chr(code) for low, high in _EMOJI for code in range(low, high))
    return frozenset(settled.union(c for c in emoji if new(c) in ("So", "Sk")))


def open_engine(kind: str, content: str) -> Engine:
    """The engine of a kind in ``ENGINES`` for the content of a ``tokenizer.json``."""
    return GigatokenEngine(content) if kind == "gigatoken" else TokenizersEngine(content)
