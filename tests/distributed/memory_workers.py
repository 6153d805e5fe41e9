"""Memory of a rank under a layout; ``torchrun … memory_workers.py FOLDER key=value …``.

Every rank compares what a real forward leaves allocated, and its parameters, with the plan.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from uar_megatron.mcore import cpu

cpu.enable()

from megatron.core import parallel_state  # noqa: E402
from real_model import Allocations, build, count_rows, forget_score_buffer, forward  # noqa: E402

from uar_megatron.mcore.step import routers_of  # noqa: E402
from uar_megatron.planning.activations import (  # noqa: E402
    Rows,
    implementation_of,
    score_buffer_bytes,
)
from uar_megatron.planning.layout import layout_of  # noqa: E402
from uar_megatron.planning.memory import stage_memory  # noqa: E402
from uar_megatron.planning.parameters import stage_parameters  # noqa: E402
from uar_megatron.planning.state import precision_of  # noqa: E402
from uar_megatron.shape import shape_of  # noqa: E402


def main() -> None:
    """Build the model on this rank and compare."""
    folder, *overrides = sys.argv[1:]
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    world, rank = dist.get_world_size(), dist.get_rank()
    experiment, args, model = build(Path(folder), *overrides, world=world)
    shape = shape_of(args)
    layout = layout_of(args, shape, world, 8)
    place = parallel_state.get_data_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    planned = stage_parameters(shape, layout, stage).on_rank(layout)
    assert planned.experts == experts
    assert planned.dense == sum(p.numel() for p in model.parameters()) - experts
    if layout.pipeline > 1:  # a stage alone has no input
        return

    received = count_rows(model)
    sent: list[int] = []
    for router in routers_of([model]):
        router.register_forward_hook(lambda module, inputs, out: sent.append(int(out[1].sum())))
    forward(model, args, seed=place).backward()
    forget_score_buffer()
    received.clear()
    sent.clear()
    with Allocations(apart_from=model) as allocations:
        loss = forward(model, args, seed=10 + place)
        measured = allocations.live_bytes()
    how = implementation_of(args, experiment.uar, "torch")
    columns = experiment.uar.budget.k_max
    numbers = [layer for layer, is_moe in enumerate(shape.is_moe) if is_moe]
    rows = {
        layer: Rows(layout.routed_tokens, columns, out, into)
        for layer, out, into in zip(numbers, sent, received, strict=True)
    }
    memory = stage_memory(shape, how, layout, precision_of(args), 0, rows, 0)
    expected = sum(memory.activations.values()) + score_buffer_bytes(shape, how, layout)
    print(f"rank {rank}: planned {expected:.0f}, measured {measured}", flush=True)
    assert expected == pytest.approx(measured, rel=0.05)
    del loss


if __name__ == "__main__":
    main()
    dist.barrier()
    dist.destroy_process_group()
