"""Sums, classes and similarities against loops in float64."""

from __future__ import annotations

import math

import brute_force
import numpy as np
import pytest
import torch

from uar_megatron.observatory import (
    NO_CLASS,
    TokenSignals,
    cache_sizes,
    decile_of_ids,
    describe_tokens,
    mean_pair_cosine,
    overlap,
    served_parts,
    unit_rows,
)

EXPERTS = 8
NAMES = ("common", "rare", "domain_0", "domain_1", "never")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_token_signals(generator: torch.Generator, temperature: float) -> None:
    signals = TokenSignals(EXPERTS, temperature, len(NAMES), "cpu")
    kept_logits, kept_ks, kept_classes = [], [], []
    for scale in (0.1, 1.0, 30.0):  # the last has energies outside the bins
        logits = scale * torch.randn(101, EXPERTS, generator=generator)
        logits[7] = math.nan
        logits[8, 3] = -math.inf  # an expert masked out; Σz is not finite then
        valid = torch.rand(101, generator=generator) > 0.2
        valid[8] = False
        ks = torch.randint(0, 5, (101,), generator=generator)
        classes = torch.stack(
            (
                torch.randint(-1, 2, (101,), generator=generator),
                torch.randint(2, 4, (101,), generator=generator),
            )
        )
        signals.add(logits, ks, valid, classes)
        for t in range(101):
            if valid[t] and t != 7:
                kept_logits.append(logits[t].numpy())
                kept_ks.append(int(ks[t]))
                kept_classes.append([NAMES[c] for c in classes[:, t].tolist() if c != NO_CLASS])
    total = signals.flat().clone()
    expected = brute_force.token_signals(
        np.array(kept_logits), np.array(kept_ks), kept_classes, temperature
    )
    brute_force.assert_token_signals(describe_tokens(total, EXPERTS, NAMES), expected)
    signals.clear()
    empty = describe_tokens(signals.flat(), EXPERTS, NAMES)
    assert empty["tokens"] == 0
    assert empty["classes"] is None


def test_without_classes(generator: torch.Generator) -> None:
    signals = TokenSignals(EXPERTS, 1.0, 0, "cpu")
    signals.add(torch.randn(9, EXPERTS, generator=generator), torch.full((9,), 2))
    assert describe_tokens(signals.flat(), EXPERTS, ())["classes"] is None


def test_deciles(generator: torch.Generator) -> None:
    counts = torch.randint(0, 50, (300,), generator=generator) ** 2
    names = [f"decile_{d + 1}" for d in decile_of_ids(counts).tolist()]
    assert names == brute_force.deciles(counts.numpy())
    share = [int(counts[[n == f"decile_{d}" for n in names]].sum()) for d in range(1, 11)]
    assert max(share) < 1.2 * min(share)
    one = decile_of_ids(torch.tensor([0, 1000, 0]))
    assert one.tolist() == [0, 5, 0]  # an id that is all tokens lies in their middle


def test_pair_cosine_without_pairs(generator: torch.Generator) -> None:
    vectors = torch.randn(6, 40, generator=generator) + 0.3
    vectors[4] = 0.0
    units = unit_rows(vectors)
    square = units.sum(dim=0).double().square().sum()
    found = mean_pair_cosine(square, (units != 0).any(dim=1).sum().double(), len(vectors))
    assert math.isclose(found, brute_force.pair_cosine(vectors.numpy()), abs_tol=1e-6)
    assert found > 0.05


def test_overlap_and_hit_rates(generator: torch.Generator) -> None:
    first, second = (torch.rand(64, EXPERTS, generator=generator) < 0.3 for _ in range(2))
    first[3] = second[3] = False  # a token that skips its experts twice
    expected = brute_force.jaccard(first.numpy(), second.numpy())
    assert math.isclose(overlap(first, second).mean(), expected)
    first[:8] = False  # a segment without slots
    segments = first.view(8, 8, EXPERTS)
    sizes = cache_sizes(2, EXPERTS)
    assert sizes == (2, 4)
    found = served_parts(segments, sizes).mean(dim=0).tolist()
    expected = [brute_force.hit_rate([first.numpy()], 8, size) for size in sizes]
    np.testing.assert_allclose(found, expected)


def test_cache_sizes() -> None:
    assert cache_sizes(8, 256) == (8, 16, 128)
    assert cache_sizes(3, 4) == (2, 3, 4)
