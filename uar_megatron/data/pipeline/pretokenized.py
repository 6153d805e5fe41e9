"""Documents from arrays of token ids, as AI2's Dolma tools write them."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from uar_megatron.data.encoding import Encoded
from uar_megatron.errors import DataError

_BLOCK_BYTES = 1 << 23
_NUMPY_MAGIC = b"\x93NUMPY"


def token_batches(
    path: Path,
    raw: io.RawIOBase,
    dtype: str,
    eod: int,
    vocab_size: int,
    append_eod: bool,
    key_of: Callable[[bytes], int] | None = None,
) -> Iterator[Encoded]:
    """Split an array of ids into documents at the end-of-document ids.

    Ids after the last end are a document too (the tools that write such arrays fill files to a
    size); it gets an end like the others. Documents without a token are left out.

    A file without any end is refused: no tool writes one, but read as another type, or with the
    end of another tokenizer, every array looks like that.

    Args:
        path: names the file.
        raw: its bytes, read to their end; little-endian ids and nothing else.
        dtype: ``uint16`` or ``uint32``.
        eod: ends a document.
        vocab_size: every id is below it.
        append_eod: keep the ends.
        key_of: gives a document's key from its ids (int32, without the end).

    Raises:
        DataError: an id outside the vocabulary, half an id at the end, numpy's own header, or ids
            of which none ends a document.
    """
    size = np.dtype(dtype).itemsize
    position, ended = 0, False
    rest: list[np.ndarray] = []
    for data in _blocks(raw, size):
        if position == 0 and data.startswith(_NUMPY_MAGIC):
            raise DataError(
                f"{path}: begins with numpy's header, where plain ids are expected\n"
                "  remedy:  write it with ndarray.tofile, as Dolma's tools do"
            )
        if len(data) % size:
            raise DataError(
                f"{path}: cut short: {position * size + len(data)} bytes are not whole ids of "
                f"{dtype}"
            )
        ids = np.frombuffer(data, dtype=np.dtype(dtype).newbyteorder("<")).astype(np.int64)
        wrong = np.flatnonzero(ids >= vocab_size)
        if wrong.size:
            raise DataError(
                f"{path}: id {ids[wrong[0]]} at token {position + wrong[0]} (byte "
                f"{(position + wrong[0]) * size}) is outside the vocabulary of {vocab_size}\n"
                f"  remedy:  is it {dtype}, and of this tokenizer?"
            )
        position += ids.size
        ends = np.flatnonzero(ids == eod)
        if not ends.size:
            # Joined when an end comes: an array without one would be copied for every block.
            rest.append(ids.astype(np.int32))
            continue
        ended, whole = True, int(ends[-1]) + 1
        yield _documents(np.concatenate((*rest, ids[:whole])), eod, append_eod, key_of)
        rest = [ids[whole:]]
    if position and not ended:
        raise DataError(
            f"{path}: none of its {position} ids of {dtype} is {eod}, which ends a document\n"
            "  remedy:  name the type (`tokens`) and the tokenizer that it was written with"
        )
    if any(ids.size for ids in rest):
        yield _documents(np.concatenate((*rest, [eod])), eod, append_eod, key_of)


def _blocks(raw: io.RawIOBase, size: int) -> Iterator[bytes]:
    """Pieces of whole ids, but perhaps the last."""
    rest = b""
    while data := raw.read(_BLOCK_BYTES):
        data = rest + data
        whole = len(data) - len(data) % size
        rest = data[whole:]
        if whole:
            yield data[:whole]
    if rest:
        yield rest


def _documents(
    ids: np.ndarray, eod: int, append_eod: bool, key_of: Callable[[bytes], int] | None
) -> Encoded:
    """Documents end to end, each with its end."""
    ids = ids.astype(np.int32)
    ends = np.flatnonzero(ids == eod)
    lengths = np.diff(ends, prepend=-1)
    full = lengths > 1
    keep = np.ones(ids.size, dtype=bool)
    keep[ends if not append_eod else ends[~full]] = False
    starts = ends - lengths + 1
    keys = [
        key_of(ids[start:end].tobytes())
        for start, end in zip(starts[full], ends[full], strict=True)
        if key_of is not None
    ]
    kept = lengths[full] if append_eod else lengths[full] - 1
    return Encoded(ids[keep], kept.tolist(), [0] * kept.size, keys, empty=int((~full).sum()))
