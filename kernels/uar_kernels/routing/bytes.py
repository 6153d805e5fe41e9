"""Memory traffic of the routing kernels, as formulas.

All for fp32 logits unless ``size`` says otherwise, energy at τ = 1, no padding mask and a single
sequence. What a launch reads again after it has read or written it comes out of L1 or L2 and is
counted apart (:func:`forward_cached`), as is what all programs add to the same few words.
"""

from uar_kernels.routing.op import FORWARD_TILES, GRANULE, tile, tokens_of_program


def forward_minimum(tokens: int, experts: int, width: int, size: int = 4) -> int:
    """Logits read once; indices, weights, k, F and H written once."""
    return tokens * (size * experts + 8 * width + 12)


def forward(tokens: int, experts: int, width: int, size: int = 4, launches: int = 1) -> int:
    """What the forward moves from and to DRAM.

    Beyond the minimum: lse (4 a token), 16 a granule of the statistics, and the sums of each expert
    (8 for Σω·p, 4 for the slots). With two launches the logits once more; F, H and the granules are
    written by the first alone.
    """
    total = forward_minimum(tokens, experts, width, size) + 4 * tokens
    total += 16 * _granules(tokens) + 12 * experts
    return total + (launches - 1) * tokens * size * experts


def forward_cached(tokens: int, experts: int, width: int) -> int:
    """What the forward moves within L1 and L2.

    The chosen logits and u, read again; the granules; what each program adds to the sums.
    """
    total = tokens * (4 * width + 4) + 16 * _granules(tokens)
    return total + 12 * experts * programs(tokens, experts)


def backward_minimum(tokens: int, experts: int, width: int, size: int = 4) -> int:
    """Logits in, their gradient out; indices, weights' gradient, lse, u, lse's gradient, ω."""
    return tokens * (2 * size * experts + 8 * width + 16)


def backward(tokens: int, experts: int, width: int, size: int = 4) -> int:
    """What the backward moves: ω is computed again from lse, so neither u nor ω is read."""
    return tokens * (2 * size * experts + 8 * width + 8) + 4 * experts


def programs(tokens: int, experts: int) -> int:
    """Programs of a forward launch."""
    block, warps = tile(FORWARD_TILES, experts)
    return max(1, -(-tokens // tokens_of_program(tokens, 1, block, warps)))


def _granules(tokens: int) -> int:
    return -(-tokens // GRANULE)
