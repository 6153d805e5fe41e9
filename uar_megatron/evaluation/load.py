"""Start Megatron for an evaluation, build the model, and load the checkpoint into it."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from uar_megatron.errors import DataError
from uar_megatron.evaluation.checkpoint import Located
from uar_megatron.evaluation.layout import (
    check_layout,
    check_routing_state,
    check_tokenizer,
    fix_vocabulary,
    world_size,
)
from uar_megatron.experiment import Experiment
from uar_megatron.pretrain import failed_loads_named, global_arguments, validate


def build(
    experiment: Experiment, located: Located
) -> tuple[argparse.Namespace, list[torch.nn.Module]]:
    """Start Megatron on this rank, build the model and load it. Called on every rank.

    Returns:
        Megatron's arguments, and this rank's chunk of the model in a list, in evaluation mode.

    Raises:
        UARError: checkpoint, configuration or layout cannot be used.
    """
    from uar_megatron.mcore.checkpoint import find_problem, load_data_only

    check_layout(experiment)
    load_data_only()
    problem = find_problem(located.folder)
    if problem is not None:
        raise DataError(
            f"checkpoint: {located.folder} {problem}\n"
            "  remedy:  restore what is missing, or name another iter_… folder"
        )
    fix_vocabulary(experiment, located)
    with contextlib.redirect_stdout(_Silence()):
        validate(experiment, world_size())
    _join(experiment)
    return _load(experiment, located)


def _join(experiment: Experiment) -> None:
    """Be the only rank of a job of our own, where no torchrun has made one."""
    if torch.distributed.is_initialized() or "WORLD_SIZE" in os.environ:
        return
    backend = "gloo" if experiment.launch.device == "cpu" else "nccl"
    torch.distributed.init_process_group(
        backend, store=torch.distributed.HashStore(), rank=0, world_size=1
    )


def _load(
    experiment: Experiment, located: Located
) -> tuple[argparse.Namespace, list[torch.nn.Module]]:
    from megatron.training import get_args, get_tokenizer
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.checkpointing import load_checkpoint
    from megatron.training.initialize import initialize_megatron
    from megatron.training.models.gpt import GPTModelBuilder
    from megatron.training.training import get_model

    from uar_megatron.mcore.checkpoint import unsafe_checkpoints_refused
    from uar_megatron.mcore.spec import assert_uar_routers, uar_layer_spec
    from uar_megatron.mcore.step import routers_of

    forget_globals()  # of a model that this process had before
    with contextlib.redirect_stdout(_Silence()):
        args = global_arguments(experiment)
        check_tokenizer(located, args, int(get_tokenizer().vocab_size))
        _forget_other_layout(args)
        initialize_megatron(allow_no_cuda=experiment.launch.device == "cpu")
        config = gpt_config_from_args(args)
        config.transformer_layer_spec = uar_layer_spec(experiment.uar)
        config.parallel_output = False
        builder = GPTModelBuilder(config)

        def provide(
            pre_process: bool,
            post_process: bool,
            vp_stage: int | None = None,
            config: Any = None,
            pg_collection: Any = None,
        ) -> torch.nn.Module:
            return builder.build_model(pg_collection, pre_process, post_process, vp_stage)

        model = get_model(provide, wrap_with_ddp=False)
        assert_uar_routers(model)
        check_routing_state(located, routers_of(model))
        with (
            _damage_named(located),
            unsafe_checkpoints_refused(str(located.load)),
            failed_loads_named(args),
        ):
            load_checkpoint(model, None, None, strict=True)
    for chunk in model:
        chunk.eval()
    return get_args(), model


def forget_globals() -> None:
    """Take arguments, tokenizer and the like, which Megatron keeps for a process, away from it.

    Its schedules also keep the scale of the last micro-batch's auxiliary losses, in a class: layers
    that are used without a schedule later would be trained with it.
    """
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.training.global_vars import unset_global_variables

    unset_global_variables()
    destroy_rerun_state_machine()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None


def _forget_other_layout(args: argparse.Namespace) -> None:
    """Let go of the process groups of a model with another layout that this process had before."""
    from megatron.core import parallel_state as ps

    if not ps.model_parallel_is_initialized():
        return
    now = (
        ps.get_tensor_model_parallel_world_size(),
        ps.get_pipeline_model_parallel_world_size(),
        ps.get_expert_model_parallel_world_size(),
        ps.get_expert_tensor_parallel_world_size(),
    )
    wanted = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.expert_model_parallel_size,
        args.expert_tensor_parallel_size,
    )
    if now != wanted:
        ps.destroy_model_parallel()


@contextlib.contextmanager
def _damage_named(located: Located) -> Iterator[None]:
    """Name the checkpoint where its tensors cannot be read, or are not those of this model."""
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except (CheckpointException, CheckpointingException, RuntimeError, ValueError) as error:
        causes = getattr(error, "failures", None)
        cause = next(iter(causes.values()))[0] if causes else error
        text = str(cause).strip().splitlines() or [type(cause).__name__]
        raise DataError(
            f"checkpoint: {located.folder} does not load: {text[0]}\n"
            "  remedy:  restore it from a copy if it is damaged; leave sizes of the model as the "
            "run had them"
        ) from error


class _Silence:
    """Megatron prints pages while it starts; its warnings go to the log and are kept."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None: ...
