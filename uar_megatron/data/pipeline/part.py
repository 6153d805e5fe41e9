"""One shard to one part: tokenized documents in the work folder, there whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from uar_megatron.data.encoding import Encoded, batches, encode_documents
from uar_megatron.data.engines import open_engine
from uar_megatron.data.files import fsync, put_json, sha256_of
from uar_megatron.data.index_file import token_dtype, write_index
from uar_megatron.data.pipeline.holdout import KEY, key_function
from uar_megatron.data.pipeline.plan import (
    PARTS,
    TOKENIZER,
    Plan,
    Shard,
    TokenizerFacts,
    keeps_tokenizer,
)
from uar_megatron.data.pipeline.pretokenized import token_batches
from uar_megatron.data.readers import read_documents
from uar_megatron.data.tokenizers import Encoder, build_encoder
from uar_megatron.errors import DataError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class DiskFullError(DataError):
    """Nothing more can be written: going on with other shards is of no use."""


@dataclass(frozen=True)
class Part:
    """What a finished part holds; its record. A part without documents has no other files.

    Attributes:
        shard, shard_bytes, shard_sha256: the input file as it was read.
        documents, tokens, empty, text_bytes: counts; ``empty`` documents were left out.
        files: SHA-256 by suffix.
    """

    shard: str
    shard_bytes: int
    shard_sha256: str
    documents: int
    tokens: int
    empty: int
    text_bytes: int
    files: dict[str, str]


def part_prefix(out: Path, shard: Shard) -> Path:
    """Path of a part without suffix."""
    return out / PARTS / shard.source / f"{shard.index:06}"


def read_part(out: Path, shard: Shard) -> Part | None:
    """The record of a shard's part; ``None`` if it is not finished.

    Raises:
        DataError: the record is damaged, not of this shard, or cannot be read.
    """
    path = Path(f"{part_prefix(out, shard)}.done")
    try:
        part = Part(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not the record of a part: {error!r}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if part.shard != shard.path:
        raise DataError(f"{path}: is the record of {part.shard}, not of {shard.path}")
    return part


class LightEncoder:
    """The tokenizer of a plan, without what only loading it takes (for ``hf``: torch)."""

    def __init__(self, facts: TokenizerFacts, content: str) -> None:
        self.name, self.vocab_size, self.eod = facts.name, facts.vocab_size, facts.eod
        self.path, self.sha256 = facts.path, facts.sha256
        self.megatron_args, self.note = facts.megatron_args, facts.note
        self._engine = open_engine(facts.spec.partition(":")[0], content)

    def encode(self, text: str) -> Sequence[int] | np.ndarray:
        """The ids of a text."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> Sequence[Sequence[int] | np.ndarray]:
        """The ids of each text."""
        return self._engine.encode_many(texts)


def open_encoder(plan: Plan, out: Path) -> Encoder:
    """The encoder of a plan."""
    if not keeps_tokenizer(plan.tokenizer.spec):
        return build_encoder(plan.tokenizer.spec)
    path = out / PARTS / TOKENIZER
    try:
        return LightEncoder(plan.tokenizer, path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def build_part(plan: Plan, out: Path, shard: Shard, encoder: Encoder) -> Part:
    """Tokenize a shard and write its part, the record last.

    Raises:
        DataError: the shard is damaged or changes meanwhile, or another process is at work on it.
        DiskFullError: there is no space left.
    """
    prefix = part_prefix(out, shard)
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        with _locked(Path(f"{prefix}.bin"), shard) as stream:
            part = read_part(out, shard)  # finished by another process since we looked?
            if part is None:
                part = _write_part(plan, shard, encoder, prefix, stream)
                put_json(Path(f"{prefix}.done"), asdict(part))
    except OSError as error:
        kind = DiskFullError if error.errno in _NO_SPACE else DataError
        raise kind(f"{shard.path}: its part {prefix}.bin cannot be written: {error}") from error
    Path(f"{prefix}.error").unlink(missing_ok=True)
    return part


@contextmanager
def _locked(path: Path, shard: Shard) -> Iterator[BinaryIO]:
    """The file, open and ours alone; emptied when what is done with it fails.

    It keeps its name all the time: whoever has it open later than we has this file, not a copy
    that nobody sees. The lock goes with the process.
    """
    with open(path, "ab") as stream:  # makes it, and empties nothing before the lock
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{shard.path}: another process is tokenizing it\n"
                "  remedy:  wait for it; start every --node once"
            ) from error
        except OSError:
            pass  # a file system without locks; one process per --node needs none
        try:
            yield stream
        except BaseException:
            stream.truncate(0)
            raise


