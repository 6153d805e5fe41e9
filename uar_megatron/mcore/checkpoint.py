"""The checkpoint that a run is about to load: is all of it there, and is it nothing but data.

Megatron trusts what it finds. A run that was killed while it saved, a file that was lost in a copy,
a tracker that names a folder which is gone, end in tracebacks of some ranks and a hang of the
others, or in training from random weights. And a checkpoint is made of pickles, which may run any
program when they are read.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from uar_megatron.errors import ConfigError, DataError
from uar_megatron.mcore.compat import SAFE_RECORDS

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
_SAFE, _UNSAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_COMMON_STATE = "common_state/shard_0_1"  # dist_checkpointing/serialization.py:227
_LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
_METADATA_GLOBALS = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
}


def load_data_only() -> None:
    """Have every ``torch.load`` of this process and of its children refuse all but plain data.

    ``torch.distributed.checkpoint`` asks for the opposite when it reads objects
    (default_planner.py:392), Megatron's common state among them; torch's own switch overrides it.
    Megatron registers the classes that its checkpoints need (core/safe_globals.py:29).

    Raises:
        ConfigError: the environment asks for unsafe loading.
    """
    if os.environ.get(_UNSAFE, "0").lower() in ("1", "y", "yes", "true"):
        raise ConfigError(
            _UNSAFE,
            "this environment variable asks torch to run whatever program a checkpoint contains",
            remedy=f"unset {_UNSAFE}",
        )
    os.environ[_SAFE] = "1"
    torch.serialization.add_safe_globals(SAFE_RECORDS)


@contextlib.contextmanager
def unsafe_checkpoints_refused(load: str | None) -> Iterator[None]:
    """Name the checkpoint where ``torch.load`` refused one of its objects inside.

    :func:`check_checkpoint` looks into the common state only; there may be thousands of objects.

    Raises:
        DataError: what was to be read is more than data, or damaged.
    """
    try:
        yield
    except (pickle.UnpicklingError, CheckpointException) as error:
        failures = getattr(error, "failures", {0: (error, None)})
        for cause, _ in failures.values():
            if isinstance(cause, pickle.UnpicklingError):
                raise DataError(
                    f"load: an object in the checkpoint in {load} is {describe_unsafe(cause)}\n"
                    "  remedy:  use a checkpoint from a source that you trust"
                ) from error
        raise


def check_on_every_rank(args: argparse.Namespace) -> None:
    """Check on rank 0, for the sake of the file system, and fail on every rank. A collective.

    Raises:
        DataError: as :func:`check_checkpoint`, or the checkpoint cannot be looked at.
    """
    verdict: list[str | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            name_newest_checkpoint(args)
            check_checkpoint(args)
        except (DataError, ConfigError) as error:
            verdict = [str(error)]
        except Exception as error:  # the other ranks wait for a verdict
            verdict = [f"load: {folder_to_load(args)} cannot be checked: {error!r}"]
    torch.distributed.broadcast_object_list(verdict, src=0)
    if verdict[0] is not None:
        raise DataError(verdict[0])


def check_checkpoint(args: argparse.Namespace) -> None:
    """Check the checkpoint that Megatron will load (checkpointing.py:1633), if there is one.

    Of the files it reads only the small ones; of tensors it sees that they are long enough.

    Raises:
        DataError: the tracker or the checkpoint is missing, incomplete, or more than data.
        ConfigError: its optimizer state cannot be loaded into this layout.
    """
    folder = folder_to_load(args)
    if folder is None or args.moe_use_upcycling or "://" in str(folder):
        return  # nothing is loaded, or it is in an object store, which answers for itself
    load = Path(folder)
    step: int | str | None
    if _is_unnamed(load, args):
        step = _latest_complete(load)  # as name_newest_checkpoint does
    else:
        step = _read_tracker(load / TRACKER) if _has_tracker(load) else None
    if step is None and not args.ckpt_step:
        return _check_nothing_to_load(load, args)
    name = step if step == "release" else f"iter_{int(args.ckpt_step or step or 0):07d}"
    problem = find_problem(load / name)
    if problem is not None:
        raise _refusal(load, f"{load / name} {problem}", without=name)
    finetunes = args.finetune or folder != args.load  # checkpointing.py:2108
    if not (finetunes or args.no_load_optim or step == "release"):
        _check_optimizers(load / name, args)
    if args.non_persistent_ckpt_type == "global":
        _check_non_persistent(Path(args.non_persistent_global_ckpt_dir or load / "non_persistent"))


def folder_to_load(args: argparse.Namespace) -> str | None:
    """Return the folder that Megatron will load from."""
    if args.pretrained_checkpoint is not None and not _has_tracker(args.load):
        return args.pretrained_checkpoint
    return args.load


def name_newest_checkpoint(args: argparse.Namespace) -> None:
    """Write the tracker that a run killed at the end of a save has left empty or not begun.

    Megatron opens it for writing when all else of the checkpoint is there, so it may be cut off
    between the two. With no complete checkpoint the run starts afresh, as in an empty folder.
    """
    if args.load is None or args.moe_use_upcycling or not _is_unnamed(Path(args.load), args):
        return
    tracker = Path(args.load) / TRACKER
    newest = _latest_complete(tracker.parent)
    if newest is None:
        tracker.unlink(missing_ok=True)  # Megatron cannot read an empty one
        return
    temporary = tracker.with_name(f"{TRACKER}.{os.getpid()}")
    temporary.write_text(str(newest))
    temporary.replace(tracker)
    logger.warning("%s named no checkpoint: going on from the newest, %d", tracker, newest)


def _is_unnamed(load: Path, args: argparse.Namespace) -> bool:
    """Whether a folder that this run also saves to has no tracker, or an empty one."""
    tracker = load / TRACKER
    return _saves_to(load, args) and not (tracker.is_file() and tracker.read_bytes().strip())


def _saves_to(load: Path, args: argparse.Namespace) -> bool:
    return args.save is not None and load.resolve() == Path(args.save).resolve()


def _has_tracker(folder: str | Path | None) -> bool:
    return folder is not None and (Path(folder) / TRACKER).is_file()


def _read_tracker(tracker: Path) -> str:
    """Return an iteration in digits, or ``release``."""
    text = tracker.read_bytes()[:100].decode(errors="replace").strip()
    if text != "release" and not re.fullmatch("[0-9]+", text):
        # Megatron reads it first, so that ckpt_step would be no way out.
        problem = f"{tracker} should hold an iteration, and holds {text!r}"
        raise _refusal(tracker.parent, problem, can_choose=False)
    return text


def _check_nothing_to_load(load: Path, args: argparse.Namespace) -> None:
    """Without a tracker Megatron starts from random weights, which is right for a new run only."""
    if _latest_complete(load) is not None:
        raise _refusal(load, f"{load} has checkpoints, but no {TRACKER} that names one")
    if not _saves_to(load, args) or args.exit_on_missing_checkpoint:
        raise DataError(
            f"load: {load} has no {TRACKER}, so there is nothing to load\n"
            "  remedy:  correct the path, or load=null to start from random weights"
        )


def _check_optimizers(folder: Path, args: argparse.Namespace) -> None:
    """Refuse optimizer state that Megatron cannot carry into this layout; it ends in tracebacks.

    Megatron gives experts an optimizer of their own where they are spread over ranks, and cannot
    split or join the state of one (``ChainedOptimizer``, optimizer.py:1578). The distributed
    optimizer saves its buffers as they lie unless it is told otherwise, which only other
    data-parallel sizes can load.
    """
    if not (folder / ".metadata").exists():
        return
    common = _common_state(folder, read_metadata(folder / ".metadata"))
    saved_args = common.get("args")
    if getattr(saved_args, "no_save_optim", False):
        return
    sharding = (common.get("content_metadata") or {}).get("distrib_optim_sharding_type")
    if sharding not in (None, "fully_reshardable", "fully_sharded_model_space"):
        for size in _LAYOUT:
            saved, now = getattr(saved_args, size, None), getattr(args, size)
            if saved is not None and saved != now:
                raise ConfigError(
                    size,
                    f"{now}, while {folder} was saved with {saved}, and its distributed "
                    f"optimizer's state as {sharding}, which fits no other layout",
                    allowed=str(saved),
                    remedy="no_load_optim=true goes on with a fresh optimizer state; saved with "
                    "dist_ckpt_optim_fully_reshardable=true, it could be loaded",
                )
    saved = getattr(saved_args, "expert_model_parallel_size", None)
    now = args.expert_model_parallel_size
    if saved is not None and "optimizer" in common and (saved > 1) != (now > 1):
        raise ConfigError(
            "expert_model_parallel_size",
            f"{now}, while {folder} was saved with {saved}: Megatron cannot carry optimizer state "
            "between one and several expert-parallel ranks",
            allowed="1" if saved == 1 else "2 or more",
            remedy="no_load_optim=true goes on with a fresh optimizer state",
        )


def _check_non_persistent(folder: Path) -> None:
    """Check what ``non_persistent_ckpt_type: global`` saves in between, which may be newer."""
    if not _has_tracker(folder):
        return
    step = _read_tracker(folder / TRACKER)
    named = folder / (step if step == "release" else f"iter_{int(step):07d}")
    problem = "is no checkpoint that a run saves" if step == "release" else find_problem(named)
    if problem is not None:
        raise DataError(
            f"load: {named} {problem}\n"
            f"  remedy:  remove {folder} to go on from the last persistent checkpoint"
        )


def _refusal(load: Path, problem: str, without: str = "", can_choose: bool = True) -> DataError:
    """The error, with the newest checkpoint that is whole as the way out."""
    complete = _latest_complete(load, without)
    if complete is None:
        remedy = "restore what is missing; no other checkpoint there is complete, so the run can "
        remedy += "otherwise only start anew, in another run.dir"
    else:
        remedy = f"restore what is missing, or go on from iteration {complete}, which is complete: "
        remedy += f"ckpt_step={complete} once, or " * can_choose
        remedy += f"write {complete} into {load / TRACKER}"
    return DataError(f"load: {problem}\n  remedy:  {remedy}")


def _latest_complete(load: Path, without: str = "") -> int | None:
    """The highest iteration whose checkpoint is whole, looking no further than that."""
    named = ((re.fullmatch("iter_([0-9]+)", f.name), f) for f in load.glob("iter_*"))
    folders = {int(match[1]): folder for match, folder in named if match}
    for step, folder in sorted(folders.items(), reverse=True):
        if folder.name != without and find_problem(folder) is None:
            return step
    return None


def find_problem(folder: Path) -> str | None:
    """Say what keeps a checkpoint from being loaded, None if nothing does.

    Args:
        folder: an ``iter_…`` folder of any of Megatron's formats.
    """
    if not folder.is_dir():
        return "does not exist"
    legacy = sorted(folder.glob("mp_rank_*"))
    if legacy:
        parts = [rank / "model_optim_rng.pt" for rank in legacy]
        lost = [part for part in parts if not part.is_file() or not part.stat().st_size]
        return f"is incomplete: {lost[0]} is missing or empty" if lost else None
    try:
        metadata = read_metadata(folder / ".metadata")
    except FileNotFoundError:
        return "is incomplete: .metadata is missing, which is written after all data"
    except Exception as error:  # a damaged pickle can raise anything
        return f"cannot be used: .metadata is damaged or not what torch writes ({error})"
    return _data_problem(folder, metadata) or _common_state_problem(folder, metadata)


def _data_problem(folder: Path, metadata: Metadata) -> str | None:
    """Say which file of tensors or objects is missing or too short."""
    lengths: dict[str, int] = {}
    for part in metadata.storage_data.values():
        end = part.offset + part.length
        lengths[part.relative_path] = max(lengths.get(part.relative_path, 0), end)
    for name, length in lengths.items():
        try:
            found = (folder / name).stat().st_size
        except FileNotFoundError:
            return f"is incomplete: {name} is missing"
        if found < length:
            return f"is incomplete: {name} has {found} bytes and should have {length}"
    return None


def _common_state_problem(folder: Path, metadata: Metadata) -> str | None:
    """Say what is wrong with what only ``torch_dist`` has: metadata.json and the common state."""
    config, legacy = folder / "metadata.json", folder / "common.pt"
    part = metadata.storage_data.get(MetadataIndex(_COMMON_STATE))
    if not config.exists():
        is_torch_dist = part is not None or legacy.exists()
        return "is incomplete: metadata.json, written last, is missing" if is_torch_dist else None
    try:
        json.loads(config.read_bytes())
    except ValueError as error:
        return f"cannot be used: metadata.json is damaged ({error})"
    if part is None and not legacy.exists():
        return "is incomplete: common.pt is missing"
    try:
        _common_state(folder, metadata)
    except Exception as error:  # a damaged file can raise anything
        name = legacy.name if part is None or legacy.exists() else part.relative_path
        return f"cannot be used: the common state in {name} is {describe_unsafe(error)}"
    return None


def saved_arguments(folder: Path) -> argparse.Namespace | None:
    """Return the arguments of the run that saved a ``torch_dist`` checkpoint, if it has them."""
    args: argparse.Namespace | None = None
    if (folder / ".metadata").exists():
        args = _common_state(folder, read_metadata(folder / ".metadata")).get("args")
    return args


def _common_state(folder: Path, metadata: Metadata) -> dict[str, Any]:
    """Everything in a ``torch_dist`` checkpoint that is no tensor; ``{}`` for other formats."""
    part = metadata.storage_data.get(MetadataIndex(_COMMON_STATE))
    # Megatron prefers the file, which its versions before 0.19 wrote.
    if (folder / "common.pt").exists():
        content = (folder / "common.pt").read_bytes()
    elif part is None:
        return {}
    else:
        with (folder / part.relative_path).open("rb") as stream:
            stream.seek(part.offset)
            content = stream.read(part.length)
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return state[0] if isinstance(state, list) else state


def describe_unsafe(error: BaseException) -> str:
    """Say in a few words why ``torch.load`` refused to read something as plain data."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named is None:
        return f"damaged ({str(error).splitlines()[0]})"
    return f"not just data: reading it would call {named[1]}, and could so run any program"


def read_metadata(path: Path) -> Metadata:
    """Read torch's description of a checkpoint, and nothing but that.

    torch itself unpickles whatever the file names (checkpoint/filesystem.py:938).

    Raises:
        pickle.UnpicklingError: the pickle names something that does not belong there; other
            exceptions if it is damaged.
    """
    with path.open("rb") as stream:
        metadata = _MetadataUnpickler(stream).load()
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise pickle.UnpicklingError("it does not describe a checkpoint")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)

    def find_class(self, module: str, name: str) -> Any:
        known = name in _METADATA_GLOBALS.get(module, ())
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which does not belong there")
