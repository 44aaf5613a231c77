"""Tests of refold; a package, so that the benchmarks can share its models."""
