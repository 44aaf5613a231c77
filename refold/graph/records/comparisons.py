"""Comparisons with a constant."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from refold.algebra.lazy import Lazy
from refold.graph import constants
from refold.graph.nodes import aten, dtype, is_call, is_tensor, same, shape
from refold.graph.records.common import constant, fixed_float


@dataclass(frozen=True)
class Comparison:
    """``x`` compared with a constant; ``operation`` is ``gt``, ``ge``, ``lt`` or ``le``.

    ``value`` has the rank of ``x`` and broadcasts against it.
    """

    node: fx.Node
    x: fx.Node
    operation: str
    value: Lazy


MIRRORED = {"gt": "lt", "lt": "gt", "ge": "le", "le": "ge"}  # with the sides exchanged


def comparison(node: object) -> Comparison | None:
    """Reads a comparison of a floating tensor with a constant of its dtype, on either side."""
    if not is_call(node, aten.gt, aten.ge, aten.lt, aten.le):
        return None
    assert isinstance(node, fx.Node)
    left, right = node.args
    operation = node.target._schema.name.split("::")[-1]  # type: ignore[union-attr]
    if constants.compact(left) is not None:
        left, right, operation = right, left, MIRRORED[operation]
    if not is_tensor(left) or not fixed_float(left):  # type: ignore[arg-type]
        return None
    assert isinstance(left, fx.Node)
    value = constant(right, len(shape(node)))
    if value is None or not same(shape(left), shape(node)):
        return None
    if isinstance(right, fx.Node) and dtype(right) != dtype(left):
        return None
    return Comparison(node, left, operation, value)
