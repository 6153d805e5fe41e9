"""Tokenizers for data preparation that give the ids Megatron's own tokenizer gives in training.

Each class repeats the calls that ``megatron.core.tokenizers.text.libraries`` makes with Megatron's
default arguments (0.19); ``tests/data/test_data_tokenizers.py`` holds the two together. As in
Megatron, a special token that is spelled out in the text becomes that special token.
"""

import base64
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from uar_megatron.data.engines import ENGINES, open_engine
from uar_megatron.errors import DataError

# Megatron's own constants (tiktoken_tokenizer.py: `v2` pattern, seven names, 1000 special ids).
_TIKTOKEN_MAX_VOCAB = 2**17
_TIKTOKEN_SPECIAL_IDS = 1000
_TIKTOKEN_KEYS = {"rank", "token_bytes", "token_str"}
_TIKTOKEN_SPECIAL_NAMES = ("<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>")
_TIKTOKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_HF_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
_EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")


class Encoder(Protocol):
    """What data preparation needs from a tokenizer.

    Attributes:
        name: short name for logs and the sidecar file.
        vocab_size: every id is below it; what Megatron pads to get the embedding's rows.
        eod: id that ends a document.
        path: the tokenizer's file or folder, ``None`` for ``bytes``.
        sha256: of the tokenizer's file (of all its files one after the other, if it has several).
        megatron_args: the ``--tokenizer-*`` arguments that select the same tokenizer in training.
        note: something the user must know before training with it, else empty.
    """

    name: str
    vocab_size: int
    eod: int
    path: Path | None
    sha256: str | None
    megatron_args: tuple[str, ...]
    note: str

    def encode(self, text: str) -> Sequence[int] | np.ndarray:
        """The ids of a text, without an end-of-document id."""
        ...

    def encode_many(self, texts: Sequence[str]) -> Sequence[Sequence[int] | np.ndarray]:
        """The ids of each text, as ``encode`` gives them; faster where the library is."""
        ...


def build_encoder(spec: str) -> Encoder:
    """Build an encoder from ``hf:PATH``, ``tiktoken:PATH``, ``sentencepiece:PATH`` or ``bytes``.

    ``gigatoken:PATH`` is ``hf:PATH`` encoded by another library, by far the fastest.

    Raises:
        DataError: unknown kind, missing file, missing library, or a tokenizer that cannot be used.
    """
    if spec == "bytes":
        return BytesEncoder()
    kind, path = tokenizer_location(spec)
    if kind in ENGINES:
        return HuggingFaceEncoder(path, kind)
    return TiktokenEncoder(path) if kind == "tiktoken" else SentencePieceEncoder(path)


def tokenizer_location(spec: str) -> tuple[str, Path]:
    """Kind and path of a tokenizer other than ``bytes``; raises DataError as ``build_encoder``."""
    kind, _, location = spec.partition(":")
    if kind not in (*ENGINES, "tiktoken", "sentencepiece") or not location:
        raise DataError(
            f"tokenizer {spec!r} is not understood\n"
            "  allowed: hf:PATH, tiktoken:PATH, sentencepiece:PATH, bytes, gigatoken:PATH"
        )
    path = Path(location)
    if not path.exists():
        raise DataError(
            f"tokenizer {spec!r}: no such file or folder: {path}\n"
            "  remedy:  give a local path; nothing is downloaded"
        )
    return kind, path


def fingerprint(spec: str) -> str | None:
    """SHA-256 as in ``Encoder.sha256``, without loading the tokenizer."""
    if spec == "bytes":
        return None
    kind, path = tokenizer_location(spec)
    return _sha256(_hf_files(_hf_location(path)) if kind in ENGINES else [path])


class _OneByOne(ABC):
    """For libraries that gain nothing from many texts at once."""

    @abstractmethod
    def encode(self, text: str) -> Sequence[int] | np.ndarray:
        """The ids of a text."""

    def encode_many(self, texts: Sequence[str]) -> list[Sequence[int] | np.ndarray]:
        """The ids of each text."""
        return [self.encode(text) for text in texts]


