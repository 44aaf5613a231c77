"""Dense layers of a graph: products with one stored matrix, and convolutions as such products.

A convolution of one group is the product of its windows, each laid out as a row, with its weight as
a matrix ``[N, K]``; what is said of linear layers then holds for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from refold.algebra.compensation import Hessian
from refold.algebra.lazy import Lazy
from refold.calibrate.lockstep import Compute, Environment
from refold.errors import Declined
from refold.graph import constants, ops
from refold.graph.nodes import arguments, aten, dtype, is_output, shape
from refold.graph.records import convolutions, products


@dataclass(frozen=True)
class Window:
    """How a convolution reads its input."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Layer:
    """A dense layer: ``weight`` is ``[N, K]``, over the columns that ``window`` makes of ``x``."""

    node: fx.Node
    x: fx.Node
    weight_node: fx.Node
    attribute: fx.Node
    weight: Lazy
    bias: Lazy | None
    bias_node: fx.Node | None
    window: Window | None = None

    @property
    def label(self) -> str:
        return str(self.attribute.meta.get("refold_name", self.attribute.target))

    @property
    def bytes(self) -> int:
        return constants.size_in_bytes(self.attribute)

    def same_input(self, other: Layer) -> bool:
        return self.x is other.x and self.window == other.window

    def around(self, run: Callable[..., Any], x: Any, product: Callable[[Any], Any]) -> Any:
        """The layer, given what multiplies the last axis; ``run`` calls an operator."""
        if self.window is None:
            return product(x)
        columns = self._columns(run, x)
        axes = len(self.window.kernel)
        return run(aten.permute.default, product(columns), [0, axes + 1, *range(1, axes + 1)])

    def columns(self, x: torch.Tensor) -> torch.Tensor:
        """What the weight multiplies, on the last axis."""
        return x if self.window is None else self._columns(_call, x)

    def _columns(self, run: Callable[..., Any], x: Any) -> Any:
        assert self.window is not None
        kernel, stride, padding = self.window.kernel, self.window.stride, self.window.padding
        axes = len(kernel)
        if any(padding):
            x = run(aten.pad.default, x, [p for one in padding[::-1] for p in (one, one)])
        if all(k == 1 for k in kernel):
            for axis, step in enumerate(stride):
                if step > 1:
                    x = run(aten.slice.Tensor, x, axis + 2, None, None, step)
            return run(aten.permute.default, x, [0, *range(2, axes + 2), 1])
        for axis, (size, step) in enumerate(zip(kernel, stride, strict=True)):
            x = run(aten.unfold.default, x, axis + 2, size, step)
        order = [0, *range(2, axes + 2), 1, *range(axes + 2, 2 * axes + 2)]
        x = run(aten.permute.default, x, order)
        return run(aten.flatten.using_ints, x, axes + 1)

    def computing(self, dense: Callable[[], torch.Tensor]) -> Compute:
        """The layer with another weight, which is formed once for all inputs and then dropped."""

        def compute(environments: Sequence[Environment]) -> list[torch.Tensor]:
            weight = dense().to(environments[0][self.x].device)
            bias = None if self.bias is None else self.bias.evaluate().to(weight)
            return [
                self.around(_call, e[self.x], lambda v: F.linear(v, weight, bias))
                for e in environments
            ]

        return compute


def _call(target: Any, *args: Any) -> Any:
    return target(*args)


def linear(node: fx.Node) -> Layer | None:
    """The node as a dense layer if it is a product with a stored matrix.

    Raises:
        Declined: its weight is not finite.
    """
    found = products.linear(node)
    if found is None:
        return None
    attribute = _attribute(found.weight_node)
    if attribute is None:
        return None
    name = "self" if node.target is aten.addmm.default else "bias"
    given = arguments(node).get(name) if found.bias is not None else None
    plain = isinstance(given, fx.Node) and constants.is_get_attr(given) and len(shape(given)) == 1
    return _checked(
        Layer(
            node, found.x, found.weight_node, attribute, found.weight, found.bias,
            given if plain else None,
        )
    )  # fmt: skip


def convolution(node: fx.Node) -> Layer | None:
    """The node as a dense layer if it is a convolution with a stored weight.

    Raises:
        Declined: it is no product with a finite matrix.
    """
    conv = convolutions.conv(node)
    if conv is None:
        return None
    attribute = _attribute(conv.weight_node)
    if attribute is None:
        return None
    if conv.groups != 1 or conv.transposed:
        kind = "transposed" if conv.transposed else f"in {conv.groups} groups"
        raise Declined(f"a convolution {kind} is no product of its windows with one matrix")
    kernel = conv.weight.shape[2:]
    mode = arguments(node)["padding"]
    lopsided = mode == "same" and any(k % 2 == 0 for k in kernel)
    if any(d != 1 for d in conv.dilation) or lopsided:
        raise Declined("dilated windows and lopsided padding are not supported")
    if dtype(conv.x) != dtype(node):
        return None
    rows = conv.weight.shape[0]
    matrix = conv.weight.map((rows, conv.weight.numel() // rows), lambda w: w.reshape(rows, -1))
    plain = conv.bias_node is not None and constants.is_get_attr(conv.bias_node)
    return _checked(
        Layer(
            node, conv.x, conv.weight_node, attribute, matrix, conv.bias,
            conv.bias_node if plain else None, Window(kernel, conv.stride, conv.padding),
        )
    )  # fmt: skip


def _checked(layer: Layer) -> Layer:
    if not constants.tensor(layer.attribute).isfinite().all():
        raise Declined("its weight is not finite")
    return layer


def _attribute(node: fx.Node) -> fx.Node | None:
    """The stored tensor behind a weight, through what only lays it out."""
    while not constants.is_fixed(node):
        if len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]
    return node


def other_readers(layer: Layer) -> list[fx.Node]:
    """What else reads the layer's weight."""
    found: list[fx.Node] = []
    reader, node = layer.node, layer.weight_node
    while True:
        found.extend(u for u in node.users if u is not reader)
        if node is layer.attribute:
            return found
        reader, node = node, node.all_input_nodes[0]


def returned(node: fx.Node) -> bool:
    """True if the model returns the value, but for its layout and dtype."""
    pending = [node]
    while pending:
        current = pending.pop()
        if is_output(current):
            return True
        pending += [u for u in current.users if ops.is_layout(u) or ops.has(u, ops.CAST)]
    return False


def hessian_of(layer: Layer, inputs: Iterable[torch.Tensor]) -> torch.Tensor:
    """The mean of ``x x^T`` over what the weight multiplies."""
    total = Hessian(layer.weight.shape[1])
    for x in inputs:
        total.add(layer.columns(x))
    return total.mean()
