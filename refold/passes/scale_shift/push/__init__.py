"""Pushing a scale and shift: ``up`` and ``down`` plan a direction each, ``pusher`` decides."""
