"""Which tensors are finite whatever the inputs are, or NaN only together with another."""

from __future__ import annotations

import math

import torch
from torch import fx

from refold.graph import constants, nodes, ops
from refold.graph.nodes import is_tensor, same, shape
from refold.graph.ops import op_name

_LIMITS = {"clamp": ("min", "max"), "hardtanh": ("min_val", "max_val")}


def nan_follows(x: fx.Node, y: fx.Node) -> bool:
    """True if ``x`` is finite or NaN, and ``y`` is NaN wherever ``x`` is."""
    return _is_bounded(x) and _carries(x, y)


def _is_bounded(node: fx.Node) -> bool:
    """True if no element is infinite."""
    while node.op == "call_function" and is_tensor(node):
        if ops.has(node, ops.BOUNDED):
            return True
        if (limits := _LIMITS.get(op_name(node))) is not None:
            low, high = (nodes.arguments(node).get(limit) for limit in limits)
            return all(isinstance(v, (int, float)) and math.isfinite(v) for v in (low, high))
        source = _only_data(node)
        if source is None or nodes.dtype(node) == torch.float16:  # whose range is soon left
            return False
        node = source
    return False


def _carries(x: fx.Node, y: fx.Node) -> bool:
    """True if ``y`` is computed from ``x`` element by element, so that NaN stays NaN."""
    while y is not x:
        if y.op != "call_function" or not is_tensor(y):
            return False
        source = y.args[0] if ops.has(y, ops.KEEPS_NAN) else None
        source = source if source is not None else _only_data(y)
        if not isinstance(source, fx.Node) or not same(shape(source), shape(y)):
            return False
        y = source
    return True


def _only_data(node: fx.Node) -> fx.Node | None:
    """The one tensor that a call reads element by element, beside finite constants."""
    if ops.has(node, ops.FINITE | ops.ALIAS | ops.COPY):
        source = node.args[0]
        return source if isinstance(source, fx.Node) else None
    if (
        not ops.has(node, ops.ARITHMETIC)
        or len(node.args) < 2
        or nodes.arguments(node).get("rounding_mode") is not None
    ):
        return None
    left, right = node.args[:2]
    for data, other in ((left, right), (right, left)):
        if (
            is_tensor(data)
            and _is_moderate(other)
            and not (op_name(node) == "div" and data is right)
        ):
            return data  # type: ignore[return-value]
    return None


def _is_moderate(value: object) -> bool:
    """True for constants that take no bounded value near infinity or, as divisors, to it."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return 1e-6 <= abs(value) <= 1e6
    lazy = constants.compact(value)
    if lazy is None or lazy.numel() > 1 << 16:
        return False
    size = lazy.get().abs()
    return bool(((size >= 1e-6) & (size <= 1e6)).all())
