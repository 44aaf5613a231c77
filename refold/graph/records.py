"""Typed records: how passes read nodes. One reader per operator family, every spelling behind it.

A reader returns ``None`` for a node that it does not describe completely; a pass never looks at
raw arguments. Constants come as float64 lazies (:func:`refold.graph.constants.exact`).
"""

from __future__ import annotations

import math
import operator
import string
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from refold.algebra.lazy import Lazy
from refold.graph import constants
from refold.graph.kinds import op_name
from refold.graph.nodes import (
    arguments,
    aten,
    dtype,
    is_call,
    is_empty,
    is_tensor,
    same,
    shape,
)

Ints = tuple[int, ...]

_MAX_MATRIX = 1 << 24  # elements of a matrix that an einsum is written out as
_DOTS = [f".{i}" for i in range(8)]


@dataclass(frozen=True)
class Conv:
    """A convolution with constant weights.

    ``weight`` is ``[O, I / groups, *k]``, ``[I, O / groups, *k]`` where transposed. ``padding`` is
    the low side's (``same`` may add one high).
    """

    node: fx.Node
    x: fx.Node
    weight_node: fx.Node
    bias_node: fx.Node | None
    weight: Lazy
    bias: Lazy | None
    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int
    transposed: bool
    output_padding: Ints

    @property
    def spatial(self) -> int:
        return len(self.stride)

    @property
    def out_channels(self) -> int:
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]


@dataclass(frozen=True)
class Linear:
    """``x @ weight.T + bias`` over the last axis of ``x``; ``weight`` is ``[O, I]``."""

    node: fx.Node
    x: fx.Node
    weight_node: fx.Node
    weight: Lazy
    bias: Lazy | None


@dataclass(frozen=True)
class Quantised:
    """A convolution or linear whose weight is ``scales * (integers - zeros)``, stored as integers.

    ``scales`` and ``zeros`` are ``[O]``; ``axis`` is the channels' in the output, ``limits`` and
    ``dtype`` are the integers'.
    """

    node: fx.Node
    integers: fx.Node
    scales: Lazy
    zeros: torch.Tensor
    bias_node: fx.Node | None
    bias: Lazy | None
    axis: int
    limits: tuple[int, int]
    dtype: torch.dtype

    @property
    def out_channels(self) -> int:
        return self.scales.shape[0]


@dataclass(frozen=True)
class Affine:
    """``scale * x + shift`` with constants that broadcast against ``x`` (rank equal to its rank).

    ``is_norm`` tells a batch norm with running statistics from plain arithmetic; ``reader`` is the
    node that reads ``x`` (the tuple form of batch norm is two nodes).
    """

    node: fx.Node
    x: fx.Node
    scale: Lazy
    shift: Lazy
    reader: fx.Node
    is_norm: bool = False


@dataclass(frozen=True)
class NormAffine:
    """A normalisation whose affine part can absorb a scale (and, if ``shifts``, a shift).

    ``axes`` are the axes of the output that its weight spans, in order.
    """

    node: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    axes: Ints
    shifts: bool
    weight_index: int
    bias_index: int


