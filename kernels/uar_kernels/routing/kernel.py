"""The routing of a micro-batch as one kernel forward and one backward.

Results do not depend on the tile or on the number of programs: sums over tokens are sums of
integers (exact in any order) or of float64 in an order that is written out (:func:`_tree_sum`).
No atomic adds a float.
"""

import triton
import triton.language as tl

from uar_kernels.routing.tile import (
    LN_2,
    LOG2_E,
    experts_of_columns,
    exponentials,
    load_logits,
    omega,
    scalar,
    store_logits,
)

# Σ ω·p and Σ ω are sums of multiples of 2⁻²⁴. A program adds at most 127 of them in an int32.
FIXED_POINT = tl.constexpr(16777216.0)
# Tokens whose deviations are added up first, into one pair of float64 in memory.
GRANULE = tl.constexpr(16)
# Tokens that a program, and granules that the last program adds up at once.
TOKENS_AT_ONCE = tl.constexpr(256)
GRANULES_AT_ONCE = tl.constexpr(1024)
# An expert that was taken as the j-th best has the key TAKEN + j from then on; a column without an
# expert has NO_EXPERT. Both are below the key of −∞.
TAKEN = tl.constexpr(-2147483648)
NO_EXPERT = tl.constexpr(-2147483648 + 65536)


