"""The only file that names Megatron's private or unstable parts, and the gate on its version.

Importing it checks the installed megatron-core first; everything else in this package takes
Megatron's classes and functions from here.
"""

from __future__ import annotations

import argparse
import functools
import logging
from collections.abc import Callable
from importlib import metadata
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from uar_megatron.errors import UnsupportedEnvironmentError

logger = logging.getLogger(__name__)

SUPPORTED_MEGATRON = SpecifierSet(">=0.19.2,<0.20")


def check_megatron_version(installed: str | None = None) -> None:
    """Raise UnsupportedEnvironmentError unless the installed megatron-core is supported.

    Args:
        installed: version to judge; the installed distribution's when None.
    """
    if installed is None:
        try:
            installed = metadata.version("megatron-core")
        except metadata.PackageNotFoundError:
            raise UnsupportedEnvironmentError(
                f"megatron-core: not installed; supported: {SUPPORTED_MEGATRON}\n"
                f"  remedy:  pip install 'megatron-core{SUPPORTED_MEGATRON}'"
            ) from None
    # A source checkout calls itself e.g. 0.19.3rc0+git; it is judged by its release number.
    release = Version(Version(installed).base_version)
    if release not in SUPPORTED_MEGATRON:
        raise UnsupportedEnvironmentError(
            f"megatron-core: {installed} is installed; supported: {SUPPORTED_MEGATRON}\n"
            f"  remedy:  pip install 'megatron-core{SUPPORTED_MEGATRON}'"
        )


check_megatron_version()

