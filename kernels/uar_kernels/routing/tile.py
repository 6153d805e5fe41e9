"""What the routing kernels do with a tile of logits: ``@triton.jit`` only, as in ``kernel.py``."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def experts_of_columns(E_PAD: tl.constexpr, ROW: tl.constexpr):
    """Expert of each column of a tile. A warp reads ROW at a time; see :func:`load_logits`."""
    column = tl.arange(0, E_PAD)
    if E_PAD > ROW:
        column = column % (E_PAD // ROW) * ROW + column // (E_PAD // ROW)
    return column


@triton.jit
def load_logits(row_ptr_T, E: tl.constexpr, E_PAD: tl.constexpr, ROW: tl.constexpr):
    """One read of a tile of logits, in fp32; −inf in columns without an expert.

    Where a row is longer than one warp reads at once, Triton would give it to several warps, and
    every reduction over it would go through shared memory. Pieces of ROW columns, joined side by
    side, stay in the warp.
    """
    if E_PAD <= ROW:
        x_TE = _load_columns(row_ptr_T, tl.arange(0, E_PAD), E, E_PAD)
    else:
        tl.static_assert(E_PAD <= 4 * ROW, "more experts than four reads of a warp")
        column = tl.arange(0, ROW)
        piece_TR = _load_columns(row_ptr_T, column, E, E_PAD)
        if E_PAD == 2 * ROW:
            x_TRP = tl.join(piece_TR, _load_columns(row_ptr_T, column + ROW, E, E_PAD))
        else:
            # The last join varies fastest: pieces 0, 1, 2, 3 side by side.
            even_TRP = tl.join(piece_TR, _load_columns(row_ptr_T, column + 2 * ROW, E, E_PAD))
            odd_TR = _load_columns(row_ptr_T, column + ROW, E, E_PAD)
            odd_TRP = tl.join(odd_TR, _load_columns(row_ptr_T, column + 3 * ROW, E, E_PAD))
            x_TRP = tl.join(even_TRP, odd_TRP)
        x_TE = tl.reshape(x_TRP, (row_ptr_T.shape[0], E_PAD))
    return x_TE


@triton.jit
def _load_columns(row_ptr_T, column, E: tl.constexpr, E_PAD: tl.constexpr):
    # Without a mask a row is read in whole vectors.
    is_expert = (column < E)[None, :] if E < E_PAD else None
    other = float("-inf") if E < E_PAD else None
    at = row_ptr_T[:, None] + column[None, :]
    return tl.load(at, mask=is_expert, other=other).to(tl.float32)


@triton.jit
def store_logits(
    row_ptr_T, x_TE, inside_T, E: tl.constexpr, E_PAD: tl.constexpr, ROW: tl.constexpr
):
    """The inverse of :func:`load_logits`."""
    if E_PAD <= ROW:
        _store_columns(row_ptr_T, x_TE, inside_T, tl.arange(0, E_PAD), E, E_PAD)
    else:
        column = tl.arange(0, ROW)
        BLOCK_T: tl.constexpr = row_ptr_T.shape[0]
        if E_PAD == 2 * ROW:
            piece_TR, next_TR = tl.split(tl.reshape(x_TE, (BLOCK_T, ROW, 2)))
            _store_columns(row_ptr_T, piece_TR, inside_T, column, E, E_PAD)
            _store_columns(row_ptr_T, next_TR, inside_T, column + ROW, E, E_PAD)
        else:
            even_TRP, odd_TRP = tl.split(tl.reshape(x_TE, (BLOCK_T, ROW, 2, 2)))
            piece_TR, next_TR = tl.split(even_TRP)
            _store_columns(row_ptr_T, piece_TR, inside_T, column, E, E_PAD)
            _store_columns(row_ptr_T, next_TR, inside_T, column + 2 * ROW, E, E_PAD)
            piece_TR, next_TR = tl.split(odd_TRP)
            _store_columns(row_ptr_T, piece_TR, inside_T, column + ROW, E, E_PAD)
            _store_columns(row_ptr_T, next_TR, inside_T, column + 3 * ROW, E, E_PAD)


@triton.jit
def _store_columns(row_ptr_T, x, inside_T, column, E: tl.constexpr, E_PAD: tl.constexpr):
    inside = inside_T[:, None]
    if E < E_PAD:
        inside = inside & (column < E)[None, :]
    tl.store(row_ptr_T[:, None] + column[None, :], x, mask=inside)


@triton.jit
def scalar(ptr, default: tl.constexpr):
    """A scalar that lives on the device, in fp32, as torch casts it beside an fp32 tensor."""
    return default if ptr is None else tl.load(ptr).to(tl.float32)


@triton.jit
def exponentials(x_TE):
    """(max, exp(x − max), its sum, log of the sum, log2(e)·(x − max)) of each row.

    The sum is NaN when logsumexp is not finite: ∞ − ∞ is NaN, and NaN stays.
    """
    max_T = tl.max(x_TE, axis=1)
    scaled_TE = (x_TE - max_T[:, None]) * LOG2_E
    exp_TE = tl.exp2(scaled_TE)
    sum_T = tl.sum(exp_TE, axis=1)
    return max_T, exp_TE, sum_T, tl.log2(sum_T) * LN_2, scaled_TE


@triton.jit
def omega(
    u_T, mean, inverse, theta, inverse_width, floor, counted_T,
    HAS_MASK: tl.constexpr, ABSOLUTE: tl.constexpr,
):  # fmt: skip
    """ω of Eq. 6; 0 for tokens that do not count."""
    if HAS_MASK:
        quantity_T = u_T if ABSOLUTE else (u_T - mean) * inverse
        gate_T = 1.0 / (1.0 + tl.exp2((theta - quantity_T) * inverse_width * LOG2_E))
        omega_T = tl.where(counted_T, floor + (1.0 - floor) * gate_T, 0.0)
    else:
        omega_T = counted_T.to(tl.float32)
    return omega_T
