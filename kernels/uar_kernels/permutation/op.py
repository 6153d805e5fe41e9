"""Launch of the permutation kernels, their gradients and the public functions."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from uar_kernels.backend import resolve
from uar_kernels.permutation import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# A program takes 2 KB of a row, so that each of its 128 threads holds 16 bytes: one 128-bit access
# per row and thread. More columns would take registers from the eight loads in flight; fewer would
# read the row ids more often.
BLOCK_BYTES = 2048
BYTES_PER_WARP = 512
# Row ids held at a time, and rows that a thread of the gather has in flight. 16 take 52 registers.
UNROLL = 8


class Launch(NamedTuple):
    """Sizes of a launch; the result does not depend on them."""

    block_h: int
    unroll: int
    num_warps: int


@dataclass(frozen=True)
class Permuted:
    """A permutation whose kernel is launched; see :func:`begin_permute`.

    Attributes:
        overflow: int32 scalar on the device, how many rows did not fit.
    """

    overflow: torch.Tensor
    _rows_RH: torch.Tensor
    _probs_R: torch.Tensor
    # Without the kernel's inputs the rows have a gradient already.
    _inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None

    def take(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first ``rows`` rows ``[rows, hidden]`` and probabilities ``[rows]``. Call it once.

        Their gradient has ``rows`` rows too. A slice of the result of :func:`permute` would instead
        have its gradient copied into one of full capacity, which moves more than the permutation.
        """
        if self._inputs is None:
            return self._rows_RH[:rows], self._probs_R[:rows]
        return _Permute.apply(*self._inputs, self._rows_RH, self._probs_R, rows)


def begin_permute(
    hidden_TH: torch.Tensor,
    probs_TK: torch.Tensor,
    row_id_TK: torch.Tensor,
    tokens_per_expert_E: torch.Tensor,
    capacity: int,
    backend: str = "auto",
) -> Permuted:
    """Launch a permutation into a buffer of ``capacity`` rows, before their number is known.

    The result's ``take`` gives the rows in use once the host knows how many there are. Nothing
    waits for the device.

    Args:
        hidden_TH: fp32, fp16 or bf16 ``[tokens, hidden]``.
        probs_TK: floating ``[tokens, K_max]``.
        row_id_TK: int32 ``[tokens, K_max]`` of :class:`uar_kernels.plan.Plan`: each row at most
            once, -1 for an unused slot.
        tokens_per_expert_E: int64 ``[experts]`` of the plan; its sum is the number of rows.
        capacity: rows of the buffer. ``row_id_TK.numel()`` always suffices. Rows beyond it are
            dropped, never written.
        backend: ``auto``, ``triton`` or ``torch``; see :func:`uar_kernels.backend.resolve`.

    Raises:
        ValueError: a shape or a type is not as above.
        RuntimeError: ``triton`` was asked for and cannot run.
    """
    _check("hidden_TH", hidden_TH, 2, DTYPES)
    _check("row_id_TK", row_id_TK, 2, (torch.int32,))
    _check("probs_TK", probs_TK, 2, DTYPES)
    _check("tokens_per_expert_E", tokens_per_expert_E, 1, (torch.int64,))
    if probs_TK.shape != row_id_TK.shape or len(hidden_TH) != len(row_id_TK) or capacity < 0:
        raise ValueError(
            "permute needs hidden_TH [tokens, hidden], probs_TK and row_id_TK [tokens, K_max] and "
            f"capacity >= 0; got {list(hidden_TH.shape)}, {list(probs_TK.shape)}, "
            f"{list(row_id_TK.shape)} and {capacity}"
        )
    if resolve(backend, hidden_TH) == "torch":
        overflow = (tokens_per_expert_E.sum() - capacity).clamp(min=0).int()
        rows_RH, probs_R = reference.permute(hidden_TH, probs_TK, row_id_TK, capacity)
        return Permuted(overflow, rows_RH, probs_R, None)
    row_id_TK = row_id_TK.contiguous()
    rows_RH = hidden_TH.new_empty(capacity, hidden_TH.shape[1])
    probs_R = probs_TK.new_empty(capacity)
    overflow = row_id_TK.new_empty(())
    with torch.no_grad():
        _scatter(
            hidden_TH.contiguous(),
            row_id_TK,
            rows_RH,
            heuristics(hidden_TH, row_id_TK),
            (probs_TK.contiguous(), probs_R, tokens_per_expert_E.contiguous(), overflow),
        )
    return Permuted(overflow, rows_RH, probs_R, (hidden_TH, probs_TK, row_id_TK))


