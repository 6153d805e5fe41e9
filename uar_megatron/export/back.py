"""From an exported model back to a checkpoint that Megatron loads."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import DefaultSavePlanner

from uar_megatron.errors import DataError
from uar_megatron.evaluation.checkpoint import CONFIG, TRACKER
from uar_megatron.export.names import piece_of
from uar_megatron.export.source import is_stack, of_layer
from uar_megatron.export.write import MANIFEST, STATE_FILE, cuts_of, new_folder

_CHECKPOINT_VERSION = 3.0  # of Megatron's parameter layout (checkpointing.py)


def import_model(folder: Path, output: Path) -> None:
    """Write a ``release`` checkpoint: weights and the routers' state, without an optimizer.

    A run that loads it begins at step 0 with these weights, in any parallel layout.

    Args:
        folder: what `uar export` wrote, its weights perhaps trained further.
        output: a folder that does not exist yet.

    Raises:
        DataError: not such a folder, files that are damaged or do not fit, or the output exists.
    """
    manifest, config = _read_json(folder / MANIFEST), _read_json(folder / "config.json")
    tensors = _read_tensors(folder)
    try:
        state: dict[str, Any] = _joined(manifest["names"], tensors, config)
        state |= {name: [None] for name in manifest["objects"]}
        common = {
            "args": argparse.Namespace(**manifest["args"]),
            "checkpoint_version": _CHECKPOINT_VERSION,
            "iteration": 0,
        }
        settings = manifest["config"]
    except (KeyError, TypeError, RuntimeError) as error:
        raise DataError(
            f"import: {folder} does not hold what its {MANIFEST} promises: {error!r}"
        ) from error
    state["common_state/shard_0_1"] = [common]
    with new_folder(output) as temporary:
        torch.distributed.checkpoint.save(
            state,
            checkpoint_id=temporary / "release",
            planner=DefaultSavePlanner(flatten_state_dict=False),
            no_dist=True,
        )
        formats = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        formats |= {"common_backend": "torch", "common_backend_version": 1}
        (temporary / "release" / "metadata.json").write_text(json.dumps(formats))
        (temporary / TRACKER).write_text("release")
        (temporary / CONFIG).write_text(yaml.safe_dump(settings, sort_keys=False))


def _joined(
    names: list[str], tensors: dict[str, torch.Tensor], config: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Put the checkpoint's tensors together again."""
    cuts = cuts_of(config)

    def one(name: str) -> torch.Tensor:
        piece = piece_of(name, cuts)
        return piece.join([tensors[target] for target in piece.targets])

    layers = range(config["num_hidden_layers"])
    return {
        name: torch.stack([one(of_layer(name, i)) for i in layers]) if is_stack(name) else one(name)
        for name in names
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(
            f"import: {path.parent} is not what `uar export` writes: it has no {path.name}\n"
            "  remedy:  name such a folder; models of other architectures cannot be imported"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"import: {path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"import: {path} is damaged: it is no mapping")
    return found


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the model's files and of the state beside them."""
    files = {folder / STATE_FILE, *folder.glob("model*.safetensors")}
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files |= {folder / name for name in set(_read_json(index)["weight_map"].values())}
    tensors = {}
    for path in sorted(files):
        try:
            with safe_open(path, framework="pt") as opened:
                tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        except FileNotFoundError:
            raise DataError(f"import: {path} is missing") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"import: {path} is damaged: {error}") from error
    return tensors
