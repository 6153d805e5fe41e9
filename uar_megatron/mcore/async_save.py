"""``async_save``: checkpoints that are written while training goes on."""

from __future__ import annotations

import argparse
import atexit
import functools
import signal
from importlib.util import find_spec
from multiprocessing import resource_tracker
from typing import Any

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


@functools.cache
def keep_writers_alive(signum: signal.Signals) -> None:
    """Keep the processes that write checkpoints alive when the job is told to save and stop.

    A batch system sends the signal to every process; the rank would wait for ever for a checkpoint
    that nobody writes. The writers inherit that the signal is blocked. So they cannot be ended by
    it either: a rank that leaves with an error kills them, where Python would wait for them.

    Args:
        signum: Megatron's ``exit_signal``.
    """
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.training import initialize

    begin = initialize.init_persistent_async_worker

    @functools.wraps(begin)
    def begin_with_signal_blocked(*args: Any, **kwargs: Any) -> None:
        resource_tracker.ensure_running()  # starting it unblocks signals
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signum})
        try:
            begin(*args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        atexit.register(kill_writer)

    def kill_writer() -> None:
        if PersistentAsyncCaller._persistent_process is not None:  # not ended as it should be
            PersistentAsyncCaller._persistent_process.kill()

    initialize.init_persistent_async_worker = begin_with_signal_blocked