@dataclass(frozen=True)
class Sum:
    """``left + alpha * right``, both tensors of the graph."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    alpha: float


@dataclass(frozen=True)
class Cat:
    """Tensors of one rank behind one another along ``axis``."""

    node: fx.Node
    parts: tuple[fx.Node, ...]
    axis: int


@dataclass(frozen=True)
class WeightedSum:
    """The sum of tensors of the graph times constants that broadcast against them."""

    node: fx.Node
    terms: tuple[tuple[fx.Node, Lazy], ...]


@dataclass(frozen=True)
class Comparison:
    """``x`` compared with a constant; ``operation`` is ``gt``, ``ge``, ``lt`` or ``le``.

    ``value`` has the rank of ``x`` and broadcasts against it.
    """

    node: fx.Node
    x: fx.Node
    operation: str
    value: Lazy


@dataclass(frozen=True)
class AvgPool:
    """An average pool.

    ``uniform``: every window divides by the same number, ``divisor``. ``keeps_constants``: a
    constant input comes out unchanged.
    """

    node: fx.Node
    x: fx.Node
    kernel: Ints
    stride: Ints
    padding: Ints
    uniform: bool
    divisor: int
    keeps_constants: bool


@dataclass(frozen=True)
class Pad:
    """A pad of the last axes: ``low`` and ``high`` for each, first padded axis first."""

    node: fx.Node
    x: fx.Node
    low: Ints
    high: Ints
    mode: str
    value: float


_CONVS = {
    aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3,
    aten.conv1d.padding: 1, aten.conv2d.padding: 2, aten.conv3d.padding: 3,
}  # fmt: skip
_TRANSPOSED = {
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}


def _ints(value: Any, count: int) -> Ints | None:
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(v, (fx.Node, torch.SymInt)) for v in items):
        return None
    if len(items) == 1:
        items = items * count
    return tuple(int(v) for v in items) if len(items) == count else None


def _fixed_float(node: fx.Node) -> bool:
    """True for floating tensors that are not known to be empty: layers of no width fold nothing."""
    return (
        is_tensor(node)
        and node.meta["val"].dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and not is_empty(node)
    )


def conv(node: object) -> Conv | None:
    """Reads a convolution, transposed or not, batched, with constant weight and bias."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    transposed = node.target in _TRANSPOSED
    spatial = _TRANSPOSED.get(node.target) or _CONVS.get(node.target)  # type: ignore[call-overload]
    is_general = node.target is aten.convolution.default
    if not spatial and not is_general:
        return None
    args = arguments(node)
    x, weight_node, bias_node = args["input"], args["weight"], args["bias"]
    if not is_tensor(x) or not is_tensor(weight_node) or not _fixed_float(node):
        return None
    if is_general:
        spatial, transposed = len(shape(weight_node)) - 2, bool(args["transposed"])
    assert spatial is not None
    if len(shape(x)) != spatial + 2:
        return None  # an unbatched call
    weight = constants.exact(weight_node)
    bias = constants.exact(bias_node) if bias_node is not None else None
    if weight is None or not weight.numel() or (bias_node is not None and bias is None):
        return None
    stride, dilation = _ints(args["stride"], spatial), _ints(args["dilation"], spatial)
    output_padding = _ints(args.get("output_padding", 0), spatial)
    if stride is None or dilation is None or output_padding is None:
        return None
    if not isinstance(args["groups"], int):
        return None  # as many groups as samples: the layer is another one for each batch size
    padding: Ints | None
    if isinstance(args["padding"], str):
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        padding = tuple(t // 2 for t in total) if args["padding"] == "same" else (0,) * spatial
    else:
        padding = _ints(args["padding"], spatial)
    if padding is None:
        return None
    return Conv(
        node, x, weight_node, bias_node, weight, bias, stride, padding, dilation,
        args["groups"], transposed, output_padding,
    )  # fmt: skip


def linear(node: object) -> Linear | None:
    """Reads a product with a constant matrix over the last axis, in any spelling."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or not _fixed_float(node):
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
    if len(shape(x)) != 3 or constants.compact(x) is not None or not _fixed_float(node):  # type: ignore[arg-type]
        return None
    return Linear(node, x, weight_node, weight, None)  # type: ignore[arg-type]


def quantised(node: object) -> Quantised | None:
    """Reads a convolution or linear of a constant weight that is dequantised in the graph."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or not _fixed_float(node):
        return None
    if node.target not in _CONVS and node.target is not aten.linear.default:
        return None
    layer = arguments(node)
    weight, bias_node = layer["weight"], layer["bias"]
    if not is_tensor(weight) or weight.op != "call_function" or dtype(weight) != dtype(node):
        return None
    name = weight.target._schema.name
    if not name.startswith("quantized_decomposed::dequantize_per_"):
        return None
    given = arguments(weight)
    integers, zeros = given["input"], given.get("zero_points", given.get("zero_point"))
    if not constants.is_fixed(integers):
        return None
    count = int(shape(integers)[0])
    if name.endswith("_channel") and given["axis"] == 0:
        scales = constants.exact(given["scales"])
    elif name.endswith("_tensor") and isinstance(given["scale"], float):
        step = float(given["scale"])
        scales = Lazy((count,), lambda: torch.full((count,), step, dtype=torch.float64))
    else:
        return None
    bias = constants.exact(bias_node) if bias_node is not None else None
    if scales is None or scales.shape != (count,) or (bias is None) != (bias_node is None):
        return None
    if isinstance(zeros, fx.Node) and not constants.is_fixed(zeros):
        return None
    origin = (
        constants.tensor(zeros).cpu() if isinstance(zeros, fx.Node) else torch.tensor(zeros or 0)
    )
    return Quantised(
        node, integers, scales, origin.expand(count), bias_node, bias,
        1 if node.target in _CONVS else -1,
        (int(given["quant_min"]), int(given["quant_max"])), given["dtype"],
    )  # fmt: skip


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
    if axes is None or len(data) != 1 or not _fixed_float(node):
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


def _constant(value: Any, rank: int) -> Lazy | None:
    """A constant operand, a number or a node, with its shape padded to ``rank``."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        number = float(value)
        return Lazy((1,) * rank, lambda: torch.full((1,) * rank, number, dtype=torch.float64))
    lazy = constants.compact(value)
    if lazy is None or len(lazy.shape) > rank:
        return None
    full = (1,) * (rank - len(lazy.shape)) + lazy.shape
    return lazy if full == lazy.shape else lazy.map(full, lambda t: t.reshape(full))


def _combine(a: Lazy, b: Lazy, function: Any) -> Lazy:
    return Lazy(
        tuple(torch.broadcast_shapes(a.shape, b.shape)),
        lambda: function(a.get(), b.get()),
        parents=(a, b),
    )


def affine(node: object) -> Affine | None:
    """Reads one elementwise ``scale * x + shift`` in any spelling, or an eval batch norm.

    The result must have the data operand's shape and dtype: a constant that broadcasts the data,
    or promotes its dtype, is not an affine map of it.
    """
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if op_name(node) not in _AFFINE or not _fixed_float(node):
        return None
    return batch_norm(node) or _arithmetic(node) or _pointwise_depthwise(node)


def _pointwise_depthwise(node: fx.Node) -> Affine | None:
    """A depthwise 1x1 convolution scales and shifts its channels, and nothing else."""
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    if not isinstance(weight, fx.Node) or not is_tensor(weight):
        return None
    if not all(same(size, 1) for size in shape(weight)[1:]):
        return None  # nearly every call, without reading it in full
    layer = conv(node)
    if layer is None or layer.transposed or layer.out_channels != layer.groups:
        return None
    channels = layer.groups
    if set(layer.stride) != {1} or any(layer.padding):
        return None
    full = (1, channels, *(1,) * layer.spatial)
    scale = layer.weight.map(full, lambda w: w.reshape(full))
    zero = Lazy(full, lambda: torch.zeros(full, dtype=torch.float64))
    shift = zero if layer.bias is None else layer.bias.map(full, lambda b: b.reshape(full))
    return Affine(node, layer.x, scale, shift, node)


def widening_affine(node: object) -> Affine | None:
    """Reads a ``scale * x + shift`` that turns an integer tensor into floats (``uint8 / 255``).

    It is a cast of ``x`` to the node's dtype, then the arithmetic.
    """
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if op_name(node) not in _AFFINE or not _fixed_float(node):
        return None
    if not any(is_tensor(a) and dtype(a) in _INTEGERS for a in node.all_input_nodes):
        return None
    return _arithmetic(node, widens=True)


_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_ARITHMETIC = {aten.neg, aten.mul, aten.div, aten.add, aten.sub, aten.rsub, aten.addcmul}
# What may read as one, by name: a look at it spares most calls the readers.
_AFFINE = frozenset({
    "batch_norm", "instance_norm", "getitem", "convolution",
    *(packet.__name__ for packet in _ARITHMETIC),
    *(overload._schema.name.removeprefix("aten::") for overload in (*_CONVS, *_TRANSPOSED)),
})  # fmt: skip


def _arithmetic(node: fx.Node, *, widens: bool = False) -> Affine | None:
    if getattr(node.target, "overloadpacket", None) not in _ARITHMETIC:
        return None
    rank = len(shape(node))
    one, zero = _constant(1.0, rank), _constant(0.0, rank)
    assert one is not None
    assert zero is not None

    def make(x: Any, scale: Lazy | None, shift: Lazy | None) -> Affine | None:
        if not is_tensor(x) or scale is None or shift is None:
            return None
        fits = dtype(x) in _INTEGERS if widens else dtype(x) == dtype(node)
        if not fits or not same(shape(x), shape(node)):
            return None
        return Affine(node, x, scale, shift, node)

    def split(a: Any, b: Any) -> tuple[Any, Lazy] | None:
        """(data, constant) of a commutative pair."""
        for data, other in ((a, b), (b, a)):
            if is_tensor(data) and constants.compact(data) is None:
                value = _constant(other, rank)
                if value is not None:
                    return data, value
        return None

    if is_call(node, aten.neg.default):
        return make(node.args[0], _constant(-1.0, rank), zero)
    if is_call(node, aten.mul.Tensor, aten.mul.Scalar):
        pair = split(node.args[0], node.args[1])
        return make(pair[0], pair[1], zero) if pair else None
    if is_call(node, aten.div.Tensor, aten.div.Scalar):
        divisor = _constant(node.args[1], rank)
        if divisor is None or constants.compact(node.args[0]) is not None:
            return None
        return make(node.args[0], divisor.map(divisor.shape, torch.reciprocal), zero)
    if is_call(node, aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar,
               aten.rsub.Tensor, aten.rsub.Scalar):  # fmt: skip
        args = arguments(node)
        a, b, alpha = args["self"], args["other"], args["alpha"]
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
            return None
        if is_call(node, aten.rsub):
            a, b = b, a
            coefficients = (1.0, -float(alpha))
        else:
            coefficients = (1.0, float(alpha) * (-1.0 if is_call(node, aten.sub) else 1.0))
        pair = split(a, b)
        if pair is None:
            return None
        data, value = pair
        sign_data, sign_value = coefficients if data is a else coefficients[::-1]
        return make(
            data, _constant(sign_data, rank), value.map(value.shape, lambda t: t * sign_value)
        )
    if is_call(node, aten.addcmul.default):
        args = arguments(node)
        factor = float(args["value"])
        base = _constant(args["self"], rank)
        pair = split(args["tensor1"], args["tensor2"])
        if base is not None and pair is not None:
            return make(pair[0], pair[1].map(pair[1].shape, lambda t: t * factor), base)
        left, right = _constant(args["tensor1"], rank), _constant(args["tensor2"], rank)
        if left is None or right is None or constants.compact(args["self"]) is not None:
            return None
        return make(args["self"], one, _combine(left, right, lambda p, q: p * q * factor))
    return None


def batch_norm(node: object) -> Affine | None:
    """Reads an eval batch norm (both spellings) as ``s * x + t`` over axis 1.

    The node is the one whose value is the normalised tensor (the ``getitem`` of the tuple form).
    ``s = gamma / sqrt(var + eps)``, ``t = beta - mean * s`` (Ioffe and Szegedy 2015, algorithm 1).
    """
    if not isinstance(node, fx.Node):
        return None
    inner = node
    if node.target is operator.getitem and node.args[1] == 0:
        inner = node.args[0]  # type: ignore[assignment]
        if not is_call(inner, aten._native_batch_norm_legit_no_training.default):
            return None
        if len(inner.users) != 1:
            return None
    elif is_call(node, aten.batch_norm.default):
        if arguments(node)["training"] is not False:
            return None
    elif is_call(node, aten.instance_norm.default):  # with tracked statistics it is a batch norm
        if arguments(node)["use_input_stats"] is not False:
            return None
    else:
        return None
    args = arguments(inner)
    x = args["input"]
    mean, var = constants.exact(args["running_mean"]), constants.exact(args["running_var"])
    if mean is None or var is None or not is_tensor(x) or dtype(x) != dtype(node):
        return None
    gamma, beta = (
        constants.exact(args[name]) if args[name] is not None else None
        for name in ("weight", "bias")
    )
    if (gamma is None) != (args["weight"] is None) or (beta is None) != (args["bias"] is None):
        return None
    rank, eps = len(shape(x)), float(args["eps"])
    if rank < 2:
        return None
    full = (1, mean.shape[0], *(1,) * (rank - 2))

    def scale() -> torch.Tensor:
        s = (var.get() + eps).rsqrt()
        return (s if gamma is None else s * gamma.get()).reshape(full)

    def shift() -> torch.Tensor:
        t = -mean.get().reshape(full) * scale()
        return t if beta is None else t + beta.get().reshape(full)

    return Affine(node, x, Lazy(full, scale), Lazy(full, shift), inner, is_norm=True)


def norm_affine(node: object) -> NormAffine | None:
    """Reads a layer, RMS, group or instance norm with a constant (or absent) affine part."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or not is_tensor(node):
        return None
    rank = len(shape(node))
    if is_call(node, aten.layer_norm.default):
        args, count = arguments(node), len(node.args[1])  # type: ignore[arg-type]
        axes, shifts, w, b = tuple(range(rank - count, rank)), True, 2, 3
    elif is_call(node, aten.rms_norm.default):
        args, count = arguments(node), len(node.args[1])  # type: ignore[arg-type]
        axes, shifts, w, b = tuple(range(rank - count, rank)), False, 2, -1
    elif is_call(node, aten.group_norm.default):
        args, axes, shifts, w, b = arguments(node), (1,), True, 2, 3
    elif is_call(node, aten.instance_norm.default):
        args, axes, shifts, w, b = arguments(node), (1,), True, 1, 2
    else:
        return None
    weight, bias = args["weight"], args.get("bias")
    for operand in (weight, bias):
        if operand is not None and constants.exact(operand) is None:
            return None
    return NormAffine(node, weight, bias, axes, shifts, w, b)


def add(node: object) -> Sum | None:
    """Reads a sum or difference of two tensors of the node's own shape and dtype."""
    if not isinstance(node, fx.Node) or not is_call(
        node, aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor
    ):
        return None
    args = arguments(node)
    left, right, alpha = args["self"], args["other"], args["alpha"]
    if not (is_tensor(left) and is_tensor(right) and _fixed_float(node)):
        return None
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        return None
    if is_call(node, aten.rsub.Tensor):
        left, right = right, left
    for operand in (left, right):
        if not same(shape(operand), shape(node)) or dtype(operand) != dtype(node):
            return None
    sign = 1.0 if is_call(node, aten.add.Tensor) else -1.0
    return Sum(node, left, right, sign * float(alpha))


def cat(node: object) -> Cat | None:
    """Reads a concatenation; an empty vector among tensors of any rank is skipped by PyTorch."""
    if not is_call(node, aten.cat.default):
        return None
    assert isinstance(node, fx.Node)
    args, rank = arguments(node), len(shape(node))
    parts = tuple(args["tensors"])
    if not all(is_tensor(p) and len(shape(p)) == rank for p in parts):
        return None
    return Cat(node, parts, int(args["dim"]) % rank)


def weighted_sum(node: object) -> WeightedSum | None:
    """Reads ``lerp``, ``addcmul``, and the sum or mean of a ``stack``, with constant factors."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or not _fixed_float(node):
        return None
    rank = len(shape(node))
    terms: list[tuple[Any, Lazy | None]] = []
    if is_call(node, aten.lerp.Scalar, aten.lerp.Tensor):
        args = arguments(node)
        weight = _constant(args["weight"], rank)
        if weight is not None:
            rest = weight.map(weight.shape, lambda w: 1 - w)
            terms = [(args["self"], rest), (args["end"], weight)]
    elif is_call(node, aten.addcmul.default):
        args = arguments(node)
        value = float(args["value"])
        for data, other in ((args["tensor1"], args["tensor2"]), (args["tensor2"], args["tensor1"])):
            factor = _constant(other, rank)
            if factor is not None and not terms:
                scaled = factor.map(factor.shape, lambda f: f * value)
                terms = [(args["self"], _constant(1.0, rank)), (data, scaled)]
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
    if not is_tensor(left) or not _fixed_float(left):  # type: ignore[arg-type]
        return None
    assert isinstance(left, fx.Node)
    value = _constant(right, len(shape(node)))
    if value is None or not same(shape(left), shape(node)):
        return None
    if isinstance(right, fx.Node) and dtype(right) != dtype(left):
        return None
    return Comparison(node, left, operation, value)


def _weighted_stack(value: Any, rank: int) -> tuple[Any, Lazy | None]:
    """What is summed as a ``stack`` and constant factors of it, where they are such a product."""
    if is_call(value, aten.mul.Tensor):
        for data, other in (value.args[:2], value.args[1::-1]):
            factor = _constant(other, rank)
            if not is_call(data, aten.stack.default) or factor is None:
                continue
            if same(shape(data), shape(value)) and dtype(data) == dtype(value):
                return data, factor
    return value, None


def _share(weights: Lazy | None, axis: int, index: int, share: float, rank: int) -> Lazy | None:
    """The factor of one part of a stack."""
    if weights is None:
        return _constant(share, rank)
    at = index if weights.shape[axis] > 1 else 0
    sizes = (*weights.shape[:axis], *weights.shape[axis + 1 :])
    return weights.map(sizes, lambda w: w.select(axis, at) * share)


def avg_pool(node: object) -> AvgPool | None:
    """Reads an average pool over the spatial axes of a batched tensor."""
    if not isinstance(node, fx.Node) or not is_call(
        node, aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d
    ):
        return None
    args = arguments(node)
    x = args["self"]
    if not is_tensor(x):
        return None
    spatial = {aten.avg_pool1d: 1, aten.avg_pool2d: 2, aten.avg_pool3d: 3}[
        node.target.overloadpacket  # type: ignore[union-attr]
    ]
    if len(shape(x)) != spatial + 2:
        return None
    kernel = _ints(args["kernel_size"], spatial)
    stride = _ints(args["stride"] or args["kernel_size"], spatial)
    padding = _ints(args["padding"], spatial)
    if kernel is None or stride is None or padding is None:
        return None
    override = args.get("divisor_override")
    divisor = 1
    for k in kernel:
        divisor *= k
    padded = any(padding)
    uniform = not args["ceil_mode"] and (bool(args["count_include_pad"]) or not padded)
    if override is not None:
        uniform, divisor = not args["ceil_mode"], int(override)
    keeps = override is None and (not args["count_include_pad"] or not padded)
    if args["ceil_mode"] and args["count_include_pad"] and padded:
        keeps = False
    return AvgPool(node, x, kernel, stride, padding, uniform, divisor, keeps)


def pad(node: object) -> Pad | None:
    """Reads a pad; ``mode`` is ``constant``, ``reflect``, ``replicate`` or ``circular``."""
    if not isinstance(node, fx.Node) or not is_tensor(node):
        return None
    if is_call(node, aten.pad.default):
        args = arguments(node)
        x, mode = args["self"], str(args["mode"])
        value = args["value"] if args["value"] is not None else 0.0
    elif is_call(node, aten.constant_pad_nd.default):
        args = arguments(node)
        x, mode, value = args["self"], "constant", args["value"]
    else:
        return None
    amounts = args["pad"]
    if not is_tensor(x) or not isinstance(value, (int, float)):
        return None
    if any(not isinstance(a, int) for a in amounts) or len(amounts) % 2:
        return None
    low, high = tuple(amounts[0::2])[::-1], tuple(amounts[1::2])[::-1]
    return Pad(node, x, low, high, mode, float(value))
