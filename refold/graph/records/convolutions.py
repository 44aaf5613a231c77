"""Convolutions, transposed or not."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from refold.algebra.lazy import Lazy
from refold.graph import constants
from refold.graph.nodes import arguments, aten, is_tensor, shape
from refold.graph.records.common import Ints, fixed_float, ints


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


CONVS = {
    aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3,
    aten.conv1d.padding: 1, aten.conv2d.padding: 2, aten.conv3d.padding: 3,
}  # fmt: skip


TRANSPOSED = {
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}


def conv(node: object) -> Conv | None:
    """Reads a convolution, transposed or not, batched, with constant weight and bias."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    transposed = node.target in TRANSPOSED
    spatial = TRANSPOSED.get(node.target) or CONVS.get(node.target)  # type: ignore[call-overload]
    is_general = node.target is aten.convolution.default
    if not spatial and not is_general:
        return None
    args = arguments(node)
    x, weight_node, bias_node = args["input"], args["weight"], args["bias"]
    if not is_tensor(x) or not is_tensor(weight_node) or not fixed_float(node):
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
    stride, dilation = ints(args["stride"], spatial), ints(args["dilation"], spatial)
    output_padding = ints(args.get("output_padding", 0), spatial)
    if stride is None or dilation is None or output_padding is None:
        return None
    if not isinstance(args["groups"], int):
        return None  # as many groups as samples: the layer is another one for each batch size
    padding: Ints | None
    if isinstance(args["padding"], str):
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        padding = tuple(t // 2 for t in total) if args["padding"] == "same" else (0,) * spatial
    else:
        padding = ints(args["padding"], spatial)
    if padding is None:
        return None
    return Conv(
        node, x, weight_node, bias_node, weight, bias, stride, padding, dilation,
        args["groups"], transposed, output_padding,
    )  # fmt: skip


def uneven_taps(conv: Conv) -> str:
    """Why the same number everywhere adds no constant to what a transposed layer gives."""
    taps = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.weight.shape[2:], strict=True)]
    if tuple(taps) == tuple(conv.stride):
        return f"outputs of {conv.node.name} side by side meet different kernel taps"
    return f"the kernel taps that meet an output of {conv.node.name} differ in number"
