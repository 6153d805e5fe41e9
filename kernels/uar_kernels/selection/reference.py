"""Pick the k best experts of each token, where k differs between tokens."""

import torch


def select_experts(
    scores_TE: torch.Tensor, k_T: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Order each token's experts by score and mark the first ``k`` of them.

    The order does not depend on k: a token that is given one more expert keeps those it had.
    Ties go to the lower expert index, so that every rank and every recomputation agree.

    Args:
        scores_TE: selection scores (bias included), ``[tokens, experts]``.
        k_T: experts of each token, integers in ``[0, width]``.
        width: columns of the result, at most the number of experts.

    Returns:
        ``(index_TK, chosen_TK)``: int64 expert indices in descending score, and a bool mask whose
        row t has its first ``k_T[t]`` entries set.
    """
    order_TE = torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices
    rank_K = torch.arange(width, device=scores_TE.device)
    return order_TE[:, :width], rank_K < k_T.unsqueeze(-1)
