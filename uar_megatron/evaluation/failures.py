"""What goes wrong in an evaluation, in words."""

from __future__ import annotations

import torch


def describe_failure(error: BaseException, rank: int) -> str:
    """Return what the user is told.

    Args:
        error: of the model's forward.
        rank: whose.
    """
    text = f"rank {rank}: {first_line(error)}"
    if isinstance(error, torch.OutOfMemoryError):
        text += (
            "\n  remedy:  a smaller --batch-size (batch_size for lm-eval), or more ranks that "
            "share the model"
        )
    return text


def first_line(error: BaseException) -> str:
    """The kind of an error, and the first line of its message if it has one."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])
