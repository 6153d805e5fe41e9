"""Variable-k selection against a sort written out in Python."""

import hypothesis.extra.numpy as hnp
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uar_kernels.selection import select_experts


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    tokens = draw(st.integers(0, 9))
    experts = draw(st.sampled_from([1, 6, 7, 8]))
    width = draw(st.integers(0, experts))
    # Few distinct values, so that ties are common.
    scores = draw(
        hnp.arrays(np.float32, (tokens, experts), elements=st.sampled_from([0.0, 0.5, 1.0]))
    )
    k = draw(hnp.arrays(np.int64, (tokens,), elements=st.integers(0, width)))
    return scores, k, width


@given(cases())
@settings(max_examples=200, deadline=None)
def test_takes_the_best_and_breaks_ties_to_the_lower_index(
    case: tuple[np.ndarray, np.ndarray, int],
) -> None:
    scores, k, width = case
    index, chosen = select_experts(torch.from_numpy(scores), torch.from_numpy(k), width)
    assert index.shape == chosen.shape == (len(scores), width)
    for row, count, got, mask in zip(scores, k, index.tolist(), chosen.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda e: (-row[e], e))
        assert got == order[:width]
        assert mask == [position < count for position in range(width)]
