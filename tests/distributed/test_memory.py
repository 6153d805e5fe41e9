"""Planned memory of a rank is that of a real one under tensor, expert and pipeline parallelism."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jobs import warm_torchrun

pytestmark = pytest.mark.slow
WORKERS = Path(__file__).with_name("memory_workers.py")
TENSOR = ("tensor_model_parallel_size=2", "sequence_parallel=true")
LAYOUTS = {
    "experts on 2 ranks": (2, ("expert_model_parallel_size=2",)),
    "one expert on each of 2 ranks": (2, ("expert_model_parallel_size=2", "num_experts=2")),
    "tensor 2, whole experts on 2": (
        2,
        (*TENSOR, "expert_tensor_parallel_size=1", "expert_model_parallel_size=2"),
    ),
    "tensor 2, gated shared expert": (
        2,
        (
            *(*TENSOR, "expert_tensor_parallel_size=1", "expert_model_parallel_size=2"),
            *("moe_shared_expert_intermediate_size=64", "moe_shared_expert_gate=true"),
        ),
    ),
    "tensor 2, experts on 2 and in 2": (4, (*TENSOR, "expert_model_parallel_size=2")),
    "pipeline 2": (2, ("pipeline_model_parallel_size=2", "num_layers=4", "moe_layer_freq=1")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_planned_memory_is_that_of_every_rank(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, options = LAYOUTS[name]
    monkeypatch.setenv("PYTHONPATH", str(WORKERS.parents[1]), prepend=os.pathsep)
    shape = ("uar.policy=uar", "uar.budget.k_max=2", "hidden_size=64", "seq_length=32")
    job = warm_torchrun(ranks, str(WORKERS), str(tmp_path), *shape, *options)
    assert job.returncode == 0, job.stderr[-4000:]
    print("\n".join(line for line in job.stdout.splitlines() if "planned" in line))
