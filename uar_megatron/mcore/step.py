"""The step boundary: where statistics, biases and step counts of all routers move."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from uar_megatron.errors import TrainingError
from uar_megatron.mcore.compat import current_iteration
from uar_megatron.mcore.router import UARRouter
from uar_megatron.uncertainty import UncertaintyStatistics


def routers_of(model: Iterable[torch.nn.Module]) -> list[UARRouter]:
    """Return the UAR routers of this rank's model chunks, in layer order."""
    return [m for chunk in model for m in chunk.modules() if isinstance(m, UARRouter)]


class StepBoundary:
    """Wraps Megatron's ``finalize_model_grads_func``: called once per optimizer step on every rank.

    ``train()`` keeps a finalize function that is already on the configuration (training.py:3549).
    The counts of non-finite tokens are copied to the host without waiting for them: on a GPU
    training stops at the boundary after the one that saw them.

    Args:
        finalize: the function to wrap, Megatron's own or somebody's.
    """

    def __init__(self, finalize: Callable[..., Any]) -> None:
        self.finalize = finalize
        self._nonfinite: torch.Tensor | None = None
        self._iteration = 0

    def __call__(self, model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> Any:
        """Finalise the gradients, then commit the routers of ``model``.

        Raises:
            TrainingError: a router met a token whose energy or entropy is not finite.
        """
        result = self.finalize(model, *args, **kwargs)
        routers = routers_of(model)
        if routers:
            if torch.cuda.is_available():
                self._stop_if_nonfinite(routers)
            counts = commit(routers)
            if self._nonfinite is None:
                self._nonfinite = torch.zeros_like(
                    counts, device="cpu", pin_memory=torch.cuda.is_available()
                )
            self._nonfinite.copy_(counts, non_blocking=True)
            self._iteration = current_iteration()
            if not torch.cuda.is_available():
                self._stop_if_nonfinite(routers)
        return result

    def _stop_if_nonfinite(self, routers: list[UARRouter]) -> None:
        if self._nonfinite is None:
            return
        for router, count in zip(routers, self._nonfinite.tolist(), strict=True):
            if count:
                raise nonfinite_error(router, int(count), self._iteration)


def nonfinite_error(router: UARRouter, tokens: int, iteration: int) -> TrainingError:
    """Return the error for the first router whose uncertainty was not finite."""
    return TrainingError(
        f"step {iteration}: in layer {router.layer_number} the router's energy or entropy of "
        f"{tokens} tokens is not finite; it is the first such layer of its pipeline stage\n"
        "  remedy:  resume from the last checkpoint with a lower learning rate, or look at what "
        "feeds that layer"
    )


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
