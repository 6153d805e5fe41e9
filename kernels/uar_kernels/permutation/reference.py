"""Permute and unpermute as indexing; torch derives their gradients.

Nothing here waits for the device: a slot without a row, and a row without a slot, point to an
additional row of zeros instead of being filtered out.
"""

import torch
from torch.nn.functional import pad


def permute(
    hidden_TH: torch.Tensor, probs_TK: torch.Tensor, row_id_TK: torch.Tensor, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy token t to row ``row_id_TK[t, s]`` for each slot s whose row is in [0, capacity).

    Args:
        hidden_TH: ``[tokens, hidden]``.
        probs_TK: ``[tokens, K_max]``.
        row_id_TK: int32 ``[tokens, K_max]``, rows of the result, each at most once; -1 for none.
        capacity: rows of the result.

    Returns:
        ``(rows_RH, probs_R)``: ``[capacity, hidden]`` and ``[capacity]``; 0 in rows of no slot.
    """
    tokens, k_max = row_id_TK.shape
    slots = tokens * k_max
    row = _or_dummy(row_id_TK.flatten(), capacity)
    slot_R = torch.full((capacity + 1,), slots, device=row.device)
    slot_R[row] = torch.arange(slots, device=row.device)
    slot_R = slot_R[:capacity]
    token_R = torch.where(slot_R < slots, slot_R // max(k_max, 1), tokens)
    return pad(hidden_TH, (0, 0, 0, 1))[token_R], pad(probs_TK.flatten(), (0, 1))[slot_R]


def unpermute(rows_RH: torch.Tensor, row_id_TK: torch.Tensor) -> torch.Tensor:
    """Add up each token's rows in fp32, in the order of its slots.

    Args:
        rows_RH: ``[rows, hidden]``.
        row_id_TK: int32 ``[tokens, K_max]``; a row outside ``[0, rows)`` counts as zeros.

    Returns:
        ``[tokens, hidden]`` in the type of ``rows_RH``.
    """
    padded_RH = pad(rows_RH, (0, 0, 0, 1))
    total_TH = rows_RH.new_zeros(len(row_id_TK), rows_RH.shape[1], dtype=torch.float32)
    for row_T in _or_dummy(row_id_TK, len(rows_RH)).unbind(dim=1):
        total_TH = total_TH + padded_RH[row_T].float()
    return total_TH.to(rows_RH.dtype)


def _or_dummy(row: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.where((row >= 0) & (row < rows), row, rows).long()
