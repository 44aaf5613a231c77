"""Scales and shifts into the layers around them."""
