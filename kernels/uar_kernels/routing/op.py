"""Routing as autograd ops on either backend, and how their kernels are launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from uar_kernels.backend import resolve
from uar_kernels.routing.reference import measure_reference, route_reference
from uar_kernels.routing.settings import Budget, Mask, Measure, Measured, Routed, Scoring, check

# The fields of ``Routed``, in their order, which is also the kernel's.
OUTPUTS = (
    "index", "probs", "k", "energy", "entropy", "lse", "statistics", "slots", "weighted", "omega",
)  # fmt: skip
# Tile of each kernel: padded experts -> (tokens, warps). Forward a thread holds 4 logits (2 of 16,
# 8 of 256, where a warp holds one row), because to each belong a key and two integer sums in
# registers; backward 8 or 16, because nothing is kept. Forward a tile is some granules.
FORWARD_TILES = {8: (64, 4), 16: (64, 8), 32: (32, 8), 64: (16, 8), 128: (16, 16), 256: (16, 16)}
BACKWARD_TILES = {8: (64, 2), 16: (64, 4), 32: (32, 4), 64: (32, 4), 128: (16, 4), 256: (16, 8)}
# Sixteen warps on each of the 132 SMs of an H800; fewer where that would leave a program less than
# 32 tokens, because what each adds to the sums is 12·E bytes.
MOST_WARPS = 132 * 16
LEAST_TOKENS = 32
# A program adds up to 127 numbers of at most 2²⁴ in an int32.
MOST_TILES = 127
# Tokens whose deviations are one pair of float64 in memory.
GRANULE = 16
# Columns that four reads of a warp cover in fp32.
MOST_EXPERTS = 512


def route(
    logits_TE: torch.Tensor,
    *,
    width: int,
    budget: Budget | torch.Tensor,
    measure: Measure | None = None,
    scoring: Scoring | None = None,
    mask: Mask | None = None,
    valid_T: torch.Tensor | None = None,
    sequences: int = 1,
    measured: Measured | None = None,
    backend: str = "auto",
) -> Routed:
    """Choose each token's experts, weight them, and add up what statistics and losses need.

    One kernel forward and one backward. Differentiable in the logits through ``probs_TK``,
    ``weighted_GE`` and ``lse_T``.

    Args:
        logits_TE: fp32, fp16 or bf16; everything is computed in fp32.
        width: columns of the selection, K ≤ E.
        budget: Eq. 5, or the k of each token, int32 or int64 in [0, K], where it needs all tokens
            (see :func:`measure_tokens`).
        measure: u and ẑ. Default: energy at τ = 1 without statistics.
        scoring: scores, weights and bias. Default: softmax over all experts, as it is.
        mask: ω; None is ω = 1.
        valid_T: bool, False for padding, which is routed but counted nowhere.
        sequences: G; tokens are ordered ``[sequence position, sequence]``.
        measured: what :func:`measure_tokens` made of these logits, if that was the first of two
            passes: ``energy_T``, ``entropy_T`` and ``statistics`` are taken from it.
        backend: ``auto``, ``triton`` or ``torch``.

    Raises:
        ValueError: sizes that do not fit; for Triton a dtype that is none of the above, or more
            than 512 experts.
        RuntimeError: ``triton`` was asked for and cannot run here.
    """
    measure, scoring = measure or Measure(), scoring or Scoring()
    check(logits_TE, width, budget, sequences)
    if resolve(backend, logits_TE) == "torch":
        return route_reference(
            logits_TE, width, budget, measure, scoring, mask, valid_T, sequences, measured
        )
    request = _Request(width, budget, measure, scoring, mask, valid_T, sequences, measured)
    return Routed(*_Route.apply(_readable(logits_TE), request))


def measure_tokens(
    logits_TE: torch.Tensor,
    *,
    measure: Measure | None = None,
    valid_T: torch.Tensor | None = None,
    backend: str = "auto",
) -> Measured:
    """F, H and their sums alone, detached: the first pass where k needs all tokens.

    Arguments and errors as in :func:`route`.
    """
    measure = measure or Measure()
    if resolve(backend, logits_TE) == "torch":
        return measure_reference(logits_TE, measure, valid_T)
    with torch.no_grad():
        outputs = _launch_forward(_readable(logits_TE), None, measure, valid_T)
    return Measured(outputs["energy"], outputs["entropy"], outputs["statistics"])


class _Request(NamedTuple):
    """The arguments of :func:`route` beside the logits."""

    width: int
    budget: Budget | torch.Tensor
    measure: Measure
    scoring: Scoring
    mask: Mask | None
    valid_T: torch.Tensor | None
    sequences: int
    measured: Measured | None


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TE: torch.Tensor, request: _Request) -> tuple[torch.Tensor, ...]:
        measure = request.measure
        outputs = _launch_forward(logits_TE, request, measure, request.valid_T)
        u_T = None
        if request.mask is not None and (measure.name == "entropy" or measure.temperature != 1.0):
            u_T = outputs[measure.name]
        ctx.save_for_backward(logits_TE, outputs["index"], outputs["lse"], u_T)
        ctx.request = request
        ctx.set_materialize_grads(False)
        differentiable = ("probs", "lse", "weighted")
        ctx.mark_non_differentiable(*(outputs[n] for n in OUTPUTS if n not in differentiable))
        return tuple(outputs[name] for name in OUTPUTS)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor, None]:
        logits_TE, index_TK, lse_T, u_T = ctx.saved_tensors
        probs_grad_TK, lse_grad_T, weighted_grad_GE = (
            None if grad is None else grad.contiguous() for grad in (grads[1], grads[5], grads[8])
        )
        grad_TE = _launch_backward(
            logits_TE, ctx.request, index_TK, lse_T, u_T,
            probs_grad_TK, weighted_grad_GE, lse_grad_T,
        )  # fmt: skip
        return grad_TE, None


def _readable(logits_TE: torch.Tensor) -> torch.Tensor:
    """The logits with experts side by side; rows may be apart."""
    if logits_TE.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"logits must be fp32, fp16 or bf16 for Triton; got {logits_TE.dtype}")
    if logits_TE.shape[1] > MOST_EXPERTS:
        raise ValueError(
            f"the Triton kernel holds at most {MOST_EXPERTS} experts; got {logits_TE.shape[1]}: "
            "use backend 'torch'"
        )
    return logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()


def _launch_forward(
    logits_TE: torch.Tensor,
    request: _Request | None,
    measure: Measure,
    valid_T: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    from uar_kernels.routing import kernel

    tokens, experts = logits_TE.shape
    device = logits_TE.device
    if request is None:
        width, budget, scoring, mask, sequences, measured = 1, None, Scoring(), None, 1, None
    else:
        width, budget, _, scoring, mask, _, sequences, measured = request
    outputs: dict[str, torch.Tensor] = {}
    if measured is None:
        outputs |= {
            "energy": torch.empty(tokens, device=device),
            "entropy": torch.empty(tokens, device=device),
            "statistics": torch.empty(4, dtype=torch.float64, device=device),
        }
    if request is not None:
        outputs |= {
            "index": torch.empty(tokens, width, dtype=torch.int32, device=device),
            "probs": torch.empty(tokens, width, device=device),
            "k": torch.empty(tokens, dtype=torch.int32, device=device),
            "lse": torch.empty(tokens, device=device),
            "slots": torch.empty(sequences, experts, dtype=torch.int32, device=device),
            "weighted": torch.empty(sequences, experts, device=device),
            "omega": torch.empty(sequences, device=device),
        }
    block, warps = tile(FORWARD_TILES, experts)
    length = tokens // sequences
    granules = torch.empty(sequences * -(-length // GRANULE), 2, dtype=torch.float64, device=device)
    free = budget if isinstance(budget, Budget) else Budget(0.0, 0.0, 0, 0)
    span = tokens_of_program(length, sequences, block, warps)
    kernel.forward[(max(1, -(-length // span)), sequences)](
        logits_TE, length, span,
        measure.mean, measure.inverse_sigma,
        free.beta if isinstance(free.beta, torch.Tensor) else None,
        budget.contiguous() if isinstance(budget, torch.Tensor) else None,
        scoring.bias_E, None if valid_T is None else valid_T.contiguous(),
        float(free.alpha), 0.0 if isinstance(free.beta, torch.Tensor) else float(free.beta),
        *_mask_arguments(mask), float(measure.temperature), float(scoring.scaling_factor),
        *(outputs.get(name) for name in OUTPUTS), granules, *_workspace(device, sequences, experts),
        MEASURE=measured is None, ROUTE=request is not None, BLOCK_T=block,
        K_MIN=free.k_min, K_MAX=free.k_max, ROUNDING=free.rounding,
        ENTROPY=measure.name == "entropy", UNIT_TEMPERATURE=measure.temperature == 1.0,
        K_PAD=padded(width), **_shape_constants(logits_TE, width, scoring, mask),
        num_warps=warps, **forward_options(experts, width),
    )  # fmt: skip
    if measured is not None:
        # Aliases: an op may return what it was given only as a new tensor.
        outputs |= {
            "energy": measured.energy_T.detach(),
            "entropy": measured.entropy_T.detach(),
            "statistics": measured.statistics.detach(),
        }
    return outputs


def _launch_backward(
    logits_TE: torch.Tensor,
    request: _Request,
    index_TK: torch.Tensor,
    lse_T: torch.Tensor,
    u_T: torch.Tensor | None,
    probs_grad_TK: torch.Tensor | None,
    weighted_grad_GE: torch.Tensor | None,
    lse_grad_T: torch.Tensor | None,
) -> torch.Tensor:
    from uar_kernels.routing import kernel

    width, _, measure, scoring, mask, valid_T, sequences, _ = request
    tokens, experts = logits_TE.shape
    grad_TE = torch.empty(tokens, experts, dtype=logits_TE.dtype, device=logits_TE.device)
    block, warps = tile(BACKWARD_TILES, experts)
    length = tokens // sequences
    if not tokens:
        return grad_TE
    kernel.backward[(-(-length // block), sequences)](
        logits_TE, length,
        measure.mean, measure.inverse_sigma, None if valid_T is None else valid_T.contiguous(),
        *_mask_arguments(mask), float(scoring.scaling_factor),
        index_TK, u_T, lse_T, probs_grad_TK, weighted_grad_GE, lse_grad_T, grad_TE,
        BLOCK_T=block, **_shape_constants(logits_TE, width, scoring, mask),
        num_warps=warps, **COMPILER_OPTIONS,
    )  # fmt: skip
    return grad_TE


# α·ẑ + β is rounded as torch rounds it, and no result depends on what a compiler contracts.
COMPILER_OPTIONS = {"enable_fp_fusion": False}


def forward_options(experts: int, width: int) -> dict[str, Any]:
    """With 96 registers.

    ptxas has to try harder for 256 experts and 16 columns, which would spill; elsewhere that takes
    more registers, or spills.
    """
    options: dict[str, Any] = COMPILER_OPTIONS | {"maxnreg": 96}
    if experts > 128 and width > 8:
        options["ptx_options"] = "--register-usage-level=8"
    return options


def padded(columns: int) -> int:
    """The power of two that holds so many columns."""
    return 1 << max(columns - 1, 0).bit_length()


def tile(table: dict[int, tuple[int, int]], experts: int) -> tuple[int, int]:
    """(tokens, warps) of a tile, for the table's first size that holds the experts, or its last."""
    size = next((size for size in table if size >= experts), max(table))
    return table[size]


