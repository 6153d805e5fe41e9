"""What is said when another rank is gone, or does not answer in time."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch

from uar_megatron.errors import TrainingError

logger = logging.getLogger(__name__)

# gloo has no exception of its own; NCCL's watchdog ends the process with a message of its own.
_GLOO = (
    "Timed out waiting",
    "Connection closed by peer",
    "Connection reset by peer",
    "Application timeout caused pair closure",  # of the collectives after the one that timed out
)


@contextlib.contextmanager
def lost_ranks_named() -> Iterator[None]:
    """Turn the error of a collective whose other side is gone into one that says so.

    Raises:
        TrainingError: a collective failed or timed out.
    """
    try:
        yield
    except RuntimeError as error:
        is_lost = isinstance(error, torch.distributed.DistError)
        if not (is_lost or any(words in str(error) for words in _GLOO)):
            raise
        logger.exception("a collective failed")
        raise TrainingError(
            f"another rank is gone or does not answer: {str(error).splitlines()[0]}\n"
            "  remedy:  look for what ended the rank that stopped first, and start again to resume "
            "from the\n           last checkpoint; if a rank was only slow, with a longer "
            "distributed_timeout_minutes"
        ) from error
