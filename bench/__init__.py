"""Benchmarks: paired comparisons with peers; results are JSON with versions."""
