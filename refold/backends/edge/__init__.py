"""Targets of small devices, each with a converter of its own."""
