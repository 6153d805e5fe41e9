"""Ops of uncertainty-aware routing that depend on torch alone.

Each op is a folder whose ``reference.py`` is its readable definition in plain torch.
"""
