"""Operators of refold's own: what no ATen operator says."""
