"""Identities of numbers that :mod:`clean-up <refold.passes.prepare.clean_up>` applies.

Each holds bit for bit; of ``-0.0`` and ``0.0`` a bound keeps either:

    x ** 1 = x                              where(True, x, y) = where(False, y, x) = x
    x & True = x | False = x                where(~c, x, y) = where(c, y, x)
    floor(round(x)) = round(x), for any two roundings
    x + zeros_like(y) = x + 0, likewise ``ones``, ``full`` ... and ``-``, ``*``, ``/``
    clamp(clamp(x, a, b), c, d) = clamp(x, clamp(a, c, d), clamp(b, c, d)), relu is a clamp
    x + -y = x - y, x - -y = x + y          resize(x) to its own size = x

A resize to its own size spreads NaN and infinity to neighbours, which it multiplies by zero; what
comes in passes here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from refold.graph import constants, nodes, ops
from refold.graph.records import fills
from refold.rewrite.build import Builder
from refold.rewrite.pattern import Call, Match, Var
from refold.rewrite.rule import RewriteRule

aten = torch.ops.aten

x, y = Var("x"), Var("y")
Range = tuple[float, float]

# Arithmetic that takes a number for its second operand.
_ARITHMETIC = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor)
# Bounds by numbers; ``maximum`` and ``minimum`` beside a constant of one element.
_CLAMPS = (
    aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default,
    aten.clamp_min.default, aten.clamp_max.default, aten.maximum.default, aten.minimum.default,
)  # fmt: skip
_FULL: Range = (-math.inf, math.inf)


def is_flag(node: Any) -> bool:
    """True for a call of truth values."""
    return nodes.is_tensor(node) and nodes.dtype(node) == torch.bool


def keeps_size(node: Any) -> bool:
    """True for a resize that leaves every size and moves nothing."""
    args = nodes.arguments(node)
    source: Any = args.get("self", args.get("input"))
    if not nodes.is_tensor(source) or not nodes.dtype(node).is_floating_point:
        return False
    scales = [v for name, v in args.items() if name.startswith("scale") and v is not None]
    flat = [s for v in scales for s in (v if isinstance(v, (list, tuple)) else (v,))]
    return all(s == 1 for s in flat) and nodes.same(nodes.shape(source), nodes.shape(node))


class SwapWhere(RewriteRule):
    """``where(~c, x, y)`` is ``where(c, y, x)``."""

    name = "clean-up/negated-condition"
    pattern = Call(
        aten.where.self,
        Call((aten.bitwise_not, aten.logical_not), Var("c").where(is_flag)), x, y,
    )  # fmt: skip

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        return build(aten.where.self, match["c"], match["y"], match["x"])


class SubtractNegative(RewriteRule):
    """``x + -y`` is ``x - y``, and ``x - -y`` is ``x + y``.

    Only where nothing follows that would fold the sign into a layer.
    """

    name = "clean-up/subtract"
    pattern = Call((aten.add.Tensor, aten.sub.Tensor), x, Call(aten.neg, y))

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        added = ops.op_name(match.root) == "add"
        return build(aten.sub.Tensor if added else aten.add.Tensor, match["x"], match["y"])


class ReadFilled(RewriteRule):
    """A tensor of one number beside a tensor of the result's shape is that number.

    So the call does not keep alive what only gave the shape.
    """

    name = "clean-up/filled"
    pattern = Call(_ARITHMETIC, ...).where(lambda node: _filled(node) is not None)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        found = _filled(match.root)
        assert found is not None
        other, number = found
        target: Any = match.root.target
        return nodes.call(
            build.graph, target, (other, number), dict(match.root.kwargs),
            rule=build.rule, sources=build.sources, like=match.root,
        )  # fmt: skip


def _filled(node: fx.Node) -> tuple[fx.Node, float] | None:
    """The other operand and the number of a filled one."""
    left, right = node.args[:2]
    found = _number(right)
    if found is None and ops.has(node, ops.COMMUTATIVE) and not node.kwargs:
        left, right = right, left
        found = _number(right)
    if found is None or not nodes.is_tensor(left) or not nodes.is_tensor(right):
        return None
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    types = {nodes.dtype(left), nodes.dtype(right), nodes.dtype(node)}
    before, after = left.meta["val"], node.meta["val"]
    if len(types) > 1 or not nodes.dtype(node).is_floating_point:
        return None
    if before.device != right.meta["val"].device or not nodes.same(before.shape, after.shape):
        return None
    return (left, found) if nodes.same(before.stride(), after.stride()) else None


def _number(node: Any) -> float | None:
    """The number that a call fills its result with, as the result's dtype holds it."""
    number = fills.filled(node)
    if number is None or type(number) is bool or not nodes.dtype(node).is_floating_point:
        return None
    if any(constants.is_mutation(u) or u.target not in _ARITHMETIC for u in node.users):
        return None
    return float(torch.full((), number, dtype=nodes.dtype(node)))  # type: ignore[arg-type]


