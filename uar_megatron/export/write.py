"""The folder that `uar export` writes: weights, configuration, modelling files, tokenizer."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from uar_megatron.data.tokenizers import HuggingFaceEncoder
from uar_megatron.errors import DataError, UARError
from uar_megatron.export import hf
from uar_megatron.export.architecture import model_config
from uar_megatron.export.names import STATE, Cuts, piece_of
from uar_megatron.export.routing import notes
from uar_megatron.export.source import Source, build_tokenizer

MANIFEST = "uar_export.json"
STATE_FILE = "megatron_state.safetensors"
MODEL_FILES = ("configuration_uar_moe.py", "routing_uar_moe.py", "modeling_uar_moe.py")
# What Megatron and our loader compare with the arguments of the run that loads a checkpoint.
_ARGUMENTS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "padded_vocab_size",
    "make_vocab_size_divisible_by",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
)
# Paths and habits of the machine that trained are nobody's business.
_PRIVATE = re.compile("save|load|run|.*(data_path|cache_path|args_path|tensorboard_dir|wandb).*")


def export_model(source: Source, output: Path, tokenizer: Path | None = None) -> list[str]:
    """Write a model for transformers, which routes as the checkpoint does.

    Args:
        source: the checkpoint.
        output: a folder that does not exist yet.
        tokenizer: where the tokenizer is now, if not where it was in training.

    Returns:
        Sentences about the differences to training; empty if there are none.

    Raises:
        ConfigError: an option or a policy that cannot be exported.
        DataError: the output exists, or the tokenizer cannot be loaded.
    """
    vocab = build_tokenizer(source.args, tokenizer).vocab_size
    config = model_config(source, vocab)
    model, state = convert(source, cuts_of(config))
    found = notes(source)
    with new_folder(output) as folder:
        config |= save_tokenizer(source.args, folder, tokenizer)
        found += _no_tokenizer(source.args) if not (folder / "tokenizer.json").exists() else []
        _save_sharded(model, folder)
        save_file(state, folder / STATE_FILE, metadata={"format": "pt"})
        for name in MODEL_FILES:
            shutil.copy(Path(hf.__path__[0]) / name, folder / name)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / MANIFEST).write_text(json.dumps(_manifest(source), indent=1) + "\n")
    return found


def cuts_of(config: Mapping[str, Any]) -> Cuts:
    """The sizes at which tensors are cut, from the exported configuration."""
    return Cuts(
        heads=config["num_attention_heads"],
        groups=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        is_gated=config["is_gated"],
        vocab=config["vocab_size"],
    )


def convert(source: Source, cuts: Cuts) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the tensors of the exported model, and those that only the way back needs.

    Raises:
        UARError: the checkpoint has a tensor that the exported model has not.
    """
    model: dict[str, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in source.tensors.items():
        piece = piece_of(name, cuts)
        for target, part in zip(piece.targets, piece.split(tensor), strict=True):
            (state if target.startswith(STATE) else model)[target] = part.contiguous()
    weights = {t.dtype for n, t in model.items() if ".frozen." not in n}
    if len(weights) > 1:
        raise UARError(f"export: weights of several dtypes ({', '.join(map(str, weights))})")
    # A stock checkpoint has no statistics, and with the same k for all tokens needs none.
    for name in [n for n in model if n.endswith("mlp.router.weight")]:
        for statistic in ("mean", "var"):
            zero = torch.zeros((), dtype=torch.float64)
            model.setdefault(name.replace("weight", f"frozen.{statistic}"), zero)
    return model, state


def save_tokenizer(args: argparse.Namespace, folder: Path, path: Path | None) -> dict[str, Any]:
    """Copy a HuggingFace tokenizer; return what ``config.json`` says of it.

    Raises:
        DataError: it cannot be loaded.
    """
    if args.tokenizer_type != "HuggingFaceTokenizer":
        return {}
    encoder = HuggingFaceEncoder(Path(path or args.tokenizer_model))
    encoder.tokenizer.save_pretrained(folder)
    named = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: getattr(encoder.tokenizer, name, None) for name in named}
    return {**ids, "eos_token_id": encoder.eod}


def _no_tokenizer(args: argparse.Namespace) -> list[str]:
    return [
        f"tokenizer_type: {args.tokenizer_type} has no files for transformers: "
        "the folder has no tokenizer"
    ]


def _save_sharded(model: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the weights in files of at most 5 GB, with an index if there are several."""
    split = split_torch_state_dict_into_shards(model)
    for name, tensors in split.filename_to_tensors.items():
        part = {tensor: model[tensor] for tensor in tensors}
        save_file(part, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _manifest(source: Source) -> dict[str, Any]:
    """What the way back needs to know of the checkpoint."""
    args, resolved = source.args, source.experiment.resolved
    return {
        "format": 1,
        "iteration": source.located.iteration,
        "names": source.names,
        "objects": source.objects,
        "args": {name: getattr(args, name) for name in _ARGUMENTS},
        "config": {k: v for k, v in resolved.items() if not _PRIVATE.fullmatch(k)},
    }


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder that appears under its name when all of it is written, or not at all.

    Raises:
        DataError: it exists already, or cannot be written.
    """
    if output.exists():
        raise DataError(
            f"output: {output} exists already\n  remedy:  remove it, or name another folder"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    except OSError as error:
        raise DataError(f"output: cannot write {output}: {error.strerror}") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        for path in temporary.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors leaves them to their owner alone
        temporary.rename(output)
    except OSError as error:
        raise DataError(f"output: cannot write {output}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