def permute(
    hidden_TH: torch.Tensor,
    probs_TK: torch.Tensor,
    row_id_TK: torch.Tensor,
    tokens_per_expert_E: torch.Tensor,
    capacity: int,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copy each token, and each of its probabilities, to the rows of its experts.

    Rows that no slot has are left as they were allocated by the kernels (the torch backend gives
    zeros): they may hold anything, NaN too. Gradients of unused and dropped slots are 0.

    Args:
        hidden_TH, probs_TK, row_id_TK, tokens_per_expert_E, capacity, backend: as for
            :func:`begin_permute`.

    Returns:
        ``(rows_RH, probs_R, overflow)``: ``[capacity, hidden]`` in the type of ``hidden_TH``,
        ``[capacity]`` in that of ``probs_TK``, and an int32 scalar on the device: how many rows
        did not fit.

    Raises:
        ValueError: a shape or a type is not as above.
        RuntimeError: ``triton`` was asked for and cannot run.
    """
    permuted = begin_permute(hidden_TH, probs_TK, row_id_TK, tokens_per_expert_E, capacity, backend)
    return *permuted.take(capacity), permuted.overflow


def unpermute(
    rows_RH: torch.Tensor, row_id_TK: torch.Tensor, backend: str = "auto"
) -> torch.Tensor:
    """Add up the rows of each token, in fp32 and in the order of its slots.

    Probabilities play no part: the alltoall dispatcher's experts have multiplied by them. In the
    gradient, rows that no slot has are left as they were allocated: pass exactly the rows in use,
    or use the gradient of no others.

    Args:
        rows_RH: fp32, fp16 or bf16 ``[rows, hidden]``.
        row_id_TK: int32 ``[tokens, K_max]`` as for :func:`permute`. A row outside ``[0, rows)``
            adds nothing, so that dropped rows need no other row ids.
        backend: ``auto``, ``triton`` or ``torch``; see :func:`uar_kernels.backend.resolve`.

    Returns:
        ``[tokens, hidden]`` in the type of ``rows_RH``.

    Raises:
        ValueError: a shape or a type is not as above.
        RuntimeError: ``triton`` was asked for and cannot run.
    """
    _check("rows_RH", rows_RH, 2, DTYPES)
    _check("row_id_TK", row_id_TK, 2, (torch.int32,))
    if resolve(backend, rows_RH) == "torch":
        return reference.unpermute(rows_RH, row_id_TK)
    return _Unpermute.apply(rows_RH, row_id_TK.contiguous())


class _Permute(torch.autograd.Function):
    """Hands out rows that are there already; the backward pass is a gather."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        probs_TK: torch.Tensor,
        row_id_TK: torch.Tensor,
        buffer_RH: torch.Tensor,
        buffer_R: torch.Tensor,
        rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(row_id_TK)
        # A view of an input would be tied to it: these are tensors of their own on its memory.
        return buffer_RH.detach()[:rows], buffer_R.detach()[:rows]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RH: torch.Tensor, grad_R: torch.Tensor) -> tuple[Any, ...]:
        (row_id_TK,) = ctx.saved_tensors
        grad_TH = grad_RH.new_empty(len(row_id_TK), grad_RH.shape[1])
        grad_TK = grad_R.new_empty(row_id_TK.shape)
        launch = heuristics(grad_RH, row_id_TK)
        _gather(grad_RH.contiguous(), row_id_TK, grad_TH, launch, (grad_R.contiguous(), grad_TK))
        return grad_TH, grad_TK, None, None, None, None


