"""Mechanism A: one room a direction. ``pusher`` decides, ``up`` and ``down`` plan."""
