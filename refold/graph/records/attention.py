"""Attention as passes read it: one operator, or a softmax between two products.

    softmax(scale * q @ k^T + masks) @ v

A softmax does not change when a row gets a constant added, and its rows sum to one. What that
allows of the keys and of the values is what a record says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from refold.graph import constants, ops
from refold.graph.nodes import arguments, aten, is_call, is_tensor, only_user, same, shape
from refold.graph.ops import op_name
from refold.graph.records import products


@dataclass(frozen=True)
class KeyedOperand:
    """A tensor that a product reads, and its axis of keys."""

    node: fx.Node
    axis: int


@dataclass(frozen=True)
class Attention:
    """An attention whose rows of weights are normalised over the keys.

    Attributes:
        node: the result.
        queries: what the keys are multiplied with, where that is known.
        keys: where every row of scores may get a constant added; or why it may not.
        values: what the weights are multiplied with.
        scores: the calls from the scores to the weights, where they are written out.
        hidden: why some row of weights may not sum to one, or ``None``.
        carried: moves a tensor that is constant over the keys from the values to the result.
    """

    node: fx.Node
    queries: fx.Node | None
    keys: KeyedOperand | str
    values: KeyedOperand
    scores: tuple[fx.Node, ...]
    hidden: str | None
    carried: Callable[[torch.Tensor], torch.Tensor]


def attention(node: fx.Node) -> Attention | None:
    """Reads an attention that drops nothing, in either spelling."""
    if is_call(node, aten.scaled_dot_product_attention.default):
        return _operator(node)
    return _written_out(node)


def _operator(node: fx.Node) -> Attention | None:
    args = arguments(node)
    query, key, value, mask = (args[n] for n in ("query", "key", "value", "attn_mask"))
    rank, repeats = len(shape(node)), 1
    if args["dropout_p"] != 0 or any(len(shape(n)) != rank for n in (query, key, value)):
        return None
    if args["enable_gqa"]:
        many, few = shape(query)[-3], shape(value)[-3]
        if not isinstance(many, int) or not isinstance(few, int):
            return None
        repeats = many // few

    def carried(shift: torch.Tensor) -> torch.Tensor:
        return shift.repeat_interleave(repeats, -3) if repeats > 1 else shift

    hidden = None if mask is None else _hiding(mask)
    keys, values = KeyedOperand(key, rank - 2), KeyedOperand(value, rank - 2)
    return Attention(node, query, keys, values, (), hidden, carried)


def _written_out(node: fx.Node) -> Attention | None:
    product = _product(node)
    if product is None or product.contracted is None:
        return None
    weights = product.left
    if not is_call(weights, aten.softmax.int, aten._softmax.default):
        return None
    rank = len(shape(weights))
    if int(weights.args[1]) % rank != rank - 1:  # type: ignore[arg-type]
        return None
    keys, scores = _scores(weights)
    values = KeyedOperand(product.right, product.contracted)
    # A row of scores that are all -inf becomes NaN, with whatever is added to it.
    queries = None if isinstance(keys, str) else _product(scores[0]).left  # type: ignore[union-attr]
    return Attention(node, queries, keys, values, (*scores, weights), None, product.carried)


def _scores(weights: fx.Node) -> tuple[KeyedOperand | str, tuple[fx.Node, ...]]:
    """Walks up from a softmax to the product that makes its scores."""
    path: list[fx.Node] = []
    reader, current = weights, weights.args[0]
    while True:
        assert isinstance(current, fx.Node)
        path.insert(0, current)
        if not only_user(current, reader):
            return f"{current.name} is read by others than the softmax", tuple(path)
        product = _product(current)
        if product is not None and product.free is not None:
            return KeyedOperand(product.right, product.free), tuple(path)
        above = _above(current)
        if above is None:
            return f"{op_name(current)} stands between scores and softmax", tuple(path)
        reader, current = current, above


def _above(node: fx.Node) -> fx.Node | None:
    """What a call between scores and softmax reads, if it keeps a constant per row one."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    source = node.args[0] if node.args else None
    if is_call(node, aten.mul, aten.div):
        rounds = arguments(node).get("rounding_mode") is not None
        return None if rounds or not _is_even(node.args[1]) else source  # type: ignore[return-value]
    if is_call(node, aten.add.Tensor):
        for operand in node.args:
            full = is_tensor(operand) and same(shape(operand), shape(node))  # type: ignore[arg-type]
            if full and constants.compact(operand) is None:
                return operand  # type: ignore[return-value]
        return None
    if is_call(node, aten.masked_fill.Scalar):
        hides = arguments(node)["value"] == -math.inf
        return source if hides and same(shape(source), shape(node)) else None  # type: ignore[arg-type, return-value]
    if ops.has(node, ops.VIEW) and same(shape(node)[-1], shape(source)[-1]):  # type: ignore[arg-type]
        return source  # type: ignore[return-value]
    return None


