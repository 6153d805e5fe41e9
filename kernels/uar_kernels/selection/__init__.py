"""Selection of a different number of experts for each token."""

from uar_kernels.selection.reference import select_experts

__all__ = ["select_experts"]
