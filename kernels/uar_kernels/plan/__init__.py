"""Where each chosen (token, expert) pair goes in the permuted buffer."""

from uar_kernels.plan.op import Plan, deepep_indices, minimum_bytes, moved_bytes, plan

__all__ = ["Plan", "deepep_indices", "minimum_bytes", "moved_bytes", "plan"]