from megatron.core.datasets.blended_megatron_dataset_builder import (  # noqa: E402
    BlendedMegatronDatasetBuilder,
)
from megatron.core.datasets.gpt_dataset import (  # noqa: E402
    GPTDataset,
    GPTDatasetConfig,
    MockGPTDataset,
)
from megatron.core.distributed.finalize_model_grads import finalize_model_grads  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.core.parallel_state import (  # noqa: E402
    get_context_parallel_world_size,
    get_data_parallel_rank,
    get_data_parallel_world_size,
    get_pipeline_model_parallel_group,
    get_pipeline_model_parallel_world_size,
    get_tensor_model_parallel_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_src_rank,
)
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.rerun_state_machine import Call, Caller  # noqa: E402
from megatron.core.transformer.moe.experts import SequentialMLP  # noqa: E402
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules  # noqa: E402
from megatron.core.transformer.moe.moe_utils import (  # noqa: E402
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
    get_default_pg_collection,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.core.transformer.moe.token_dispatcher import (  # noqa: E402
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
    _DeepepManager,
    _NCCLEPManager,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules  # noqa: E402
from megatron.core.transformer.transformer_layer import (  # noqa: E402
    get_transformer_layer_offset,
)

# What a checkpoint may contain besides what Megatron declares as safe (core/safe_globals.py:29):
# its own note of a result that it did not believe.
SAFE_RECORDS = [Call, Caller]

__all__ = [
    "SAFE_RECORDS",
    "SUPPORTED_MEGATRON",
    "BlendedMegatronDatasetBuilder",
    "GPTDataset",
    "GPTDatasetConfig",
    "MoEAllGatherTokenDispatcher",
    "MoEAlltoAllTokenDispatcher",
    "MoEFlexTokenDispatcher",
    "MoELayer",
    "MoESubmodules",
    "MockGPTDataset",
    "ProcessGroupCollection",
    "SequentialMLP",
    "TopKRouter",
    "TransformerBlockSubmodules",
    "_DeepepManager",
    "_NCCLEPManager",
    "add_megatron_arguments",
    "apply_router_token_dropping",
    "check_megatron_version",
    "compute_routing_scores_for_aux_loss",
    "correct_flops",
    "current_global_batch_size",
    "current_iteration",
    "default_layer_spec",
    "finalize_model_grads",
    "flex_backend_is_installed",
    "flops_function",
    "get_context_parallel_world_size",
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
    "get_default_pg_collection",
    "get_gpt_decoder_block_spec",
    "get_pipeline_model_parallel_group",
    "get_pipeline_model_parallel_world_size",
    "get_tensor_model_parallel_group",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_src_rank",
    "get_transformer_layer_offset",
    "keep_saving_in_this_process",
    "keep_state_over_reruns",
    "observe_training",
    "signal_received",
    "start_missing_state_fresh",
    "stops_at_nan",
    "topk_routing_with_score_function",
    "train_data_sets",
    "training_arguments",
    "transform_mtp_specs",
]


def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add every Megatron argument to ``parser`` and return it."""
    from megatron.training.arguments import add_megatron_arguments as add

    return add(parser)


def default_layer_spec(config: Any, vp_stage: int | None) -> Any:
    """The layer spec Megatron would take for a ``GPTModelConfig`` or ``TransformerConfig``."""
    from megatron.training.models import gpt

    if isinstance(config, gpt.GPTModelConfig):
        return gpt.default_layer_spec(config, vp_stage)
    return get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=config.transformer_impl == "transformer_engine",
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )


def flex_backend_is_installed(backend: str) -> bool:
    """Whether Megatron found the library that a backend of its flex dispatcher needs.

    Args:
        backend: a value of ``moe_flex_dispatcher_backend``.
    """
    from megatron.core.transformer.moe import token_dispatcher

    entries = {
        "deepep": token_dispatcher.fused_dispatch,
        "hybridep": token_dispatcher.hybrid_ep_dispatch,
        "ncclep": token_dispatcher.nccl_ep_dispatch,
    }
    return entries[backend] is not None


def current_global_batch_size() -> int:
    """Sequences of the current optimizer step, which may be ramping up."""
    from megatron.core.num_microbatches_calculator import get_current_global_batch_size

    return int(get_current_global_batch_size())


def training_arguments() -> argparse.Namespace | None:
    """The arguments of Megatron's training loop, None outside of it."""
    from megatron.training import global_vars

    return global_vars._GLOBAL_ARGS  # type: ignore[no-any-return]


def current_iteration() -> int:
    """The 1-based number of the optimizer step that Megatron's training loop is in."""
    from megatron.training import get_args

    return int(get_args().curr_iteration) + 1


def train_data_sets(args: argparse.Namespace) -> int:
    """How many data sets are blended for training; 0 if one alone is."""
    from megatron.training.utils import get_blend_and_blend_per_split

    if args.mock_data:
        return 0
    blend, per_split = get_blend_and_blend_per_split(args)
    if per_split is not None:
        blend = per_split[0]
    count = len(blend[0]) if blend is not None else 0
    return count if count > 1 else 0


def keep_saving_in_this_process() -> None:
    """Have checkpoints that are saved at once collect their results here.

    Megatron starts a process for that (filesystem_async.py:53), for the sake of ``async_save``. A
    batch system sends SIGTERM to all processes of a job: a rank would be about to save for it, and
    find that process gone. Without it a rank that is killed also leaves nothing behind.
    """
    import queue

    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def signal_received() -> bool:
    """Whether any rank got the signal that ``--exit-signal-handler`` waits for; a collective."""
    from megatron.training.global_vars import get_signal_handler

    return any(get_signal_handler().signals_received())


def stops_at_nan() -> bool:
    """Whether Megatron itself stops at a loss or gradient that is not finite."""
    from megatron.training import get_args

    return bool(get_args().check_for_nan_in_loss_and_grad)


def keep_state_over_reruns(save: Callable[[], Any], restore: Callable[[Any], None]) -> None:
    """Have Megatron save state before each step and restore it when it repeats or gives up one.

    Megatron repeats a step whose loss or gradient it does not believe (rerun_state_machine.py);
    without this the step boundary would be taken twice.
    """
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    machine = get_rerun_state_machine()
    stock_save, stock_restore = machine.state_save_func, machine.state_restore_func

    def save_all() -> Any:
        return {"megatron": stock_save() if stock_save else None, "uar": save()}

    def restore_all(state: Any) -> None:
        if stock_restore and state["megatron"]:
            stock_restore(state["megatron"])
        restore(state["uar"])

    machine.state_save_func, machine.state_restore_func = save_all, restore_all


@functools.cache
def transform_mtp_specs(transform: Callable[[Any, Any], Any]) -> None:
    """Pass every multi-token-prediction spec through ``transform(decoder_spec, mtp_spec)``.

    Megatron builds that spec from its own layers whatever the decoder's spec is
    (training/models/gpt.py:387). Once per transform.
    """
    from megatron.training.models import gpt

    build = gpt.mtp_block_spec

    def mtp_block_spec(config: Any, decoder_spec: Any, vp_stage: int | None = None) -> Any:
        return transform(decoder_spec, build(config, decoder_spec, vp_stage=vp_stage))

    gpt.mtp_block_spec = mtp_block_spec


@functools.cache
def start_missing_state_fresh(marker: str) -> None:
    """Let a checkpoint load without the tensors whose names contain ``marker``, and say so.

    Megatron's default strictness fails on a tensor that the model has and the checkpoint has not,
    and its lenient ones would let other tensors go missing too. Tensors with other names are
    treated as always. Once per marker.

    Args:
        marker: part of the names of tensors that may keep their fresh values.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    load = dist_checkpointing.load

    def load_what_is_there(
        sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **kw: Any
    ) -> Any:
        saved = _saved_names(checkpoint_dir)
        absent: set[str] = set()

        def is_absent(value: Any) -> bool:
            wanted = isinstance(value, ShardedTensor) and marker in value.key
            if wanted and saved is not None and value.key not in saved:
                absent.add(value.key)
                return True
            return False

        _, sharded_state_dict = extract_matching_values(sharded_state_dict, is_absent)
        if absent:
            names = sorted({key.rpartition(marker)[2] for key in absent})
            logger.warning(
                "the checkpoint %s has no %s state of: %s; it starts fresh",
                checkpoint_dir,
                marker,
                ", ".join(names),
            )
        return load(sharded_state_dict, checkpoint_dir, *args, **kw)

    dist_checkpointing.load = load_what_is_there


def _saved_names(checkpoint_dir: Any) -> set[str] | None:
    """Names of the tensors in a torch_dist checkpoint, None for another format."""
    from pathlib import Path

    from torch.distributed.checkpoint import FileSystemReader

    if not (Path(checkpoint_dir) / ".metadata").exists():
        return None
    return set(FileSystemReader(checkpoint_dir).read_metadata().state_dict_metadata)


def flops_function() -> Callable[..., float]:
    """Megatron's count of a step's FLOPs: from its arguments and the sequences of the batch."""
    from megatron.training import training

    return training.num_floating_point_operations  # type: ignore[no-any-return]


def correct_flops(correction: Callable[[float], float]) -> None:
    """Add ``correction`` to Megatron's FLOPs of a step, wherever its training loop uses them.

    These are the throughput of its log line, TensorBoard and wandb, and
    ``num_floating_point_operations_so_far`` of checkpoints and the progress log.

    Args:
        correction: FLOPs to add to those of a step, from the tokens of its global batch.
    """
    from megatron.training import training

    stock = training.num_floating_point_operations

    def num_floating_point_operations(
        args: Any,
        batch_size: int,
        seqlen_squared_sum_in_batch: float | None = None,
        total_real_tokens_in_batch: float | None = None,
    ) -> float:
        tokens = total_real_tokens_in_batch
        if tokens is None:
            tokens = batch_size * args.seq_length
        static = stock(args, batch_size, seqlen_squared_sum_in_batch, total_real_tokens_in_batch)
        return static + correction(tokens)

    training.num_floating_point_operations = num_floating_point_operations


def observe_training(
    on_step: Callable[[dict[str, Any], Callable[[], float]], None],
    on_evaluation: Callable[[], list[dict[str, Any]]],
    on_validation: Callable[[int, dict[str, float], dict[str, list[dict[str, Any]]]], None],
) -> None:
    """Call back after each optimizer step, before its log line, and after each validation.

    ``megatron.training.training`` has no such hooks: its metrics tracker is not told the learning
    rate or the gradient norm, and validation losses only reach its writers. So its
    ``training_log``, ``evaluate`` and ``evaluate_and_print_results`` are called through, their
    results untouched.

    Args:
        on_step: called on every rank with ``training_log``'s arguments by name and what reads the
            seconds of Megatron's interval timer (training alone, without validation and
            checkpoints). Reading waits for the device, so it is for the end of an interval.
        on_evaluation: called on every rank after each pass over a set; returns what is to be known
            of its routing.
        on_validation: called on ranks of the last pipeline stage with the iteration, the loss of
            each validation set, named as in ``--validation-set-names`` or by its position, and
            after the training of each test set with ``test_`` before its name, and what
            ``on_evaluation`` returned for it.
    """
    import inspect

    from megatron.training import get_args, get_timers, training

    log, evaluate, report = (
        training.training_log,
        training.evaluate,
        training.evaluate_and_print_results,
    )
    signature = inspect.signature(log)
    losses: list[dict[str, Any]] = []
    routing: list[list[dict[str, Any]]] = []

    @functools.wraps(log)
    def training_log(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        timer = get_timers()("interval-time")
        on_step(call.arguments, functools.partial(timer.elapsed, reset=False, barrier=False))
        return log(*args, **kwargs)

    @functools.wraps(evaluate)
    def evaluate_and_collect(*args: Any, **kwargs: Any) -> Any:
        result = evaluate(*args, **kwargs)
        losses.append(result[0] or {})
        routing.append(on_evaluation())
        return result

    @functools.wraps(report)
    def evaluate_and_print_results(prefix: str, *args: Any, **kwargs: Any) -> Any:
        iteration = inspect.signature(report).bind(prefix, *args, **kwargs).arguments["iteration"]
        losses.clear()
        routing.clear()
        result = report(prefix, *args, **kwargs)
        names = get_args().validation_set_names or [f"set_{i}" for i in range(len(losses))]
        if prefix.endswith("test set"):
            names = [f"test_{name}" for name in names]
        values = {
            name: float(loss["lm loss"])
            for name, loss in zip(names, losses, strict=False)
            if "lm loss" in loss
        }
        if values:
            on_validation(iteration, values, dict(zip(names, routing, strict=False)))
        return result

    training.training_log = training_log
    training.evaluate = evaluate_and_collect
    training.evaluate_and_print_results = evaluate_and_print_results
