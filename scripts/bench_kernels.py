"""Time the kernels on a GPU, beside Megatron's unfused path and Transformer Engine's kernels.

**Not yet run on hardware.** First all results are compared with the torch definitions and with
Megatron's; then each operation is timed with CUDA events, its inputs out of the L2 cache. Without a
GPU it says so and ends; --verify-only then compares a small case in Triton's interpreter.

    python scripts/bench_kernels.py --tokens 16384 --hidden 2048
    python scripts/bench_kernels.py --verify-only
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from uar_megatron.data.cli import run_command
from uar_megatron.errors import UARError

WARM_UP = 20
RUNS = 100
# More than the L2 cache of any GPU so far: writing it puts an operation's inputs into DRAM.
FLUSHED_BYTES = 256 * 2**20
# Experts, mean k, K_max. Megatron and Transformer Engine route every token to the mean.
PRESETS = {"8A2": (8, 2, 4), "16A4": (16, 4, 8), "256A8": (256, 8, 16)}
Operation = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """One operation of one implementation; milliseconds and bytes."""

    preset: str
    tokens: int
    hidden: int
    operation: str
    implementation: str
    median: float
    p20: float
    p80: float
    peak_bytes: int


class Case:
    """Inputs of one size, and the operations of each implementation on them.

    Attributes:
        rows: Σk of our routing.
    """

    def __init__(self, preset: str, tokens: int, hidden: int, device: str) -> None:
        from uar_kernels import routing

        self.experts, self.k, self.width = PRESETS[preset]
        generator = torch.Generator().manual_seed(1)
        logits_TE = torch.randn(tokens, self.experts, generator=generator)
        hidden_TH = torch.randn(tokens, hidden, generator=generator).bfloat16()
        self.logits_TE = logits_TE.to(device).requires_grad_()
        self.hidden_TH = hidden_TH.to(device)
        self.tokens = tokens
        u_T = routing.measure_tokens(self.logits_TE, backend="torch").energy_T.double()
        self.settings: dict[str, Any] = {
            "width": self.width,
            # floor(ẑ + k + ½) is k on average.
            "budget": routing.Budget(1.0, self.k + 0.5, 1, self.width),
            "measure": routing.Measure(mean=u_T.mean(), inverse_sigma=1 / u_T.std()),
            "mask": routing.Mask(0.0, 1.0),
        }
        self.routed = self.route("torch")
        self.planned = self.plan("torch")
        self.rows = int(self.planned.tokens_per_expert_E.sum())
        self.permuted_RH = self.permute("torch")[0]

    def route(self, backend: str) -> Any:
        """Our router's forward."""
        from uar_kernels import routing

        return routing.route(self.logits_TE, backend=backend, **self.settings)

    def route_and_back(self, backend: str) -> torch.Tensor:
        """Our router's forward and the gradient of the logits."""
        routed = self.route(backend)
        outputs = (routed.probs_TK, routed.weighted_GE, routed.lse_T)
        return torch.autograd.grad(outputs, self.logits_TE, [out.detach() for out in outputs])[0]

    def plan(self, backend: str) -> Any:
        """Our plan of the routing that all operations share."""
        from uar_kernels import plan

        return plan.plan(self.routed.index_TK, self.experts, backend=backend)

    def permute(
        self, backend: str, routed: Any = None, planned: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Our permutation into a buffer of the largest size, of which the rows in use are taken."""
        from uar_kernels import permutation

        routed, planned = routed or self.routed, planned or self.planned
        sizes = (planned.row_id_TK, planned.tokens_per_expert_E, planned.row_id_TK.numel())
        probs_TK = routed.probs_TK.detach()
        return permutation.begin_permute(self.hidden_TH, probs_TK, *sizes, backend).take(self.rows)

    def unpermute(self, backend: str) -> torch.Tensor:
        """Our unpermutation of the permuted rows."""
        from uar_kernels import permutation

        return permutation.unpermute(self.permuted_RH, self.planned.row_id_TK, backend)

    def ours(self, backend: str = "triton") -> dict[str, Operation]:
        """Our operations by name."""

        def everything() -> Any:
            routed = self.route(backend)
            return self.permute(backend, routed, self.plan(backend))

        return {
            "router forward": lambda: self.route(backend),
            "router forward and backward": lambda: self.route_and_back(backend),
            "plan": lambda: self.plan(backend),
            "permute": lambda: self.permute(backend),
            "plan and permute": lambda: self.permute(backend, None, self.plan(backend)),
            "unpermute": lambda: self.unpermute(backend),
            "logits to permuted rows": everything,
        }

    def megatron(self, fused: bool) -> dict[str, Operation]:
        """Megatron's operations, with ``fused`` Transformer Engine's. Both plan in permute."""
        from megatron.core.transformer.moe import moe_utils

        def router() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            probs_TE, map_TE = self.megatron_routing(fused)
            aux_map_TE, scores_TE = moe_utils.compute_routing_scores_for_aux_loss(
                self.logits_TE, self.k, "softmax", fused=fused
            )
            sizes = (self.tokens, self.k, self.experts, 0.01)
            counts_E = aux_map_TE.sum(dim=0)
            loss = moe_utils.switch_load_balancing_loss_func(
                scores_TE, counts_E, *sizes, fused=fused
            )
            return probs_TE, map_TE, loss + moe_utils.z_loss_func(self.logits_TE, 0.001)

        def router_and_back() -> torch.Tensor:
            probs_TE, _, loss = router()
            gradients = [probs_TE.detach(), torch.ones_like(loss)]
            return torch.autograd.grad((probs_TE, loss), self.logits_TE, gradients)[0]

        def permute(probs_TE: torch.Tensor, map_TE: torch.Tensor) -> tuple[Any, ...]:
            rows = self.tokens * self.k
            return moe_utils.permute(self.hidden_TH, map_TE, probs_TE, rows, fused=fused)

        with torch.no_grad():
            routed = self.megatron_routing(fused)
            permuted_RH, _, order_R, *_ = permute(*routed)
        shape = self.hidden_TH.shape
        return {
            "router forward": router,
            "router forward and backward": router_and_back,
            "plan and permute": lambda: permute(*routed),
            "unpermute": lambda: moe_utils.unpermute(permuted_RH, order_R, shape, fused=fused),
            "logits to permuted rows": lambda: permute(*(out.detach() for out in router()[:2])),
        }

    def megatron_routing(self, fused: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Megatron's dense probabilities and map, for the mean k."""
        from megatron.core.transformer.moe import moe_utils

        options = {"use_pre_softmax": True, "fused": fused}
        return moe_utils.topk_routing_with_score_function(self.logits_TE, self.k, **options)


def verify(case: Case, with_te: bool) -> None:
    """Compare every operation with its definition in torch; for constant k, with the other two.

    Raises:
        UARError: a result differs.
    """
    for name, operation in case.ours().items():
        expected = tensors(case.ours("torch")[name]())
        for ours, theirs in zip(tensors(operation()), expected, strict=True):
            expect_equal(name, ours, theirs)
    from uar_kernels import permutation, plan, routing

    settings = case.settings | {"budget": routing.Budget(0.0, float(case.k), case.k, case.k)}
    routed = routing.route(case.logits_TE.detach(), backend="triton", **settings)
    planned = plan.plan(routed.index_TK, case.experts, backend="triton")
    rows_RH, probs_R, _ = permutation.permute(
        case.hidden_TH, routed.probs_TK, planned.row_id_TK, planned.tokens_per_expert_E,
        case.tokens * case.k, backend="triton",
    )  # fmt: skip
    out_TH = permutation.unpermute(rows_RH, planned.row_id_TK, backend="triton")
    for fused in (False, True) if with_te else (False,):
        name = "Transformer Engine" if fused else "Megatron"
        others = case.megatron(fused)
        expected_RH, expected_R, *_ = others["plan and permute"]()
        expect_equal(f"rows, against {name}", rows_RH, expected_RH)
        expect_equal(f"their probabilities, against {name}", probs_R, expected_R)
        # Megatron adds up in bf16.
        expect_equal(f"unpermuted rows, against {name}", out_TH, others["unpermute"](), 0.05)


def tensors(result: Any) -> list[torch.Tensor]:
    """The tensors of a result, whichever way it is put together."""
    if isinstance(result, torch.Tensor):
        return [result]
    values = result if isinstance(result, tuple) else vars(result).values()
    return [value for value in values if isinstance(value, torch.Tensor)]


def expect_equal(
    what: str, ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4
) -> None:
    """Integers must be equal, floats close; bf16 to its last bit."""
    if ours.dtype == torch.bfloat16:
        tolerance = max(tolerance, 2**-7)
    difference = (ours.detach().double() - theirs.detach().double()).abs()
    allowed = tolerance * (1 + theirs.detach().double().abs())
    if ours.shape != theirs.shape or not bool((difference <= allowed).all()):
        raise UARError(f"{what}: the kernel's result is not that of the reference")


def time_on_gpu(operation: Operation) -> tuple[list[float], int]:
    """Sorted milliseconds of each run, and the most bytes that one run allocates."""
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(WARM_UP):
        operation()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    operation()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    events = []
    for _ in range(RUNS):
        flushed.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        operation()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events), peak


