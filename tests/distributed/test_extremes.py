"""Ranks and experts without rows, everybody in one place, ranks of different size, context."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from jobs import UNSAVED, train, warm_torchrun

from uar_megatron.reporting.runlog import read_run

pytestmark = pytest.mark.slow
WORKERS = Path(__file__).with_name("extreme_workers.py")


@pytest.mark.parametrize(
    ("ranks", "checks"),
    [
        (2, ("extremes", "context_and_expert_parallel", "context_parity", "context")),
        (4, ("extremes",)),  # two data-parallel replicas of each expert
    ],
)
def test_on_ranks(ranks: int, checks: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(WORKERS.parents[1]))
    job = warm_torchrun(ranks, str(WORKERS), *checks)
    assert job.returncode == 0, job.stderr[-6000:]


def test_training_where_experts_get_no_rows(tmp_path: Path) -> None:
    """Megatron's overlapped gradient reduction waits for every expert's gradient."""
    losses = train(
        2,
        tmp_path,
        *(
            "expert_model_parallel_size=2",
            "use_distributed_optimizer=true",
            "train_iters=6",
            *UNSAVED,
        ),
        *("overlap_grad_reduce=true", "overlap_param_gather=true"),
        *("uar.policy=uar", "uar.budget.k_min=0", "uar.budget.k_max=1"),
        *("uar.budget.alpha=0.5", "uar.budget.beta=-0.2"),
    )
    assert all(math.isfinite(loss) for loss in losses.values())
    assert losses[6] < losses[1]
    steps = read_run(tmp_path / "run.jsonl").steps
    # Nobody is uncertain before there are statistics; later a few tokens are.
    assert all(layer.rows == 0 for layer in steps[0].layers)
    assert any(layer.rows > 0 for step in steps for layer in step.layers)
    assert all(0.0 in layer.load for step in steps for layer in step.layers)
