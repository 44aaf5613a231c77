"""What a node costs, in microseconds, from measured rates: operations, bytes moved, launches.

A rewrite that is exact is still not wanted where it is slower (a depthwise convolution followed by
a pointwise one is one dense convolution at nine times the operations). The rates are measured by
``tools/measure_costs.py``; nothing here is guessed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx

from refold.graph.kinds import LAYOUT, kind, op_name
from refold.graph.nodes import hints
from refold.graph.records import convolutions, products, windows

_LANES = 16  # floats in a vector of the kernels that the table was measured on
_FEW = 4  # up to so many input channels kernels for images do not pad them


@dataclass(frozen=True)
class CostTable:
    """Measured rates of one machine: GFLOP/s per family, GB/s, microseconds per launch.

    ``resize`` is in GB/s too: interpolation computes more than it moves.
    """

    conv_1x1: float
    conv_kxk: float
    conv_grouped: float
    conv_depthwise: float
    linear: float
    bytes: float
    resize: float
    launch: float

    @staticmethod
    @cache
    def load() -> CostTable:
        data = json.loads(Path(__file__).with_name("cost_table.json").read_text())
        return CostTable(**{f.name: float(data["rates"][f.name]) for f in fields(CostTable)})


@dataclass(frozen=True)
class LayerCosts:
    """What calls of linears cost on one backend, in microseconds.

    Attributes:
        call: of a layer, beside its product.
        bias: of adding its bias.
        part: of a layer's result that is cut out of a larger one, beside copying it.
    """

    call: float
    bias: float
    part: float


@cache
def layer_costs(backend: str) -> LayerCosts | None:
    """The measured costs of calls on a backend; ``None`` where nobody measured, or it loses."""
    data = json.loads(Path(__file__).with_name("cost_table.json").read_text())
    found = data["layers"].get(backend)
    return None if found is None else LayerCosts(**found)


def convolution(
    out_shape: Sequence[int], in_shape: Sequence[int], per_group: int, groups: int,
    taps: Sequence[int], width: int,
) -> float:  # fmt: skip
    """Microseconds of a convolution; shapes are ``[N, C, *spatial]`` at the trace's sizes."""
    table = CostTable.load()
    window = math.prod(taps)
    positions = math.prod(out_shape) // max(out_shape[1], 1)
    channels, inner = _in_lanes(out_shape[1]), per_group
    if per_group == 1 and groups > 1:
        rate = table.conv_depthwise
    elif groups > 1:
        rate, channels = table.conv_grouped, out_shape[1]
    else:
        rate = table.conv_1x1 if window == 1 else table.conv_kxk
        inner = _in_lanes(per_group) if per_group > _FEW else per_group
    flops = 2.0 * positions * channels * inner * window
    moved = (math.prod(out_shape) + math.prod(in_shape)) * width
    return _time(flops, rate, moved + out_shape[1] * per_group * window * width)


def _in_lanes(channels: int) -> int:
    """Channels as blocked kernels compute them: six take as long as sixteen."""
    return -(-channels // _LANES) * _LANES


def matrix(rows: int, out_features: int, in_features: int, width: int) -> float:
    """Microseconds of ``[rows, in] @ [in, out]``."""
    flops = 2.0 * rows * out_features * in_features
    moved = (rows * (out_features + in_features) + out_features * in_features) * width
    return _time(flops, CostTable.load().linear, moved)


def elementwise(shape: Sequence[int], operands: int, width: int, constant: int = 0) -> float:
    """Microseconds of an operation that reads ``operands`` tensors of ``shape`` and writes one.

    ``constant`` counts the elements of a broadcast operand.
    """
    return _time(0.0, 1.0, (math.prod(shape) * (operands + 1) + constant) * width)


def resize(out_shape: Sequence[int], in_shape: Sequence[int], width: int) -> float:
    """Microseconds of a resize (upsampling, interpolation)."""
    table = CostTable.load()
    moved = (math.prod(out_shape) + math.prod(in_shape)) * width
    return table.launch + moved / table.resize * 1e-3


def _time(flops: float, rate: float, moved: float) -> float:
    table = CostTable.load()
    return table.launch + max(flops / rate, moved / table.bytes) * 1e-3


def _einsum(node: fx.Node, width: int) -> float:
    """Microseconds of an einsum, contracted from the left to the right."""
    operands: Any = node.args[1]
    moved = width * (math.prod(hints(node)) + sum(math.prod(hints(x)) for x in operands))
    terms, result = products.einsum_axes(node) or ([], [])
    sizes: dict[str, int] = {}
    open_axes: set[str] = set()
    flops = 0.0
    for at, term in enumerate(terms):
        sizes |= zip(term, hints(operands[at]), strict=True)
        open_axes |= set(term)
        flops += 2.0 * math.prod(sizes[a] for a in open_axes) if at else 0.0
        open_axes &= set(result).union(*terms[at + 1 :])
    return _time(flops, CostTable.load().linear, moved)


def of(node: fx.Node) -> float:
    """Microseconds of a node of the graph at the trace's sizes."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or node.op != "call_function":
        return 0.0
    shape, width = hints(node), value.element_size()
    if (conv := convolutions.conv(node)) is not None:
        taps = conv.weight.shape[2:]
        if not conv.transposed:
            return convolution(shape, hints(conv.x), conv.weight.shape[1], conv.groups, taps, width)
        if set(conv.stride) == {1}:  # a convolution with the kernel turned round
            inner = conv.weight.shape[0] // conv.groups
            return convolution(shape, hints(conv.x), inner, conv.groups, taps, width)
        inner = conv.weight.shape[1]
        return convolution(hints(conv.x), hints(conv.x), inner, conv.groups, taps, width)
    if (product := products.left_product(node)) is not None:  # as the convolution that it is
        return convolution(shape, hints(product.x), product.weight.shape[1], 1, (1,), width)
    if (linear := products.linear(node)) is not None:
        rows = math.prod(shape[:-1])
        return matrix(rows, shape[-1], linear.weight.shape[1], width)
    if op_name(node) == "einsum":
        return _einsum(node, width)
    if kind(node) in ("conv", "conv-transpose", "linear", "matmul"):
        summed = (hints(node.all_input_nodes[0])[-1:] or (1,))[0]
        columns = shape[-1] if shape else 1  # two vectors make a number
        return matrix(math.prod(shape) // max(columns, 1), columns, summed, width)
    if op_name(node) in LAYOUT and op_name(node) not in ("cat", "clone", "repeat", "contiguous"):
        return 0.0
    if "upsample" in op_name(node):
        return resize(shape, hints(node.all_input_nodes[0]), width)
    if kind(node) == "embedding":  # reads the rows that it picks
        return elementwise(shape, 1, width)
    tensors = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
    read = sum(math.prod(hints(a)) for a in tensors)
    window = 1
    if (pool := windows.avg_pool(node)) is not None:
        window = math.prod(pool.kernel)
    return _time(0.0, 1.0, (read * window + math.prod(shape)) * width)
