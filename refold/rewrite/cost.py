"""What calls cost, in microseconds, from measured rates: operations, bytes moved, launches.

A rewrite that is exact is still not wanted where it is slower (a depthwise convolution followed by
a pointwise one is one dense convolution at nine times the operations). What is slower depends on
where the graph runs: a target hands over a :class:`CostModel`, the context carries it, and passes
ask it. The rates are measured by ``tools/measure_costs.py``, on a CPU; nothing here is guessed.

Where nobody measured (a GPU, half precision, a runtime that nobody timed) one thing is still known:
what takes less arithmetic, less memory traffic and fewer calls is not slower anywhere. So there a
price is those three, and a rewrite pays where none of them grows and one shrinks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import fx

from refold.graph import ops
from refold.graph.nodes import hints
from refold.graph.ops import kind, op_name
from refold.graph.records import convolutions, products, windows

_LANES = 16  # floats in a vector of the kernels that the table was measured on
_FEW = 4  # up to so many input channels kernels for images do not pad them
_MEASURED = (torch.float32, torch.float64)
_COPIES = {"cat", "clone", "repeat", "contiguous"}  # layouts that move their elements
_SAME = 1e-9  # a difference below this share is rounding of equal prices


@dataclass(frozen=True)
class Price:
    """What some calls cost: microseconds, or each of the measures that stand in for them."""

    parts: tuple[float, ...]

    def __add__(self, other: Price) -> Price:
        pairs = zip_longest(self.parts, other.parts, fillvalue=0.0)
        return Price(tuple(a + b for a, b in pairs))

    def __rmul__(self, times: float) -> Price:
        return Price(tuple(times * a for a in self.parts))

    @property
    def total(self) -> float:
        """The sum of the measures; microseconds, where they were measured."""
        return sum(self.parts)

    def over(self, other: Price) -> float:
        """What is saved by paying another price instead; negative where any measure grows."""
        saved = [a - b for a, b in zip_longest(self.parts, other.parts, fillvalue=0.0)]
        if any(d < -_SAME * abs(a) for d, a in zip(saved, self.parts, strict=True)):
            return min(saved)
        return sum(saved)


FREE = Price((0.0,))


@dataclass(frozen=True)
class Rates:
    """Measured rates of one machine: GFLOP/s per family, GB/s, microseconds per launch.

    ``resize`` is in GB/s too: interpolation computes more than it moves.
    """

    conv_1x1: float = math.inf
    conv_kxk: float = math.inf
    conv_grouped: float = math.inf
    conv_depthwise: float = math.inf
    linear: float = math.inf
    bytes: float = math.inf
    resize: float = math.inf
    launch: float = 0.0


# Machines on which one thing alone takes time; in round units of today's, so that a sum of the
# three ranks what pays.
_MEASURES = {
    "arithmetic": Rates(100.0, 100.0, 100.0, 100.0, 100.0, resize=4.0),
    "memory traffic": Rates(bytes=50.0, resize=50.0),
    "calls": Rates(launch=1.0),
}


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


@dataclass(frozen=True)
class CostModel:
    """What calls cost where a graph will run.

    Attributes:
        name: what reports call the place.
        rates: those of a CPU, or ``None``: nobody measured there.
        layers: what calls of linears cost there, or ``None``.
        apart: why linears of one input are not merged, where ``layers`` is ``None``.
        unmeasured: why there are no rates, where there are none.
    """

    name: str
    rates: Rates | None = None
    layers: LayerCosts | None = None
    apart: str = ""
    unmeasured: str = ""

    def __post_init__(self) -> None:
        if not self.apart:
            object.__setattr__(self, "apart", f"what a call takes on {self.name} is not known")
        if not self.unmeasured:
            reason = f"what calls cost on {self.name} is not measured"
            object.__setattr__(self, "unmeasured", reason)

    def at(self, node: fx.Node) -> CostModel:
        """The model that holds for a call: rates are of CPUs, and of single precision."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return self
        if value.device.type != "cpu":
            return _unknown(self, "measured on the CPU alone")
        if value.is_floating_point() and value.dtype not in _MEASURED:
            return _unknown(self, "not measured in half precision")
        return self

    def dearer(self, now: Price, then: Price) -> str:
        """How ``then`` is more than ``now``, behind a subject."""
        if self.rates is not None:
            return f"would cost {then.total:.1f} us instead of {now.total:.1f} us (cost table)"
        grown = [b > a for a, b in zip_longest(now.parts, then.parts, fillvalue=0.0)]
        more = " and ".join(name for name, grows in zip(_MEASURES, grown, strict=False) if grows)
        return f"would take more {more}, and {self.unmeasured}"

    def convolution(
        self, out_shape: Sequence[int], in_shape: Sequence[int], per_group: int, groups: int,
        taps: Sequence[int], width: int,
    ) -> Price:  # fmt: skip
        """Of a convolution; shapes are ``[N, C, *spatial]`` at the trace's sizes."""
        window = math.prod(taps)
        positions = math.prod(out_shape) // max(out_shape[1], 1)
        channels, inner = _in_lanes(out_shape[1]), per_group
        if per_group == 1 and groups > 1:
            family = "conv_depthwise"
        elif groups > 1:
            family, channels = "conv_grouped", out_shape[1]
        else:
            family = "conv_1x1" if window == 1 else "conv_kxk"
            inner = _in_lanes(per_group) if per_group > _FEW else per_group
        flops = 2.0 * positions * channels * inner * window
        moved = (math.prod(out_shape) + math.prod(in_shape)) * width
        return self._time(flops, family, moved + out_shape[1] * per_group * window * width)

    def matrix(self, rows: int, out_features: int, in_features: int, width: int) -> Price:
        """Of ``[rows, in] @ [in, out]``."""
        flops = 2.0 * rows * out_features * in_features
        moved = (rows * (out_features + in_features) + out_features * in_features) * width
        return self._time(flops, "linear", moved)

    def elementwise(
        self, shape: Sequence[int], operands: int, width: int, constant: int = 0
    ) -> Price:
        """Of an operation that reads ``operands`` tensors of ``shape`` and writes one.

        ``constant`` counts the elements of a broadcast operand.
        """
        return self._time(0.0, "linear", (math.prod(shape) * (operands + 1) + constant) * width)

    def resize(self, out_shape: Sequence[int], in_shape: Sequence[int], width: int) -> Price:
        """Of a resize (upsampling, interpolation)."""
        moved = (math.prod(out_shape) + math.prod(in_shape)) * width
        return Price(tuple(r.launch + moved / r.resize * 1e-3 for r in self._machines))

    @property
    def _machines(self) -> tuple[Rates, ...]:
        return tuple(_MEASURES.values()) if self.rates is None else (self.rates,)

    def _time(self, flops: float, family: str, moved: float) -> Price:
        return Price(
            tuple(
                r.launch + max(flops / getattr(r, family), moved / r.bytes) * 1e-3
                for r in self._machines
            )
        )

    def _einsum(self, node: fx.Node, width: int) -> Price:
        """Of an einsum, contracted from the left to the right."""
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
        return self._time(flops, "linear", moved)

    def of(self, node: fx.Node) -> Price:
        """Of a node of the graph at the trace's sizes."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or node.op != "call_function":
            return FREE
        shape, width = hints(node), value.element_size()
        if (conv := convolutions.conv(node)) is not None:
            taps = conv.weight.shape[2:]
            if not conv.transposed:
                return self.convolution(
                    shape, hints(conv.x), conv.weight.shape[1], conv.groups, taps, width
                )
            if set(conv.stride) == {1}:  # a convolution with the kernel turned round
                inner = conv.weight.shape[0] // conv.groups
                return self.convolution(shape, hints(conv.x), inner, conv.groups, taps, width)
            inner = conv.weight.shape[1]
            return self.convolution(hints(conv.x), hints(conv.x), inner, conv.groups, taps, width)
        if (product := products.left_product(node)) is not None:  # as the convolution that it is
            return self.convolution(
                shape, hints(product.x), product.weight.shape[1], 1, (1,), width
            )
        if (linear := products.linear(node)) is not None:
            rows = math.prod(shape[:-1])
            return self.matrix(rows, shape[-1], linear.weight.shape[1], width)
        if op_name(node) == "einsum":
            return self._einsum(node, width)
        if kind(node) in ("conv", "conv-transpose", "linear", "matmul"):
            summed = (hints(node.all_input_nodes[0])[-1:] or (1,))[0]
            columns = shape[-1] if shape else 1  # two vectors make a number
            return self.matrix(math.prod(shape) // max(columns, 1), columns, summed, width)
        if ops.is_layout(node) and op_name(node) not in _COPIES:
            return FREE
        if ops.has(node, ops.RESIZE):
            return self.resize(shape, hints(node.all_input_nodes[0]), width)
        if kind(node) == "embedding":  # reads the rows that it picks
            return self.elementwise(shape, 1, width)
        tensors = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
        read = sum(math.prod(hints(a)) for a in tensors)
        window = 1
        if (pool := windows.avg_pool(node)) is not None:
            window = math.prod(pool.kernel)
        return self._time(0.0, "linear", (read * window + math.prod(shape)) * width)


def _in_lanes(channels: int) -> int:
    """Channels as blocked kernels compute them: six take as long as sixteen."""
    return -(-channels // _LANES) * _LANES


@cache
def _unknown(model: CostModel, how: str) -> CostModel:
    return replace(
        model, rates=None, layers=None,
        apart=f"what a call takes is {how}", unmeasured=f"what calls cost is {how}",
    )  # fmt: skip


@cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(__file__).with_name("cost_table.json").read_text())
    return found


def on_cpu(name: str, apart: str = "") -> CostModel:
    """The model of what runs on a CPU: the table's rates, and its costs of layers of that name.

    The rates are PyTorch's; other runtimes for CPUs are taken to compute at the same.

    Args:
        name: of the entry of the table, where calls of layers were measured; else any.
        apart: why linears of one input are not merged, where they were not.
    """
    table = _table()
    rates = Rates(**{f.name: float(table["rates"][f.name]) for f in fields(Rates)})
    layers = table["layers"].get(name)
    return CostModel(name, rates, None if layers is None else LayerCosts(**layers), apart)


def reference() -> CostModel:
    """Of PyTorch on a CPU, which the rates were measured in."""
    return on_cpu("torch")