@triton.jit
def _tree_sum(x, LEVELS: tl.constexpr):
    """Sums of 2^LEVELS neighbours, as a tree of adjacent pairs: whatever the layout, one order."""
    for _ in tl.static_range(LEVELS):
        # Two numbers have one sum, in whichever threads they are.
        x = tl.sum(tl.reshape(x, (x.shape[0] // 2, 2)), axis=1)
    return x


@triton.jit
def _budget(z_T, alpha, beta, K_MIN: tl.constexpr, K_MAX: tl.constexpr, ROUNDING: tl.constexpr):
    """k of Eq. 5. Between whole bounds it is all one whether one clamps before or after."""
    exact_T = tl.minimum(tl.maximum(alpha * z_T + beta, K_MIN), K_MAX)
    if ROUNDING == "floor":
        exact_T = tl.floor(exact_T)
    elif ROUNDING == "ceil":
        exact_T = tl.ceil(exact_T)
    else:
        # There is no fraction left at 1.5·2²³, and halves have gone to even.
        exact_T = (exact_T + 12582912.0) - 12582912.0
    return exact_T.to(tl.int32)


@triton.jit
def _ordered_key(score):
    """An int32 that orders as the score does; −0 as 0."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def forward(
    logits_ptr, length, span,
    mean_ptr, inverse_ptr, beta_ptr, given_k_ptr, bias_ptr, valid_ptr,
    alpha, beta, theta, inverse_width, floor, temperature, scaling,
    index_ptr, probs_ptr, k_ptr, energy_ptr, entropy_ptr, lse_ptr,
    statistics_ptr, slots_ptr, weighted_ptr, omega_ptr,
    granules_ptr, counts_ptr, sums_ptr,
    MEASURE: tl.constexpr, ROUTE: tl.constexpr, ROW_STRIDE: tl.constexpr, E: tl.constexpr,
    E_PAD: tl.constexpr, ROW: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr,
    K_MIN: tl.constexpr, K_MAX: tl.constexpr, ROUNDING: tl.constexpr, ENTROPY: tl.constexpr,
    UNIT_TEMPERATURE: tl.constexpr,
    SIGMOID: tl.constexpr, WEIGHTS: tl.constexpr, SCALED: tl.constexpr, HAS_MASK: tl.constexpr,
    ABSOLUTE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """If MEASURE, F, H and their statistics; if ROUTE, the selection, its weights and the loads.

    Each program takes ``span`` neighbouring tokens of one sequence, a whole number of tiles. The
    last one to finish adds up what all have left behind, and leaves the workspace zero:
    ``counts`` int32: ticket, finite tokens, others, slots per sequence and expert;
    ``sums`` int64: Σω per sequence, Σω·p per sequence and expert; ``granules`` float64 pairs.
    """
    sequence = tl.program_id(1)
    sequences = tl.num_programs(1)
    expert_E = experts_of_columns(E_PAD, ROW)
    column_K = tl.arange(0, K_PAD)
    begin = tl.program_id(0) * span
    end = tl.minimum(begin + span, length)

    omega_sum_T = tl.zeros((BLOCK_T,), tl.int32)
    weighted_sum_TE = tl.zeros((BLOCK_T, E_PAD), tl.int32)
    slots_sum_TE = tl.zeros((BLOCK_T, E_PAD), tl.int32)

    for start in range(begin, end, BLOCK_T):
        position_T = start + tl.arange(0, BLOCK_T)
        inside_T = position_T < length
        # Rows past the end read the last token again, and neither count nor are written.
        position_T = tl.minimum(position_T, length - 1)
        token_T = position_T.to(tl.int64) * sequences + sequence
        row_ptr_T = logits_ptr + token_T * ROW_STRIDE
        x_TE = load_logits(row_ptr_T, E, E_PAD, ROW)

        max_T, exp_TE, sum_T, log_T, scaled_TE = exponentials(x_TE)
        finite_T = sum_T == sum_T
        lse_T = max_T + log_T
        if UNIT_TEMPERATURE:
            energy_T = -lse_T
            # −200: exp is 0, and 0·−∞ would be NaN.
            spread_T = tl.sum(exp_TE * tl.maximum(scaled_TE, -200.0), axis=1) / sum_T
            entropy_T = log_T - spread_T * LN_2
        else:
            hot_max_T, hot_TE, hot_sum_T, hot_log_T, scaled_TE = exponentials(x_TE / temperature)
            energy_T = -temperature * (hot_max_T + hot_log_T)
            spread_T = tl.sum(hot_TE * tl.maximum(scaled_TE, -200.0), axis=1) / hot_sum_T
            entropy_T = hot_log_T - spread_T * LN_2
        if MEASURE:
            tl.store(energy_ptr + token_T, energy_T, mask=inside_T)
            tl.store(entropy_ptr + token_T, entropy_T, mask=inside_T)
        if ROUTE:
            u_T = entropy_T if ENTROPY else energy_T
            tl.store(lse_ptr + token_T, lse_T, mask=inside_T)
            # From L1 for each tile: in registers over all of them they make wide tiles spill.
            mean = scalar(mean_ptr, 0.0)
            inverse = scalar(inverse_ptr, 0.0)
            if given_k_ptr is None:
                if beta_ptr is not None:
                    beta = tl.load(beta_ptr).to(tl.float32)
                z_T = tl.where(finite_T, (u_T - mean) * inverse, 0.0)
                k_T = _budget(z_T, alpha, beta, K_MIN, K_MAX, ROUNDING)
            else:
                k_T = tl.load(given_k_ptr + token_T).to(tl.int32)
            tl.store(k_ptr + token_T, k_T, mask=inside_T)

            # A token that is not finite scores 0 everywhere: experts 0, 1, 2, …
            if SIGMOID:
                score_TE = 1.0 / (1.0 + tl.exp2(x_TE * -LOG2_E))
                score_TE = tl.where(finite_T[:, None], score_TE, 0.0)
            else:
                score_TE = tl.where(finite_T[:, None], exp_TE * (1.0 / sum_T)[:, None], 0.0)
            valid_T = inside_T
            if valid_ptr is not None:
                valid_T = inside_T & tl.load(valid_ptr + token_T)
            counted_T = valid_T & finite_T
            omega_T = FIXED_POINT * omega(
                u_T, mean, inverse, theta, inverse_width, floor, counted_T, HAS_MASK, ABSOLUTE
            )
            omega_sum_T += (omega_T + 0.5).to(tl.int32)
            if SIGMOID:
                omega_T /= tl.sum(score_TE, axis=1) + 1e-20
            weighted_sum_TE += (score_TE * omega_T[:, None] + 0.5).to(tl.int32)

            if bias_ptr is not None:
                bias_E = tl.load(bias_ptr + expert_E, mask=expert_E < E, other=0.0)
                key_TE = _ordered_key(tl.where(finite_T[:, None], score_TE + bias_E[None, :], 0.0))
            elif WEIGHTS == "softmax_after":
                key_TE = _ordered_key(tl.where(finite_T[:, None], x_TE, 0.0))
            else:
                # Floats from 0 up are ordered as their bits.
                key_TE = score_TE.to(tl.int32, bitcast=True)
            if E < E_PAD:
                key_TE = tl.where((expert_E < E)[None, :], key_TE, NO_EXPERT)

            index_TK = tl.full((BLOCK_T, K_PAD), -1, tl.int32)
            for j in tl.static_range(K):
                best_T = tl.max(key_TE, axis=1)
                is_best_TE = key_TE == best_T[:, None]
                expert_T = tl.min(tl.where(is_best_TE, expert_E[None, :], E_PAD), axis=1)
                key_TE = tl.where(expert_E[None, :] == expert_T[:, None], TAKEN + j, key_TE)
                index_TK = tl.where((column_K == j)[None, :], expert_T[:, None], index_TK)
            slots_T = tl.where(valid_T, TAKEN + k_T, TAKEN)
            slots_sum_TE += (key_TE < slots_T[:, None]).to(tl.int32)

            chosen_TK = column_K[None, :] < k_T[:, None]
            # The logits of a row were read a moment ago: they come out of L1.
            z_TK = tl.load(
                row_ptr_T[:, None] + index_TK, mask=(column_K < K)[None, :], other=0.0
            ).to(tl.float32)
            if WEIGHTS == "softmax_after":
                z_TK = tl.where(chosen_TK, z_TK, float("-inf"))
                weight_TK = tl.exp2((z_TK - tl.max(z_TK, axis=1)[:, None]) * LOG2_E)
                weight_TK = weight_TK / tl.sum(weight_TK, axis=1)[:, None]
            elif SIGMOID:
                weight_TK = 1.0 / (1.0 + tl.exp2(z_TK * -LOG2_E))
            else:
                weight_TK = tl.exp2((z_TK - max_T[:, None]) * LOG2_E) * (1.0 / sum_T)[:, None]
            if WEIGHTS == "renormalised":
                chosen_sum_T = tl.sum(tl.where(chosen_TK, weight_TK, 0.0), axis=1)
                weight_TK = weight_TK / (chosen_sum_T + 1e-20)[:, None]
            if SCALED:
                weight_TK *= scaling
            weight_TK = tl.where(finite_T[:, None], weight_TK, float("nan"))
            out_TK = token_T[:, None] * K + column_K[None, :]
            inside_TK = inside_T[:, None]
            if K < K_PAD:
                inside_TK = inside_TK & (column_K < K)[None, :]
            tl.store(index_ptr + out_TK, tl.where(chosen_TK, index_TK, -1), mask=inside_TK)
            tl.store(probs_ptr + out_TK, tl.where(chosen_TK, weight_TK, 0.0), mask=inside_TK)

    if MEASURE:
        # What a thread has stored another one reads.
        tl.debug_barrier()
        _sum_statistics(
            entropy_ptr if ENTROPY else energy_ptr, valid_ptr, mean_ptr, begin, end, length,
            granules_ptr, counts_ptr,
        )  # fmt: skip
    # Integers may be added in any order.
    if ROUTE:
        tl.atomic_add(sums_ptr + sequence, tl.sum(omega_sum_T.to(tl.int64)), sem="relaxed")
        at_E = sequence * E + expert_E
        is_expert_E = expert_E < E
        weighted_E = tl.sum(weighted_sum_TE.to(tl.int64), axis=0)
        tl.atomic_add(sums_ptr + sequences + at_E, weighted_E, mask=is_expert_E, sem="relaxed")
        slots_E = tl.sum(slots_sum_TE, axis=0)
        tl.atomic_add(counts_ptr + 3 + at_E, slots_E, mask=is_expert_E, sem="relaxed")
    # All threads of this program have written before its ticket is taken …
    tl.debug_barrier()
    ticket = tl.atomic_add(counts_ptr, 1, sem="acq_rel")
    if ticket == tl.num_programs(0) * sequences - 1:
        # … and the last program reads past L1 what the others wrote.
        _finish(
            sequences, tl.cdiv(length, GRANULE) * sequences, statistics_ptr, slots_ptr,
            weighted_ptr, omega_ptr, granules_ptr, counts_ptr, sums_ptr, MEASURE, ROUTE, E, E_PAD,
        )  # fmt: skip


@triton.jit
def _sum_statistics(u_ptr, valid_ptr, mean_ptr, begin, end, length, granules_ptr, counts_ptr):
    """Σ(u−ū) and Σ(u−ū)² of each granule of a program's tokens, and how many are finite.

    After the tiles, with a thread for each token: within a tile all lanes of a row would add up the
    same numbers. The u of a token is NaN if the token is not finite.
    """
    sequence = tl.program_id(1)
    granules = tl.cdiv(length, GRANULE)
    mean = scalar(mean_ptr, 0.0)
    finite = 0
    other = 0
    for start in range(begin, end, TOKENS_AT_ONCE):
        position_T = start + tl.arange(0, TOKENS_AT_ONCE)
        valid_T = position_T < end
        token_T = position_T.to(tl.int64) * tl.num_programs(1) + sequence
        u_T = tl.load(u_ptr + token_T, mask=valid_T, other=0.0)
        if valid_ptr is not None:
            valid_T = valid_T & tl.load(valid_ptr + token_T, mask=valid_T, other=0).to(tl.int1)
        finite_T = valid_T & (u_T == u_T)
        finite += tl.sum(finite_T.to(tl.int32))
        other += tl.sum((valid_T & (u_T != u_T)).to(tl.int32))
        deviation_T = tl.where(finite_T, u_T - mean, 0.0).to(tl.float64)
        granule_N = start // GRANULE + tl.arange(0, TOKENS_AT_ONCE // GRANULE)
        at_N = granules_ptr + 2 * (sequence * granules + granule_N)
        inside_N = granule_N * GRANULE < end
        tl.store(at_N, _tree_sum(deviation_T, 4), mask=inside_N)
        tl.store(at_N + 1, _tree_sum(deviation_T * deviation_T, 4), mask=inside_N)
    tl.atomic_add(counts_ptr + 1, finite, sem="relaxed")
    tl.atomic_add(counts_ptr + 2, other, sem="relaxed")


@triton.jit
def _finish(
    sequences, granules, statistics_ptr, slots_ptr, weighted_ptr, omega_ptr, granules_ptr,
    counts_ptr, sums_ptr, MEASURE: tl.constexpr, ROUTE: tl.constexpr, E: tl.constexpr,
    E_PAD: tl.constexpr,
):  # fmt: skip
    """Add up what the programs left behind, write it, and leave the workspace zero."""
    if MEASURE:
        shift_N = tl.zeros((GRANULES_AT_ONCE,), tl.float64)
        squares_N = tl.zeros((GRANULES_AT_ONCE,), tl.float64)
        for start in range(0, granules, GRANULES_AT_ONCE):
            granule_N = start + tl.arange(0, GRANULES_AT_ONCE)
            at_N = granules_ptr + 2 * granule_N
            inside_N = granule_N < granules
            shift_N += tl.load(at_N, mask=inside_N, other=0.0, cache_modifier=".cg")
            squares_N += tl.load(at_N + 1, mask=inside_N, other=0.0, cache_modifier=".cg")
        only = tl.arange(0, 1)
        tl.store(statistics_ptr + only, _tree_sum(shift_N, 10))
        tl.store(statistics_ptr + 1 + only, _tree_sum(squares_N, 10))
        for i in tl.static_range(2):
            count = tl.load(counts_ptr + 1 + i, cache_modifier=".cg")
            tl.store(statistics_ptr + 2 + i, count.to(tl.float64))
    expert_E = tl.arange(0, E_PAD)
    is_expert_E = expert_E < E
    if ROUTE:
        for sequence in range(sequences):
            at_E = sequence * E + expert_E
            slots_E = tl.load(counts_ptr + 3 + at_E, mask=is_expert_E, cache_modifier=".cg")
            tl.store(slots_ptr + at_E, slots_E, mask=is_expert_E)
            at_sums_E = sums_ptr + sequences + at_E
            weighted_E = tl.load(at_sums_E, mask=is_expert_E, cache_modifier=".cg")
            weighted_E = (weighted_E.to(tl.float64) / FIXED_POINT).to(tl.float32)
            tl.store(weighted_ptr + at_E, weighted_E, mask=is_expert_E)
            omega = tl.load(sums_ptr + sequence, cache_modifier=".cg").to(tl.float64)
            tl.store(omega_ptr + sequence, (omega / FIXED_POINT).to(tl.float32))
    # Several threads read the same word: all must have before it is cleared.
    tl.debug_barrier()
    for i in tl.static_range(3):
        tl.store(counts_ptr + i, 0)
    if ROUTE:
        for sequence in range(sequences):
            at_E = sequence * E + expert_E
            tl.store(counts_ptr + 3 + at_E, tl.zeros((E_PAD,), tl.int32), mask=is_expert_E)
            at_sums_E = sums_ptr + sequences + at_E
            tl.store(at_sums_E, tl.zeros((E_PAD,), tl.int64), mask=is_expert_E)
            tl.store(sums_ptr + sequence, tl.zeros((), tl.int64))


@triton.jit
def backward(
    logits_ptr, length,
    mean_ptr, inverse_ptr, valid_ptr, theta, inverse_width, floor, scaling,
    index_ptr, u_ptr, lse_ptr, probs_grad_ptr, weighted_grad_ptr, lse_grad_ptr, logits_grad_ptr,
    ROW_STRIDE: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, ROW: tl.constexpr,
    K: tl.constexpr, SIGMOID: tl.constexpr, WEIGHTS: tl.constexpr, SCALED: tl.constexpr,
    HAS_MASK: tl.constexpr, ABSOLUTE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits from those of the weights, of Σω·p and of lse; each may be absent.

    ``u_ptr`` None: u is F at τ = 1, which is −lse.
    """
    sequence = tl.program_id(1)
    position_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside_T = position_T < length
    position_T = tl.minimum(position_T, length - 1)
    token_T = position_T.to(tl.int64) * tl.num_programs(1) + sequence
    expert_E = experts_of_columns(E_PAD, ROW)
    x_TE = load_logits(logits_ptr + token_T * ROW_STRIDE, E, E_PAD, ROW)
    lse_T = tl.load(lse_ptr + token_T)
    p_TE = tl.exp2((x_TE - lse_T[:, None]) * LOG2_E)
    score_TE = 1.0 / (1.0 + tl.exp2(x_TE * -LOG2_E)) if SIGMOID else p_TE

    # Gradient of the scores.
    grad_TE = tl.zeros((BLOCK_T, E_PAD), tl.float32)
    if probs_grad_ptr is not None:
        chosen_TE = tl.zeros((BLOCK_T, E_PAD), tl.int1)
        index_ptr_T = index_ptr + token_T * K
        probs_grad_ptr_T = probs_grad_ptr + token_T * K
        for j in tl.static_range(K):
            is_it_TE = expert_E[None, :] == tl.load(index_ptr_T + j)[:, None]
            grad_TE = tl.where(is_it_TE, tl.load(probs_grad_ptr_T + j)[:, None], grad_TE)
            if WEIGHTS != "as_they_are":
                chosen_TE = chosen_TE | is_it_TE
        if SCALED:
            grad_TE *= scaling
        if WEIGHTS == "renormalised":
            share_TE = tl.where(chosen_TE, score_TE, 0.0)
            inverse_T = 1.0 / (tl.sum(share_TE, axis=1) + 1e-20)
            inner_T = tl.sum(share_TE * grad_TE, axis=1) * inverse_T
            grad_TE = tl.where(chosen_TE, (grad_TE - inner_T[:, None]) * inverse_T[:, None], 0.0)
        elif WEIGHTS == "softmax_after":
            # Not a function of p, which a bias may have chosen where it underflows.
            z_TE = tl.where(chosen_TE, x_TE, float("-inf"))
            max_T = tl.maximum(tl.max(z_TE, axis=1), -3.0e38)
            share_TE = tl.exp2((z_TE - max_T[:, None]) * LOG2_E)
            share_TE *= (1.0 / tl.maximum(tl.sum(share_TE, axis=1), 1.0))[:, None]
            inner_T = tl.sum(share_TE * grad_TE, axis=1)
            direct_TE = share_TE * (grad_TE - inner_T[:, None])
            grad_TE = tl.zeros((BLOCK_T, E_PAD), tl.float32)

    if weighted_grad_ptr is not None:
        counted_T = lse_T == lse_T
        if valid_ptr is not None:
            counted_T &= tl.load(valid_ptr + token_T)
        u_T = -lse_T
        if u_ptr is not None:
            u_T = tl.load(u_ptr + token_T)
        omega_T = omega(
            u_T, scalar(mean_ptr, 0.0), scalar(inverse_ptr, 0.0), theta, inverse_width, floor,
            counted_T, HAS_MASK, ABSOLUTE,
        )  # fmt: skip
        at_E = weighted_grad_ptr + sequence * E + expert_E
        weighted_grad_E = tl.load(at_E, mask=expert_E < E, other=0.0)
        if SIGMOID:
            sum_T = tl.sum(score_TE, axis=1) + 1e-20
            omega_T /= sum_T
            inner_T = tl.sum(score_TE * weighted_grad_E[None, :], axis=1) / sum_T
            grad_TE += omega_T[:, None] * (weighted_grad_E[None, :] - inner_T[:, None])
        else:
            grad_TE += omega_T[:, None] * weighted_grad_E[None, :]

    if SIGMOID:
        grad_TE *= score_TE * (1.0 - score_TE)
        if lse_grad_ptr is not None:
            lse_grad_T = tl.load(lse_grad_ptr + token_T)
            grad_TE += p_TE * lse_grad_T[:, None]
        # NaN, and not 0, for a token that is not finite.
        grad_TE += (lse_T - lse_T)[:, None]
    else:
        shift_T = -tl.sum(p_TE * grad_TE, axis=1)
        if lse_grad_ptr is not None:
            shift_T += tl.load(lse_grad_ptr + token_T)
        grad_TE = p_TE * (grad_TE + shift_T[:, None])
        if WEIGHTS == "softmax_after" and probs_grad_ptr is not None:
            grad_TE += direct_TE
    store_logits(logits_grad_ptr + token_T * E, grad_TE, inside_T, E, E_PAD, ROW)
