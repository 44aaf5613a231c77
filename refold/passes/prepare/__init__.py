"""Passes that bring a graph into a form that the families can read."""
