"""From text to token ids and back, with the tokenizer that the run was trained with."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from uar_megatron.data.tokenizers import BytesEncoder
from uar_megatron.errors import ConfigError


@dataclass(frozen=True)
class Text:
    """Megatron's tokenizer of the run.

    Attributes:
        tokenizer: Megatron's, or None for bytes (``uar data --tokenizer bytes``).
        vocab_size: ids are below it.
        eod: id that ends a document.
        name: for caches.
    """

    tokenizer: Any
    vocab_size: int
    eod: int
    name: str

    @property
    def _huggingface(self) -> Any:
        """What Megatron's wrapper of a HuggingFace tokenizer wraps; None of another tokenizer."""
        inner = getattr(getattr(self.tokenizer, "_tokenizer", None), "tokenizer", None)
        return inner if callable(inner) else None

    @property
    def prefix(self) -> int:
        """The context of what has none: BOS where HuggingFace's tokenizer has one, else EOD.

        Megatron's other tokenizers may name a BOS, but never put it before a text.
        """
        bos = getattr(self._huggingface, "bos_token_id", None)
        return self.eod if bos is None else int(bos)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Return the ids of a text.

        Args:
            text: any.
            special_tokens: with those that the tokenizer adds by itself, as in the training data.
        """
        if self.tokenizer is None:
            return [int(byte) for byte in BytesEncoder().encode(text)]
        if not special_tokens and self._huggingface is not None:
            return list(self._huggingface(text, add_special_tokens=False).input_ids)
        return [int(i) for i in self.tokenizer.tokenize(text)]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ids."""
        if self.tokenizer is None:
            return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")
        numbers = [int(i) for i in ids]
        if skip_special_tokens and self._huggingface is not None:
            # Megatron's wrapper would keep special tokens that have no role (BOS, EOS, …).
            return str(self._huggingface.decode(numbers, skip_special_tokens=True))
        return str(self.tokenizer.detokenize(numbers, skip_special_tokens=skip_special_tokens))


class NoText(Text):
    """Of a run on token ids that stand for no text."""

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Refuse.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "tokenizer_type",
            "NullTokenizer: this run was trained on ids that stand for no text",
            remedy="evaluate a run on text, or measure its perplexity on Megatron data (--data-path"
            "), which needs no tokenizer",
        )


def text_of(args: argparse.Namespace) -> Text:
    """Return the tokenizer that the arguments name, built by Megatron."""
    from megatron.training import get_tokenizer

    tokenizer = get_tokenizer()
    size, eod = int(tokenizer.vocab_size), int(tokenizer.eod)
    name = str(args.tokenizer_model or args.tokenizer_type)
    if args.tokenizer_type != "NullTokenizer":
        return Text(tokenizer, size, eod, name)
    if (size, eod) == (BytesEncoder.vocab_size, BytesEncoder.eod):
        return Text(None, size, eod, "bytes")
    return NoText(tokenizer, size, eod, name)
