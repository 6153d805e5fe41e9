"""A Megatron checkpoint read as plain tensors: no process group, no model, nothing but data."""

from __future__ import annotations

import argparse
import io
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from uar_megatron.config import UARConfig
from uar_megatron.errors import DataError
from uar_megatron.evaluation.checkpoint import Located, locate
from uar_megatron.experiment import Experiment, load_experiment
from uar_megatron.mcore.checkpoint import (
    find_problem,
    load_data_only,
    read_metadata,
    saved_arguments,
)

_MODEL = ("embedding.", "decoder.", "output_layer.")


@dataclass(frozen=True)
class Source:
    """What a checkpoint holds of a model.

    Attributes:
        located: where it is.
        args: the Megatron arguments that were saved in it.
        experiment: the resolved configuration of the run.
        names: every tensor of the model by the checkpoint's own name; a stack of all layers has a
            name without a layer's number.
        objects: names of what is no tensor, such as ``…_extra_state/shard_0_1``.
        tensors: by Megatron's name, with a layer's number.
    """

    located: Located
    args: argparse.Namespace
    experiment: Experiment
    names: list[str]
    objects: list[str]
    tensors: dict[str, torch.Tensor] = field(repr=False)

    @property
    def uar(self) -> UARConfig:
        """The UAR section of the run."""
        return self.experiment.uar


def read_checkpoint(checkpoint: str | Path, config: str | Path | None = None) -> Source:
    """Read the weights and the routers' state of a checkpoint; optimizer state stays where it is.

    Args:
        checkpoint: the folder of a run, its folder of checkpoints, or one ``iter_…`` folder.
        config: the resolved configuration, where the run has left none there.

    Raises:
        DataError: no checkpoint, an incomplete or damaged one, one that is more than data, or one
            of another format than ``torch_dist``.
        ConfigError: there is no configuration.
    """
    load_data_only()
    located = locate(checkpoint, config)
    problem = find_problem(located.folder)
    if problem is not None:
        raise DataError(f"checkpoint: {located.folder} {problem}")
    if not (located.folder / "metadata.json").exists():
        raise DataError(
            f"checkpoint: {located.folder} is not in the format torch_dist\n"
            "  remedy:  save it with ckpt_format: torch_dist"
        )
    args = saved_arguments(located.folder)
    if args is None:
        raise DataError(f"checkpoint: {located.folder} holds no Megatron arguments")
    described = read_metadata(located.folder / ".metadata").state_dict_metadata
    ours = {name: entry for name, entry in described.items() if name.startswith(_MODEL)}
    stored = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in ours.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    # `find_problem` has seen that .metadata is data; torch would otherwise unpickle anything.
    torch.distributed.checkpoint.load(
        stored, storage_reader=FileSystemReader(located.folder), no_dist=True
    )
    return Source(
        located,
        args,
        load_experiment(located.config),
        sorted(stored),
        sorted(name for name, entry in ours.items() if isinstance(entry, BytesStorageMetadata)),
        unstack(stored),
    )


def unstack(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give every layer its own tensors: Megatron stacks layers that are all alike."""
    tensors = {}
    for name, tensor in stored.items():
        if not is_stack(name):
            tensors[name] = tensor
            continue
        for layer, part in enumerate(tensor):
            tensors[of_layer(name, layer)] = part
    return tensors


def is_stack(name: str) -> bool:
    """Whether a name in a checkpoint is that of all layers together."""
    parts = name.split(".")
    return parts[:2] == ["decoder", "layers"] and not parts[2].isdigit()


def of_layer(name: str, layer: int) -> str:
    """The name of one layer's tensor in a stack."""
    return name.replace("decoder.layers.", f"decoder.layers.{layer}.", 1)


def build_tokenizer(args: argparse.Namespace, path: Path | None) -> Any:
    """Build Megatron's tokenizer, which knows the size of the vocabulary without padding.

    Args:
        args: of the checkpoint.
        path: where the tokenizer is now, if not where it was in training.

    Raises:
        DataError: it is not there, or cannot be loaded.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer as build

    args = argparse.Namespace(**vars(args))
    args.pad_vocab_size = False
    if path is not None:
        args.tokenizer_model = str(path)
    where = args.tokenizer_model
    try:
        if where and "/" in str(where) and not Path(where).exists():
            raise FileNotFoundError(f"{where} does not exist")
        with redirect_stdout(io.StringIO()):
            return build(args)
    except Exception as error:  # libraries of tokenizers raise almost anything
        raise DataError(
            f"tokenizer_model: the tokenizer of the training cannot be loaded: {error}\n"
            "  remedy:  name its folder or file with --tokenizer"
        ) from error
