"""Uncertainty, selection, weights and loads of a micro-batch in one pass over the logits."""

from uar_kernels.routing.op import MOST_EXPERTS, measure_tokens, route
from uar_kernels.routing.settings import Budget, Mask, Measure, Measured, Routed, Scoring

__all__ = [
    "MOST_EXPERTS",
    "Budget",
    "Mask",
    "Measure",
    "Measured",
    "Routed",
    "Scoring",
    "measure_tokens",
    "route",
]
