"""Batch norms into the layers around them."""
