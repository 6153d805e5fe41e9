"""How a checkpoint is laid out over the ranks of an evaluation, and what does not fit."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from uar_megatron.errors import ConfigError, DataError
from uar_megatron.evaluation.checkpoint import Located
from uar_megatron.experiment import Experiment

if TYPE_CHECKING:
    from uar_megatron.mcore.router import UARRouter

_EMBEDDING = "embedding.word_embeddings.weight"


def world_size() -> int:
    """Ranks of this job, as torchrun says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_layout(experiment: Experiment) -> None:
    """Refuse parallel sizes that the ranks or the model cannot be divided by.

    Raises:
        ConfigError: naming the size, and what would fit.
    """
    megatron, ranks = experiment.megatron, world_size()
    tensor = int(megatron["tensor_model_parallel_size"])
    stages = int(megatron["pipeline_model_parallel_size"])
    experts = int(megatron["expert_model_parallel_size"])
    expert_tensor = int(megatron["expert_tensor_parallel_size"])
    for name, size, of, total in (
        ("tensor_model_parallel_size", tensor, "ranks", ranks),
        ("pipeline_model_parallel_size", tensor * stages, "ranks", ranks),
        ("expert_model_parallel_size", experts * expert_tensor * stages, "ranks", ranks),
        ("tensor_model_parallel_size", tensor, "attention heads", _count(megatron, "heads")),
        ("pipeline_model_parallel_size", stages, "layers", _layers_to_divide(megatron)),
        ("expert_model_parallel_size", experts, "experts", _count(megatron, "experts")),
    ):
        if total and total % size:
            raise ConfigError(
                name,
                f"{total} {of} cannot be divided by {size}"
                + (" (with the other parallel sizes)" if size != megatron[name] else ""),
                allowed=f"a divisor of {total}",
                remedy="change the size, or the number of processes (--nproc)",
            )


def _layers_to_divide(megatron: dict[str, object]) -> int:
    """Layers, where the stages have as many each; 0 where the user says how many each has."""
    uneven = (
        *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
        *("pipeline_model_parallel_layout", "account_for_embedding_in_pipeline_split"),
        "account_for_loss_in_pipeline_split",
    )
    return 0 if any(megatron.get(name) for name in uneven) else _count(megatron, "layers")


def _count(megatron: dict[str, object], what: str) -> int:
    key = {"heads": "num_attention_heads", "layers": "num_layers", "experts": "num_experts"}[what]
    value = megatron.get(key)
    return int(value) if isinstance(value, int) else 0


def fix_vocabulary(experiment: Experiment, located: Located) -> None:
    """Set the padded vocabulary to that of the checkpoint.

    Megatron pads it to a multiple of the tensor-parallel size; rows that another layout adds would
    be random, and take their part of every softmax.
    """
    rows = _rows_of_embedding(located)
    if rows is None:
        return
    tensor = int(experiment.megatron["tensor_model_parallel_size"])
    if rows % tensor:
        raise ConfigError(
            "tensor_model_parallel_size",
            f"the checkpoint's embedding has {rows} rows, which cannot be divided by {tensor}",
            allowed=f"a divisor of {rows}",
        )
    experiment.megatron["padded_vocab_size"] = rows


def check_tokenizer(located: Located, args: argparse.Namespace, vocab_size: int) -> None:
    """Refuse a tokenizer whose vocabulary is not the one that the run was trained with.

    Raises:
        DataError: the padded sizes differ.
    """
    from uar_megatron.mcore.checkpoint import saved_arguments

    rows = _rows_of_embedding(located)
    if rows is None:
        return
    saved = saved_arguments(located.folder)
    multiple = getattr(saved, "make_vocab_size_divisible_by", args.make_vocab_size_divisible_by)
    multiple *= getattr(saved, "tensor_model_parallel_size", 1)
    wanted = -(-vocab_size // multiple) * multiple
    if wanted != rows:
        raise DataError(
            f"tokenizer_model: {args.tokenizer_model or args.tokenizer_type} has {vocab_size} "
            f"tokens, which are padded to {wanted}; the checkpoint's embedding has {rows} rows\n"
            "  remedy:  name the tokenizer that the run was trained with: tokenizer_model=PATH"
        )


def check_routing_state(located: Located, routers: Sequence[UARRouter]) -> None:
    """Refuse a checkpoint without the statistics that its routers decide by.

    Training may go on from one; routers then start as if at the first step, and every token is of
    average uncertainty.

    Raises:
        DataError: it has none.
    """
    if all(router.is_off for router in routers):
        return
    names = _saved(located)
    if names is not None and not any(".uar_statistics." in name for name in names):
        raise DataError(
            f"checkpoint: {located.folder} has no statistics of UAR routers: a run of stock "
            "Megatron has saved it\n"
            "  remedy:  uar.policy=topk evaluates it as it was trained (with uar.clb.enabled=false "
            "uar.bias.enabled=false)"
        )


def _saved(located: Located) -> dict[str, Any] | None:
    """What a checkpoint says of its tensors, by name; None for Megatron's older formats."""
    from uar_megatron.mcore.checkpoint import read_metadata

    path = located.folder / ".metadata"
    return dict(read_metadata(path).state_dict_metadata) if path.is_file() else None


def _rows_of_embedding(located: Located) -> int | None:
    size = getattr((_saved(located) or {}).get(_EMBEDDING), "size", None)
    return None if size is None else int(size[0])
