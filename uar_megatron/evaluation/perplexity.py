"""Perplexity of a model on Megatron data, and the loads of its experts over the whole of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from uar_megatron.data.check import check_dataset
from uar_megatron.errors import ConfigError
from uar_megatron.evaluation.model import CheckpointModel
from uar_megatron.evaluation.usage import Usage


def perplexity(
    model: CheckpointModel, prefix: str, limit: int | None = None, batch_size: int = 8
) -> dict[str, Any]:
    """Return loss, perplexity and use of experts on ``PREFIX.bin`` and ``.idx``.

    The documents, joined in their order, are cut into sequences of ``window`` tokens of which each
    token predicts the next one, as in training (which shuffles the documents first); the last
    sequence may be shorter. Attention and routing see across documents, as in training.

    Args:
        model: on rank 0, while the others serve.
        prefix: of the data.
        limit: sequences; None for all.
        batch_size: sequences of a micro-batch.

    Raises:
        DataError: the data are missing, damaged, or of another vocabulary.
        ConfigError: the run was trained with attention that stops at documents.
    """
    args = model.args
    check_attention(vars(args))
    check_dataset(prefix, args.padded_vocab_size)
    usage, total, counted = Usage(), 0.0, 0
    rows = batch_size * model.rows_at_once
    sequences = list(_sequences(prefix, model.window, limit))
    progress = tqdm(total=len(sequences), desc=f"perplexity on {Path(prefix).name}")
    for first in range(0, len(sequences), rows):
        some = sequences[first : first + rows]
        found = model.score([s[:-1].tolist() for s in some], [[int(s[-1])] for s in some])
        usage.add_loads(found.signals)
        for b, tokens in enumerate(some):
            logprob = np.concatenate((found.own[b][:, 0], found.finals[b][:, 0]))
            # As Megatron's loss mask: what an end of document predicts does not count.
            counts = tokens[:-1] != model.text.eod if args.eod_mask_loss else np.ones(len(logprob))
            total -= float((logprob.astype(np.float64) * counts).sum())
            counted += int(counts.sum())
            usage.add(found.signals, b, len(tokens) - 1)
        progress.update(len(some))
    progress.close()
    loss = total / max(counted, 1)
    return {
        "data": prefix,
        "sequences": len(sequences),
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        **usage.describe(model.shape),
    }


def check_attention(megatron: Mapping[str, Any]) -> None:
    """Refuse a run whose attention stops at documents.

    Args:
        megatron: arguments by name.

    Raises:
        ConfigError: it was trained so.
    """
    for name in ("reset_attention_mask", "reset_position_ids"):
        if megatron.get(name):
            raise ConfigError(
                name,
                "true: this run's attention stops at the end of a document, which an evaluation on "
                "joined documents does not",
                remedy="evaluate it on tasks, or with a model trained without it",
            )


def names_of(prefixes: Sequence[str], known: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the prefixes by their names in results: the last part of the path, or all of it.

    Args:
        prefixes: of data.
        known: results of data sets by name, as they are already.
    """
    short = {prefix: Path(prefix).name for prefix in dict.fromkeys(prefixes)}
    used = list(short.values())

    def is_free(prefix: str, name: str) -> bool:
        return used.count(name) == 1 and known.get(name, {"data": prefix})["data"] == prefix

    return {name if is_free(prefix, name) else prefix: prefix for prefix, name in short.items()}


def _sequences(prefix: str, window: int, limit: int | None) -> Iterator[np.ndarray]:
    """Pieces of ``window + 1`` tokens; each begins with the last token of the one before."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(prefix)
    kept: list[np.ndarray] = []
    length = made = 0
    for index in range(len(data)):
        kept.append(np.asarray(data[index], dtype=np.int64))
        length += len(kept[-1])
        if length <= window:
            continue
        stream = np.concatenate(kept)
        while len(stream) > window:
            yield stream[: window + 1]
            made += 1
            if made == limit:
                return
            stream = stream[window:]
        kept, length = [stream], len(stream)
    if length > 1:
        yield np.concatenate(kept)
