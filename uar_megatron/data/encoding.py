"""Documents to token ids, many at a time: what ``uar data`` and ``uar corpus`` share."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from uar_megatron.data.tokenizers import Encoder
from uar_megatron.errors import DataError

# One batch is what a worker gets at once: large enough to hide the hand-over, small enough that
# a few in flight per worker cost little memory.
_BATCH_CHARACTERS = 1 << 18
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class Encoded:
    """One tokenized batch: the ids of its documents end to end.

    Attributes:
        ids: int32.
        lengths: tokens of each document kept, its end included.
        sizes: UTF-8 size of each document kept; 0 where the text is not known.
        keys: what ``key_of`` gave for each document kept; empty without it.
        empty: documents dropped because they give no token.
    """

    ids: np.ndarray
    lengths: list[int]
    sizes: list[int]
    keys: list[int]
    empty: int


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Group documents, in their order."""
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encode_documents(
    encoder: Encoder,
    batch: Sequence[str],
    append_eod: bool,
    key_of: Callable[[bytes], int] | None = None,
) -> Encoded:
    """Tokenize documents; those that are white space, or give no token, are left out.

    Raises:
        DataError: the tokenizer gives an id outside its vocabulary.
    """
    texts = [text for text in batch if text.strip()]
    end = np.array([encoder.eod], dtype=np.int32)
    parts: list[np.ndarray] = []
    lengths: list[int] = []
    sizes: list[int] = []
    keys: list[int] = []
    for text, raw in zip(texts, encoder.encode_many(texts), strict=True):
        ids = np.asarray(raw, dtype=np.int32)
        if ids.size == 0:
            continue
        parts.append(ids)
        lengths.append(ids.size)
        # Some tokenizers end every text themselves; one end is enough.
        if append_eod and ids[-1] != encoder.eod:
            parts.append(end)
            lengths[-1] += 1
        data = text.encode("utf-8")
        sizes.append(len(data))
        if key_of is not None:
            keys.append(key_of(data))
    ids = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
    if ids.size and not 0 <= ids.min() <= ids.max() < encoder.vocab_size:
        raise DataError(
            f"tokenizer {encoder.name}: gives ids from {ids.min()} to {ids.max()}, outside "
            f"its own vocabulary of {encoder.vocab_size}"
        )
    return Encoded(ids, lengths, sizes, keys, empty=len(batch) - len(lengths))
