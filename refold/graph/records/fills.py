"""Tensors of one number, whatever their sizes: ``zeros``, ``ones_like``, ``new_full`` and so on."""

from __future__ import annotations

from torch import fx

from refold.graph.nodes import arguments
from refold.graph.ops import op_name

# The number, or ``None`` where an argument says which.
_FILLS: dict[str, int | None] = {
    "zeros": 0, "ones": 1, "full": None, "new_zeros": 0, "new_ones": 1, "new_full": None,
    "zeros_like": 0, "ones_like": 1, "full_like": None,
}  # fmt: skip


def filled(node: object) -> int | float | None:
    """The number that a call fills its result with, if it is such a call and says a fixed one."""
    if not isinstance(node, fx.Node) or op_name(node) not in _FILLS:
        return None
    number = _FILLS[op_name(node)]
    if number is None:
        number = arguments(node).get("fill_value")
    return number if isinstance(number, (int, float)) else None
