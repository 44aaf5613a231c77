"""Layers whose weights are stored as integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from refold.algebra.lazy import Lazy
from refold.graph import constants
from refold.graph.nodes import arguments, aten, dtype, is_tensor, shape
from refold.graph.records.common import fixed_float
from refold.graph.records.convolutions import CONVS


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


def quantised(node: object) -> Quantised | None:
    """Reads a convolution or linear of a constant weight that is dequantised in the graph."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or not fixed_float(node):
        return None
    if node.target not in CONVS and node.target is not aten.linear.default:
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
        1 if node.target in CONVS else -1,
        (int(given["quant_min"]), int(given["quant_max"])), given["dtype"],
    )  # fmt: skip
