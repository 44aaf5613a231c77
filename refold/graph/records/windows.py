"""Windows that move over a tensor, and what is put around it: average pools and pads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from refold.graph.nodes import arguments, aten, is_call, is_tensor, shape
from refold.graph.records.common import Ints, ints


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
    kernel = ints(args["kernel_size"], spatial)
    stride = ints(args["stride"] or args["kernel_size"], spatial)
    padding = ints(args["padding"], spatial)
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


def crops(node: fx.Node) -> bool:
    """True for a zero pad by negative amounts alone, which takes elements away."""
    args = arguments(node)
    amounts = args["pad"]
    plain = str(args.get("mode", "constant")) == "constant"
    return plain and all(isinstance(a, int) and a <= 0 for a in amounts) and min(amounts) < 0


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
    if not is_tensor(x) or not isinstance(value, (int, float)) or crops(node):
        return None
    if any(not isinstance(a, int) for a in amounts) or len(amounts) % 2:
        return None
    low, high = tuple(amounts[0::2])[::-1], tuple(amounts[1::2])[::-1]
    return Pad(node, x, low, high, mode, float(value))
