"""Counts the bytes that a MoE layer hands to collectives; ``torchrun … traffic_workers.py EP TP``.

Every rank compares them with the plan for the rows that were really routed.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from uar_megatron.mcore import cpu

cpu.enable()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import mappings  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from moe_cases import (  # noqa: E402
    HIDDEN,
    hidden_states,
    stock_layer,
    transformer_config,
    uar_layer,
)

from uar_megatron.planning.layout import Layout  # noqa: E402
from uar_megatron.planning.traffic import exchange  # noqa: E402

EXPERTS = 8


class Collectives:
    """Bytes of each collective's input, in the order of the calls, while it is entered."""

    def __enter__(self) -> Collectives:
        self.all_to_all: list[tuple[int, float]] = []
        self.gathered: list[tuple[str, int]] = []
        self._originals = {}
        self._replace(dist, "all_to_all_single", self._count_all_to_all)
        self._replace(mappings, "dist_all_gather_func", self._count("all-gather"))
        self._replace(mappings, "dist_reduce_scatter_func", self._count("reduce-scatter"))
        for name, kind in (("all_gather", "all-gather"), ("reduce_scatter", "reduce-scatter")):
            self._replace(dist, name, self._count(kind))
        return self

    def __exit__(self, *_: object) -> None:
        for (module, name), original in self._originals.items():
            setattr(module, name, original)

    def _replace(self, module: Any, name: str, wrap: Any) -> None:
        original = getattr(module, name)
        self._originals[module, name] = original
        setattr(module, name, wrap(original))

    def _count_all_to_all(self, original: Any) -> Any:
        def counting(output: Any, tensor: Any, outs: Any, ins: Any, *args: Any, **kw: Any) -> Any:
            size = tensor.numel() * tensor.element_size()
            group = kw.get("group")
            own = float(ins[dist.get_rank(group)]) / max(float(sum(ins)), 1.0)
            self.all_to_all.append((size, size * (1 - own)))
            return original(output, tensor, outs, ins, *args, **kw)

        return lambda *args, **kw: counting(
            *(args or ()),
            *(kw.pop(name) for name in _ALL_TO_ALL[len(args) :] if name in kw),
            **kw,
        )

    def _count(self, kind: str) -> Any:
        def wrap(original: Any) -> Any:
            def counting(output: Any, tensor: Any, *args: Any, **kw: Any) -> Any:
                tensors = tensor if isinstance(tensor, list) else [tensor]
                size = sum(one.numel() * one.element_size() for one in tensors)
                self.gathered.append((kind, size))
                return original(output, tensor, *args, **kw)

            return counting

        return wrap


_ALL_TO_ALL = ("output", "input", "output_split_sizes", "input_split_sizes")


def check(expert: int, tensor: int, uar: dict[str, Any], tokens: int, **options: Any) -> None:
    """Compare one layer's forward and backward with the plan, on this rank."""
    config = transformer_config(
        num_moe_experts=EXPERTS,
        expert_model_parallel_size=expert,
        tensor_model_parallel_size=tensor,
        expert_tensor_parallel_size=tensor,
        sequence_parallel=tensor > 1,
        moe_router_load_balancing_type="none",
        **options,
    )
    layer = uar_layer(config, uar, like=stock_layer(config))
    with torch.no_grad():
        layer.router.weight.mul_(20)
    maps: list[torch.Tensor] = []
    layer.router.register_forward_hook(lambda module, inputs, output: maps.append(output[1]))
    hidden = hidden_states(tokens, seed=dist.get_rank()).to(config.params_dtype)
    with Collectives() as forward:
        output, _ = layer(hidden.detach().requires_grad_())
    with Collectives() as backward:
        output.float().square().sum().backward()

    group = parallel_state.get_expert_model_parallel_group()
    counts_E = _counts(maps[0])
    everybody = [torch.empty_like(counts_E) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everybody, counts_E, group=group)
    rank = dist.get_rank(group)
    layout = Layout(
        world=dist.get_world_size(),
        gpus_per_node=8,
        tensor=tensor,
        pipeline=1,
        virtual=1,
        context=1,
        expert=expert,
        expert_tensor=tensor,
        has_sequence_parallel=tensor > 1,
        micro_batch=1,
        global_batch=dist.get_world_size() // tensor,
        seq_length=tokens * tensor,
        stages=((0,),),
        warmup_group=1,
    )
    per_rank = [counts.view(expert, -1).sum(dim=1).tolist() for counts in everybody]
    element = torch.empty((), dtype=config.params_dtype).element_size()
    plan = exchange(
        per_rank[rank],
        [theirs[rank] for theirs in per_rank],
        rank,
        layout,
        experts=EXPERTS,
        width=HIDDEN,
        element=element,
        weight={"fp32": 4}.get(config.moe_router_dtype, element),
    )
    exchanges = expert > 1
    assert [size for size, _ in forward.all_to_all] == exchanges * [
        plan.dispatch,
        plan.weights,
        plan.combine,
    ]
    assert sum(size for size, _ in forward.all_to_all) == plan.forward
    sizes = sorted(size for size, _ in backward.all_to_all)
    assert sizes == sorted(exchanges * [plan.dispatch, plan.combine, plan.weight_gradients]), sizes
    assert sum(sizes) == plan.backward
    if exchanges:
        leaving = [away for _, away in forward.all_to_all[:2]]
        assert leaving == [plan.dispatch * plan.leaving, plan.weights * plan.leaving], leaving
    gathers = [size for kind, size in forward.gathered if kind == "all-gather"]
    assert gathers[0] == plan.counts
    assert sum(gathers[1:]) == plan.gathered
    reduced = [size for kind, size in backward.gathered if kind == "reduce-scatter"]
    assert (sum(reduced) > 0) == (tensor > 1)


def _counts(routed: torch.Tensor) -> torch.Tensor:
    """Rows for each expert, int64, from a dense map or from compact indices."""
    if routed.dtype == torch.bool:
        return routed.sum(dim=0)
    chosen = routed[(routed >= 0) & (routed < EXPERTS)].long()
    return torch.bincount(chosen, minlength=EXPERTS)


def main() -> None:
    """Set the process groups up and run every check."""
    expert, tensor = map(int, sys.argv[1:])
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=tensor,
    )
    model_parallel_cuda_manual_seed(1, ep_rank=parallel_state.get_expert_model_parallel_rank())
    free = {"policy": "uar", "budget": {"alpha": 2.0, "beta": 2.5, "k_min": 0, "k_max": 5}}
    uneven = 20 + 7 * dist.get_rank() if tensor == 1 else 24
    check(expert, tensor, {"policy": "topk"}, 24)
    check(expert, tensor, free, uneven)
    check(expert, tensor, free, uneven, moe_router_dtype="fp32")
    check(expert, tensor, {**free, "kernel_backend": "triton"}, uneven)
    half = {"params_dtype": torch.bfloat16, "bf16": True}
    check(expert, tensor, {"policy": "topk"}, 24, **half)
    check(expert, tensor, free, uneven, moe_router_dtype="fp32", **half)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
