"""Megatron models as sources of an export, without a training and without files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from evaluated_run import forgotten_afterwards
from real_model import build, forward

from uar_megatron.evaluation.checkpoint import Located
from uar_megatron.evaluation.model import CheckpointModel
from uar_megatron.export.source import Source, unstack
from uar_megatron.mcore.step import commit, routers_of

TINY = ("init_method_std=0.2", "vocab_size=120")
"""Logits that differ between tokens; a vocabulary that is padded to 128."""


@contextlib.contextmanager
def opened(checkpoint: Path) -> Iterator[CheckpointModel]:
    """A checkpoint in Megatron, which forgets afterwards what it was told for it."""
    with forgotten_afterwards(), CheckpointModel(checkpoint, batch_size=1) as model:
        yield model


def trained_source(run_dir: Path, *overrides: str) -> tuple[Source, torch.nn.Module]:
    """A tiny model that has taken a step's statistics, as a checkpoint would hold it."""
    experiment, args, model = build(run_dir, *TINY, *overrides)
    for seed in range(2):
        forward(model.train(), args, seed=seed)
        commit(routers_of([model]))
    tensors = {name: tensor.detach().clone() for name, tensor in _merged(model).items()}
    located = Located(run_dir, 2, run_dir / "config.yaml")
    return Source(located, args, experiment, sorted(tensors), [], unstack(tensors)), model.eval()


def _parts(model: torch.nn.Module) -> list[Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    sharded = model.sharded_state_dict()
    apply_factories(sharded)
    return [part for part in nested_values(sharded) if hasattr(part, "key")]


def _merged(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Put the shards of one name side by side: layers of a stack, experts, halves of a gate."""
    whole: dict[str, torch.Tensor] = {}
    for part in _parts(model):
        if not isinstance(part.data, torch.Tensor):
            continue
        target = whole.setdefault(part.key, torch.empty(part.global_shape, dtype=part.data.dtype))
        data = part.data.reshape((1,) * part.prepend_axis_num + tuple(part.data.shape))
        place = [
            slice(at, at + size) for at, size in zip(part.global_offset, data.shape, strict=True)
        ]
        target[tuple(place)] = data
    return whole
