"""Products with a constant matrix, in any spelling."""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from refold.algebra.lazy import Lazy
from refold.graph import constants
from refold.graph.nodes import arguments, aten, dtype, is_call, is_tensor, same, shape
from refold.graph.records.common import fixed_float

_MAX_MATRIX = 1 << 24  # elements of a matrix that an einsum is written out as


_DOTS = [f".{i}" for i in range(8)]


@dataclass(frozen=True)
class Linear:
    """``x @ weight.T + bias`` over the last axis of ``x``; ``weight`` is ``[O, I]``."""

    node: fx.Node
    x: fx.Node
    weight_node: fx.Node
    weight: Lazy
    bias: Lazy | None


def linear(node: object) -> Linear | None:
    """Reads a product with a constant matrix over the last axis, in any spelling."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or not fixed_float(node):
        return None
    bias_node: Any = None
    if node.target is aten.linear.default:
        args = arguments(node)
        x, weight_node, bias_node = args["input"], args["weight"], args["bias"]
        transpose = False
    elif node.target is aten.addmm.default:
        args = arguments(node)
        if args["beta"] != 1 or args["alpha"] != 1:
            return None
        x, weight_node, bias_node, transpose = args["mat1"], args["mat2"], args["self"], True
    elif node.target in (aten.mm.default, aten.matmul.default):
        x, weight_node, transpose = node.args[0], node.args[1], True
    elif node.target is aten.einsum.default:
        product = _einsum_product(node)
        if product is None:
            return None
        x, weight_node, transpose = product
    else:
        return None
    if not is_tensor(x) or not is_tensor(weight_node) or len(shape(weight_node)) != 2:  # type: ignore[arg-type]
        return None
    if len(shape(x)) < 2 or dtype(x) != dtype(node):  # type: ignore[arg-type]
        return None
    weight = constants.exact(weight_node)
    if weight is None or not weight.numel() or constants.compact(x) is not None:
        return None
    if transpose:
        weight = weight.map((weight.shape[1], weight.shape[0]), lambda w: w.t())
    if not same(shape(x)[-1], weight.shape[1]):  # type: ignore[arg-type]
        return None  # an einsum broadcasts an axis of size 1
    bias = None
    if bias_node is not None:
        bias = constants.exact(bias_node)
        if bias is None or bias.shape not in ((weight.shape[0],), (1, weight.shape[0])):
            return None
        bias = bias.map((weight.shape[0],), lambda b: b.reshape(-1))
    return Linear(node, x, weight_node, weight, bias)  # type: ignore[arg-type]


def left_product(node: object) -> Linear | None:
    """Reads ``weight @ x`` with a constant matrix: a linear over the middle axis of three."""
    if not is_call(node, aten.matmul.default):
        return None
    assert isinstance(node, fx.Node)
    weight_node, x = node.args
    weight = constants.exact(weight_node)
    if weight is None or len(weight.shape) != 2 or not weight.numel() or not is_tensor(x):
        return None
    if len(shape(x)) != 3 or constants.compact(x) is not None or not fixed_float(node):  # type: ignore[arg-type]
        return None
    return Linear(node, x, weight_node, weight, None)  # type: ignore[arg-type]


def trailing_product(node: object) -> Linear | None:
    """Reads an einsum of one tensor with constants as a matrix over the last axes of both.

    The axes that come first in the tensor and in the result, and in no constant, are rows:
    ``btgi,gio->btgo`` is a block-diagonal matrix, ``btd,edh->bteh`` a stack of matrices.
    """
    if not is_call(node, aten.einsum.default):
        return None
    assert isinstance(node, fx.Node)
    operands: Any = node.args[1]
    axes, factors = einsum_axes(node), [constants.exact(x) for x in operands]
    data = [i for i, f in enumerate(factors) if f is None]
    if axes is None or len(data) != 1 or not fixed_float(node):
        return None
    terms, result = axes
    x, term = operands[data[0]], terms[data[0]]
    fixed = {i: f for i, f in enumerate(factors) if f is not None}
    mixed = {a for i in fixed for a in terms[i]}
    rows = 0
    while rows < min(len(term), len(result)) and term[rows] == result[rows] not in mixed:
        rows += 1
    tail, out = term[rows:], result[rows:]
    sizes: dict[str, Any] = dict(zip(tail, shape(x)[rows:], strict=True))
    for i, f in fixed.items():
        for axis, size in zip(terms[i], f.shape, strict=True):
            if not same(sizes.setdefault(axis, size), size):
                return None  # an axis of one broadcasts
    if dtype(x) != dtype(node) or rows == 0:
        return None
    if any(len(a) != 1 or not isinstance(sizes.get(a), int) for a in (*tail, *out)):
        return None
    inputs, outputs = (math.prod(sizes[a] for a in part) for part in (tail, out))
    probe = next(c for c in string.ascii_letters if c not in {*sizes, *term, *result})
    equation = ",".join("".join(t) for t in ([probe, *tail], *(terms[i] for i in fixed)))

    def compute() -> torch.Tensor:
        eye = torch.eye(inputs, dtype=torch.float64).reshape(-1, *(sizes[a] for a in tail))
        columns = torch.einsum(
            f"{equation}->{probe}{''.join(out)}", eye, *(f.get() for f in fixed.values())
        )
        return columns.reshape(inputs, outputs).t().contiguous()

    if not 0 < inputs * outputs <= _MAX_MATRIX:
        return None
    return Linear(node, x, node, Lazy((outputs, inputs), compute), None)


def _einsum_product(node: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
    """``...i,oi->...o`` and ``...i,io->...o``: data, matrix, whether the matrix is ``[I, O]``."""
    equation = str(node.args[0]).replace(" ", "")
    operands: Any = node.args[1]
    inputs, arrow, result = equation.partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2 or len(operands) != 2:  # type: ignore[arg-type]
        return None
    left, right = terms
    x, w = operands
    if constants.compact(x) is not None:
        left, right, x, w = right, left, w, x  # type: ignore[has-type]
    if len(right) != 2 or len(set(right)) != 2 or "." in right or not left or not result:
        return None
    inner = left[-1]
    if inner not in right or (len(set(left)) != len(left) and "." not in left):
        return None
    outer = right.replace(inner, "")
    if outer in left or result != left[:-1] + outer:
        return None
    return x, w, right == inner + outer  # type: ignore[return-value]


def einsum_broadcasts(node: fx.Node) -> bool:
    """True unless each letter of an einsum provably names axes of one size."""
    axes, operands = einsum_axes(node, repeated=True), node.args[1]
    if axes is None:
        return True
    sizes: dict[str, Any] = {}
    pairs = zip(axes[0], operands, strict=True)  # type: ignore[arg-type]
    return not all(
        same(sizes.setdefault(letter, size), size)
        for term, x in pairs
        for letter, size in zip(term, shape(x), strict=True)
    )


def einsum_axes(
    node: fx.Node, *, repeated: bool = False
) -> tuple[list[list[str]], list[str]] | None:
    """The letter of every axis of each operand and of the result; ``.7`` is the last of ``...``.

    Args:
        node: the einsum.
        repeated: read terms that name two axes alike, too (a diagonal).
    """
    inputs, arrow, result = str(node.args[0]).replace(" ", "").partition("->")
    operands: Any = node.args[1]
    terms: list[list[str]] = []
    spread = 0
    for term, x in zip(inputs.split(","), operands, strict=True):
        before, dots, after = term.partition("...")
        count = len(shape(x)) - len(before) - len(after)
        if count < 0 or not arrow or (count and not dots):
            return None
        terms.append([*before, *_DOTS[len(_DOTS) - count :], *after])
        spread = max(spread, count)
    before, dots, after = result.partition("...")
    out = [*before, *(_DOTS[len(_DOTS) - spread :] if dots else ()), *after]
    if not repeated and any(len(set(t)) != len(t) for t in (*terms, out)):
        return None
    return terms, out
