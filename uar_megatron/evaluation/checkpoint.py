"""Where a run's checkpoint is, what it was trained with, and how it is to be laid out now."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from uar_megatron.errors import ConfigError, DataError
from uar_megatron.experiment import SECTIONS, Experiment, load_experiment, values_of_group
from uar_megatron.pretrain import prepare_device

TRACKER = "latest_checkpointed_iteration.txt"
CONFIG = "config.yaml"

# Weights do not know how they were spread: one rank unless the user asks for more.
_LAYOUT: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "context_parallel_size": 1,
}
_EVALUATION: dict[str, Any] = {
    "no_load_optim": True,
    "no_load_rng": True,
    "exit_on_missing_checkpoint": True,
    "mock_data": True,
    "micro_batch_size": 1,
}
# What belongs to a training alone, writes somewhere, or needs a layout that is not this one.
_NO_TRAINING = (
    *("save", "async_save", "use_checkpoint_args", "pretrained_checkpoint", "ckpt_step"),
    *("non_persistent_ckpt_type", "tensorboard_dir", "wandb_project", "exit_signal_handler"),
    *("data_path", "train_data_path", "valid_data_path", "test_data_path", "data_args_path"),
    *("per_split_data_args_path", "multiple_validation_sets", "full_validation"),
    *("validation_set_names", "global_batch_size", "rampup_batch_size"),
    *("step_batch_size_schedule", "mtp_num_layers", "cuda_graph_impl", "recompute_granularity"),
    *("recompute_method", "recompute_num_layers", "recompute_activations", "sequence_parallel"),
    *("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"),
    *("pipeline_model_parallel_layout", "overlap_moe_expert_parallel_comm"),
    *("delay_wgrad_compute", "tp_comm_overlap", "decoder_first_pipeline_num_layers"),
    *("decoder_last_pipeline_num_layers", "account_for_embedding_in_pipeline_split"),
    "account_for_loss_in_pipeline_split",
)
_NO_ANSWER = (
    *_LAYOUT,
    "sequence_parallel",
    "moe_token_dispatcher_type",
    "load",
    "micro_batch_size",
)
"""Of a configuration as evaluated: what does not change what the model says."""
_NO_OBSERVATION = ("uar.observe.interval=0", "uar.observe.probe_interval=0")


@dataclass(frozen=True)
class Located:
    """A checkpoint on disk.

    Attributes:
        load: the folder that Megatron loads from, which holds ``iter_…`` folders.
        iteration: the iteration, or ``release``.
        config: the resolved configuration that the run has left.
    """

    load: Path
    iteration: int | str
    config: Path

    @property
    def folder(self) -> Path:
        """Where the weights are."""
        name = self.iteration
        return self.load / (name if isinstance(name, str) else f"iter_{name:07d}")


def locate(checkpoint: str | Path, config: str | Path | None = None) -> Located:
    """Find the weights and the configuration that belong to them.

    Args:
        checkpoint: the folder of a run, its folder of checkpoints (the newest is taken), or one
            ``iter_…`` folder.
        config: the resolved configuration, where the run has left none there.

    Raises:
        DataError: there is no such checkpoint.
        ConfigError: there is no configuration.
    """
    path = Path(checkpoint)
    if not path.is_dir():
        raise DataError(
            f"checkpoint: {path} is no folder\n"
            "  remedy:  name the folder of a run, its folder of checkpoints, or an iter_… folder"
        )
    load, iteration = _load_and_iteration(path.resolve())
    if config is not None:
        return Located(load, iteration, Path(config))
    for folder in (load, load.parent):
        if (folder / CONFIG).is_file():
            return Located(load, iteration, folder / CONFIG)
    raise ConfigError(
        "config",
        f"neither {load} nor {load.parent} has the {CONFIG} that a run leaves there",
        remedy="name the resolved configuration of the run with --config (config= for lm-eval)",
    )


def _load_and_iteration(path: Path) -> tuple[Path, int | str]:
    named = re.fullmatch("iter_([0-9]+)", path.name)
    if named:
        return path.parent, int(named[1])
    if path.name == "release":
        return path.parent, "release"
    for folder in (path, path / "checkpoints"):
        tracker = folder / TRACKER
        if tracker.is_file():
            text = tracker.read_bytes()[:100].decode(errors="replace").strip()
            if text == "release":
                return folder, text
            if re.fullmatch("[0-9]+", text):
                return folder, int(text)
            raise DataError(
                f"checkpoint: {tracker} should hold an iteration, and holds {text!r}\n"
                "  remedy:  name one of the iter_… folders beside it"
            )
    found = sorted(p.name for f in (path, path / "checkpoints") for p in f.glob("iter_*"))
    remedy = (
        f"name one of {', '.join(found[-3:])}" if found else "correct the path: nothing is there"
    )
    raise DataError(f"checkpoint: {path} has no {TRACKER} that names one\n  remedy:  {remedy}")


def evaluation_experiment(located: Located, overrides: Sequence[str] = ()) -> Experiment:
    """Return the run's configuration, as it is to be evaluated.

    The model and its routing are those of the run. Its layout is not: every parallel size is 1
    unless overridden. MTP layers, which have no part in a prediction, are left out.

    Args:
        located: of :func:`locate`.
        overrides: dotted overrides, e.g. ``expert_model_parallel_size=2``, ``parallel=cpu`` or
            ``uar.budget.mode=exact``.

    Raises:
        ConfigError: the configuration cannot be used.
    """
    values = [
        value for override in overrides for value in _without_groups(located.config, override)
    ]
    experiment = load_experiment(located.config, [*_NO_OBSERVATION, *values])
    prepare_device(experiment)
    from uar_megatron.mcore.arguments import destination

    own = {**_LAYOUT, **_EVALUATION, "load": str(located.load)}
    if isinstance(located.iteration, int):
        own["ckpt_step"] = located.iteration
    keys = (value.partition("=")[0] for value in values)
    asked_for = {destination(key) for key in keys if key.split(".")[0] not in SECTIONS}
    megatron = {
        key: value
        for key, value in experiment.megatron.items()
        if value is not None and _is_kept(destination(key), own, asked_for)
    }
    megatron |= {key: value for key, value in own.items() if key not in asked_for}
    tensor, expert = (megatron[f"{kind}_model_parallel_size"] for kind in ("tensor", "expert"))
    megatron["sequence_parallel"] = tensor > 1
    if megatron.get("moe_token_dispatcher_type") == "flex" and tensor * expert == 1:
        megatron["moe_token_dispatcher_type"] = "alltoall"  # flex is for several ranks alone
    if megatron["context_parallel_size"] != 1:
        raise ConfigError(
            "context_parallel_size",
            f"{megatron['context_parallel_size']}: sequences are not cut in an evaluation",
            allowed="1",
        )
    return dataclasses.replace(experiment, megatron=megatron)


def evaluation_only(megatron: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of Megatron's arguments that may change what the model says."""
    return {key: value for key, value in megatron.items() if key not in _NO_ANSWER}


def _is_kept(name: str, own: dict[str, Any], asked_for: set[str]) -> bool:
    return name in asked_for or (name not in own and name not in _NO_TRAINING)


def _without_groups(config: Path, override: str) -> list[str]:
    """A resolved configuration has no groups left: put in what a group consists of."""
    group = values_of_group(config, override)
    return [override] if group is None else _assignments("", group)


def _assignments(prefix: str, values: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            lines += _assignments(f"{prefix}{key}.", value)
        else:
            text = str(yaml.safe_dump(value, default_flow_style=True, width=10**9))
            lines.append(f"{prefix}{key}={text.removesuffix('...' + chr(10)).strip()}")
    return lines