class MergeClamps(RewriteRule):
    """A bound of what is bounded is one bound."""

    name = "clean-up/clamps"
    pattern = Call(_CLAMPS, ...).where(lambda node: _clamps(node) is not None)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        found = _clamps(match.root)
        assert found is not None
        inner, (low, high) = found
        if (low, high) == _range(inner):
            return inner
        source = _bounded(inner)
        if (low, high) == (0.0, math.inf):
            return build(aten.relu.default, source)
        if (low, high) == (0.0, 6.0):
            return build(aten.relu6.default, source)
        low_, high_ = (None if math.isinf(b) else b for b in (low, high))
        return build(aten.clamp.default, source, low_, high_)


def _clamps(node: fx.Node) -> tuple[fx.Node, Range] | None:
    """The inner of two bounds, and what both are together."""
    outer = _range(node)
    inner: Any = _bounded(node)
    if outer is None or not isinstance(inner, fx.Node) or inner.target not in _CLAMPS:
        return None
    first = _range(inner)
    if first is None or first == _FULL:
        return None
    low, high = (min(max(bound, outer[0]), outer[1]) for bound in first)
    if (low, high) == first:
        return inner, first
    if (low, high) == _FULL or len(inner.users) > 1 or nodes.pinned(inner):
        return None
    return inner, (low, high)


def _range(node: fx.Node) -> Range | None:
    """The lowest and the highest value that a call lets pass, all others as they are."""
    source: Any = _bounded(node)
    if source is None or not nodes.dtype(node).is_floating_point:
        return None
    if nodes.dtype(source) != nodes.dtype(node):
        return None
    if not nodes.same(nodes.shape(source), nodes.shape(node)):
        return None
    name, args = ops.op_name(node), nodes.arguments(node)
    if name in ("relu", "relu6"):
        return (0.0, 6.0 if name == "relu6" else math.inf)
    if name in ("maximum", "minimum"):
        bound = next((_single(a) for a in node.args if a is not source), None)
        args = {"min" if name == "maximum" else "max": bound}
        if bound is None:
            return None
    low = args.get("min", args.get("min_val"))
    high = args.get("max", args.get("max_val"))
    if any(b is not None and type(b) not in (int, float) for b in (low, high)):
        return None
    found = (-math.inf if low is None else float(low), math.inf if high is None else float(high))
    return found if found[0] <= found[1] else None  # NaN is no bound, either


def _bounded(node: fx.Node) -> fx.Node | None:
    """What a call bounds: of ``maximum`` and ``minimum``, the operand beside a constant."""
    if ops.op_name(node) not in ("maximum", "minimum"):
        source = node.args[0]
        return source if nodes.is_tensor(source) else None  # type: ignore[return-value]
    left, right = node.args[:2]
    for source, bound in ((left, right), (right, left)):
        if _single(bound) is not None and nodes.is_tensor(source):
            return source  # type: ignore[return-value]
    return None


def _single(node: Any) -> float | None:
    """The number of a constant that holds one."""
    if not constants.is_fixed(node) or nodes.dtype(node).is_complex:
        return None
    data = constants.tensor(node)
    if isinstance(data, FakeTensor) or data.is_meta or data.numel() != 1:
        return None
    return float(data)


def rules(*, strides_matter: bool, last: bool) -> tuple[RewriteRule, ...]:
    """The rules of this module.

    Args:
        strides_matter: something in the graph reads strides.
        last: nothing follows that folds into layers.
    """
    found: list[RewriteRule] = [SwapWhere(), MergeClamps()]
    if last:
        found.append(SubtractNegative())
    if not strides_matter:
        found.append(ReadFilled())
    return tuple(found)
