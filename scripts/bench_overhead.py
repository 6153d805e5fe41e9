"""What uncertainty-aware routing costs: stock Megatron and ours side by side in one process.

Every round runs one training step of each variant on the same batch, in random order, through
Megatron's own ``train_step``; ratios are taken within a round, so that a noisy machine disturbs
both sides alike. Launches, host synchronisations, floating-point operations and peak memory are
counted exactly, from the operations that torch dispatches. With several ranks what is printed are
rank 0's counts, and its times between barriers.

    python scripts/bench_overhead.py --rounds 40
    torchrun --nproc_per_node 2 scripts/bench_overhead.py --parallel cpu_ep2 --only exact
"""

from __future__ import annotations

import json
import os
import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from uar_megatron.data.cli import run_command
from uar_megatron.experiment import load_experiment
from uar_megatron.policies import find_policy

LOG_INTERVAL = 10
# Stock models with meters; the second observes every step, so that what an interval costs is its
# excess over the first, divided by ``uar.observe.interval``.
MONITORED = {"monitor": False, "monitor, observed": True}
UAR: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "monitor": None,
    "monitor, observed": None,
    "off": {"policy": "topk"},
    "exact": {"policy": "uar", "budget": {"mode": "exact"}},
    "free": {"policy": "uar", "budget": {"mode": "free", "beta": 2.5}},
    "free + CLB": {
        "policy": "uar",
        "budget": {"mode": "free", "beta": 2.5},
        "clb": {"enabled": True},
    },
}


@dataclass
class Result:
    """One variant. Ratios are to the baseline, within each round."""

    step_time_ratio: float = 1.0
    interval: tuple[float, float] = (1.0, 1.0)
    standard_error: float = 0.0
    flops_ratio: float = 1.0
    peak_bytes_ratio: float = 1.0
    launches: int = 0
    host_syncs: int = 0
    collectives: int = 0
    k_eff: float = 0.0
    seconds: list[float] = field(default_factory=list)


class Counter(TorchDispatchMode):
    """Counts what a step makes the device do.

    Launches are operations that write memory (views and bare allocations are none). Host
    synchronisations are reads of a value (``item``, ``tolist``, ``cpu``, data-dependent shapes) and
    waits for a stream: what would stall a GPU. On a CPU a value that Megatron has copied to the
    host before counts again where it is read.
    """

    _ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
    _WAITS = ("_local_scalar_dense", "nonzero", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.host_syncs = self.collectives = 0
        self.live_bytes = self.peak_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            self.collectives += 1
        elif name in self._WAITS:
            self.host_syncs += 1
        elif not func.is_view and name not in self._ALLOCATIONS:
            self.launches += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live_bytes -= size

    def __enter__(self) -> Counter:
        from uar_megatron.mcore import cpu

        self._patched: list[tuple[type, str]] = [(torch.Tensor, "tolist"), (torch.Tensor, "cpu")]
        if cpu.is_enabled():
            self._patched += [(torch.cuda.Stream, "synchronize"), (torch.cuda.Event, "synchronize")]
        self._originals = [getattr(owner, name) for owner, name in self._patched]
        for (owner, name), original in zip(self._patched, self._originals, strict=True):
            setattr(owner, name, self._counting(original))
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *exception: Any) -> None:
        for (owner, name), original in zip(self._patched, self._originals, strict=True):
            setattr(owner, name, original)
        super().__exit__(*exception)

    def _counting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.host_syncs += 1
            return original(*args, **kwargs)

        return counted


