"""Targets that PyTorch itself runs."""