class BytesEncoder(_OneByOne):
    """UTF-8 bytes as ids 0..255, as Megatron's byte-level tokenizer; 256 ends a document.

    Megatron offers no ``--tokenizer-type`` for bytes. Training needs only the vocabulary and the
    end-of-document id, which ``NullTokenizer`` with 257 entries supplies. The byte-level default of
    0 for that id is not used: it is also the byte NUL.
    """

    name = "bytes"
    vocab_size = 257
    eod = 256
    path: Path | None = None
    sha256: str | None = None
    megatron_args: tuple[str, ...] = (
        *("--tokenizer-type", "NullTokenizer"),
        *("--vocab-size", "257"),
    )
    note = ""

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8)


class HuggingFaceEncoder:
    """A folder or file that ``transformers.AutoTokenizer`` reads (``HuggingFaceTokenizer``).

    Special tokens that the tokenizer itself adds (a leading BOS, say) are kept, as in Megatron.
    """

    def __init__(self, path: Path, engine: str = "hf") -> None:
        path = _hf_location(path)
        self.name = f"{engine}:{path.resolve().name}"
        self.path: Path | None = path
        self.note = ""
        self.tokenizer = _load_auto_tokenizer(path)
        self.vocab_size = len(self.tokenizer)
        self.eod = self._end_of_document()
        self.sha256: str | None = _sha256(_hf_files(path))
        self.megatron_args: tuple[str, ...] = (
            *("--tokenizer-type", "HuggingFaceTokenizer"),
            *("--tokenizer-model", str(path)),
        )
        # What transformers made of the files, so that no class of its own is needed to encode.
        self.content: str = self.tokenizer.backend_tokenizer.to_str()
        self._engine = open_engine(engine, self.content)

    def encode(self, text: str) -> Sequence[int] | np.ndarray:
        return self._engine.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> Sequence[Sequence[int] | np.ndarray]:
        return self._engine.encode_many(texts)

    def _end_of_document(self) -> int:
        # Megatron takes eos, and the separator where there is no eos.
        token = self.tokenizer.eos_token or self.tokenizer.sep_token
        if token is None:
            vocabulary = self.tokenizer.get_vocab()
            token = next((name for name in _EOD_NAMES if name in vocabulary), None)
            if token is None:
                raise DataError(
                    f"tokenizer {self.path}: has no end-of-document token\n"
                    "  remedy:  name one as eos_token in a tokenizer_config.json beside it"
                )
            self.note = (
                f"{self.path} names no end-of-document token; {token!r} was used. Megatron finds "
                "it only in a folder with tokenizer.json and a tokenizer_config.json holding "
                f'{{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "{token}"}}.'
            )
        return int(self.tokenizer.convert_tokens_to_ids(token))


class TiktokenEncoder(_OneByOne):
    """A tiktoken vocabulary in Megatron's JSON form (``TikTokenizer``).

    The file is a list of ``{"rank", "token_bytes", "token_str"}``; ids below 1000 are special.
    Megatron's defaults apply: pattern ``v2``, at most 131072 ids in all, ``</s>`` ends a document.
    """

    def __init__(self, path: Path) -> None:
        self.name = f"tiktoken:{path.name}"
        self.path: Path | None = path
        self.note = ""
        ranks = _tiktoken_ranks(path)
        self.vocab_size = _TIKTOKEN_SPECIAL_IDS + len(ranks)
        self.eod = _TIKTOKEN_SPECIAL_NAMES.index("</s>")
        self.sha256: str | None = _sha256([path])
        self.megatron_args: tuple[str, ...] = (
            *("--tokenizer-type", "TikTokenizer"),
            *("--tokenizer-model", str(path)),
            *("--vocab-size", str(self.vocab_size)),
        )
        fillers = range(len(_TIKTOKEN_SPECIAL_NAMES), _TIKTOKEN_SPECIAL_IDS)
        names = (*_TIKTOKEN_SPECIAL_NAMES, *(f"<SPECIAL_{i}>" for i in fillers))
        self._encoding = _import_optional("tiktoken").Encoding(
            name=self.name,
            pat_str=_TIKTOKEN_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={name: i for i, name in enumerate(names)},
        )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._encoding.encode(text, allowed_special="all")
        return ids


