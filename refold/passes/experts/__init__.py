"""Experts that are equal, or that the user asks to average, into one."""
