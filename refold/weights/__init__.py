"""The weights that a compiled program was made from: noticing that they have changed."""
