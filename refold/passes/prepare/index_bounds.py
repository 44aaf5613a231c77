"""What values a tensor made of positions takes on a block of its indices.

Attention masks compare positions: ``arange(n) < rows``, ``arange(n)[:, None] >= arange(n)``. Where
``n`` is symbolic no mask can be looked at, but between which numbers it lies on a block of rows and
columns follows from where the block begins and ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import fx

from refold.graph.evaluate import evaluate_constants
from refold.graph.nodes import arguments, is_tensor, same, shape
from refold.graph.ops import op_name

Interval = tuple[float, float]  # both ends belong to it; booleans count as 0 and 1

_UNKNOWN: Interval = (-math.inf, math.inf)
_EITHER: Interval = (0.0, 1.0)


@dataclass
class IndexBounds:
    """Bounds of the tensors of a graph; constants are looked at once."""

    constant: Set[fx.Node]
    values: dict[fx.Node, torch.Tensor] = field(default_factory=dict)

    def of(self, node: fx.Node, block: Sequence[Interval]) -> Interval:
        """The least and the largest value of a tensor on a block, or wider ones.

        Args:
            node: the tensor.
            block: the first and the last index of each axis; where that is not known, a smaller
                and a larger one.
        """
        sizes = shape(node)
        block = [(0.0, 0.0) if same(s, 1) else b for s, b in zip(sizes, block, strict=True)]
        boolean = node.meta["val"].dtype == torch.bool
        if node in self.constant:
            return self._stored(node, block)
        name = op_name(node) if node.op == "call_function" else ""
        if name == "arange":
            return _positions(node, block[0])
        if name in ("expand", "unsqueeze"):
            return self._below(node, block)
        if boolean and name in ("logical_not", "bitwise_not"):
            return _negated(self._operand(node.args[0], block))
        if len(node.args) == 2 and (name in _COMPARED or (boolean and name in _JOINED)):
            left, right = (self._operand(a, block) for a in node.args)
            if name in _COMPARED:
                return _COMPARED[name](left, right)
            pick = _JOINED[name]
            return pick(left[0], right[0]), pick(left[1], right[1])
        return _EITHER if boolean else _UNKNOWN

    def _below(self, node: fx.Node, block: Sequence[Interval]) -> Interval:
        source = node.all_input_nodes[0]
        if op_name(node) == "expand":
            return self._operand(source, block)
        axis = int(arguments(node)["dim"]) % len(block)
        return self.of(source, [*block[:axis], *block[axis + 1 :]])

    def _operand(self, value: object, block: Sequence[Interval]) -> Interval:
        """The bounds of an operand that is broadcast against a block."""
        if isinstance(value, (bool, int, float)):
            return float(value), float(value)
        if not is_tensor(value):
            return _UNKNOWN
        assert isinstance(value, fx.Node)
        return self.of(value, block[len(block) - len(shape(value)) :])

    def _stored(self, node: fx.Node, block: Sequence[Interval]) -> Interval:
        """The bounds of a constant, by looking."""
        if node not in self.values:
            self.values.update(evaluate_constants([node]))
        value = self.values[node]
        for axis, (first, last) in enumerate(block):
            stop = value.shape[axis] if math.isinf(last) else int(last) + 1
            value = value.narrow(axis, int(first), stop - int(first))
        if not value.numel() or value.is_complex():
            return _UNKNOWN
        wide = value.double()
        return float(wide.min()), float(wide.max())


def _positions(arange: fx.Node, indices: Interval) -> Interval:
    args = arguments(arange)
    start = args.get("start", 0)
    if type(start) is not int or args.get("step", 1) != 1:
        return _UNKNOWN
    return start + indices[0], start + indices[1]


def _less(a: Interval, b: Interval) -> Interval:
    if a[1] < b[0]:
        return 1.0, 1.0
    return (0.0, 0.0) if a[0] >= b[1] else _EITHER


def _equal(a: Interval, b: Interval) -> Interval:
    if a[1] < b[0] or b[1] < a[0]:
        return 0.0, 0.0
    return (1.0, 1.0) if a[0] == a[1] == b[0] == b[1] else _EITHER


def _negated(a: Interval) -> Interval:
    return 1.0 - a[1], 1.0 - a[0]


# What an operator makes of bounds on its operands.
_COMPARED = {
    "lt": _less,
    "gt": lambda a, b: _less(b, a),
    "ge": lambda a, b: _negated(_less(a, b)),
    "le": lambda a, b: _negated(_less(b, a)),
    "eq": _equal,
    "ne": lambda a, b: _negated(_equal(a, b)),
}
# The same for booleans.
_JOINED = {
    "logical_and": min, "bitwise_and": min, "__and__": min,
    "logical_or": max, "bitwise_or": max, "__or__": max,
}  # fmt: skip