class _Unpermute(torch.autograd.Function):
    """A gather; the backward pass is a scatter."""

    @staticmethod
    def forward(ctx: Any, rows_RH: torch.Tensor, row_id_TK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(row_id_TK)
        ctx.rows = len(rows_RH)
        hidden_TH = rows_RH.new_empty(len(row_id_TK), rows_RH.shape[1])
        _gather(rows_RH.contiguous(), row_id_TK, hidden_TH, heuristics(rows_RH, row_id_TK))
        return hidden_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[Any, ...]:
        (row_id_TK,) = ctx.saved_tensors
        grad_RH = grad_TH.new_empty(ctx.rows, grad_TH.shape[1])
        _scatter(grad_TH.contiguous(), row_id_TK, grad_RH, heuristics(grad_TH, row_id_TK))
        return grad_RH, None


def heuristics(rows: torch.Tensor, row_id_TK: torch.Tensor) -> Launch:
    """The sizes to launch with, for rows ``[..., hidden]`` of this type."""
    block_h = min(BLOCK_BYTES // rows.itemsize, _next_power_of_2(rows.shape[1]))
    num_warps = max(block_h * rows.itemsize // BYTES_PER_WARP, 1)
    return Launch(block_h, min(max(row_id_TK.shape[1], 1), UNROLL), num_warps)


def compilations() -> list[dict[str, Any]]:
    """What the functions compile for usual sizes, for the report on generated code."""
    from uar_kernels.permutation import kernel

    kinds = (
        ("permute", kernel.scatter_rows, True),
        ("permute backward", kernel.gather_rows, True),
        ("unpermute", kernel.gather_rows, False),
        ("unpermute backward", kernel.scatter_rows, False),
    )
    cases = [
        (torch.bfloat16, 1024, 8),
        (torch.bfloat16, 2048, 8),
        (torch.bfloat16, 7168, 16),
        (torch.float32, 1024, 8),
    ]
    result = []
    for dtype, hidden, k_max in cases:
        row_id_TK = torch.empty(0, k_max, dtype=torch.int32)
        launch = heuristics(torch.empty(0, hidden, dtype=dtype), row_id_TK)
        row_type = "*fp32" if dtype == torch.float32 else "*bf16"
        for name, fn, has_probs in kinds:
            probs_type, counts_type = ("*fp32", "*i64") if has_probs else ("*i32", "*i32")
            types = {"tokens_TH": row_type, "rows_RH": row_type, "row_id_TK": "*i32"}
            types |= {"probs_TK": probs_type, "probs_R": probs_type}
            types |= {"tokens_per_expert_E": counts_type, "overflow": "*i32"}
            constexprs = _constexprs(hidden, k_max, launch) | {"HAS_PROBS": has_probs}
            if fn is kernel.scatter_rows:
                constexprs["BLOCK_E"] = 64 if has_probs else 1
            names = [n for n in fn.arg_names if n not in constexprs]
            result.append(
                {
                    "kernel": name,
                    "fn": fn,
                    "signature": {n: types.get(n, "i32") for n in names},
                    "constexprs": constexprs,
                    "attrs": [fn.arg_names.index(n) for n in names if n in types],
                    "num_warps": launch.num_warps,
                    "tokens_per_program": launch.block_h / hidden,
                    "case": f"{row_type[1:]}, H={hidden}, K={k_max}",
                }
            )
    return result


def _scatter(
    tokens_TH: torch.Tensor,
    row_id_TK: torch.Tensor,
    rows_RH: torch.Tensor,
    launch: Launch,
    probs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Write rows_RH, and with probs ``(probs_TK, probs_R, tokens_per_expert_E, overflow)`` more."""
    from uar_kernels.permutation import kernel

    tokens, hidden = tokens_TH.shape
    # Without probabilities the kernel does not touch these pointers.
    probs_TK, probs_R, tokens_per_expert_E, overflow = probs or (row_id_TK,) * 4
    num_experts = len(tokens_per_expert_E) if probs else 0
    programs = tokens * -(-hidden // launch.block_h)
    kernel.scatter_rows[(max(programs, 1),)](
        tokens_TH,
        probs_TK,
        row_id_TK,
        tokens_per_expert_E,
        rows_RH,
        probs_R,
        overflow,
        len(rows_RH),
        tokens,
        num_experts,
        **_constexprs(hidden, row_id_TK.shape[1], launch),
        BLOCK_E=_next_power_of_2(num_experts),
        HAS_PROBS=probs is not None,
        num_warps=launch.num_warps,
    )


def _gather(
    rows_RH: torch.Tensor,
    row_id_TK: torch.Tensor,
    tokens_TH: torch.Tensor,
    launch: Launch,
    probs: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Write tokens_TH, and with probs ``(probs_R, probs_TK)`` the latter too."""
    from uar_kernels.permutation import kernel

    tokens, hidden = tokens_TH.shape
    if tokens == 0:
        return
    probs_R, probs_TK = probs or (row_id_TK,) * 2
    kernel.gather_rows[(tokens * -(-hidden // launch.block_h),)](
        rows_RH,
        probs_R,
        row_id_TK,
        tokens_TH,
        probs_TK,
        len(rows_RH),
        **_constexprs(hidden, row_id_TK.shape[1], launch),
        HAS_PROBS=probs is not None,
        num_warps=launch.num_warps,
    )


def _constexprs(hidden: int, k_max: int, launch: Launch) -> dict[str, int]:
    return {
        "K": k_max,
        "H": hidden,
        "BLOCK_K": _next_power_of_2(k_max),
        "BLOCK_H": launch.block_h,
        "UNROLL": launch.unroll,
    }


def _check(name: str, tensor: torch.Tensor, dim: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dim() != dim or tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name} must have {dim} dimensions and be {allowed}; got {tensor.dtype} "
            f"{list(tensor.shape)}"
        )


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
