"""Judges a compiled model by its numbers, against a float64 oracle of its original."""