def _write_part(plan: Plan, shard: Shard, encoder: Encoder, prefix: Path, stream: BinaryIO) -> Part:
    stream.truncate(0)
    dtype = token_dtype(encoder.vocab_size)
    written = hashlib.sha256()
    lengths = [np.empty(0, dtype=np.int32)]
    keys = [np.empty(0, dtype=KEY)]
    empty = text_bytes = 0
    before = _size_and_time(shard)
    with Path(shard.path).open("rb", buffering=0) as file:
        raw = _Hashed(file, shard)
        for encoded in _encoded(plan, shard, encoder, raw):
            data = encoded.ids.astype(dtype).tobytes()
            stream.write(data)
            written.update(data)
            lengths.append(np.array(encoded.lengths, dtype=np.int32))
            empty += encoded.empty
            text_bytes += sum(encoded.sizes)
            if plan.recipe.validation:
                pairs = zip(encoded.keys, encoded.sizes, strict=True)
                keys.append(np.array(list(pairs), dtype=KEY))
        size = raw.finish()
    if _size_and_time(shard) != before or size != before[0]:
        raise DataError(
            f"{shard.path}: has changed while it was read ({size} bytes of {before[0]})\n"
            "  remedy:  give the same command again when nothing writes to it"
        )
    stream.flush()
    os.fsync(stream.fileno())
    files = {".bin": written.hexdigest()}
    write_index(Path(f"{prefix}.idx"), dtype, lambda: lengths)
    suffixes = [".idx"]
    if plan.recipe.validation:
        np.concatenate(keys).tofile(f"{prefix}.key")
        suffixes.append(".key")
    for suffix in suffixes:
        fsync(Path(f"{prefix}{suffix}"))
        files[suffix] = sha256_of(Path(f"{prefix}{suffix}"))
    counts = np.concatenate(lengths)
    return Part(
        shard=shard.path,
        shard_bytes=size,
        shard_sha256=raw.digest.hexdigest(),
        documents=len(counts),
        tokens=int(counts.sum(dtype=np.int64)),
        empty=empty,
        text_bytes=text_bytes,
        files=files,
    )


def _size_and_time(shard: Shard) -> tuple[int, int]:
    try:
        found = Path(shard.path).stat()
    except OSError as error:
        raise DataError(f"{shard.path}: cannot be read: {error}") from error
    return found.st_size, found.st_mtime_ns


def _encoded(plan: Plan, shard: Shard, encoder: Encoder, raw: _Hashed) -> Iterator[Encoded]:
    """The shard's documents, tokenized, in their order."""
    source, recipe = plan.source(shard.source), plan.recipe
    path, append_eod = Path(shard.path), recipe.append_eod
    key_of = key_function(recipe.seed) if recipe.validation else None
    if source.tokens:
        yield from token_batches(
            path, raw, source.tokens, encoder.eod, encoder.vocab_size, append_eod, key_of
        )
        return
    documents = read_documents(path, raw, source.json_field, source.separator)
    for batch in batches(documents):
        yield encode_documents(encoder, batch, append_eod, key_of)


class _Hashed(io.RawIOBase):
    """A shard's bytes, hashed while they are read."""

    def __init__(self, raw: io.FileIO, shard: Shard) -> None:
        self.digest = hashlib.sha256()
        self._raw, self._shard = raw, shard
        self._size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            count = self._raw.readinto(buffer)
        except OSError as error:
            raise DataError(
                f"{self._shard.path}: cannot be read at byte {self._size}: {error}"
            ) from error
        self.digest.update(memoryview(buffer)[:count])
        self._size += count
        return count

    def finish(self) -> int:
        """Read what a decompressor left; return how many bytes there were in all."""
        while self.read(1 << 20):
            pass
        return self._size
