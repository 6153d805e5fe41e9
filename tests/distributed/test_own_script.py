"""Somebody's own Megatron script with ``--spec``: the same routing as with our entry."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jobs import UNSAVED, train, train_stock

from uar_megatron.reporting.runlog import read_run

pytestmark = pytest.mark.slow

LAYOUT = (
    *("pipeline_model_parallel_size=2", "num_layers=4", 'moe_layer_freq="[0,0,1,1]"'),
    *("train_iters=8", *UNSAVED),
)


def test_spec_trains_like_our_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is monitored as well; the first pipeline stage has no router to say what is logged."""
    (tmp_path / "my_uar.yaml").write_text(
        "uar: {policy: uar, budget: {mode: mean, alpha: 1.0, k_max: 4}}\n"
    )
    (tmp_path / "my_spec.py").write_text(
        "from uar_megatron.mcore.spec import uar_layer_spec\n"
        f"spec = uar_layer_spec({str(tmp_path / 'my_uar.yaml')!r})\n"
    )
    ours = train(2, tmp_path / "ours", *LAYOUT, "uar.policy=uar", "uar.budget.mode=mean")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("WATCH", str(tmp_path / "log"))
    theirs = train_stock(2, tmp_path / "theirs", [*LAYOUT, "--", "--spec", "my_spec", "spec"])
    assert theirs == ours
    logs = [read_run(tmp_path / name / "run.jsonl").steps for name in ("log", "ours")]
    for of_theirs, of_ours in zip(*logs, strict=True):
        assert of_theirs.layers == of_ours.layers
        assert of_ours.layers[0].policy["beta"] != 0
