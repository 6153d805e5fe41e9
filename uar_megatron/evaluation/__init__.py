"""Checkpoints at work: log-likelihoods, benchmarks, perplexity, with the routing they trained."""