class Variant:
    """A model with its optimizer, and the step that Megatron would run for it."""

    def __init__(self, name: str, uar: dict[str, Any] | None, args: Any) -> None:
        from megatron.core.enums import ModelType
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.rerun_state_machine import get_rerun_state_machine
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from megatron.core.utils import get_model_config
        from megatron.training.argument_utils import (
            gpt_config_from_args,
            pretrain_cfg_container_from_args,
        )
        from megatron.training.training import setup_model_and_optimizer

        from uar_megatron.config import UARConfig
        from uar_megatron.mcore.compat import finalize_model_grads
        from uar_megatron.mcore.meters import meters_of
        from uar_megatron.mcore.spec import uar_layer_spec
        from uar_megatron.mcore.tracker import RoutingTracker

        self.name, self.args = name, args
        torch.manual_seed(args.seed)
        model_parallel_cuda_manual_seed(args.seed, force_reset_rng=True)
        model_config = gpt_config_from_args(args)
        if uar is not None:
            model_config.transformer_layer_spec = uar_layer_spec(UARConfig.model_validate(uar))
        container = pretrain_cfg_container_from_args(args, model_config)
        self.model, self.optimizer, self.scheduler = setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            cfg_container=container,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        self.config = get_model_config(self.model[0])
        self.config.grad_scale_func = self.optimizer.scale_loss
        if self.config.finalize_model_grads_func is None:
            self.config.finalize_model_grads_func = finalize_model_grads
        self.forward_backward = get_forward_backward_func()
        self.steps = 0
        # The step boundary hooks into this process-wide machine; each variant has its own hooks.
        self.machine = get_rerun_state_machine()
        stock_hooks = (self.machine.state_save_func, self.machine.state_restore_func)
        self.k_eff = float(args.moe_router_topk)
        self.tracker = None
        self.observed = None
        if uar is not None or name in MONITORED:
            self.tracker = RoutingTracker(
                meters_of(self.model, 1.0),
                args.num_layers,
                args.num_experts,
                () if uar is None else find_policy(uar["policy"]).logged,
                LOG_INTERVAL,
                lambda: args.global_batch_size * args.seq_length,
                self._emit,
            )
        if MONITORED.get(name):
            self.observed = self._observe()
        self.hooks = (self.machine.state_save_func, self.machine.state_restore_func)
        self.machine.state_save_func, self.machine.state_restore_func = stock_hooks

    def _observe(self) -> Any:
        from uar_megatron.mcore.observation import ObservedSteps
        from uar_megatron.mcore.token_classes import TokenClasses
        from uar_megatron.mcore.watching import moe_layers

        args = self.args
        classes = TokenClasses(self.model, 0, lambda: True)
        ids_V = torch.arange(args.padded_vocab_size, device=torch.cuda.current_device())
        classes.decile_V = ids_V * 10 // args.padded_vocab_size
        routers = [layer.router for layer in moe_layers(self.model)]
        return ObservedSteps(routers, args.num_layers, args.num_experts, 1.0, classes, lambda: True)

    def _emit(self, record: dict[str, Any]) -> None:
        self.k_eff = record["k_eff"]

    def step(self, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        """Run one optimizer step, and what our entry does around it."""
        from megatron.training.training import train_step

        from uar_megatron.mcore.gpt import forward_step

        self.machine.state_save_func, self.machine.state_restore_func = self.hooks
        self.args.curr_iteration = self.steps
        losses, skipped, *_, grad_norm, _, _ = train_step(
            forward_step,
            batches,
            self.model,
            self.optimizer,
            self.scheduler,
            self.config,
            self.forward_backward,
            iteration=self.steps,
        )
        self.hooks = (self.machine.state_save_func, self.machine.state_restore_func)
        self.steps += 1
        if self.tracker is not None:
            call = {"iteration": self.steps, "loss_dict": losses, "skipped_iter": skipped}
            call |= {"grad_norm": grad_norm, "learning_rate": 0.0, "is_first_iteration": False}
            self.tracker.on_step(call, seconds=lambda: 1.0)
        if self.observed is not None:
            self.observed.take()


def batches_of(args: Any) -> Iterator[dict[str, torch.Tensor]]:
    """The same micro-batch of random tokens for ever, as the data loader would hand it over."""
    generator = torch.Generator().manual_seed(args.seed + args.rank)
    shape = (args.micro_batch_size, args.seq_length)
    tokens = torch.randint(0, args.padded_vocab_size, shape, generator=generator)
    causal = torch.ones(args.seq_length, args.seq_length).tril().logical_not()
    batch = {
        "tokens": tokens,
        "labels": tokens.roll(-1, dims=1),
        "loss_mask": torch.ones(shape),
        "position_ids": torch.arange(args.seq_length).expand(shape).contiguous(),
        "attention_mask": causal.expand(args.micro_batch_size, 1, -1, -1),
    }
    while True:
        yield batch


def synchronize() -> None:
    """Wait for a GPU, where there is one, and for the other ranks."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()


def measure(
    variants: list[Variant], batches: Any, rounds: int, baseline: str = "stock"
) -> dict[str, Result]:
    """Count one step of each variant, then time them in rounds; ratios are to the baseline."""
    results = {variant.name: Result() for variant in variants}
    for _ in range(LOG_INTERVAL):  # statistics settle, allocators and caches fill
        for variant in variants:
            variant.step(batches)
    counts, flops = {}, {}
    for variant in variants:
        # A step without a log line: its one all-reduce is shared by LOG_INTERVAL steps.
        with Counter() as counts[variant.name]:
            variant.step(batches)
        with FlopCounterMode(display=False) as counter:
            variant.step(batches)
        flops[variant.name] = counter.get_total_flops()
    order = list(variants)
    same_on_all_ranks = random.Random(0)
    for _ in range(rounds):
        same_on_all_ranks.shuffle(order)
        for variant in order:
            synchronize()
            started = time.perf_counter()
            variant.step(batches)
            synchronize()
            results[variant.name].seconds.append(time.perf_counter() - started)
    reference = results[baseline].seconds
    for variant in variants:
        result, count = results[variant.name], counts[variant.name]
        ratios = [ours / theirs for ours, theirs in zip(result.seconds, reference, strict=True)]
        result.step_time_ratio = statistics.median(ratios)
        result.interval, result.standard_error = bootstrap(ratios)
        result.flops_ratio = flops[variant.name] / flops[baseline]
        result.peak_bytes_ratio = count.peak_bytes / counts[baseline].peak_bytes
        result.launches, result.host_syncs = count.launches, count.host_syncs
        result.collectives, result.k_eff = count.collectives, variant.k_eff
    return results


def bootstrap(ratios: list[float], draws: int = 2000) -> tuple[tuple[float, float], float]:
    """The 95 % interval of the median, and its standard error."""
    medians = sorted(statistics.median(random.choices(ratios, k=len(ratios))) for _ in range(draws))
    interval = medians[int(0.025 * draws)], medians[int(0.975 * draws)]
    return interval, statistics.stdev(medians)


def main(
    config: Annotated[Path, typer.Option(help="experiment whose model is measured")] = Path(
        "configs/demo.yaml"
    ),
    rounds: Annotated[int, typer.Option(min=5, help="paired rounds")] = 40,
    parallel: Annotated[str, typer.Option(help="group `parallel`")] = "cpu",
    only: Annotated[list[str] | None, typer.Option(help="variants to measure beside stock")] = None,
    output: Annotated[Path | None, typer.Option(help="also write the results as JSON")] = None,
) -> None:
    """Measure the overhead of uncertainty-aware routing against stock Megatron."""
    overrides = [f"parallel={parallel}", "data=mock", "vocab_size=4096", "lr=1e-5", "min_lr=1e-5"]
    overrides += ["save=null", "load=null", "tensorboard_dir=null", "lr_warmup_iters=0"]
    experiment = load_experiment(config, overrides)
    if "RANK" not in os.environ:  # not under torchrun
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}

    from uar_megatron.pretrain import _argv, _prepare_process

    argv = _prepare_process(experiment)
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.initialize import initialize_megatron

    with _argv(argv):
        args = parse_and_validate_args()
    initialize_megatron(pretrain_cfg_container_from_args(args, None))
    wanted = {"stock", *(only or UAR)}
    variants = [Variant(name, uar, args) for name, uar in UAR.items() if name in wanted]
    results = measure(variants, RerunDataIterator(batches_of(args)), rounds)
    torch.distributed.destroy_process_group()
    if args.rank == 0:
        report(f"{config}, {parallel}: ratios to stock Megatron, {rounds} paired rounds", results)
        if output is not None:
            text = json.dumps({n: asdict(r) for n, r in results.items()}, indent=1)
            output.write_text(text + "\n")


def report(title: str, results: dict[str, Result]) -> None:
    """Print the table."""
    table = Table(title=title)
    for column in ("variant", "step time (95 %)", "FLOPs", "peak memory", "k", "launches"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    table.add_column("host syncs", justify="right")
    table.add_column("collectives", justify="right")
    for name, r in results.items():
        low, high = r.interval
        table.add_row(
            name,
            f"{r.step_time_ratio:.3f} ({low:.3f}–{high:.3f})",
            *(f"{r.flops_ratio:.3f}", f"{r.peak_bytes_ratio:.3f}", f"{r.k_eff:.2f}"),
            *(str(r.launches), str(r.host_syncs), str(r.collectives)),
        )
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
