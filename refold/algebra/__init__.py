"""Affine maps of a tensor: pure tensor arithmetic in float64 that knows no graph."""
