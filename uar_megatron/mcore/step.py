"""The step boundary: where statistics, biases and step counts of all routers move."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from uar_megatron.mcore.router import UARRouter


def routers_of(model: Iterable[torch.nn.Module]) -> list[UARRouter]:
    """Return the UAR routers of this rank's model chunks, in layer order."""
    return [m for chunk in model for m in chunk.modules() if isinstance(m, UARRouter)]


class StepBoundary:
    """Wraps Megatron's ``finalize_model_grads_func``: called once per optimizer step on every rank.

    ``train()`` keeps a finalize function that is already on the configuration (training.py:3549).

    Args:
        finalize: the function to wrap, Megatron's own or somebody's.
    """

    def __init__(self, finalize: Callable[..., Any]) -> None:
        self.finalize = finalize

    def __call__(self, model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> Any:
        """Finalise the gradients, then commit the routers of ``model``."""
        result = self.finalize(model, *args, **kwargs)
        commit(routers_of(model))
        return result


@torch.no_grad()
def commit(routers: list[UARRouter]) -> None:
    """Sum all routers' pending values over the ranks that hold tokens, in one all-reduce.

    Ranks of one pipeline stage share their layers, so the vector has the same length on all ranks
    of the group; a stage without MoE layers has nothing to reduce.
    """
    if not routers:
        return
    parts = [router.pending() for router in routers]
    total = torch.cat(parts)
    torch.distributed.all_reduce(total, group=routers[0].tp_dp_cp_group)
    for router, part in zip(routers, total.split([len(p) for p in parts]), strict=True):
        router.commit(part)
