"""What a padded tensor is at its border, and where maps may not be composed because of it.

Padding stands for values that the map before it would have computed: it is exact only where it has
those values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from refold.algebra.affine_map import AffineMap
from refold.graph.nodes import known, same, shape

_NO_END = 1 << 62  # slices write "to the end" as the largest integer


@dataclass
class Border:
    """A tensor that is a map inside and one constant per channel on each padded side.

    ``sides`` maps (spatial axis, 0 low / 1 high) to (width, value per channel).
    """

    base: AffineMap
    sides: dict[tuple[int, int], tuple[int, torch.Tensor]]


def border_reason(
    outer: AffineMap, inner: AffineMap, root: fx.Node, middle: fx.Node, node: fx.Node
) -> str | None:
    """Why ``outer(inner(x))`` differs from their composition at a border, or ``None``.

    Zero padding that ``outer`` reads stands for ``inner``'s value there; it is that value only if
    ``inner`` reads nothing but padding of the root there, and adds no bias.
    """
    extents, results = shape(middle)[2:], shape(node)[2:]
    low: list[int] = []
    high: list[int] = []
    for axis in range(outer.spatial):
        taps = outer.support[axis]
        low.append(max(0, outer.origin[axis] - min(taps)))
        last = outer.stride[axis] * (results[axis] - 1) + max(taps) - outer.origin[axis]
        high.append(0 if known(last < extents[axis]) else 1)
    if not any(low) and not any(high):
        return None
    if not inner.bias_is(0.0):
        return (
            f"{node.name} pads with zeros where {middle.name} would have its bias "
            f"(exact inside, wrong at the border)"
        )
    return reads_outside(outer, inner, root, middle, low, high)


def reads_outside(
    outer: AffineMap, inner: AffineMap, root: fx.Node, middle: fx.Node,
    low: Sequence[int], high: Sequence[int],
) -> str | None:  # fmt: skip
    """Why ``inner`` would read the root where ``outer`` reads padding, or ``None``."""
    extents, origins = shape(middle)[2:], shape(root)[2:]
    for axis in range(inner.spatial):
        stride, taps = inner.stride[axis], inner.support[axis]
        if low[axis] and max(taps) - inner.origin[axis] - stride >= 0:
            return f"the padding after {middle.name} hides positions that a merged kernel would see"
        first = stride * extents[axis] + min(taps) - inner.origin[axis]
        if high[axis] and not known(first >= origins[axis]):
            return f"the padding after {middle.name} hides positions that a merged kernel would see"
    return None


def covered_side(
    sides: dict[tuple[int, int], Any], axis: int, start: int, end: Any, extent: Any
) -> int | None:
    """Which padded side ``[start, end)`` covers exactly: 0 low, 1 high."""
    if (axis, 0) in sides and start == 0 and same(end, sides[(axis, 0)][0]):
        return 0
    if (axis, 1) in sides:
        width = sides[(axis, 1)][0]
        first = start if start >= 0 else extent + start
        to_the_end = isinstance(end, int) and end >= _NO_END
        if same(first, extent - width) and (to_the_end or same(end, extent)):
            return 1
    return None
