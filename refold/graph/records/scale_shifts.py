"""Scales and shifts of a tensor: arithmetic, batch norms, and what other norms end with."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from refold.algebra.lazy import Lazy
from refold.graph import constants
from refold.graph.nodes import arguments, aten, dtype, is_call, is_tensor, same, shape
from refold.graph.ops import op_name
from refold.graph.records.common import Ints, constant, fixed_float
from refold.graph.records.convolutions import CONVS, TRANSPOSED, conv


@dataclass(frozen=True)
class Affine:
    """``scale * x + shift`` with constants that broadcast against ``x`` (rank equal to its rank).

    ``is_norm`` tells a batch norm with running statistics from plain arithmetic; ``reader`` is the
    node that reads ``x`` (the tuple form of batch norm is two nodes). ``ends`` is another norm that
    ends with it, and computes something else before.
    """

    node: fx.Node
    x: fx.Node
    scale: Lazy
    shift: Lazy
    reader: fx.Node
    is_norm: bool = False
    ends: NormAffine | None = None


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


def end_of_norm(node: object) -> Affine | None:
    """The affine part of a layer, RMS, group or instance norm as a scale-shift of the rest."""
    norm = norm_affine(node)
    if norm is None or not fixed_float(norm.node):
        return None
    u, x = norm.node, norm.node.args[0]
    held = [part for part in (norm.weight, norm.bias) if part is not None]
    if not held or not isinstance(x, fx.Node) or any(dtype(p) != dtype(u) for p in (x, *held)):
        return None
    sizes = shape(u)
    if any(not isinstance(sizes[a], int) for a in norm.axes):
        return None
    full = tuple(int(s) if a in norm.axes else 1 for a, s in enumerate(sizes))

    def part(operand: fx.Node | None, neutral: float) -> Lazy:
        value = None if operand is None else constants.exact(operand)
        if value is None:
            one = (1,) * len(full)
            return Lazy(one, lambda: torch.full(one, neutral, dtype=torch.float64))
        return value.map(full, lambda t: t.reshape(full))

    return Affine(u, x, part(norm.weight, 1.0), part(norm.bias, 0.0), u, ends=norm)


_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


_ARITHMETIC = {aten.neg, aten.mul, aten.div, aten.add, aten.sub, aten.rsub, aten.addcmul}


# What may read as one, by name: a look at it spares most calls the readers.
_AFFINE = frozenset({
    "batch_norm", "instance_norm", "getitem", "convolution",
    *(packet.__name__ for packet in _ARITHMETIC),
    *(overload._schema.name.removeprefix("aten::") for overload in (*CONVS, *TRANSPOSED)),
})  # fmt: skip


def affine(node: object) -> Affine | None:
    """Reads one elementwise ``scale * x + shift`` in any spelling, or an eval batch norm.

    The result must have the data operand's shape and dtype: a constant that broadcasts the data,
    or promotes its dtype, is not an affine map of it.
    """
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if op_name(node) not in _AFFINE or not fixed_float(node):
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
    if op_name(node) not in _AFFINE or not fixed_float(node):
        return None
    if not any(is_tensor(a) and dtype(a) in _INTEGERS for a in node.all_input_nodes):
        return None
    return _arithmetic(node, widens=True)


def _arithmetic(node: fx.Node, *, widens: bool = False) -> Affine | None:
    if getattr(node.target, "overloadpacket", None) not in _ARITHMETIC:
        return None
    rank = len(shape(node))
    one, zero = constant(1.0, rank), constant(0.0, rank)
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
                value = constant(other, rank)
                if value is not None:
                    return data, value
        return None

    if is_call(node, aten.neg.default):
        return make(node.args[0], constant(-1.0, rank), zero)
    if is_call(node, aten.mul.Tensor, aten.mul.Scalar):
        pair = split(node.args[0], node.args[1])
        return make(pair[0], pair[1], zero) if pair else None
    if is_call(node, aten.div.Tensor, aten.div.Scalar):
        divisor = constant(node.args[1], rank)
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
            data, constant(sign_data, rank), value.map(value.shape, lambda t: t * sign_value)
        )
    if is_call(node, aten.addcmul.default):
        args = arguments(node)
        factor = float(args["value"])
        base = constant(args["self"], rank)
        pair = split(args["tensor1"], args["tensor2"])
        if base is not None and pair is not None:
            return make(pair[0], pair[1].map(pair[1].shape, lambda t: t * factor), base)
        left, right = constant(args["tensor1"], rank), constant(args["tensor2"], rank)
        if left is None or right is None or constants.compact(args["self"]) is not None:
            return None
        return make(args["self"], one, _combine(left, right, lambda p, q: p * q * factor))
    return None


def _combine(a: Lazy, b: Lazy, function: Any) -> Lazy:
    return Lazy(
        tuple(torch.broadcast_shapes(a.shape, b.shape)),
        lambda: function(a.get(), b.get()),
        parents=(a, b),
    )


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