class SentencePieceEncoder(_OneByOne):
    """A SentencePiece model (``SentencePieceTokenizer``); its eos ends a document."""

    def __init__(self, path: Path) -> None:
        self.name = f"sentencepiece:{path.name}"
        self.path: Path | None = path
        self.note = ""
        self._processor = _import_optional("sentencepiece").SentencePieceProcessor()
        try:
            self._processor.Load(str(path))
        except (OSError, RuntimeError) as error:
            raise DataError(f"tokenizer {path}: not a SentencePiece model: {error}") from error
        self.vocab_size = int(self._processor.get_piece_size())
        self.eod = int(self._processor.eos_id())
        if self.eod < 0:
            raise DataError(f"tokenizer {path}: this SentencePiece model has no eos piece")
        self.sha256: str | None = _sha256([path])
        self.megatron_args: tuple[str, ...] = (
            *("--tokenizer-type", "SentencePieceTokenizer"),
            *("--tokenizer-model", str(path)),
        )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode_as_ids(text)
        return ids


def _load_auto_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if path.is_file():  # a lone file is what AutoTokenizer would look up on the hub as well
            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        return AutoTokenizer.from_pretrained(
            str(path), use_fast=True, trust_remote_code=False, local_files_only=True
        )
    # transformers raises almost anything (OSError, ValueError, a bare Exception from Rust).
    except Exception as error:
        reason = re.sub(r"\s+", " ", str(error))[:300]
        raise DataError(f"tokenizer {path}: transformers cannot load it: {reason}") from error


def _hf_location(path: Path) -> Path:
    """The folder of a ``tokenizer.json``: only from there transformers reads the special tokens."""
    beside = path.parent / "tokenizer_config.json"
    return path.parent if path.name == "tokenizer.json" and beside.exists() else path


def _hf_files(path: Path) -> list[Path]:
    """The files that hold the vocabulary: ``tokenizer.json`` alone where there is one."""
    if path.is_file():
        return [path]
    if (path / "tokenizer.json").exists():
        return [path / "tokenizer.json"]
    return [path / name for name in _HF_FILES if (path / name).exists()]


def _tiktoken_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes to id, as Megatron reads them (``reload_mergeable_ranks``)."""
    if path.suffix != ".json":
        raise DataError(
            f"tokenizer {path}: Megatron reads tiktoken vocabularies from .json files only, a list "
            'of {"rank", "token_bytes", "token_str"}'
        )
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        entries = entries[: _TIKTOKEN_MAX_VOCAB - _TIKTOKEN_SPECIAL_IDS]
        ranks = {
            base64.b64decode(entry["token_bytes"]): rank + _TIKTOKEN_SPECIAL_IDS
            for rank, entry in enumerate(entries)
        }
        ordered = all(entry["rank"] == rank for rank, entry in enumerate(entries))
        keys = all(entry.keys() == _TIKTOKEN_KEYS for entry in entries)  # Megatron asserts it
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"tokenizer {path}: not a tiktoken vocabulary: {error!r}") from error
    single_bytes = all(ranks.get(bytes([i])) == i + _TIKTOKEN_SPECIAL_IDS for i in range(256))
    if not keys or not ordered or len(ranks) != len(entries) or not single_bytes:
        raise DataError(
            f"tokenizer {path}: not a tiktoken vocabulary: entries must have just rank, "
            "token_bytes and token_str, ranks must count up from 0, the first 256 tokens must be "
            "the bytes in order, and no token may occur twice"
        )
    return ranks


def _import_optional(library: str) -> Any:
    try:
        return __import__(library)
    except ModuleNotFoundError as error:
        raise DataError(
            f"this tokenizer needs {library}, which is not installed\n"
            "  remedy:  pip install 'uar-megatron[tokenizers]'"
        ) from error


def _sha256(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()
