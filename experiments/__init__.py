"""Comparisons, benchmarks and curves: what one runs but need not read."""
