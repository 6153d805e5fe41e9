"""An evaluation over two ranks says what one rank says, whichever way they share the model."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluated_run import recorded, shared_run
from jobs import TESTS, warm_torchrun

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_run(tmp_path_factory)


def job(nproc: int, run: Path, output: Path) -> dict[str, Any]:
    script = TESTS / "distributed" / "evaluation_workers.py"
    done = warm_torchrun(nproc, str(script), str(run), str(run.parent / "record.pt"), str(output))
    assert done.returncode == 0, done.stderr[-6000:]
    found: dict[str, Any] = pickle.loads(output.read_bytes())
    return found


@pytest.fixture(scope="module")
def found(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return job(2, run, tmp_path_factory.mktemp("two") / "found.pt")


@pytest.mark.parametrize("layout", ["EP2", "TP2", "PP2", "DP2"])
def test_two_ranks_are_the_training(run: Path, found: dict[str, Any], layout: str) -> None:
    sequences, wanted = recorded(run)
    got = found[layout]
    for b, (s, want) in enumerate(zip(sequences, wanted, strict=True)):
        at = slice(0, len(s))
        torch.testing.assert_close(got["logits"][b, at], want["logits"], atol=1e-5, rtol=1e-5)
        assert (got["k"][:, b, at] == want["k"].numpy()).all()
        np.testing.assert_allclose(got["energy"][:, b, at], want["energy"].numpy(), atol=1e-5)
    assert (got["slots"] == sum(want["slots"] for want in wanted).numpy()).all()
    for ours, theirs in zip(got["likelihoods"], found["DP2"]["likelihoods"], strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-5)
        assert ours[1] == theirs[1]
    assert got["usage"]["t"]["k_eff"] == pytest.approx(found["DP2"]["usage"]["t"]["k_eff"])
    assert got["layout"]["ranks"] == 2


def test_sequences_of_their_own_length(run: Path, found: dict[str, Any]) -> None:
    sequences, _ = recorded(run)
    got = found["EP2, exact"]
    for b, s in enumerate(sequences):
        assert (got["k"][:, b].sum(axis=1) == 2 * len(s)).all()
    assert got["usage"]["t"]["k_eff"] == pytest.approx(2.0)


def test_rank_0_says_which_rank_has_failed(found: dict[str, Any]) -> None:
    """And neither it nor the others wait for ever; they go on."""
    assert found["DP2"]["failures"] == [
        "rank 0: RuntimeError: broken",
        "rank 1: RuntimeError: broken",
        "rank 0: RuntimeError: broken\nrank 1: RuntimeError",
    ]
