"""Somebody's own Megatron script with ``--spec``: the same routing as with our entry."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import train, train_stock

pytestmark = pytest.mark.slow


def test_spec_trains_like_our_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_uar.yaml").write_text("uar: {policy: uar, budget: {alpha: 1.0, k_max: 4}}\n")
    (tmp_path / "my_spec.py").write_text(
        "from uar_megatron.mcore.spec import uar_layer_spec\n"
        f"spec = uar_layer_spec({str(tmp_path / 'my_uar.yaml')!r})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    theirs = train_stock(1, tmp_path / "theirs", ["--", "--spec", "my_spec", "spec"])
    ours = train(1, tmp_path / "ours", "uar.policy=uar", "uar.budget.alpha=1.0")
    assert theirs == ours
