"""A constant scale and shift, pushed into what makes a tensor or into all that reads it.

``region`` says what is pushed and what holds for it; ``up`` and ``down``, one for each direction,
make a ``plan`` of it: the path, step by step, and what is to be written; ``pusher`` tries both and
carries a plan out as one edit. ``carry`` knows what lets a scale and shift through, ``thresholds``
what becomes of a sign or a comparison, ``weights`` writes.
"""
