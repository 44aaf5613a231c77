"""The sketches that networks are drawn from: one idea each, with sizes of its own.

Each takes the network as it grows and a value, adds calls, and returns the last result. One that
does not fit raises :class:`refold.fuzz.draw.Unfit`, and what it added is taken back.
"""

from __future__ import annotations

from refold.fuzz.draw import EFFECTS, SKETCHES
from refold.fuzz.sketches import blocks, effects, layers, layouts

__all__ = ["EFFECTS", "SKETCHES", "blocks", "effects", "layers", "layouts"]
