"""Sweeps: one experiment in many variants and seeds, run to the end and compared in a table."""
