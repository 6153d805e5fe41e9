"""The observatory's signals, token by token and pair by pair, in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Classes = Sequence[Sequence[str]]


def token_signals(
    logits: np.ndarray, ks: np.ndarray, classes: Classes, temperature: float = 1.0
) -> dict[str, Any]:
    """Fields of a ``LayerObservation`` from the logits of all tokens.

    Args:
        logits: ``[tokens, experts]``.
        ks: experts of each token.
        classes: names of each token's classes.
    """
    experts = logits.shape[1]
    nothing = -temperature * math.log(experts)
    histogram = np.zeros((20, 48), dtype=int)
    groups: dict[str, list[tuple[float, float, int]]] = {}
    for row, k, names in zip(logits.astype(np.float64), ks, classes, strict=True):
        scaled = row / temperature
        partition = scaled.max() + math.log(np.exp(scaled - scaled.max()).sum())
        p = np.exp(scaled - partition)
        energy = -temperature * partition
        entropy = -sum(x * math.log(x) for x in p if x > 0)
        i = math.floor(entropy / (math.log(experts) / 20))
        j = math.floor((energy - nothing + 8 * temperature) / (0.25 * temperature))
        histogram[min(max(i, 0), 19), min(max(j, 0), 47)] += 1
        for name in names:
            groups.setdefault(name, []).append((energy, entropy, int(k)))
    sums = logits.astype(np.float64).sum(axis=1)
    return {
        "tokens": len(logits),
        "histogram": histogram.tolist(),
        "logit_sum_mean": float(sums.mean()),
        "logit_sum_std": float(sums.std()),
        "classes": {
            name: (len(of), *(sum(values) / len(of) for values in zip(*of, strict=True)))
            for name, of in groups.items()
        },
    }


def assert_token_signals(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal counts, and means to what fp32 energies allow."""
    assert found["tokens"] == expected["tokens"]
    assert found["histogram"] == expected["histogram"]
    for name in ("logit_sum_mean", "logit_sum_std"):
        assert math.isclose(found[name], expected[name], rel_tol=1e-5, abs_tol=1e-6), name
    classes = {c["name"]: c for c in found["classes"] or []}
    assert classes.keys() == expected["classes"].keys()
    for name, (tokens, *means) in expected["classes"].items():
        assert classes[name]["tokens"] == tokens, name
        got = [classes[name][field] for field in ("energy_mean", "entropy_mean", "k_eff")]
        np.testing.assert_allclose(got, means, rtol=1e-5, atol=1e-6)


def pair_cosine(vectors: np.ndarray) -> float:
    """Mean over pairs of the rows; a zero row is similar to none."""
    vectors = vectors.astype(np.float64)
    cosines = []
    for a, b in itertools.combinations(vectors, 2):
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        cosines.append(a @ b / norms if norms else 0.0)
    return float(np.mean(cosines))


def deciles(counts: np.ndarray) -> list[str]:
    """The class of each id: ids by count, where the middle of its tokens lies among all."""
    order = sorted(range(len(counts)), key=lambda i: (counts[i], i))
    names, before = [""] * len(counts), 0
    for i in order:
        middle = before + counts[i] / 2
        names[i] = f"decile_{min(int(10 * middle / counts.sum()), 9) + 1}"
        before += counts[i]
    return names


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Mean over tokens of the overlap of their sets of experts."""
    overlaps = []
    for a, b in zip(first, second, strict=True):
        one, two = set(np.flatnonzero(a)), set(np.flatnonzero(b))
        overlaps.append(len(one & two) / len(one | two) if one | two else 1.0)
    return float(np.mean(overlaps))


def hit_rate(sequences: Sequence[np.ndarray], segment: int, size: int) -> float:
    """Local routing consistency of maps ``[tokens, experts]``, cut into whole segments."""
    parts = []
    for sequence in sequences:
        for start in range(0, len(sequence) - segment + 1, segment):
            slots = sorted(sequence[start : start + segment].sum(axis=0), reverse=True)
            if sum(slots):
                parts.append(sum(slots[:size]) / sum(slots))
    return float(np.mean(parts))
