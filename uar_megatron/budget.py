"""How many experts a token gets (Eq. 5: Adaptive Expansion)."""

import torch

from uar_megatron.config import BudgetConfig

ROUNDING = {"floor": torch.floor, "nearest": torch.round, "ceil": torch.ceil}


def expert_budget(zscore_T: torch.Tensor, budget: BudgetConfig) -> torch.Tensor:
    """Return k = clamp(round(α·ẑ + β), K_min, K_max), int64 ``[tokens]`` (Eq. 5).

    Args:
        zscore_T: normalised uncertainty ẑ, finite.
        budget: α, β, bounds and rounding; ``floor`` is what the paper prints.
    """
    exact_T = ROUNDING[budget.rounding](budget.alpha * zscore_T + budget.beta)
    return exact_T.clamp(budget.k_min, budget.k_max).long()
