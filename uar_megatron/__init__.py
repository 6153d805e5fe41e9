"""Uncertainty-Aware Routing (UAR) for Megatron-Core: a plugin, not a fork."""

__version__ = "0.1.0"
