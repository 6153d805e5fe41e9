"""Where all-to-all bytes go and how long they take; the bytes themselves are counted in
tests/distributed/test_traffic.py."""

from __future__ import annotations

import dataclasses

import pytest

from uar_megatron.errors import ConfigError
from uar_megatron.planning.hardware import GPUS, hardware
from uar_megatron.planning.layout import Layout
from uar_megatron.planning.traffic import (
    Exchange,
    all_to_all_seconds,
    even_exchange,
    exchange,
    ring_seconds,
)

LAYOUT = Layout(
    world=8,
    gpus_per_node=4,
    tensor=1,
    pipeline=1,
    virtual=1,
    context=1,
    expert=8,
    expert_tensor=1,
    has_sequence_parallel=False,
    micro_batch=1,
    global_batch=8,
    seq_length=16,
    stages=((0,),),
    warmup_group=1,
)
SIZES = {"experts": 16, "width": 10, "element": 2, "weight": 4}


def test_even_rows_over_two_nodes() -> None:
    found = even_exchange(80, LAYOUT, **SIZES)
    assert found.dispatch == found.combine == 80 * 10 * 2
    assert found.weights == 80 * 4
    assert found.counts == 16 * 8
    assert found.leaving == 7 / 8
    assert found.between_nodes == 1 / 2
    assert found.gathered == 0


def test_a_group_within_a_node_and_one_that_straddles() -> None:
    within = dataclasses.replace(LAYOUT, gpus_per_node=8)
    assert even_exchange(80, within, **SIZES).between_nodes == 0
    # Ranks of the group lie two apart: 0 2 | 4 6 on nodes of four.
    apart = dataclasses.replace(LAYOUT, expert=4, expert_tensor=2)
    found = even_exchange(80, apart, **SIZES)
    assert found.between_nodes == 1 / 2
    assert found.gathered == 80 * (10 * 2 + 4)
    # The rank that is alone on its node sends most to others.
    straddling = dataclasses.replace(LAYOUT, expert=4, gpus_per_node=3)
    assert even_exchange(80, straddling, **SIZES).between_nodes == 3 / 4


def test_uneven_rows() -> None:
    found = exchange([6, 0, 2, 0], [1, 1, 1, 1], 0, dataclasses.replace(LAYOUT, expert=4), **SIZES)
    assert (found.dispatch, found.combine) == (8 * 20, 4 * 20)
    assert found.leaving == 2 / 8


def test_one_rank_exchanges_nothing() -> None:
    found = even_exchange(80, dataclasses.replace(LAYOUT, expert=1), **SIZES)
    assert found.forward == found.backward == found.counts == found.leaving == 0


def test_the_slower_link_counts() -> None:
    h800 = hardware("H800")
    found = Exchange(0, 0, 0, 0, 0, 0, leaving=0.75, between_nodes=0.5)
    assert all_to_all_seconds(100e9, found, h800) == pytest.approx(50 / 50)
    within = dataclasses.replace(found, between_nodes=0.0)
    assert all_to_all_seconds(160e9, within, h800) == pytest.approx(0.75)
    mostly_within = dataclasses.replace(found, between_nodes=0.1)
    assert all_to_all_seconds(160e9, mostly_within, h800) == pytest.approx(0.65)
    assert ring_seconds(8e9, 4, 2e9) == pytest.approx(3.0)


def test_links_can_be_given() -> None:
    found = hardware("h100", nvlink_gbs=100, network_gbs=12.5)
    assert (found.nvlink, found.network) == (100e9, 12.5e9)
    assert found.peak_flops == GPUS["h100"].peak_flops
    with pytest.raises(ConfigError, match="did you mean 'h800'"):
        hardware("h80")
    for impossible in (0, float("inf"), float("nan"), 1e300):
        with pytest.raises(ConfigError, match="--network-gbs"):
            hardware("h100", network_gbs=impossible)
