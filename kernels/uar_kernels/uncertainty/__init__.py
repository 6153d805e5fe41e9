"""Energy and entropy of router logits."""

from uar_kernels.uncertainty.reference import energy_and_entropy

__all__ = ["energy_and_entropy"]
