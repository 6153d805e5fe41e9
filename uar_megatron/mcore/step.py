"""The step boundary: where statistics, biases and step counts of all routers move."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch

from uar_megatron.errors import TrainingError
from uar_megatron.mcore.compat import current_iteration, keep_state_over_reruns, stops_at_nan
from uar_megatron.mcore.guard import ConsistencyGuard
from uar_megatron.mcore.router import UARRouter
from uar_megatron.uncertainty import UncertaintyStatistics

logger = logging.getLogger(__name__)


def routers_of(model: Iterable[torch.nn.Module]) -> list[UARRouter]:
    """Return the UAR routers of this rank's model chunks, in layer order."""
    return [m for chunk in model for m in chunk.modules() if isinstance(m, UARRouter)]


class StepBoundary:
    """Wraps Megatron's ``finalize_model_grads_func``: called once per optimizer step on every rank.

    ``train()`` keeps a finalize function that is already on the configuration (training.py:3549).

    Args:
        finalize: the function to wrap, Megatron's own or somebody's.
        consistency_interval: steps between comparisons of the ranks' routing state, 0 for never.
    """

    def __init__(self, finalize: Callable[..., Any], consistency_interval: int) -> None:
        self.finalize = finalize
        self.guard = ConsistencyGuard(consistency_interval)
        self._watch: NonFiniteWatch | None = None

    def __call__(self, model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> Any:
        """Finalise the gradients, then commit the routers of ``model``.

        Raises:
            TrainingError: a router met a token whose energy or entropy is not finite, and Megatron
                was told not to stop at such things; or ranks do not agree on a router's state.
        """
        result = self.finalize(model, *args, **kwargs)
        routers = routers_of(model)
        if routers:
            if self._watch is None:
                self._watch = NonFiniteWatch(routers)
                keep_state_over_reruns(
                    lambda: [router.snapshot() for router in routers],
                    functools.partial(_restore, routers),
                )
            self._watch.look(commit(routers))
        self.guard.on_step(routers, current_iteration)
        return result


class NonFiniteWatch:
    """Notices routers whose uncertainty is not finite, without waiting for the device.

    On a GPU the counts arrive on the host during the step after, and are read at its boundary.

    Args:
        routers: this rank's, in layer order.
    """

    def __init__(self, routers: list[UARRouter]) -> None:
        self.routers = routers
        self._on_gpu = torch.cuda.is_available()
        self._counts = torch.zeros(len(routers), dtype=torch.float64, pin_memory=self._on_gpu)
        self._iteration = 0

    def look(self, counts: torch.Tensor) -> None:
        """Take note of a step's counts, and judge those that have arrived.

        Args:
            counts: non-finite tokens of each router, on the device.
        """
        if self._on_gpu:
            self._judge()
        self._counts.copy_(counts, non_blocking=True)
        self._iteration = current_iteration()
        if not self._on_gpu:
            self._judge()

    def _judge(self) -> None:
        for router, tokens in zip(self.routers, self._counts.tolist(), strict=True):
            if tokens:
                error = nonfinite_error(router, int(tokens), self._iteration)
                # Megatron repeats the step, saves a checkpoint of the step before, and stops.
                if not stops_at_nan():
                    raise error
                logger.error("%s", error)
                return


def nonfinite_error(router: UARRouter, tokens: int, iteration: int) -> TrainingError:
    """Return the error for the first router whose uncertainty was not finite."""
    return TrainingError(
        f"step {iteration}: in layer {router.layer_number} the router's energy or entropy of "
        f"{tokens} tokens is not finite; it is the first such layer of its pipeline stage\n"
        "  remedy:  resume from the last checkpoint with a lower learning rate, or look at what "
        "feeds that layer"
    )


def _restore(routers: list[UARRouter], snapshots: list[dict[str, Any]]) -> None:
    for router, snapshot in zip(routers, snapshots, strict=True):
        router.restore(snapshot)


@torch.no_grad()
def commit(routers: list[UARRouter]) -> torch.Tensor:
    """Sum all routers' pending values over the ranks that hold tokens, in one all-reduce.

    Ranks of one pipeline stage share their layers, so the vector has the same length on all ranks
    of the group.

    Args:
        routers: this rank's, at least one.

    Returns:
        The number of non-finite tokens that each router met in the step, on the device.
    """
    parts = [router.pending() for router in routers]
    total = torch.cat(parts)
    torch.distributed.all_reduce(total, group=routers[0].tp_dp_cp_group)
    totals = total.split([len(part) for part in parts])
    nonfinite = UncertaintyStatistics.PENDING_SIZE - 1
    counts = torch.stack([part[nonfinite] for part in totals])
    for router, part in zip(routers, totals, strict=True):
        router.commit(part)
    return counts
