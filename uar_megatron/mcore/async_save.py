"""``async_save``: checkpoints that are written while training goes on."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from uar_megatron.errors import ConfigError
from uar_megatron.mcore import cpu

_NVRX = "nvidia_resiliency_ext"


def check_async_save(args: argparse.Namespace) -> None:
    """Refuse what Megatron would switch off with a warning, or fail at after the model is built.

    Args:
        args: Megatron's arguments before its validation, which clears ``async_save``
            (arguments.py:1746).

    Raises:
        ConfigError: an argument that asynchronous saving needs is missing, or a package.
    """
    if not args.async_save:
        return
    if not args.use_persistent_ckpt_worker:
        raise ConfigError(
            "async_save",
            "Megatron saves asynchronously with a persistent worker only",
            remedy="set use_persistent_ckpt_worker: true as well, or drop async_save",
        )
    if args.async_strategy == "nvrx" and (cpu.is_enabled() or not find_spec(_NVRX)):
        why = "works on GPUs only" if cpu.is_enabled() else f"needs the package {_NVRX}"
        raise ConfigError(
            "async_strategy",
            f"nvrx, Megatron's default, {why}",
            allowed="mcore" if cpu.is_enabled() else f"mcore, or nvrx with {_NVRX}",
            remedy="set async_strategy: mcore",
        )
