"""Layouts that the other tests do not use."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import train

from uar_megatron.reporting.runlog import read_run

pytestmark = pytest.mark.slow


def test_a_pipeline_stage_without_moe_layers(tmp_path: Path) -> None:
    """Every rank takes part in the log's reduction, whether it has routers or not."""
    losses = train(
        2,
        tmp_path,
        *("pipeline_model_parallel_size=2", "num_layers=2", 'moe_layer_freq="[0,1]"'),
        *("uar.policy=uar", "uar.bias.enabled=true", "train_iters=5"),
    )
    assert losses[5] < losses[1]
    for step in read_run(tmp_path / "run.jsonl").steps:
        (metrics,) = step.layers
        assert metrics.layer == 2
        assert metrics.tokens == 8 * 32
        assert metrics.bias_max_abs is not None
