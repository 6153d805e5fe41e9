"""UAR routing that takes its time while a file exists, so that a training can be interrupted."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from uar_megatron.policies.uar import UARPolicy

SECONDS = 0.25
"""Of a forward pass of one layer, unless the file names another number. There are two layers with a
router, and two micro-batches in a step."""


class SlowPolicy(UARPolicy):
    """As ``uar``; ``$UAR_TEST_SLOW`` names the file."""

    def is_stock(self, step: int) -> bool:
        """See :class:`~uar_megatron.policies.base.RoutingPolicy`; asked in every forward pass."""
        with contextlib.suppress(FileNotFoundError):
            time.sleep(float(Path(os.environ["UAR_TEST_SLOW"]).read_text() or SECONDS))
        return super().is_stock(step)
