"""Layers for multi-token prediction have our routers too."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import UNSAVED, train, train_stock

from uar_megatron.reporting.runlog import read_run

pytestmark = pytest.mark.slow

MTP = (
    "mtp_num_layers=1",
    "train_iters=6",
    "calculate_per_token_loss=true",
    "moe_z_loss_coeff=0.01",
    *UNSAVED,
)


def test_off_equals_stock(tmp_path: Path) -> None:
    assert train(1, tmp_path / "ours", *MTP) == train_stock(1, tmp_path / "stock", MTP)


def test_on(tmp_path: Path) -> None:
    losses = train(1, tmp_path, *MTP, "routing=uar_ae_clb", "uar.clb.start_step=2")
    assert losses[6] < losses[1]
    for step in read_run(tmp_path / "run.jsonl").steps:
        assert [m.layer for m in step.layers] == [2, 3, 4]
        assert all(m.tokens == 8 * 32 for m in step.layers)
        assert all(m.rows == m.k_eff * m.tokens for m in step.layers)
