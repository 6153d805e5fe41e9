"""The two kernels of the plan: count, then rank.

A counting sort that keeps its order. The flat (token, slot) entries are cut into one range per
program and each range into one part per stream, a row of the tiles below that Triton gives to a
warp. ``count_kernel`` counts the entries per expert of each part and of each range: a histogram in
shared memory, whose integers may be added in any order. ``rank_kernel`` adds up the counts of the
ranges before its own, which is the scan, and each stream walks through its part with running
counters. No program waits for another, and nothing depends on which one runs first.

There a stream takes 32 entries at a time. For each bit of the expert id, one 32-bit word says which
of them have it set (a ballot); ANDs of such words give the entries that chose a given expert, and
counting bits gives counts and ranks. This costs log2(E) steps where a one-hot table takes E.

Shape letters: S streams, N entries, L the 32 lanes of a stream, E experts, P programs.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def _popcount(x):
    # LLVM knows this idiom and makes it one POPC; libdevice's popc does not interpret.
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _ballot(flag_SL):
    # Each lane owns one bit of the sum, so the sum is an OR and cannot overflow.
    return tl.sum(flag_SL.to(tl.uint32) << tl.arange(0, 32)[None, :], axis=1)


@triton.jit
def _first_entries(part, STREAMS: tl.constexpr):
    stream_S = tl.program_id(0) * STREAMS + tl.arange(0, STREAMS)
    return stream_S[:, None] * part + tl.arange(0, 32)[None, :]


@triton.jit
def _load_experts(index, entry_SL, entries, num_experts):
    expert_SL = tl.load(index + entry_SL, mask=entry_SL < entries, other=-1).to(tl.int32)
    return tl.where(expert_SL < num_experts, expert_SL, -1)


@triton.jit(do_not_specialize=["entries"])
def count_kernel(
    index,
    counts,
    part_counts,
    entries,
    part,
    num_experts,
    BLOCK_E: tl.constexpr,
    STREAMS: tl.constexpr,
    COUNT_AT_ONCE: tl.constexpr,
):
    """counts[program, e] and part_counts[program, stream, e]: entries that chose expert e.

    ``part`` is the length of a stream's part, a multiple of 32.
    """
    program = tl.program_id(0)
    expert_E = tl.arange(0, BLOCK_E)
    stream_S = tl.arange(0, STREAMS)
    count_SE = tl.zeros([STREAMS, BLOCK_E], tl.int32)
    for first in range(0, part, COUNT_AT_ONCE):
        place_N = first + tl.arange(0, COUNT_AT_ONCE)
        entry_SN = (program * STREAMS + stream_S)[:, None] * part + place_N[None, :]
        expert_SN = _load_experts(index, entry_SN, entries, num_experts)
        counted_SN = (expert_SN >= 0) & (place_N < part)[None, :]
        bin_SN = stream_S[:, None] * BLOCK_E + tl.maximum(expert_SN, 0)
        bins = tl.histogram(
            tl.reshape(bin_SN, [STREAMS * COUNT_AT_ONCE]),
            STREAMS * BLOCK_E,
            mask=tl.reshape(counted_SN, [STREAMS * COUNT_AT_ONCE]),
        )
        count_SE += tl.reshape(bins, [STREAMS, BLOCK_E])
    row_S = program * STREAMS + tl.arange(0, STREAMS)
    known_E = expert_E < num_experts
    tl.store(
        part_counts + row_S[:, None] * num_experts + expert_E[None, :],
        count_SE,
        mask=known_E[None, :],
    )
    tl.store(counts + program * num_experts + expert_E, tl.sum(count_SE, axis=0), mask=known_E)


@triton.jit(do_not_specialize=["entries", "ep_size"])
def rank_kernel(
    index,
    counts,
    part_counts,
    row_id,
    tokens_per_expert,
    splits,
    entries,
    part,
    num_experts,
    ep_size,
    BLOCK_E: tl.constexpr,
    STREAMS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    SCAN_ROWS: tl.constexpr,
):
    """row_id of the program's range; the totals are shared out among the programs."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    expert_E = tl.arange(0, BLOCK_E)
    known_E = expert_E < num_experts
    before_PE = tl.zeros([SCAN_ROWS, BLOCK_E], tl.int32)
    total_PE = tl.zeros([SCAN_ROWS, BLOCK_E], tl.int32)
    for first in range(0, programs, SCAN_ROWS):
        row_P = first + tl.arange(0, SCAN_ROWS)
        count_PE = tl.load(
            counts + row_P[:, None] * num_experts + expert_E[None, :],
            mask=(row_P < programs)[:, None] & known_E[None, :],
            other=0,
        )
        total_PE += count_PE
        before_PE += tl.where((row_P < program)[:, None], count_PE, 0)
    total_E = tl.sum(total_PE, axis=0)
    before_E = tl.sum(before_PE, axis=0)
    if program == 0:
        tl.store(tokens_per_expert + expert_E, total_E.to(tl.int64), mask=known_E)
    # The experts of an EP rank are neighbours.
    local_experts = num_experts // ep_size
    for rank in range(program, ep_size, programs):
        mine_E = expert_E // local_experts == rank
        tl.store(splits + rank, tl.sum(tl.where(mine_E, total_E, 0), axis=0).to(tl.int64))

    row_S = program * STREAMS + tl.arange(0, STREAMS)
    part_SE = tl.load(
        part_counts + row_S[:, None] * num_experts + expert_E[None, :],
        mask=known_E[None, :],
        other=0,
    )
    start_E = tl.cumsum(total_E, axis=0) - total_E + before_E
    next_SE = start_E[None, :] + tl.cumsum(part_SE, axis=0) - part_SE
    earlier_L = (tl.full([32], 1, tl.uint32) << tl.arange(0, 32)) - 1
    all_E = tl.full([BLOCK_E], 0xFFFFFFFF, tl.uint32)
    entry_SL = _first_entries(part, STREAMS)
    next_SL = _load_experts(index, entry_SL, entries, num_experts)
    for _ in range(0, part, 32):
        expert_SL = next_SL
        next_SL = _load_experts(index, entry_SL + 32, entries, num_experts)
        used_SL = expert_SL >= 0
        word_S = _ballot(used_SL)
        same_SL = word_S[:, None] & earlier_L[None, :]
        same_SE = word_S[:, None] & all_E[None, :]
        for bit in tl.static_range(INDEX_BITS):
            bit_SL = (expert_SL >> bit) & 1
            word_S = _ballot(bit_SL)
            same_SL &= word_S[:, None] ^ (bit_SL - 1).to(tl.uint32)
            same_SE &= word_S[:, None] ^ (((expert_E >> bit) & 1) - 1).to(tl.uint32)[None, :]
        slot_SL = tl.arange(0, STREAMS)[:, None] * BLOCK_E + tl.where(used_SL, expert_SL, 0)
        slot_flat = tl.reshape(slot_SL, [STREAMS * 32])
        first_SL = tl.reshape(
            tl.gather(tl.reshape(next_SE, [STREAMS * BLOCK_E]), slot_flat, axis=0), [STREAMS, 32]
        )
        row_SL = tl.where(used_SL, first_SL + _popcount(same_SL), -1)
        tl.store(row_id + entry_SL, row_SL, mask=entry_SL < entries)
        next_SE += _popcount(same_SE)
        entry_SL += 32