def tokens_of_program(length: int, sequences: int, block: int, warps: int) -> int:
    """How many neighbouring tokens of a sequence a forward program takes, in whole tiles."""
    wanted = max(-(-length * sequences * warps // MOST_WARPS), LEAST_TOKENS)
    return min(-(-wanted // block), MOST_TILES) * block


def _shape_constants(
    logits_TE: torch.Tensor, width: int, scoring: Scoring, mask: Mask | None
) -> dict[str, Any]:
    return {
        # Constant, so that rows of 8 logits are known to begin where 16 bytes do.
        "ROW_STRIDE": logits_TE.stride(0),
        "E": logits_TE.shape[1],
        "E_PAD": padded(logits_TE.shape[1]),
        # A warp reads 32 vectors of 16 bytes at once.
        "ROW": 512 // logits_TE.element_size(),
        "K": width,
        "SIGMOID": scoring.function == "sigmoid",
        "WEIGHTS": scoring.weights,
        "SCALED": scoring.scaling_factor != 1.0,
        "HAS_MASK": mask is not None,
        "ABSOLUTE": mask is not None and mask.units == "absolute",
    }


def _mask_arguments(mask: Mask | None) -> Sequence[float]:
    return (0.0, 1.0, 0.0) if mask is None else (mask.theta, 1.0 / mask.width, mask.floor)


_WORKSPACES: dict[tuple[torch.device, int], tuple[torch.Tensor, torch.Tensor]] = {}


def _workspace(
    device: torch.device, sequences: int, experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros for what programs add up between them; every launch leaves zeros behind.

    Kept for each device and stream, so that launches that may overlap never share it. A CUDA graph
    gets its own, cleared in the graph: its replays run on any stream.
    """
    counts, sums = 3 + sequences * experts, sequences * (1 + experts)
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return _zeros(counts, torch.int32, device), _zeros(sums, torch.int64, device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    kept = _WORKSPACES.get(key)
    if kept is None or kept[0].numel() < counts or kept[1].numel() < sums:
        kept = _zeros(counts, torch.int32, device), _zeros(sums, torch.int64, device)
        _WORKSPACES[key] = kept
    return kept


def _zeros(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(size, dtype=dtype, device=device)


_TYPES = {
    "logits_ptr": "*fp32", "mean_ptr": "*fp64", "inverse_ptr": "*fp64", "given_k_ptr": "*i64",
    "bias_ptr": "*fp32", "valid_ptr": "*i1", "index_ptr": "*i32", "k_ptr": "*i32",
    "slots_ptr": "*i32", "counts_ptr": "*i32", "sums_ptr": "*i64", "statistics_ptr": "*fp64",
    "granules_ptr": "*fp64", "length": "i32", "span": "i32",
}  # fmt: skip


def compilations() -> list[dict[str, Any]]:
    """What the committed report compiles ahead of time: the launches of the paper's presets.

    Energy at τ = 1 with moving statistics, softmax over all experts, ω in units of σ, no padding.
    """
    from uar_kernels.routing import kernel

    absent = ("beta_ptr", "given_k_ptr", "bias_ptr", "valid_ptr", "u_ptr")
    entries = []
    for experts in (8, 16, 64, 256):
        for width in (2, 4, 8, 16):
            if width > experts:
                continue
            logits_TE = torch.empty(0, experts)
            shape = _shape_constants(logits_TE, width, Scoring(), Mask(0.0, 1.0))
            forward = shape | {
                "MEASURE": True, "ROUTE": True, "K_PAD": padded(width), "K_MIN": 1, "K_MAX": width,
                "ROUNDING": "floor", "ENTROPY": False, "UNIT_TEMPERATURE": True,
            }  # fmt: skip
            for name, fn, table, constants, options in (
                (
                    "routing forward", kernel.forward, FORWARD_TILES, forward,
                    forward_options(experts, width),
                ),
                ("routing backward", kernel.backward, BACKWARD_TILES, shape, COMPILER_OPTIONS),
            ):  # fmt: skip
                block, warps = tile(table, experts)
                constexprs = constants | {"BLOCK_T": block} | dict.fromkeys(absent)
                constexprs = {n: v for n, v in constexprs.items() if n in fn.arg_names}
                # Scalars that are not in the table are pointers to fp32 or fp32 numbers.
                signature = {
                    n: "constexpr" if n in constexprs
                    else _TYPES.get(n, "*fp32" if n.endswith("_ptr") else "fp32")
                    for n in fn.arg_names
                }  # fmt: skip
                attrs = {
                    (i,): [["tt.divisibility", 16]]
                    for i, n in enumerate(fn.arg_names)
                    if signature[n].startswith("*") or n in ("length", "span")
                }
                entries.append(
                    {
                        "kernel": name, "case": f"E={experts}, K={width}", "fn": fn,
                        "signature": signature, "constexprs": constexprs, "attrs": attrs,
                        "num_warps": warps, "tokens_per_program": block,
                        "options": options,
                    }
                )  # fmt: skip
    return entries
