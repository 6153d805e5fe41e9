"""Uncertainty, selection, weights and loads of a micro-batch in one pass over the logits."""

from uar_kernels.routing.op import measure_tokens, route
from uar_kernels.routing.settings import Budget, Mask, Measure, Measured, Routed, Scoring

__all__ = ["Budget", "Mask", "Measure", "Measured", "Routed", "Scoring", "measure_tokens", "route"]
