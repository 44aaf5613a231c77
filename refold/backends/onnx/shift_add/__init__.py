"""Lowers ``refold::bcq_linear``: to block-quantised integers, to a function, or to floats."""
