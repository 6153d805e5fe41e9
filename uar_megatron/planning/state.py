"""Memory of weights, gradients and optimizer, by Megatron's bytes per parameter.

As Megatron's estimate (theoretical_memory_usage.py:290): in bf16 with fp32 gradients 18 bytes per
parameter, 6 + 12 / DP with the distributed optimizer; in fp16, whose gradients are fp16, 2 less.
Megatron pads its buckets; that is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from uar_megatron.planning.layout import Layout
from uar_megatron.planning.parameters import RankParameters


@dataclass(frozen=True)
class Precision:
    """Bytes of each thing that is kept per parameter.

    Attributes:
        weight: the parameter that the forward reads.
        gradient: the buffer that micro-batches add to.
        master: fp32 copy of the parameter, 0 where the parameter is fp32.
        moments: both of Adam.
        is_distributed: master and moments are cut over data-parallel ranks.
    """

    weight: int
    gradient: int
    master: int
    moments: int
    is_distributed: bool


@dataclass(frozen=True)
class State:
    """Bytes of one rank."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """All three."""
        return self.weights + self.gradients + self.optimizer


def precision_of(args: Any) -> Precision:
    """Return the bytes per parameter that Megatron's arguments ask for (Adam)."""
    is_half = bool(args.bf16 or args.fp16)
    if args.bf16:  # which turns fp32 gradients on unless it is told not to (arguments.py:1190)
        main_grads = str(args.main_grads_dtype)
        has_half_gradients = args.grad_reduce_in_bf16 or main_grads.endswith(("bf16", "bfloat16"))
    else:
        has_half_gradients = args.fp16 and not args.accumulate_allreduce_grads_in_fp32
    return Precision(
        weight=2 if is_half else 4,
        gradient=2 if has_half_gradients else 4,
        master=4 if is_half else 0,
        moments=8,
        is_distributed=bool(args.use_distributed_optimizer),
    )


def state_bytes(parameters: RankParameters, layout: Layout, precision: Precision) -> State:
    """Return what a rank keeps from step to step."""
    count = parameters.dense + parameters.experts
    dense, experts = parameters.dense, parameters.experts
    if precision.is_distributed:
        dense /= layout.data * layout.context
        experts /= layout.expert_data
    return State(
        weights=count * precision.weight,
        gradients=count * precision.gradient,
        optimizer=(dense + experts) * (precision.master + precision.moments),
    )
