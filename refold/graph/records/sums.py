"""Sums of tensors, weighted or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from refold.algebra.lazy import Lazy
from refold.graph import constants
from refold.graph.nodes import arguments, aten, dtype, is_call, is_tensor, same, shape
from refold.graph.records.common import constant, fixed_float


@dataclass(frozen=True)
class Addition:
    """``left + alpha * right``, both tensors of the graph."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    alpha: float


@dataclass(frozen=True)
class WeightedSum:
    """The sum of tensors of the graph times constants that broadcast against them."""

    node: fx.Node
    terms: tuple[tuple[fx.Node, Lazy], ...]


def add(node: object) -> Addition | None:
    """Reads a sum or difference of two tensors of the node's own shape and dtype."""
    if not isinstance(node, fx.Node) or not is_call(
        node, aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor
    ):
        return None
    args = arguments(node)
    left, right, alpha = args["self"], args["other"], args["alpha"]
    if not (is_tensor(left) and is_tensor(right) and fixed_float(node)):
        return None
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        return None
    if is_call(node, aten.rsub.Tensor):
        left, right = right, left
    for operand in (left, right):
        if not same(shape(operand), shape(node)) or dtype(operand) != dtype(node):
            return None
    sign = 1.0 if is_call(node, aten.add.Tensor) else -1.0
    return Addition(node, left, right, sign * float(alpha))


def weighted_sum(node: object) -> WeightedSum | None:
    """Reads ``lerp``, ``addcmul``, and the sum or mean of a ``stack``, with constant factors."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or not fixed_float(node):
        return None
    rank = len(shape(node))
    terms: list[tuple[Any, Lazy | None]] = []
    if is_call(node, aten.lerp.Scalar, aten.lerp.Tensor):
        args = arguments(node)
        weight = constant(args["weight"], rank)
        if weight is not None:
            rest = weight.map(weight.shape, lambda w: 1 - w)
            terms = [(args["self"], rest), (args["end"], weight)]
    elif is_call(node, aten.addcmul.default):
        args = arguments(node)
        value = float(args["value"])
        for data, other in ((args["tensor1"], args["tensor2"]), (args["tensor2"], args["tensor1"])):
            factor = constant(other, rank)
            if factor is not None and not terms:
                scaled = factor.map(factor.shape, lambda f: f * value)
                terms = [(args["self"], constant(1.0, rank)), (data, scaled)]
    elif is_call(node, aten.sum.dim_IntList, aten.mean.dim):
        stacked = node.args[0]
        args = arguments(node)
        stacked, weights = _weighted_stack(stacked, rank + 1)
        if is_call(stacked, aten.stack.default) and args["dtype"] is None and not args["keepdim"]:
            assert isinstance(stacked, fx.Node)
            inner = arguments(stacked)
            axis = int(inner["dim"]) % (rank + 1)
            if [int(d) % (rank + 1) for d in args["dim"] or ()] == [axis]:
                parts = inner["tensors"]
                share = 1 / len(parts) if is_call(node, aten.mean.dim) else 1.0
                terms = [
                    (part, _share(weights, axis, i, share, rank)) for i, part in enumerate(parts)
                ]
    read = []
    for x, factor in terms:
        if not is_tensor(x) or factor is None or constants.compact(x) is not None:
            return None
        if not same(shape(x), shape(node)) or dtype(x) != dtype(node):
            return None
        read.append((x, factor))
    return WeightedSum(node, tuple(read)) if read else None


def _weighted_stack(value: Any, rank: int) -> tuple[Any, Lazy | None]:
    """What is summed as a ``stack`` and constant factors of it, where they are such a product."""
    if is_call(value, aten.mul.Tensor):
        for data, other in (value.args[:2], value.args[1::-1]):
            factor = constant(other, rank)
            if not is_call(data, aten.stack.default) or factor is None:
                continue
            if same(shape(data), shape(value)) and dtype(data) == dtype(value):
                return data, factor
    return value, None


def _share(weights: Lazy | None, axis: int, index: int, share: float, rank: int) -> Lazy | None:
    """The factor of one part of a stack."""
    if weights is None:
        return constant(share, rank)
    at = index if weights.shape[axis] > 1 else 0
    sizes = (*weights.shape[:axis], *weights.shape[axis + 1 :])
    return weights.map(sizes, lambda w: w.select(axis, at) * share)
