"""Tokenizing processes: they start light, leave Ctrl-C to the parent and never outlive it."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import Any

from uar_megatron.errors import DataError


@contextmanager
def worker_pool(
    workers: int, start: Callable[..., None], *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes have called ``start(*arguments)``.

    Raises:
        DataError: one of them died.
    """
    # spawn: a fork would copy whatever threads and locks this process happens to hold.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(start, *arguments),
    )
    try:
        yield pool
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died (out of memory?)\n  remedy:  use fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(start: Callable[..., None], *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    # A process is a core's worth of work; threads of the library below it would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    start(*arguments)


def _exit_with_parent() -> None:
    """Without this, workers of a parent that was killed with SIGKILL would wait for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
