"""The only file that names Megatron's private or unstable parts, and the gate on its version.

Importing it checks the installed megatron-core first; everything else in this package takes
Megatron's classes and functions from here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import metadata
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from uar_megatron.errors import UnsupportedEnvironmentError

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
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules  # noqa: E402
from megatron.core.transformer.moe.moe_utils import (  # noqa: E402
    compute_routing_scores_for_aux_loss,
    get_default_pg_collection,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.core.transformer.moe.token_dispatcher import (  # noqa: E402
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules  # noqa: E402

__all__ = [
    "SUPPORTED_MEGATRON",
    "BlendedMegatronDatasetBuilder",
    "GPTDataset",
    "GPTDatasetConfig",
    "MoEAllGatherTokenDispatcher",
    "MoEAlltoAllTokenDispatcher",
    "MoELayer",
    "MoESubmodules",
    "MockGPTDataset",
    "TopKRouter",
    "TransformerBlockSubmodules",
    "add_megatron_arguments",
    "check_megatron_version",
    "compute_routing_scores_for_aux_loss",
    "default_layer_spec",
    "finalize_model_grads",
    "get_default_pg_collection",
    "get_gpt_decoder_block_spec",
    "observe_training",
    "topk_routing_with_score_function",
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


def observe_training(
    on_step: Callable[[dict[str, Any], float], None],
    on_validation: Callable[[int, dict[str, float]], None],
) -> None:
    """Call back after each optimizer step and each validation of the training loop.

    ``megatron.training.training`` has no such hooks: its metrics tracker is not told the learning
    rate or the gradient norm, and validation losses only reach its writers. So its
    ``training_log``, ``evaluate`` and ``evaluate_and_print_results`` are called through, their
    results untouched.

    Args:
        on_step: called on every rank with ``training_log``'s arguments by name and the seconds that
            Megatron's interval timer shows (training alone, without validation and checkpoints).
        on_validation: called on ranks of the last pipeline stage with the iteration and the loss of
            each validation set, named as in ``--validation-set-names`` or by its position, and
            after the training of each test set with ``test_`` before its name.
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

    def training_log(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        seconds = get_timers()("interval-time").elapsed(reset=False, barrier=False)
        result = log(*args, **kwargs)
        on_step(call.arguments, seconds)
        return result

    def evaluate_and_collect(*args: Any, **kwargs: Any) -> Any:
        result = evaluate(*args, **kwargs)
        losses.append(result[0] or {})
        return result

    def evaluate_and_print_results(prefix: str, *args: Any, **kwargs: Any) -> Any:
        iteration = inspect.signature(report).bind(prefix, *args, **kwargs).arguments["iteration"]
        losses.clear()
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
            on_validation(iteration, values)
        return result

    training.training_log = training_log
    training.evaluate = evaluate_and_collect
    training.evaluate_and_print_results = evaluate_and_print_results
