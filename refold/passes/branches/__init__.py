"""Branches and sequences into one layer."""
