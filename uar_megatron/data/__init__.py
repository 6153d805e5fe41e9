"""From text to Megatron ``.bin/.idx``: readers, tokenizers, the builder, the start-up check."""
