"""Moving statistics: what enters, what stays frozen, how they move."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uar_megatron.config import UARConfig
from uar_megatron.uncertainty import UncertaintyStatistics


def statistics(**fields: object) -> UncertaintyStatistics:
    return UncertaintyStatistics(UARConfig.model_validate(fields), "cpu")


def feed(stats: UncertaintyStatistics, logits: torch.Tensor) -> np.ndarray:
    """Accumulate one micro-batch and return its u in float64."""
    measured = stats.measure(logits)
    stats.accumulate(measured)
    u = measured.energy_T if stats.measure_name == "energy" else measured.entropy_T
    return u.double().numpy()


@given(
    momentum=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    steps=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3), min_size=1, max_size=5),
    measure=st.sampled_from(["energy", "entropy"]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40, deadline=None)
def test_follow_a_bias_corrected_moving_average(
    momentum: float, steps: list[list[int]], measure: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    stats = statistics(uncertainty=measure, statistics={"momentum": momentum})
    weights = mean = var = 0.0
    for micro_batches in steps:
        parts = [
            feed(stats, 3 * torch.randn(n, 5, generator=generator) + seed % 7)
            for n in micro_batches
        ]
        stats.commit(stats.pending().clone())
        u = np.concatenate(parts)
        if len(u):
            # Adam's form: a plain moving average divided by the weights it has gathered.
            weights = momentum * weights + (1 - momentum)
            mean += (1 - momentum) / weights * (u.mean() - mean)
            var += (1 - momentum) / weights * (u.var() - var)
    assert float(stats.mean) == pytest.approx(mean, rel=1e-6, abs=1e-6)
    assert float(stats.var) == pytest.approx(var, rel=1e-5, abs=1e-6)


def test_zscore_is_zero_before_the_first_commit_and_frozen_within_a_step() -> None:
    stats = statistics()
    logits = torch.randn(50, 8)
    assert torch.count_nonzero(stats.measure(logits).zscore_T) == 0
    feed(stats, logits)
    assert torch.count_nonzero(stats.measure(logits).zscore_T) == 0
    stats.commit(stats.pending().clone())
    before = stats.measure(logits).zscore_T
    feed(stats, torch.randn(50, 8) + 5)
    torch.testing.assert_close(stats.measure(logits).zscore_T, before, rtol=0, atol=0)
    assert float(before.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(before.std(unbiased=False)) == pytest.approx(1.0, abs=1e-5)


def test_nonfinite_and_padding_tokens_do_not_enter() -> None:
    stats, clean = statistics(), statistics()
    logits = torch.randn(6, 8)
    dirty = torch.cat((logits, torch.full((2, 8), math.nan), torch.full((1, 8), 7.0)))
    measured = stats.measure(dirty)
    stats.accumulate(measured, valid_T=torch.tensor([True] * 8 + [False]))
    assert torch.equal(measured.zscore_T, torch.zeros(9))
    assert stats.pending()[3] == 2
    feed(clean, logits)
    torch.testing.assert_close(stats.pending()[:3], clean.pending()[:3])


@pytest.mark.parametrize("rows", [0, 5])
def test_no_tokens_or_no_spread_leaves_everybody_average(rows: int) -> None:
    stats = statistics()
    logits = torch.ones(rows, 8)
    feed(stats, logits)
    stats.commit(stats.pending().clone())
    assert (
        torch.count_nonzero(stats.measure(torch.randn(4, 8) if rows == 0 else logits).zscore_T) == 0
    )
    assert int(stats.num_updates) == (1 if rows else 0)


def test_split_over_ranks_and_micro_batches_does_not_matter() -> None:
    logits = torch.randn(64, 8)
    whole = statistics()
    feed(whole, logits)
    whole.commit(whole.pending().clone())
    ranks = [statistics(), statistics()]
    for stats, half in zip(ranks, logits.split(32), strict=True):
        for part in half.split([5, 27]):
            feed(stats, part)
    total = ranks[0].pending() + ranks[1].pending()
    for stats in ranks:
        stats.commit(total)
        torch.testing.assert_close(stats.mean, whole.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(stats.var, whole.var, rtol=1e-10, atol=0)


def test_state_survives_a_bf16_model() -> None:
    stats = statistics()
    feed(stats, torch.randn(10, 8))
    stats.commit(stats.pending().clone())
    before = float(stats.mean)
    torch.nn.Sequential(stats).bfloat16().half().float()
    assert stats.mean.dtype == torch.float64
    assert float(stats.mean) == before
    assert set(stats.state_dict()) == {"mean", "var", "num_updates", "measured"}


@pytest.mark.parametrize("changed", [{"uncertainty": "entropy"}, {"temperature": 2.0}])
def test_state_of_another_uncertainty_is_not_taken_over(changed: dict) -> None:
    stats = statistics()
    feed(stats, torch.randn(10, 8))
    stats.commit(stats.pending().clone())
    same, other = statistics(), statistics(**changed)
    same.load_state_dict(stats.state_dict())
    assert same.mean == stats.mean != 0
    other.load_state_dict(stats.state_dict())
    assert int(other.num_updates) == 0
    assert other.mean == 0
