"""Benchmarks: side by side in one process, medians of ratios, never a gate."""
