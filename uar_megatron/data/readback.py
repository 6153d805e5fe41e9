"""A finished dataset as Megatron's own reader sees it."""

import warnings
from pathlib import Path

import numpy as np

from uar_megatron.errors import DataError

_BLOCK = 1 << 24


def read_back(prefix: Path, documents: int, tokens: int, vocab_size: int, eod: int | None) -> None:
    """Read a dataset with Megatron's reader and compare it with what was meant to be written.

    Args:
        prefix: path without suffix.
        documents, tokens: how many were written.
        vocab_size: every id is below it.
        eod: ends every document; ``None`` if nothing does.

    Raises:
        DataError: they differ.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about ranks and about packages not needed here
        # Late: it brings torch with it, which takes seconds.
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        dataset = IndexedDataset(str(prefix))
    name = prefix.name
    lengths = np.array(dataset.sequence_lengths, dtype=np.int64)
    found = len(dataset.document_indices) - 1
    if (found, int(lengths.sum())) != (documents, tokens):
        raise DataError(
            f"dataset {name}: reading it back gives {found} documents and "
            f"{lengths.sum()} tokens, {documents} and {tokens} were written"
        )
    last = np.cumsum(lengths) - 1
    itemsize = np.dtype(dataset.index.dtype).itemsize
    for low in range(0, tokens, _BLOCK):
        count = min(_BLOCK, tokens - low)
        ids = dataset.bin_reader.read(dtype=dataset.index.dtype, count=count, offset=low * itemsize)
        least, most = int(ids.min()), int(ids.max())
        inside = last[np.searchsorted(last, low) : np.searchsorted(last, low + count)] - low
        ended = eod is None or bool(np.all(ids[inside] == eod))
        del ids  # a view of the mapped file, which must go before the dataset closes it
        if least < 0 or most >= vocab_size:
            raise DataError(f"dataset {name}: reading it back gives ids from {least} to {most}")
        if not ended:
            raise DataError(f"dataset {name}: a document read back does not end with its end id")
