"""What the permutation moves, as formulas of the sizes."""

from uar_kernels.permutation.op import BLOCK_BYTES


def moved_bytes(
    tokens: int,
    k_max: int,
    rows: int,
    hidden: int,
    itemsize: int,
    num_experts: int = 0,
    probs: bool = True,
    backward: bool = False,
) -> int:
    """Bytes that one launch loads and stores, from L2 and beyond.

    Args:
        tokens, k_max, hidden, itemsize: sizes of the input.
        rows: Σk, the slots in use.
        num_experts: counts that permute reads for ``overflow``.
        probs: whether probabilities are moved: in both directions of permute, not of unpermute.
        backward: of permute: the gradient of the probabilities is written for all slots.
    """
    blocks = -(-hidden * itemsize // BLOCK_BYTES)
    total = (tokens + rows) * hidden * itemsize + 4 * tokens * k_max * blocks
    if probs:
        total += 4 * rows + 4 * (tokens * k_max if backward else rows)
    if probs and not backward:
        total += 8 * num_experts + 4
    return total


def minimum_bytes(tokens: int, rows: int, hidden: int, itemsize: int) -> int:
    """Bytes that any permutation must move: each row once, a row id and two probabilities each."""
    return (tokens + rows) * hidden * itemsize + 12 * rows
