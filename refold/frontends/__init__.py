"""Frontends: whatever brings a model into the IR."""
