"""Is a Megatron dataset on disk whole, and does it fit the model? Reads the index, never the data.

Independent of Megatron on purpose: it takes well under a second at training start-up, and its
errors say what is wrong where Megatron's reader would fail an assertion or read nonsense.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uar_megatron.data.index_file import DTYPES, HEADER, MAGIC
from uar_megatron.errors import DataError

_BLOCK = 1 << 20  # sequences looked at together, to bound memory
_REMEDY = "\n  remedy:  build it again with `uar data` (or scripts/prepare_data.py)"


@dataclass(frozen=True)
class DatasetInfo:
    """What a dataset's index and sidecar say.

    Attributes:
        prefix: path without ``.bin``/``.idx``.
        documents: number of documents.
        sequences: number of sequences; equal to the documents for text.
        tokens: number of token ids in the ``.bin``.
        dtype: numpy name of the token type.
        vocab_size, tokenizer_sha256: of the tokenizer that made it; ``None`` without a sidecar.
    """

    prefix: str
    documents: int
    sequences: int
    tokens: int
    dtype: str
    vocab_size: int | None
    tokenizer_sha256: str | None


def check_dataset(prefix: str | Path, vocab_size: int | None = None) -> DatasetInfo:
    """Check that ``PREFIX.bin`` and ``PREFIX.idx`` are whole, belong together and fit the model.

    The sidecar ``PREFIX.json`` is optional (datasets made by other tools have none); without it
    the vocabulary cannot be compared. The ``.bin`` is not read.

    Args:
        prefix: path without ``.bin``/``.idx``.
        vocab_size: number of token ids the model has, padding included; ``None`` skips the test.

    Raises:
        DataError: a file is missing, corrupt or of the wrong size, or the data was made with a
            larger vocabulary than the model's.
    """
    prefix = str(prefix)
    bin_path, idx_path = Path(prefix + ".bin"), Path(prefix + ".idx")
    for path in (bin_path, idx_path):
        if not path.is_file():
            with_suffix = prefix.endswith((".bin", ".idx"))
            hint = " (the prefix is given without .bin/.idx)" if with_suffix else ""
            raise DataError(f"dataset {prefix}: {path} does not exist{hint}{_REMEDY}")
    try:
        dtype, documents, lengths = _read_index(idx_path)
        sidecar = _read_sidecar(Path(prefix + ".json"))
        bin_bytes = bin_path.stat().st_size
    except OSError as error:
        raise DataError(f"dataset {prefix}: cannot be read: {error}") from error
    tokens = int(lengths.sum(dtype=np.int64))
    if tokens == 0:  # Megatron cannot map an empty file
        raise DataError(f"dataset {prefix}: it holds no tokens{_REMEDY}")
    expected_bytes = tokens * np.dtype(dtype).itemsize
    if bin_bytes != expected_bytes:
        raise DataError(
            f"dataset {prefix}: {bin_path.name} has {bin_bytes} bytes, the index describes "
            f"{tokens} tokens of {dtype} = {expected_bytes} bytes{_REMEDY}"
        )
    info = DatasetInfo(
        prefix=prefix,
        documents=documents,
        sequences=len(lengths),
        tokens=tokens,
        dtype=dtype,
        vocab_size=sidecar["vocab_size"] if sidecar else None,
        tokenizer_sha256=sidecar["tokenizer"]["sha256"] if sidecar else None,
    )
    if sidecar:
        told = tuple(sidecar[key] for key in ("documents", "tokens", "dtype"))
        if told != (documents, tokens, dtype):
            raise DataError(
                f"dataset {prefix}: the sidecar tells of {told[0]} documents and {told[1]} tokens "
                f"of {told[2]}, the index of {documents} and {tokens} of {dtype}{_REMEDY}"
            )
    if vocab_size is not None and info.vocab_size is not None and info.vocab_size > vocab_size:
        raise DataError(
            f"dataset {prefix}: made with a vocabulary of {info.vocab_size} ids, the model has "
            f"{vocab_size}\n  remedy:  train with the tokenizer that made the data, or build the "
            "data again with the model's tokenizer"
        )
    return info


def _read_index(path: Path) -> tuple[str, int, np.ndarray]:
    """Token dtype, number of documents and sequence lengths (int32) of a consistent index."""

    def corrupt(why: str) -> DataError:
        return DataError(f"{path}: corrupt index: {why}{_REMEDY}")

    size = path.stat().st_size
    if size < HEADER.size:
        raise corrupt(f"{size} bytes, too short for a header")
    with path.open("rb") as stream:
        magic, version, code, sequences, bounds = HEADER.unpack(stream.read(HEADER.size))
    if magic != MAGIC:
        raise corrupt("it does not begin as a Megatron index")
    if version != 1:
        raise corrupt(f"version {version}, only 1 is known")
    if code not in DTYPES:
        raise corrupt(f"type code {code} is not an integer type")
    expected = HEADER.size + 12 * sequences + 8 * bounds
    if size not in (expected, expected + sequences):  # multimodal data has one more byte each
        raise corrupt(f"{size} bytes where its header asks for {expected}")
    if sequences == 0 or bounds == 0:
        raise corrupt("it holds no documents")

    buffer = np.memmap(path, mode="r")
    lengths = np.frombuffer(buffer, np.int32, sequences, HEADER.size)
    offset = HEADER.size + lengths.nbytes
    pointers = np.frombuffer(buffer, np.int64, sequences, offset)
    document_ends = np.frombuffer(buffer, np.int64, bounds, offset + pointers.nbytes)

    itemsize = np.dtype(DTYPES[code]).itemsize
    start = 0
    for low in range(0, sequences, _BLOCK):
        block = lengths[low : low + _BLOCK]
        if block.min() < 0:
            raise corrupt("a sequence of negative length")
        ends = start + np.cumsum(block, dtype=np.int64) * itemsize
        begins = np.concatenate(([start], ends[:-1]))
        if not np.array_equal(pointers[low : low + _BLOCK], begins):
            raise corrupt("sequence offsets that do not follow from the lengths")
        start = int(ends[-1])
    if document_ends[0] != 0 or document_ends[-1] != sequences:
        raise corrupt("document bounds that do not cover the sequences")
    if np.any(np.diff(document_ends) < 0):
        raise corrupt("document bounds out of order")
    return DTYPES[code], bounds - 1, lengths


def _read_sidecar(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        sidecar: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for key, kind in (("vocab_size", int), ("documents", int), ("tokens", int), ("dtype", str)):
            if not isinstance(sidecar[key], kind):
                raise TypeError(f"{key} is not of type {kind.__name__}")
        sidecar["tokenizer"]["sha256"]  # must be there
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a sidecar written by uar-megatron: {error!r}") from error
    return sidecar
