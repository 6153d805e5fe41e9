"""Checkpoints taken to HuggingFace's layout, and back."""
