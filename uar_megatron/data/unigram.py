"""The unigram model of a dataset: the yardstick that a language model has to beat."""

from pathlib import Path

import numpy as np

from uar_megatron.data.check import check_dataset

_BLOCK = 1 << 22  # tokens counted together; bincount needs 8 bytes for each


def unigram_cross_entropy(
    train_prefix: str | Path, valid_prefix: str | Path, vocab_size: int
) -> float:
    """Cross-entropy in nats per token of the add-one-smoothed unigram model of the training data.

    Counts every token id of both ``.bin`` files, end-of-document ids included; the perplexity is
    the exponential.

    Raises:
        DataError: a dataset is missing, corrupt or made with a larger vocabulary.
    """
    train = token_counts(train_prefix, vocab_size)
    valid = token_counts(valid_prefix, vocab_size)
    log_probabilities = np.log(train + 1.0) - np.log(train.sum() + float(vocab_size))
    return float(-(valid * log_probabilities).sum() / valid.sum())


def token_counts(prefix: str | Path, vocab_size: int) -> np.ndarray:
    """How often each id occurs in a dataset; int64, shape [vocab_size]."""
    info = check_dataset(prefix, vocab_size)
    tokens = np.memmap(f"{prefix}.bin", dtype=info.dtype, mode="r")
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), _BLOCK):
        counts += np.bincount(tokens[start : start + _BLOCK], minlength=vocab_size)
    return counts
