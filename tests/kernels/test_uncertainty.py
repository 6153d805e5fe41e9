"""Energy and entropy against a float64 computation from Eq. 3 and 4."""

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uar_kernels.uncertainty import energy_and_entropy

LOGITS = hnp.arrays(
    np.float64,
    st.tuples(st.integers(0, 7), st.sampled_from([1, 6, 7, 8, 64])),
    elements=st.floats(-30, 30, width=32),
)


def reference(logits: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 3 and 4 term by term, in float64."""
    energies, entropies = [], []
    for row in logits:
        partition = math.fsum(math.exp(z / temperature) for z in row)
        probs = [math.exp(z / temperature) / partition for z in row]
        energies.append(-temperature * math.log(partition))
        entropies.append(-math.fsum(p * math.log(p) for p in probs if p > 0))
    return np.array(energies), np.array(entropies)


@given(logits=LOGITS, temperature=st.sampled_from([0.5, 1.0, 2.0]))
@settings(max_examples=60, deadline=None)
def test_equals_the_formula(logits: np.ndarray, temperature: float) -> None:
    energy, entropy = energy_and_entropy(torch.from_numpy(logits), temperature)
    expected_energy, expected_entropy = reference(logits, temperature)
    np.testing.assert_allclose(energy.numpy(), expected_energy, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(entropy.numpy(), expected_entropy, rtol=1e-9, atol=1e-11)


@given(logits=LOGITS, shift=st.floats(-5, 5))
@settings(max_examples=30, deadline=None)
def test_energy_sees_the_level_and_entropy_does_not(logits: np.ndarray, shift: float) -> None:
    energy, entropy = energy_and_entropy(torch.from_numpy(logits))
    moved_energy, moved_entropy = energy_and_entropy(torch.from_numpy(logits + shift))
    torch.testing.assert_close(moved_energy, energy - shift)
    torch.testing.assert_close(moved_entropy, entropy, rtol=1e-7, atol=1e-7)


def test_extremes() -> None:
    logits = torch.tensor([[0.0] * 8, [1e4] + [0.0] * 7, [-1e4] * 8, [0.0] + [-math.inf] * 7])
    energy, entropy = energy_and_entropy(logits)
    torch.testing.assert_close(energy, torch.tensor([-math.log(8), -1e4, 1e4 - math.log(8), -0.0]))
    # A common level of 1e4 costs the entropy nothing.
    torch.testing.assert_close(entropy, torch.tensor([math.log(8), 0.0, math.log(8), 0.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_computes_in_fp32_whatever_the_router_dtype(dtype: torch.dtype) -> None:
    logits = torch.randn(33, 8).to(dtype)
    energy, entropy = energy_and_entropy(logits)
    assert energy.dtype == entropy.dtype == torch.float32
    expected_energy, expected_entropy = energy_and_entropy(logits.double())
    torch.testing.assert_close(energy.double(), expected_energy, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-6)


def test_nonfinite_logits_stay_visible() -> None:
    energy, _ = energy_and_entropy(
        torch.tensor([[math.nan, 0.0], [math.inf, 0.0], [-math.inf] * 2])
    )
    assert not torch.isfinite(energy).any()