def _is_even(factor: object) -> bool:
    """True for a constant factor that is the same for every key of a row."""
    if isinstance(factor, (int, float)):
        return math.isfinite(factor)
    exact = constants.compact(factor)
    return exact is not None and set(exact.shape[-1:]) <= {1} and bool(exact.get().isfinite().all())


def _hiding(mask: fx.Node) -> str | None:
    """Why a mask may hide every key of some row, or ``None``: a constant one is looked at."""
    if not constants.is_fixed(mask):
        return "its mask is not constant: where it hides every key of a row, the row is zero"
    value = constants.tensor(mask)
    shown = value if value.dtype == torch.bool else value.isfinite()
    return None if bool(shown.any(-1).all()) else "its mask hides every key of a row"


@dataclass(frozen=True)
class _Product:
    """A product over the last axis of ``left``.

    ``contracted`` is the axis of ``right`` that meets it (where it is the only one), ``free`` the
    one that becomes the last of the result.
    """

    left: fx.Node
    right: fx.Node
    contracted: int | None
    free: int | None
    carried: Callable[[torch.Tensor], torch.Tensor]


def _product(node: object) -> _Product | None:
    if not isinstance(node, fx.Node) or not is_tensor(node):
        return None
    if is_call(node, aten.matmul.default, aten.bmm.default):
        left, right = node.args[0], node.args[1]
        rank = len(shape(right))  # type: ignore[arg-type]
        if rank < 2 or len(shape(left)) < 2:  # type: ignore[arg-type]
            return None
        return _Product(left, right, rank - 2, rank - 1, lambda shift: shift)  # type: ignore[arg-type]
    if is_call(node, aten.einsum.default):
        return _einsum(node)
    return None


def _einsum(node: fx.Node) -> _Product | None:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    inputs, arrow, result = equation.partition("->")
    terms = inputs.split(",")
    if not arrow or "." in equation or len(terms) != 2 or len(operands) != 2:  # type: ignore[arg-type]
        return None
    if products.einsum_broadcasts(node):
        return None
    first, second = terms
    if any(len(set(term)) != len(term) for term in (first, second, result)):
        return None
    left, right = list(operands)  # type: ignore[arg-type]
    if not all((first, second, result)):  # a factor or a result without axes
        return None
    summed = (set(first) | set(second)) - set(result)
    contracted = second.index(first[-1]) if summed == {first[-1]} <= set(second) else None
    free = second.index(result[-1]) if result[-1] in set(second) - set(first) else None

    def carried(shift: torch.Tensor) -> torch.Tensor:
        sizes = dict(zip(second, shift.shape, strict=True))
        kept = [letter for letter in result if letter in sizes]
        rest = [letter for letter in second if letter not in result]
        moved = shift.permute([second.index(letter) for letter in (*rest, *kept)])
        return moved.reshape([sizes.get(letter, 1) for letter in result])

    return _Product(left, right, contracted, free, carried)  # type: ignore[arg-type]
