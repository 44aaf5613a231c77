"""Random networks, and judges of what becomes of them."""