def measure(case: Case, preset: str, with_te: bool) -> list[Timing]:
    """Time all operations of all implementations that are there."""
    sides = {"ours": case.ours(), "Megatron": case.megatron(fused=False)}
    if with_te:
        sides["TE"] = case.megatron(fused=True)
    timings = []
    for operation in sides["ours"]:
        for side, operations in sides.items():
            if operation in operations:
                times, peak = time_on_gpu(operations[operation])
                low, *_, high = statistics.quantiles(times, n=5)
                sizes = (preset, case.tokens, case.hidden_TH.shape[1])
                median = statistics.median(times)
                timings.append(Timing(*sizes, operation, side, median, low, high, peak))
    return timings


def main(
    preset: Annotated[list[str], typer.Option(help="sizes: 8A2, 16A4, 256A8")] = list(PRESETS),  # noqa: B006
    tokens: Annotated[int, typer.Option(min=1, help="tokens of a micro-batch")] = 16384,
    hidden: Annotated[int, typer.Option(min=1, help="hidden size")] = 2048,
    verify_only: Annotated[
        bool, typer.Option("--verify-only", help="compare results, time nothing")
    ] = False,
    output: Annotated[Path, typer.Option(help="JSON file")] = Path("runs/bench_kernels.json"),
) -> None:
    """Verify, time, print a table and write the numbers."""
    if unknown := set(preset) - PRESETS.keys():
        raise UARError(f"unknown preset {', '.join(unknown)}: one of {', '.join(PRESETS)}")
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not verify_only:
        print("skipped: no GPU, so there is nothing to time (--verify-only compares results)")
        return
    if not on_gpu:
        print("no GPU: verifying 64 tokens of 96 columns in Triton's interpreter")
        tokens, hidden = 64, 96
        # Triton reads it when it is imported, which is not yet; Megatron needs the CPU layer.
        os.environ["TRITON_INTERPRET"] = "1"
        from uar_megatron.mcore import cpu

        cpu.enable()
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if not HAVE_TE and not verify_only:
        print("skipped: Transformer Engine is not installed")
    timings = []
    for name in preset:
        case = Case(name, tokens, hidden, "cuda" if on_gpu else "cpu")
        verify(case, HAVE_TE)
        print(f"{name}: verified, mean k {case.rows / tokens:.2f}", flush=True)
        if not verify_only:
            timings += measure(case, name, HAVE_TE)
    if timings:
        show(timings)
        output.parent.mkdir(parents=True, exist_ok=True)
        device = torch.cuda.get_device_name()
        rows = [asdict(timing) for timing in timings]
        output.write_text(json.dumps({"device": device, "timings": rows}, indent=1) + "\n")


def show(timings: list[Timing]) -> None:
    """Print the table."""
    table = Table("preset", "operation", "by", "median ms", "p20", "p80", "peak MiB")
    for row in timings:
        times = (f"{time:.4f}" for time in (row.median, row.p20, row.p80))
        peak = f"{row.peak_bytes / 2**20:.1f}"
        table.add_row(row.preset, row.operation, row.implementation, *times, peak)
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
