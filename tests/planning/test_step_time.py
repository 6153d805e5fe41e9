"""Parts of the step time by hand: a dense and seven MoE layers, 256 experts on 8 ranks, 64 GPUs.

A step has 1024 sequences of 4096 tokens, one in a micro-batch.
"""

from __future__ import annotations

import pytest
from plans import planned

HIDDEN, DENSE, EXPERT, VOCAB, SEQ = 1024, 2560, 320, 32000, 4096
NVLINK, NETWORK = 160e9, 50e9
SPEED = 989e12 * 0.35
TOKENS = 1024 * SEQ / 64
"""Of a step, over the GPUs: its FLOPs are spread evenly."""

CORE = 2 * SEQ * HIDDEN  # the causal half of two products
ATTENTION = 4 * 2 * HIDDEN**2 + CORE
MLP = 6 * HIDDEN * DENSE
ROUTER = 2 * HIDDEN * 256
EXPERTS = 8 * 6 * HIDDEN * EXPERT
LOGITS = 2 * HIDDEN * VOCAB

TENSOR = ("tensor_model_parallel_size=2", "sequence_parallel=true")
WHOLE_EXPERTS = (*TENSOR, "expert_tensor_parallel_size=1")
FULL = ("recompute_granularity=full", "recompute_method=uniform", "recompute_num_layers=1")
SHARED = "moe_shared_expert_intermediate_size=320"
RING = SEQ * HIDDEN * 2 / 2
"""Bytes that a rank of two moves when a hidden state is gathered or scattered."""
ROWS = SEQ / 2 * 8 * (HIDDEN * 2 + 4)
"""The same of the rows of one layer, and their weights, between two expert tensor ranks."""
MICRO_BATCHES = 32
"""Of each of the 32 data-parallel ranks under tensor parallelism."""


def selective(*modules: str) -> tuple[str, str]:
    return "recompute_granularity=selective", f"recompute_modules=[{','.join(modules)}]"


def test_computation_by_hand() -> None:
    found = planned(64).time
    dense = 8 * ATTENTION + MLP + 7 * ROUTER + LOGITS
    assert found.dense == pytest.approx(3 * TOKENS * dense / SPEED)
    assert found.experts == pytest.approx(3 * TOKENS * 7 * EXPERTS / SPEED)
    under_tensor = planned(64, *TENSOR).time
    assert under_tensor.dense == pytest.approx(found.dense)
    assert under_tensor.experts == pytest.approx(found.experts)


def test_a_layer_for_multi_token_prediction_by_hand() -> None:
    """Attention and experts once more, the projection of two hidden states, other logits."""
    plain, found = planned(64).time, planned(64, "mtp_num_layers=1").time
    more = ATTENTION + ROUTER + 2 * 2 * HIDDEN**2 + LOGITS
    assert found.dense - plain.dense == pytest.approx(3 * TOKENS * more / SPEED)
    assert found.experts / plain.experts == pytest.approx(8 / 7)
    assert found.all_to_all / plain.all_to_all == pytest.approx(8 / 7)


@pytest.mark.parametrize(
    ("options", "flops"),
    [
        (FULL, 8 * ATTENTION + MLP + 7 * (ROUTER + EXPERTS)),
        (
            (*FULL, "mtp_num_layers=1"),
            9 * ATTENTION + MLP + 8 * (ROUTER + EXPERTS) + 2 * 2 * HIDDEN**2,
        ),
        (
            ("recompute_granularity=full", "recompute_method=block", "recompute_num_layers=2"),
            2 * ATTENTION + MLP + ROUTER + EXPERTS,
        ),
        (selective("core_attn"), 8 * CORE),
        (selective("mlp"), MLP),
        (selective("moe"), 7 * (ROUTER + EXPERTS)),
        ((*selective("shared_experts"), SHARED), 7 * 6 * HIDDEN * 320),
        (
            (*selective("shared_experts"), SHARED, "moe_shared_expert_gate=true"),
            7 * (6 * HIDDEN * 320 + 2 * HIDDEN),
        ),
        (selective("layernorm"), 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_recomputed_flops_by_hand(options: tuple[str, ...], flops: float) -> None:
    assert planned(64, *options).time.recomputation == pytest.approx(TOKENS * flops / SPEED)


@pytest.mark.parametrize(
    ("options", "rings", "exchanges"),
    [
        # Of eight attention blocks and one dense MLP; the forward has two of a block's five.
        ((), 9 * 5, 7 * 4),
        ((SHARED,), 9 * 5 + 7 * 5, 7 * 4),
        (FULL, 9 * 7, 7 * 6),
        (selective("core_attn"), 9 * 5, 7 * 4),
        (selective("mlp"), 9 * 5 + 2, 7 * 4),
        ((SHARED, *selective("moe")), 9 * 5 + 7 * 7, 7 * 6),
        ((SHARED, *selective("shared_experts")), 9 * 5 + 7 * 7, 7 * 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_tensor_parallel_collectives_by_hand(
    options: tuple[str, ...], rings: int, exchanges: int
) -> None:
    whole = planned(64, *WHOLE_EXPERTS, *options).time
    assert whole.tensor_parallel == pytest.approx(MICRO_BATCHES * rings * RING / NVLINK)
    cut = planned(64, *TENSOR, *options).time
    more = cut.tensor_parallel - whole.tensor_parallel
    assert more == pytest.approx(MICRO_BATCHES * exchanges * ROWS / NVLINK)


def test_a_tensor_parallel_group_across_nodes_takes_the_network() -> None:
    within = planned(64, *TENSOR).time.tensor_parallel
    across = planned(64, *TENSOR, gpus_per_node=1).time.tensor_parallel
    assert across == pytest.approx(within * NVLINK / NETWORK)
    experts = planned(64, *WHOLE_EXPERTS, gpus_per_node=1).time.tensor_parallel
    assert experts == pytest.approx(MICRO_BATCHES * 9 * 5 * RING / NETWORK)


def test_expert_tensor_ranks_wait_for_the_fullest() -> None:
    whole = planned(64, *WHOLE_EXPERTS, concentration=0.5)
    cut = planned(64, *TENSOR, concentration=0.5)
    more = cut.time.tensor_parallel - whole.time.tensor_parallel
    imbalance = cut.job.imbalance[0].expected
    assert imbalance > 1.1
    assert more == pytest.approx(MICRO_BATCHES * 7 * 4 * ROWS * imbalance / NVLINK)


def test_recomputed_layers_exchange_their_rows_again() -> None:
    plain = planned(64).time.all_to_all
    assert planned(64, *FULL).time.all_to_all == pytest.approx(1.5 * plain)
    assert planned(64, *selective("moe")).time.all_to_all == pytest.approx(1.5 * plain)
    assert planned(64, *selective("core_attn")).time.all_to_all == plain
