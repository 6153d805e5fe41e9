"""The step boundary: where statistics, biases and step counts of all routers move."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch

from uar_megatron.errors import TrainingError
from uar_megatron.mcore.compat import (
    current_iteration,
    get_pipeline_model_parallel_group,
    keep_state_over_reruns,
    stops_at_nan,
)
from uar_megatron.mcore.guard import ConsistencyGuard
from uar_megatron.mcore.router import UARRouter
from uar_megatron.policies.base import PolicyState
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
        policy_state: of any layer; a pipeline stage without MoE layers has none of its own.
    """

    def __init__(
        self,
        finalize: Callable[..., Any],
        consistency_interval: int,
        policy_state: PolicyState | None = None,
    ) -> None:
        self.finalize = finalize
        self.policy_state = policy_state
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
        elif self.policy_state is not None and self.policy_state.spans_layers:
            # The policy was built on the CPU; the sum goes from device to device.
            device = torch.cuda.current_device()
            pending = self.policy_state.pending().to(device)
            sum_over_pipeline(pending.new_zeros(len(pending) + 1))
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
    of_model = None
    if routers[0].uar_policy is not None and routers[0].uar_policy.spans_layers:
        sums = [router.policy_sums(part) for router, part in zip(routers, totals, strict=True)]
        of_model = sum_over_pipeline(torch.stack(sums).sum(dim=0))
    nonfinite = UncertaintyStatistics.PENDING_SIZE - 1
    counts = torch.stack([part[nonfinite] for part in totals])
    for router, part in zip(routers, totals, strict=True):
        router.commit(part, of_model)
    return counts


def sum_over_pipeline(value: torch.Tensor) -> torch.Tensor:
    """Sum over the stages of the pipeline, in place; all of them must call it."""
    group = get_pipeline_model_parallel_group()
    if group.size() > 1:
        torch.distributed.all_reduce(value, group=group)
    return value
