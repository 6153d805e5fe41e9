"""Launch of the plan kernels and the public function."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from uar_kernels.backend import resolve
from uar_kernels.plan import reference

DEEPEP_MAX_K = 32
# Entries are counted in int32; the margin is for the last, partly empty range.
MAX_ENTRIES = 2**30


@dataclass(frozen=True)
class Plan:
    """Where the rows of a permutation go. Rows are ordered by expert, inside an expert by token.

    Attributes:
        row_id_TK: int32 ``[tokens, K_max]``, row of (token, slot) in the permuted buffer; -1 where
            the slot is unused. The rows in use are 0, 1, ... without gaps.
        tokens_per_expert_E: int64 ``[experts]``.
        splits: int64 ``[ep_size]``, rows for each expert-parallel rank.
    """

    row_id_TK: torch.Tensor
    tokens_per_expert_E: torch.Tensor
    splits: torch.Tensor


class Launch(NamedTuple):
    """Sizes of the two launches; the result does not depend on them.

    Attributes:
        programs: programs of each kernel.
        part: entries of a stream, a multiple of 32.
        streams: streams (tile rows) of a program.
        scan_rows: ranges whose counts ``rank_kernel`` adds up at a time.
        num_warps: warps of a program.
    """

    programs: int
    part: int
    streams: int
    scan_rows: int
    num_warps: int


# (experts up to, part, most programs, scan rows).
# Every program of rank_kernel reads every program's counts, 4·E bytes each: limits on the programs
# keep programs² · 4·E below 2.5 MB (from L2), and 96 of 8 warps nearly cover the 132 SMs of an
# H800. Every part has counts too, written once and read once: parts grow with E so that these stay
# below the bytes of the entries themselves. The scan's tile has at most 4096 counts, 16 per thread
# in flight; 32 rows at most, as they are added up in the end.
HEURISTICS = ((64, 128, 96, 32), (256, 512, 48, 16), (1 << 30, 1024, 32, 4))
# A stream per warp keeps ballots and running counters inside the warp; 8 warps hide each other's
# latency and fit four times on an SM.
STREAMS = NUM_WARPS = 8
# Entries of each stream that are counted at a time, four in a thread.
COUNT_AT_ONCE = 128


def plan(index_TK: torch.Tensor, num_experts: int, ep_size: int = 1, backend: str = "auto") -> Plan:
    """Find each chosen expert's row in the permuted buffer, without a [tokens, experts] map.

    The order is that of Megatron's ``permute``. Nothing waits for the device.

    Args:
        index_TK: int32 or int64 ``[tokens, K_max]``, the expert ids of each token; -1 (in fact any
            id outside ``[0, num_experts)``) marks an unused slot, wherever it is. A token has an
            expert at most once; if not, its slots get neighbouring rows.
        num_experts: number of experts, at least 1.
        ep_size: expert-parallel ranks, a divisor of ``num_experts``.
        backend: ``auto``, ``triton`` or ``torch``; see :func:`uar_kernels.backend.resolve`.

    Raises:
        ValueError: a shape, a type or ``ep_size`` is not as above.
        RuntimeError: ``triton`` was asked for and cannot run.
    """
    _check_index(index_TK)
    if num_experts < 1 or ep_size < 1 or num_experts % ep_size:
        raise ValueError(
            f"ep_size must divide num_experts; got num_experts={num_experts}, ep_size={ep_size}"
        )
    if index_TK.numel() > MAX_ENTRIES:
        raise ValueError(f"at most {MAX_ENTRIES} slots can be planned; got {index_TK.numel()}")
    if resolve(backend, index_TK) == "torch":
        return Plan(*reference.plan(index_TK, num_experts, ep_size))
    launch = heuristics(index_TK.numel(), num_experts)
    return _launch(index_TK.contiguous(), num_experts, ep_size, launch)


def deepep_indices(index_TK: torch.Tensor) -> torch.Tensor:
    """Convert expert ids to what DeepEP's dispatch takes: int64, -1 where unused.

    Args:
        index_TK: int32 or int64 ``[tokens, K_max]`` as for :func:`plan`; K_max at most 32.

    Raises:
        ValueError: K_max is more than DeepEP can take, or a shape or type is not as above.
    """
    _check_index(index_TK)
    if index_TK.shape[1] > DEEPEP_MAX_K:
        raise ValueError(
            f"DeepEP takes at most {DEEPEP_MAX_K} experts per token; got K_max="
            f"{index_TK.shape[1]}. Lower k_max, or use another token dispatcher."
        )
    return index_TK.long().clamp(min=-1).contiguous()


def heuristics(entries: int, num_experts: int) -> Launch:
    """The sizes that :func:`plan` launches with.

    Parts are shorter than the table says where one program is enough, and longer where programs
    reach their limit.
    """
    part, most, scan_rows = next(row[1:] for row in HEURISTICS if num_experts <= row[0])
    programs = min(max(_cdiv(entries, STREAMS * part), 1), most)
    part = max(_cdiv(_cdiv(entries, programs * STREAMS), 32), 1) * 32
    return Launch(programs, part, STREAMS, scan_rows, NUM_WARPS)


def moved_bytes(tokens: int, k_max: int, num_experts: int, index_itemsize: int = 4) -> int:
    """Bytes that the two kernels load and store, from L2 and beyond.

    Entries are read twice and rows written once; counts of programs are written once and read by
    every program; counts of parts are written and read once; totals are written.
    """
    entries = tokens * k_max
    launch = heuristics(entries, num_experts)
    return (
        entries * (2 * index_itemsize + 4)
        + 4 * num_experts * launch.programs * (1 + launch.programs)
        + 4 * num_experts * launch.programs * launch.streams * 2
        + 8 * num_experts
    )


def minimum_bytes(tokens: int, k_max: int, num_experts: int, index_itemsize: int = 4) -> int:
    """Bytes that any plan must move: entries in, rows and totals out."""
    return tokens * k_max * (index_itemsize + 4) + 8 * num_experts


def compilations() -> list[dict[str, Any]]:
    """What :func:`plan` compiles for usual sizes, for the report on generated code.

    ``trips`` counts how often each loop of the kernel runs, in the order of the code; of the last
    one, how many entries a thread takes.
    """
    from uar_kernels.plan import kernel

    result = []
    for num_experts, k_max in ((8, 8), (16, 8), (64, 8), (256, 8), (256, 16)):
        tokens = 32768
        launch = heuristics(tokens * k_max, num_experts)
        steps = launch.part // 32
        for fn, trips in (
            (kernel.count_kernel, [steps]),
            (
                kernel.rank_kernel,
                [_cdiv(launch.programs, launch.scan_rows), 1, steps],
            ),
        ):
            constexprs = _constexprs(fn, num_experts, launch)
            types = {
                "index": "*i64",
                "tokens_per_expert": "*i64",
                "splits": "*i64",
            } | dict.fromkeys(("counts", "part_counts", "row_id"), "*i32")
            names = [name for name in fn.arg_names if name not in constexprs]
            result.append(
                {
                    "kernel": f"plan.{fn.__name__}",
                    "fn": fn,
                    "signature": {name: types.get(name, "i32") for name in names},
                    "constexprs": constexprs,
                    "attrs": [
                        fn.arg_names.index(n)
                        for n in names
                        if n in types
                        or n == "part"
                        or (n == "num_experts" and not num_experts % 16)
                    ],
                    "num_warps": launch.num_warps,
                    "tokens_per_program": launch.part * launch.streams // k_max,
                    "trips": trips,
                    "case": f"E={num_experts}, K={k_max}",
                }
            )
    return result


def _launch(index_TK: torch.Tensor, num_experts: int, ep_size: int, launch: Launch) -> Plan:
    from uar_kernels.plan import kernel

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=index_TK.device)

    result = Plan(
        row_id_TK=empty(*index_TK.shape, dtype=torch.int32),
        tokens_per_expert_E=empty(num_experts, dtype=torch.int64),
        splits=empty(ep_size, dtype=torch.int64),
    )
    counts = empty(launch.programs, num_experts, dtype=torch.int32)
    part_counts = empty(launch.programs, launch.streams, num_experts, dtype=torch.int32)
    sizes = (index_TK.numel(), launch.part, num_experts)
    kernel.count_kernel[(launch.programs,)](
        index_TK,
        counts,
        part_counts,
        *sizes,
        **_constexprs(kernel.count_kernel, num_experts, launch),
        num_warps=launch.num_warps,
    )
    kernel.rank_kernel[(launch.programs,)](
        index_TK,
        counts,
        part_counts,
        result.row_id_TK,
        result.tokens_per_expert_E,
        result.splits,
        *sizes,
        ep_size,
        **_constexprs(kernel.rank_kernel, num_experts, launch),
        num_warps=launch.num_warps,
    )
    return result


def _constexprs(fn: Any, num_experts: int, launch: Launch) -> dict[str, int]:
    """The constants that a kernel takes."""
    # A tile of fewer than 8 experts would save nothing.
    index_bits = max((num_experts - 1).bit_length(), 3)
    constants = {
        "BLOCK_E": 1 << index_bits,
        "STREAMS": launch.streams,
        "COUNT_AT_ONCE": COUNT_AT_ONCE,
        "INDEX_BITS": index_bits,
        "SCAN_ROWS": launch.scan_rows,
    }
    return {name: value for name, value in constants.items() if name in fn.arg_names}


def _check_index(index_TK: torch.Tensor) -> None:
    if index_TK.dim() != 2 or index_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "index_TK must be int32 or int64 [tokens, K_max]; got "
            f"{index_TK.dtype} {list(index_TK.shape)}"
        )


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
