"""Layouts: sizes, stages, micro-batches in flight, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from uar_megatron.config import UARConfig
from uar_megatron.errors import ConfigError
from uar_megatron.mcore.arguments import megatron_parser, to_argv
from uar_megatron.planning.activations import implementation_of
from uar_megatron.planning.layout import Layout, layout_of
from uar_megatron.shape import shape_of

MODEL: dict[str, Any] = {
    "num_layers": 8,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_experts": 16,
    "seq_length": 128,
    "vocab_size": 1000,
    "micro_batch_size": 2,
}


def layout(gpus: int, gpus_per_node: int = 8, **options: Any) -> Layout:
    args = megatron_parser().parse_args(to_argv(MODEL | options))
    return layout_of(args, shape_of(args), gpus, gpus_per_node)


def test_sizes_of_a_mixed_layout() -> None:
    found = layout(
        64,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        pipeline_model_parallel_size=2,
        context_parallel_size=2,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
        global_batch_size=64,
    )
    assert (found.data, found.expert_data) == (8, 8)
    assert found.micro_batches == 4
    assert found.tokens == 2 * 128 / 2
    assert found.routed_tokens == 2 * 128 / 2 / 2
    assert found.stages == ((0, 1, 2, 3), (4, 5, 6, 7))


def test_expert_tensor_parallelism_is_that_of_the_rest_unless_set() -> None:
    found = layout(
        8, tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=4
    )
    assert found.expert_tensor == 2
    assert found.expert_group == [0, 2, 4, 6]


def test_stages_of_an_interleaved_pipeline() -> None:
    found = layout(
        4,
        pipeline_model_parallel_size=2,
        num_virtual_stages_per_pipeline_rank=2,
        global_batch_size=64,
    )
    assert found.stages == ((0, 1, 4, 5), (2, 3, 6, 7))
    # Megatron's warm-up of the first rank: (2 - 0 - 1)·2 + (2 - 1)·2 = 4 chunks, and one more.
    assert [found.in_flight(stage) for stage in (0, 1)] == [5 / 2, 3 / 2]
    per_stage = layout(4, pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=2)
    assert per_stage.stages == found.stages


def recomputed(method: str, layers: int, mtp_layers: int = 0, **options: Any) -> list[Any]:
    """Groups of recomputed layers on each stage of two."""
    args = {"recompute_granularity": "full", "recompute_method": method, **options}
    args |= {"recompute_num_layers": layers, "pipeline_model_parallel_size": 2}
    parsed = megatron_parser().parse_args(to_argv(MODEL | args))
    found = layout_of(parsed, shape_of(parsed), 2, 8)
    how = implementation_of(parsed, UARConfig(), "torch")
    return [how.recomputed_groups(found, stage, mtp_layers) for stage in (0, 1)]


def test_recomputation_counts_the_layers_of_each_chunk() -> None:
    """Rank 0 has layers 0 1 and 4 5, rank 1 has 2 3, 6 7 and the MTP layer 8."""
    chunks = {"num_virtual_stages_per_pipeline_rank": 2, "global_batch_size": 64}
    assert recomputed("block", 1, 1, **chunks) == [[(0,), (4,)], [(2,), (6,)]]
    assert recomputed("block", 3, 1, **chunks)[1] == [(2,), (3,), (6,), (7,)]
    assert recomputed("uniform", 1, 1, **chunks)[1] == [(2,), (3,), (6,), (7,), (8,)]
    assert recomputed("uniform", 3, **chunks) == [[(0, 1), (4, 5)], [(2, 3), (6, 7)]]
    assert recomputed("uniform", 3) == [[(0, 1, 2), (3,)], [(4, 5, 6), (7,)]]
    assert recomputed("block", 3)[1] == [(4,), (5,), (6,)]


def test_micro_batches_in_flight_of_1f1b() -> None:
    found = layout(4, pipeline_model_parallel_size=4, global_batch_size=6)
    assert [found.in_flight(stage) for stage in range(4)] == [3, 3, 2, 1]  # 3 micro-batches


def test_uneven_ends_of_a_pipeline() -> None:
    found = layout(
        4,
        pipeline_model_parallel_size=4,
        decoder_first_pipeline_num_layers=1,
        decoder_last_pipeline_num_layers=3,
    )
    assert found.stages == ((0,), (1, 2), (3, 4), (5, 6, 7))


@pytest.mark.parametrize(
    ("gpus", "options", "words"),
    [
        (12, {"expert_model_parallel_size": 8}, ["--gpus", "12", "multiples of 8", "8 and 16"]),
        (4, {"expert_model_parallel_size": 8}, ["--gpus", "the least is 8"]),
        (32, {"expert_model_parallel_size": 32}, ["expert_model_parallel_size", "1, 2, 4, 8, 16"]),
        (8, {"expert_model_parallel_size": 3}, ["--gpus", "expert 3"]),
        (0, {}, ["--gpus", "1 or more"]),
        (8, {"global_batch_size": 24}, ["global_batch_size", "24", "data parallel 8"]),
        (3, {"tensor_model_parallel_size": 3, "sequence_parallel": True}, ["num_attention_heads"]),
        (2, {"tensor_model_parallel_size": 2}, ["sequence_parallel", "set sequence_parallel"]),
        (3, {"pipeline_model_parallel_size": 3}, ["pipeline_model_parallel_size", "8 layers"]),
        (
            2,
            {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 3},
            ["num_virtual_stages", "3 equal chunks"],
        ),
        (8, {"account_for_loss_in_pipeline_split": True}, ["account_for_loss", "not modelled"]),
    ],
)
def test_what_does_not_divide_is_refused(
    gpus: int, options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as refusal:
        layout(gpus, **options)
    for word in words:
        assert word in str(refusal.value)
