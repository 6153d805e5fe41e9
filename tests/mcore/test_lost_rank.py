"""Which errors of a collective are said to be another rank's."""

from __future__ import annotations

import pytest

from uar_megatron.errors import TrainingError
from uar_megatron.mcore.lost_rank import lost_ranks_named


@pytest.mark.parametrize(
    "words",
    [
        "[…/unbound_buffer.cc:81] Timed out waiting 5000ms for recv operation to complete",
        "[…/pair.cc:553] Connection closed by peer [127.0.0.1]:1234",
        "[…/pair.cc:553] Application timeout caused pair closure",
    ],
)
def test_gloo_has_lost_a_rank(words: str) -> None:
    with pytest.raises(TrainingError, match="another rank is gone"), lost_ranks_named():
        raise RuntimeError(words)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape"), lost_ranks_named():
        raise RuntimeError("shape mismatch")
