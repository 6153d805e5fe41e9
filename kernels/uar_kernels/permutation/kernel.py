"""The two kernels of the permutation: a scatter and a gather of rows, one token at a time.

A program handles one token and BLOCK_H of its columns; a token's programs are neighbours, so that
they share its row ids in the cache. The scatter (permute, and the gradient of unpermute) loads the
columns once and stores them k times. The gather (unpermute, and the gradient of permute) adds k
rows in the order of the slots, in fp32; a row has one token, so nothing is added to memory.

Sizes that change between steps are not specialised on, so nothing is compiled again for them.
H is a compile-time constant: Triton then knows whether rows start at multiples of 16 bytes, and
uses 128-bit accesses if so.
"""

# mypy: allow-untyped-defs
# An `if` on a compile-time constant stays apart from one on a value: it removes the code.
# ruff: noqa: SIM102

import triton
import triton.language as tl


@triton.jit
def _load_rows(row_ids, first, capacity, K: tl.constexpr, UNROLL: tl.constexpr):
    """The rows of UNROLL slots as a tuple, -1 for those to leave out.

    All are loaded before the first is used: the compiler may not move a load over a store.
    """
    rows = ()
    for i in tl.static_range(UNROLL):
        # A tensor in the interpreter too, where `first` is a Python number.
        slot = tl.full([], i, tl.int32) + first
        row = tl.load(row_ids + slot, mask=slot < K, other=-1)
        rows += (tl.where(row < capacity, row, -1).to(tl.int64),)  # type: ignore[assignment]
    return rows


@triton.jit(do_not_specialize=["capacity", "num_tokens"])
def scatter_rows(
    tokens_TH,
    probs_TK,
    row_id_TK,
    tokens_per_expert_E,
    rows_RH,
    probs_R,
    overflow,
    capacity,
    num_tokens,
    num_experts,
    K: tl.constexpr,
    H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_PROBS: tl.constexpr,
):
    """rows_RH[row_id] = tokens_TH, for each slot whose row is in [0, capacity).

    With HAS_PROBS also probs_R[row_id] = probs_TK, and how many rows are beyond the capacity.
    """
    program = tl.program_id(0)
    blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    token = (program // blocks).to(tl.int64)
    block = program % blocks
    h = block * BLOCK_H + tl.arange(0, BLOCK_H)
    row_ids = row_id_TK + token * K
    # The grid has a program even where there is no token.
    if token < num_tokens:
        x = tl.load(tokens_TH + token * H + h, mask=h < H)
        for first in range(0, K, UNROLL):
            rows = _load_rows(row_ids, first, capacity, K, UNROLL)
            for i in tl.static_range(UNROLL):
                row = rows[i]
                tl.store(rows_RH + row * H + h, x, mask=h < tl.where(row >= 0, H, 0))
        if HAS_PROBS:
            if block == 0:
                k = tl.arange(0, BLOCK_K)
                row_K = tl.load(row_ids + k, mask=k < K, other=-1)
                keep_K = (row_K >= 0) & (row_K < capacity)
                prob_K = tl.load(probs_TK + token * K + k, mask=keep_K)
                tl.store(probs_R + row_K, prob_K, mask=keep_K)
    if HAS_PROBS:
        if program == 0:
            e = tl.arange(0, BLOCK_E)
            used = tl.sum(tl.load(tokens_per_expert_E + e, mask=e < num_experts, other=0), axis=0)
            tl.store(overflow, tl.maximum(used - capacity, 0).to(tl.int32))


@triton.jit(do_not_specialize=["capacity"])
def gather_rows(
    rows_RH,
    probs_R,
    row_id_TK,
    tokens_TH,
    probs_TK,
    capacity,
    K: tl.constexpr,
    H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_PROBS: tl.constexpr,
):
    """tokens_TH = the sum of rows_RH[row_id] over the slots whose row is in [0, capacity).

    With HAS_PROBS also probs_TK = probs_R[row_id], 0 for the other slots.
    """
    program = tl.program_id(0)
    blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    token = (program // blocks).to(tl.int64)
    block = program % blocks
    h = block * BLOCK_H + tl.arange(0, BLOCK_H)
    row_ids = row_id_TK + token * K
    total = tl.zeros([BLOCK_H], tl.float32)
    for first in range(0, K, UNROLL):
        rows = _load_rows(row_ids, first, capacity, K, UNROLL)
        for i in tl.static_range(UNROLL):
            row = rows[i]
            x = tl.load(rows_RH + row * H + h, mask=h < tl.where(row >= 0, H, 0), other=0.0)
            total += x.to(tl.float32)
    tl.store(tokens_TH + token * H + h, total.to(tokens_TH.dtype.element_ty), mask=h < H)
    if HAS_PROBS:
        if block == 0:
            k = tl.arange(0, BLOCK_K)
            row_K = tl.load(row_ids + k, mask=k < K, other=-1)
            keep_K = (row_K >= 0) & (row_K < capacity)
            prob_K = tl.load(probs_R + row_K, mask=keep_K, other=0.0)
            tl.store(probs_TK + token * K + k, prob_K, mask=k < K)
