"""Writes an affine map of a tensor as the call that computes it, and says what that costs.

A map of channels is a convolution (or a transposed one), padded by a call of its own where no
padding of the layer's gives the exact extent; a map of features is a matrix product, one of the
rows of a table an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from refold.algebra import affine_map as am
from refold.algebra.affine_map import AffineMap
from refold.algebra.lazy import Lazy
from refold.graph import constants, layout, nodes
from refold.graph.nodes import aten, hint, hints, same, shape
from refold.passes.branches.maps import Key
from refold.rewrite.cost import CostModel, Price

# The overloads that are written, by the number of axes of a kernel.
_CONVS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
# The same for transposed layers.
_TRANSPOSED = {
    1: aten.conv_transpose1d.default,
    2: aten.conv_transpose2d.input,
    3: aten.conv_transpose3d.input,
}


@dataclass(frozen=True)
class Emission:
    """What would compute a map.

    Attributes:
        price: by the model that holds where it would stand.
        calls: how many there are.
        write: writes them and returns the last.
    """

    price: Price
    calls: int
    write: Callable[[], fx.Node]


@dataclass
class Emitter:
    """Writes maps into a graph, under the name of a rule, and prices them.

    Attributes:
        copies: the constants that calls alike read already, by label; what is written joins them.
    """

    gm: fx.GraphModule
    rule: str
    costs: CostModel
    copies: dict[str, fx.Node] | None = None

    def emission(self, node: fx.Node, key: Key, merged: AffineMap) -> Emission | str | None:
        """How to write a map over a root instead of ``node``, or why it cannot be written."""
        kind_, root = key
        if kind_ == "feature":
            return self._matrix(node, root, merged)
        if kind_ == "table":
            return self._embedding(node, root, merged)
        if kind_ == "transposed":
            return self._transposed(node, root, merged)
        return self._convolution(node, root, merged)

    def _matrix(self, node: fx.Node, root: fx.Node, merged: AffineMap) -> Emission | None:
        dense = am.regroup(merged, 1)
        width = node.meta["val"].element_size()
        rows = math.prod(hints(node)) // max(dense.out_channels, 1)
        price = self.costs.at(node).matrix(rows, dense.out_channels, dense.in_channels, width)

        def emit() -> fx.Node:
            x = root
            if not same(shape(root)[-1], dense.in_channels):
                x = self._call(aten.reshape.default, (root, [-1, dense.in_channels]), [node])
            weight = self._constant(node, "weight", dense.weight, x)
            bias = self._constant(node, "bias", Lazy.of(dense.bias), x) if dense.has_bias else None
            out = self._call(aten.linear.default, (x, weight, bias), [node])
            if not same(shape(out), shape(node)):
                out = self._reshape_like(out, node)
            return out

        if not same(shape(root)[:-1], shape(node)[:-1]) and not _static_but_batch(node):
            return None
        return Emission(price, 1, emit)

    def _embedding(self, node: fx.Node, root: fx.Node, merged: AffineMap) -> Emission | None:
        dense = am.regroup(merged, 1)
        if not same(shape(node), (*shape(root), dense.out_channels)):
            return None
        rows = (dense.in_channels, dense.out_channels)
        table = dense.weight.map(rows, lambda w: w.t() + dense.bias)

        def emit() -> fx.Node:
            weight = self._constant(node, "weight", table, node)
            return self._call(aten.embedding.default, (weight, root), [node])

        price = self.costs.at(node).elementwise(hints(node), 1, node.meta["val"].element_size())
        return Emission(price, 1, emit)

    def _reshape_like(self, out: fx.Node, node: fx.Node) -> fx.Node:
        sizes = [s if isinstance(s, int) else -1 for s in shape(node)]
        return self._call(aten.reshape.default, (out, sizes), [node])

    def _convolution(
        self, node: fx.Node, root: fx.Node, merged: AffineMap
    ) -> Emission | str | None:
        if merged.spatial not in _CONVS:
            return None
        sizes, wanted = shape(root)[2:], shape(node)[2:]
        execution = next(
            (
                e
                for e in am.executions(merged)
                if _extent_fits(sizes, wanted, e, merged.stride, e.padding)
            ),
            None,
        )
        pads: tuple[tuple[int, int], ...] = ()
        if execution is None:  # padded on one side, or by another width: a call of its own
            execution = am.trimmed(merged)
            pads = _sides(sizes, wanted, execution, merged.stride) if execution else ()
            if execution is None or not pads:
                return "no padding gives the merged convolution its exact extent"
            execution = replace(execution, padding=(0,) * merged.spatial)
        # a view has strides of its own, and so has a product with a matrix on the left
        own_strides = layout.is_layout(node) or (merged.spatial == 1 and merged.is_pointwise)
        width = node.meta["val"].element_size()
        read = list(hints(root))
        for axis, pair in enumerate(pads):
            read[2 + axis] += sum(pair)
        price = self.costs.at(node).convolution(
            hints(node), read, merged.weight.shape[1], merged.groups,
            execution.weight.shape[2:], width,
        )  # fmt: skip
        if pads:
            price += self.costs.at(node).elementwise(read, 0, width, math.prod(hints(root)))

        def emit() -> fx.Node:
            weight = self._constant(node, "weight", execution.weight, root)
            bias = None
            if merged.has_bias:
                bias = self._constant(node, "bias", Lazy.of(merged.bias), root)
            x = root
            if pads:
                flat = [width for pair in reversed(pads) for width in pair]
                x = self._call(aten.pad.default, (root, flat), [node])
            return self._call(
                _CONVS[merged.spatial],
                (
                    x, weight, bias, list(merged.stride), list(execution.padding),
                    list(execution.dilation), merged.groups,
                ),
                [node],
                None if own_strides else node,
            )  # fmt: skip

        return Emission(price, 2 if pads else 1, emit)

    def _transposed(self, node: fx.Node, root: fx.Node, merged: AffineMap) -> Emission | str | None:
        if merged.spatial not in _TRANSPOSED:
            return None
        for execution in am.executions(merged):
            extra = _output_padding(shape(root)[2:], shape(node)[2:], execution, merged.stride)
            if extra is not None:
                break
        else:
            return "no padding gives the merged transposed convolution its exact extent"
        weight = am.swapped(execution.weight, merged.groups)
        price = self.costs.at(node).convolution(
            hints(root), hints(root), weight.shape[1], merged.groups, weight.shape[2:],
            node.meta["val"].element_size(),
        )  # fmt: skip

        def emit() -> fx.Node:
            stored = self._constant(node, "weight", weight, root)
            bias = None
            if merged.has_bias:
                bias = self._constant(node, "bias", Lazy.of(merged.bias), root)
            return self._call(
                _TRANSPOSED[merged.spatial],
                (
                    root, stored, bias, list(merged.stride), list(execution.padding), extra,
                    merged.groups, list(execution.dilation),
                ),
                [node],
                None if layout.is_layout(node) else node,
            )  # fmt: skip

        return Emission(price, 1, emit)

    def _constant(self, node: fx.Node, label: str, data: Lazy, like: fx.Node) -> fx.Node:
        held = None if self.copies is None else self.copies.get(label)
        if held is not None and not held._erased and held < node:
            return held
        new = constants.add(self.gm, f"{node.name}.{label}", data, like.meta["val"])
        if self.copies is not None:
            self.copies[label] = new
        return new

    def _call(
        self,
        target: Any,
        args: tuple[Any, ...],
        sources: list[fx.Node],
        like: fx.Node | None = None,
    ) -> fx.Node:
        return nodes.call(self.gm.graph, target, args, rule=self.rule, sources=sources, like=like)

    def plus(self, new: fx.Node, rest: list[tuple[float, fx.Node]], node: fx.Node) -> fx.Node:
        """Adds what is left of a sum."""
        for factor, leaf in rest:
            target, alpha = aten.add.Tensor, factor
            if factor == -1.0:
                target, alpha = aten.sub.Tensor, 1.0
            kwargs = {} if alpha == 1.0 else {"alpha": alpha}
            new = nodes.call(
                self.gm.graph, target, (new, leaf), kwargs, rule=self.rule, sources=[node]
            )
        return new

    def pad_earlier(self, pad: fx.Node, earlier: fx.Node) -> fx.Node:
        """The pad of an earlier tensor, in front of a pad of what is computed from it."""
        target: Any = pad.target
        args, kwargs = (earlier, *pad.args[1:]), dict(pad.kwargs)
        with self.gm.graph.inserting_before(pad):
            return nodes.call(self.gm.graph, target, args, kwargs, rule=self.rule, sources=[pad])


def _static_but_batch(node: fx.Node) -> bool:
    return sum(not isinstance(s, int) for s in shape(node)) <= 1


def _output_padding(
    sizes: tuple[nodes.Size, ...], wanted: tuple[nodes.Size, ...], e: am.Execution,
    stride: tuple[int, ...],
) -> list[int] | None:  # fmt: skip
    """What a transposed convolution must add on the high sides for its exact extent."""
    found = []
    for axis, size in enumerate(sizes):
        span = e.dilation[axis] * (e.weight.shape[2 + axis] - 1) + 1
        extent = (size - 1) * stride[axis] - 2 * e.padding[axis] + span
        fits = [x for x in range(stride[axis]) if same(extent + x, wanted[axis])]
        if not fits:
            return None
        found += fits
    return found


def _extent_fits(
    sizes: tuple[nodes.Size, ...], wanted: tuple[nodes.Size, ...], e: am.Execution,
    stride: tuple[int, ...], high: tuple[int, ...],
) -> bool:  # fmt: skip
    for axis, size in enumerate(sizes):
        span = e.dilation[axis] * (e.weight.shape[2 + axis] - 1) + 1
        extent = (size + e.padding[axis] + high[axis] - span) // stride[axis] + 1
        if hint(extent) != hint(wanted[axis]) or not same(extent, wanted[axis]):
            return False
    return True


def _sides(
    sizes: tuple[nodes.Size, ...], wanted: tuple[nodes.Size, ...], e: am.Execution,
    stride: tuple[int, ...],
) -> tuple[tuple[int, int], ...]:  # fmt: skip
    """How far to pad each axis, in front and behind, for the exact extent; nothing if none does."""
    high = []
    for axis, size in enumerate(sizes):
        span = e.dilation[axis] * (e.weight.shape[2 + axis] - 1) + 1
        last = stride[axis] * (hint(wanted[axis]) - 1) + span
        high.append(last - e.padding[axis] - hint(size))
    if min(high) < 0 or not _extent_fits(sizes, wanted, e, stride, tuple(high)):
        return ()
    return tuple(zip(e.padding, high, strict=True))
