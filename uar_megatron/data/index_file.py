"""The ``.idx`` file of a Megatron dataset (``megatron.core.datasets.indexed_dataset``, 0.19).

Independent of Megatron on purpose: that brings torch with it, which takes seconds in each process.
"""

import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

# Magic, version, type code, number of sequences, number of documents + 1; then three arrays.
HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_CODES = {name: code for code, name in DTYPES.items()}
_LARGEST_OF_UINT16 = 65499  # Megatron's own bound (``DType.optimal_dtype``)
_BLOCK = 1 << 20


def token_dtype(vocab_size: int) -> str:
    """The numpy name of the type that Megatron would store ids of this vocabulary in."""
    return "uint16" if vocab_size <= _LARGEST_OF_UINT16 else "int32"


def write_index(path: Path, dtype: str, lengths: Callable[[], Iterable[np.ndarray]]) -> None:
    """Write an index of documents of one sequence each, in bounded memory.

    Args:
        path: the ``.idx``.
        dtype: numpy name of the token type.
        lengths: gives the documents' tokens in blocks of any size, each time anew.
    """
    documents = sum(len(block) for block in lengths())
    with path.open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, _CODES[dtype], documents, documents + 1))
        for block in lengths():
            stream.write(block.astype("<i4").tobytes())
        for block in _offsets(lengths(), np.dtype(dtype).itemsize):
            stream.write(block.astype("<i8").tobytes())
        for low in range(0, documents + 1, _BLOCK):
            high = min(low + _BLOCK, documents + 1)
            stream.write(np.arange(low, high, dtype="<i8").tobytes())


def _offsets(lengths: Iterable[np.ndarray], itemsize: int) -> Iterator[np.ndarray]:
    start = 0
    for block in lengths:
        ends = start + np.cumsum(block, dtype=np.int64) * itemsize
        yield np.concatenate(([start], ends))[:-1]
        start = int(ends[-1]) if len(ends) else start


def read_lengths(path: Path) -> np.ndarray:
    """The sequence lengths of an index that was checked before; int32, mapped."""
    with path.open("rb") as stream:
        sequences = HEADER.unpack(stream.read(HEADER.size))[3]
    return np.memmap(path, dtype="<i4", mode="r", offset=HEADER.size, shape=(sequences,))
