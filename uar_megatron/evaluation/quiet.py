"""Quiet for commands whose output is what they print."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Hide what torch, Megatron and transformers say of themselves; our own warnings stay."""
    warnings.filterwarnings("ignore")
    for name in ("megatron", "torch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
