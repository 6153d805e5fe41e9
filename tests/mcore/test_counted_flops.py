"""Megatron's FLOPs of a step with the counted rows in place of K per token."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
from megatron.training import training
from test_flops import arguments

from uar_megatron.mcore.compat import correct_flops
from uar_megatron.mcore.counted_flops import CountedFlops

TOKENS = 6 * 32
ROW = 3 * 2 * 64 * 48 * 3
"""Forward and backward FLOPs of a row: three products of 64 × 48."""


@pytest.fixture
def args(monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    stock = training.num_floating_point_operations
    monkeypatch.setattr(training, "num_floating_point_operations", stock)  # put back afterwards
    args = arguments("--swiglu --moe-layer-freq [0]+[1]*3")
    args.world_size = 4
    return args


def record(*rows: float) -> dict[str, Any]:
    layers = [{"layer": number, "rows": n} for number, n in enumerate(rows, start=2)]
    return {"tokens_per_step": float(TOKENS), "seconds_per_step": 0.5, "layers": layers}


def test_megatrons_figure_follows_the_last_record(args: argparse.Namespace) -> None:
    stock = training.num_floating_point_operations
    counted = CountedFlops(args)
    correct_flops(counted.correction)
    corrected = training.num_floating_point_operations
    assert corrected(args, 6) == stock(args, 6)  # nothing counted yet
    k_rows = 3.0 * TOKENS
    log = record(k_rows + 5, k_rows - 1, k_rows + 6)
    counted.add_to(log)
    assert corrected(args, 6) == stock(args, 6) + 10 * ROW == log["flops"]
    assert log["flops_ratio"] == log["flops"] / stock(args, 6) > 1
    assert log["throughput"] == pytest.approx(log["flops"] / 0.5 / 4 / 1e12, rel=1e-12)
    # A batch of another size has as many rows per token, padding none.
    assert corrected(args, 12) == pytest.approx(stock(args, 12) + 20 * ROW, rel=1e-14)
    packed = {"seqlen_squared_sum_in_batch": 1000.0, "total_real_tokens_in_batch": TOKENS / 2}
    assert corrected(args, 6, **packed) == pytest.approx(stock(args, 6, **packed) + 5 * ROW)
    counted.add_to(record(k_rows, k_rows, k_rows))
    assert corrected(args, 6) == stock(args, 6)  # to the bit
    fewer = record(k_rows / 2, 0.0, 0.0)
    counted.add_to(fewer)
    assert corrected(args, 6) == fewer["flops"] == stock(args, 6) - 2.5 * k_rows * ROW


def test_layers_have_their_own_figures(args: argparse.Namespace) -> None:
    k_rows = 3.0 * TOKENS
    log = record(k_rows, 2 * k_rows, 0.0)
    CountedFlops(args).add_to(log)
    first, second, third = log["layers"]
    assert first["flops_ratio"] == 1
    assert second["flops"] - first["flops"] == pytest.approx(k_rows * ROW)
    assert first["flops"] - third["flops"] == pytest.approx(k_rows * ROW)
    assert second["flops_ratio"] == second["flops"] / first["flops"]


def test_gates_count_whatever_the_activation(args: argparse.Namespace) -> None:
    """Megatron counts two products for quick GEGLU, which has three like SwiGLU."""
    log, same = record(4.0 * TOKENS, 5.0, 6.0), record(4.0 * TOKENS, 5.0, 6.0)
    CountedFlops(args).add_to(log)
    args.swiglu, args.quick_geglu = False, True
    CountedFlops(args).add_to(same)
    for name in ("flops", "flops_ratio", "throughput"):
        assert same[name] == pytest.approx(log[name], rel=1e-12)
    assert same["layers"] == log["layers"]


def test_one_layer_may_be_all_mtp_layers(args: argparse.Namespace) -> None:
    """Its rows are those of every time it runs."""
    args.mtp_num_layers, k_rows = 2, 3.0 * TOKENS
    apart, one = record(*[k_rows] * 3, k_rows, k_rows + 8), record(*[k_rows] * 3, 2 * k_rows + 8)
    CountedFlops(args).add_to(apart)
    args.mtp_use_repeated_layer = True
    CountedFlops(args).add_to(one)
    for name in ("flops", "flops_ratio"):
        assert one[name] == pytest.approx(apart[name], rel=1e-12)
    *_, first, second = apart["layers"]
    assert one["layers"][-1]["flops"] == pytest.approx(first["flops"] + second["flops"])
    plain = record(*[k_rows] * 3, 2 * k_rows)
    CountedFlops(args).add_to(plain)
    assert plain["flops_ratio"] == 1
    assert all(layer["flops_ratio"] == 1 for layer in plain["layers"])


def test_sizes_that_are_not_modelled_leave_the_total(args: argparse.Namespace) -> None:
    args.multi_latent_attention = True
    log = record(4.0 * TOKENS, 3.0 * TOKENS, 3.0 * TOKENS)
    CountedFlops(args).add_to(log)
    assert log["flops"] == training.num_floating_point_operations(args, 6) + TOKENS * ROW
    assert "flops" not in log["layers"][0]
