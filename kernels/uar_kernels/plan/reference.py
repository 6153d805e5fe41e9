"""The plan as one stable sort."""

import torch


def plan(
    index_TK: torch.Tensor, num_experts: int, ep_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give each chosen (token, slot) its row: by expert, inside an expert by token.

    This is the order of Megatron's ``permute``, which reads a transposed [experts, tokens] map.

    Args:
        index_TK: expert ids, integers ``[tokens, K_max]``; an id outside ``[0, num_experts)``,
            as -1, marks an unused slot.
        num_experts: number of experts.
        ep_size: expert-parallel ranks; each has ``num_experts / ep_size`` neighbouring experts.

    Returns:
        ``(row_id_TK, tokens_per_expert_E, splits)``: int32 rows (-1 where unused), int64 counts of
        each expert, int64 counts of each rank.
    """
    expert = index_TK.flatten().long()
    used = (expert >= 0) & (expert < num_experts)
    # Unused slots sort behind the last expert.
    expert = torch.where(used, expert, num_experts)
    order = torch.sort(expert, stable=True).indices
    row = torch.empty_like(order)
    row[order] = torch.arange(order.numel(), device=order.device)
    tokens_per_expert_E = torch.bincount(expert, minlength=num_experts + 1)[:num_experts]
    return (
        torch.where(used, row, -1).int().view_as(index_TK),
        tokens_per_expert_E,
        tokens_per_expert_E.view(ep_size, -1).sum(dim=1),
    )
