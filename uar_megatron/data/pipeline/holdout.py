"""Which documents are held out: a hash of the content decides, so that copies stay together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import numpy as np

from uar_megatron.errors import DataError

KEY_BITS = 63
KEY = np.dtype([("key", "<u8"), ("bytes", "<u4")])
"""What a part keeps for each document: its key, and the size of its text in bytes of UTF-8."""
_BUCKET_BITS = 16


def key_function(seed: int) -> Callable[[bytes], int]:
    """A document's content to a uniform number below 2**63."""
    secret = f"uar corpus {seed}".encode()

    def key(content: bytes) -> int:
        digest = hashlib.blake2b(content, digest_size=8, key=secret).digest()
        return int.from_bytes(digest, "little") >> 1

    return key


def threshold_of_fraction(fraction: float) -> int:
    """Documents with a key below it are held out: about this part of all."""
    return int(fraction * 2**KEY_BITS)


def threshold_of_tokens(
    parts: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]], target: int, name: str
) -> int:
    """The least threshold below which documents have ``target`` tokens or more.

    Args:
        parts: gives (keys as uint64, lengths in tokens), part by part, each time anew.
        target: tokens to hold out.
        name: of what they are of, for the message.

    Raises:
        DataError: they have no more tokens than that.
    """
    shift = np.uint64(KEY_BITS - _BUCKET_BITS)
    weights = np.zeros(1 << _BUCKET_BITS, dtype=np.int64)
    for keys, lengths in parts():
        np.add.at(weights, (keys >> shift).astype(np.int64), lengths.astype(np.int64))
    if weights.sum() <= target:
        raise DataError(
            f"recipe.validation.tokens: {target} of them would be all that {name} has "
            f"({weights.sum()})\n  remedy:  hold out fewer"
        )
    totals = np.cumsum(weights)
    bucket = int(np.searchsorted(totals, target))
    inside = [
        (keys[mask], lengths[mask])
        for keys, lengths in parts()
        if (mask := (keys >> shift) == np.uint64(bucket)).any()
    ]
    keys = np.concatenate([keys for keys, _ in inside])
    order = np.argsort(keys, kind="stable")
    lengths = np.concatenate([lengths for _, lengths in inside]).astype(np.int64)[order]
    below = int(totals[bucket] - weights[bucket])
    last = int(np.searchsorted(below + np.cumsum(lengths), target))
    return int(keys[order][last]) + 1
