"""Which affine maps of which earlier tensors a node computes.

For every node, :class:`MapReader` keeps maps by key: the *kind* (``conv``: channels are axis 1;
``transposed``: likewise, of a transposed convolution with a stride; ``feature``: the last axis, any
rows before it; ``table``: rows that an integer tensor picks, the matrix over its one-hot code) and
the *root* they start from. A node's maps come from its operands' maps; whatever is not affine
simply has none but itself.

Composition is exact only where the padding that the outer map reads is what the inner map would
have computed there; that test is done per side, on symbolic sizes where shapes are dynamic.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from refold.algebra import affine_map as am
from refold.algebra.affine_map import AffineMap
from refold.algebra.lazy import Lazy
from refold.graph import constants, nodes, ops
from refold.graph.nodes import aten, is_call, is_tensor, same, shape
from refold.graph.ops import op_name
from refold.graph.records import concatenations, convolutions, products, scale_shifts, sums, windows
from refold.passes.branches.borders import Border, border_reason, covered_side, reads_outside

Key = tuple[str, fx.Node]
Maps = dict[Key, AffineMap]

_MAX_ROOTS = 16
_MAX_TAPS = 4096
_MAX_MATRIX = 1 << 22


@dataclass
class MapReader:
    """Maps of every node visited so far, and the reasons why some compositions are not maps.

    ``propose`` makes the call of a pad read an earlier tensor: the reader writes no graph itself.
    ``proposed`` are such calls, which nothing reads yet: roots that exist if chosen.
    """

    propose: Callable[[fx.Node, fx.Node], fx.Node]
    maps: dict[fx.Node, Maps] = field(default_factory=dict)
    identities: dict[fx.Node, Maps] = field(default_factory=dict)
    borders: dict[fx.Node, dict[Key, Border]] = field(default_factory=dict)
    refusals: dict[fx.Node, str] = field(default_factory=dict)
    proposed: set[fx.Node] = field(default_factory=set)

    def visit(self, node: fx.Node) -> Maps:
        """Reads the maps of a node whose operands were visited."""
        readable = node.op == "call_function" and is_tensor(node) and not nodes.pinned(node)
        readable = readable and not any(map(_is_empty, (node, *node.all_input_nodes)))
        found = self._read(node) if readable else {}
        kept = {
            k: m
            for k, m in found.items()
            if math.prod(m.kernel) <= _MAX_TAPS and 0 < m.weight.numel() <= 1 << 28
        }
        self.maps[node] = dict(list(kept.items())[:_MAX_ROOTS])
        return self.maps[node]

    def inherit(self, new: fx.Node, old: fx.Node, dead: set[fx.Node]) -> None:
        """Gives a replacement all maps of what it replaces (they are equal)."""
        self.maps[new] = {k: m for k, m in self.maps.pop(old, {}).items() if k[1] not in dead}
        if old in self.borders:
            self.borders[new] = self.borders.pop(old)

    def of(self, node: fx.Node) -> Maps:
        """The maps of a node, itself as a root included, farthest root last."""
        if node not in self.identities:
            self.identities[node] = identity_maps(node)
        out = dict(self.identities[node])
        for key, value in self.maps.get(node, {}).items():
            if key[1].users or key[1].op == "placeholder" or key[1] in self.proposed:
                out[key] = value
        return out

    # -- one reader per family ------------------------------------------------------------------

    def _read(self, node: fx.Node) -> Maps:
        if (conv := convolutions.conv(node)) is not None:
            return self._transposed(conv) if conv.transposed else self._conv(conv)
        if (linear := products.linear(node)) is not None:
            return self._linear(linear)
        if (product := products.left_product(node)) is not None:
            return self._left_product(product)
        if (product := products.trailing_product(node)) is not None:
            return self._trailing_product(product)
        if (affine := scale_shifts.affine(node)) is not None:
            return self._affine(affine)
        if (total := sums.add(node)) is not None:
            return self._sum(total)
        if (weighted := sums.weighted_sum(node)) is not None:
            return self._weighted(weighted)
        if (pool := windows.avg_pool(node)) is not None:
            return self._pool(pool)
        if (pad := windows.pad(node)) is not None:
            return self._pad(pad)
        if is_call(node, aten.embedding.default):
            return self._embedding(node)
        if (cat := concatenations.cat(node)) is not None:
            return self._cat(cat)
        if is_call(node, aten.slice.Tensor):
            return self._slice(node)
        if is_call(node, aten.slice_scatter.default):
            return self._slice_scatter(node)
        name = op_name(node)
        if ops.has(node, ops.ALIAS | ops.COPY) or (
            is_call(node, aten.dropout.default) and node.args[2] is False
        ):
            return self._same(node)
        if ops.has(node, ops.VIEW):
            return self._reshape(node)
        if name in ("channel_shuffle", "native_channel_shuffle"):
            return self._shuffle(node)
        if name in ("repeat", "repeat_interleave", "index_select", "index", "flip"):
            return self._picked(node)
        if node.target is operator.getitem:
            return self._part(node)
        return {}

    def _same(self, node: fx.Node) -> Maps:
        source = node.args[0]
        if not is_tensor(source) or nodes.dtype(source) != nodes.dtype(node):  # type: ignore[arg-type]
            return {}
        return self.of(source)  # type: ignore[arg-type]

    def _after(self, outer: AffineMap, u: fx.Node, node: fx.Node, kind: str) -> Maps:
        """``outer`` applied to ``u``, composed with each of ``u``'s maps that it may pass."""
        out: Maps = {}
        for key, inner in self.of(u).items():
            follows = (
                key[0] == kind
                or (kind == "feature" and key[0] == "table")
                # what maps every position by itself follows any map of positions
                or (kind == "conv" and key[0] == "transposed" and outer.is_pointwise)
            )
            if not follows or inner.out_channels != outer.in_channels:
                continue
            if inner.spatial != outer.spatial:
                continue
            if key[1] is u:  # over itself: nothing to compose
                out[key] = outer
                continue
            if key[0] == "conv":
                reason = border_reason(outer, inner, key[1], u, node)
                if reason is not None:
                    self.refusals[node] = reason
                    continue
            out[key] = am.compose(outer, inner)
        return out

    def _conv(self, conv: convolutions.Conv) -> Maps:
        bias = _bias(conv.bias, conv.out_channels)
        outer = am.convolution(
            conv.weight, bias, conv.groups, conv.stride, conv.padding, conv.dilation
        )
        return self._after(outer, conv.x, conv.node, "conv")

    def _transposed(self, conv: convolutions.Conv) -> Maps:
        bias = _bias(conv.bias, conv.out_channels)
        outer = am.transposed_convolution(
            conv.weight, bias, conv.groups, conv.stride, conv.padding, conv.dilation
        )
        if set(conv.stride) == {1}:
            return self._after(outer, conv.x, conv.node, "conv")
        out: Maps = {("transposed", conv.x): outer}
        for (kind, root), inner in self.of(conv.x).items():
            if root is conv.x or kind == "feature" or kind == "table":
                continue
            pointwise = kind == "conv" and inner.is_pointwise
            if not pointwise and kind != "transposed":
                continue
            if not same(shape(conv.x)[2:], _grown(shape(root)[2:], inner, kind)):
                continue  # a crop: the root goes on where the layer's input has ended
            if not inner.bias_is(0.0):
                self.refusals[conv.node] = (
                    f"{convolutions.uneven_taps(conv)}, so the bias of {conv.x.name} adds no "
                    f"constant to it"
                )
                continue
            compose = am.compose if pointwise else am.compose_transposed
            out["transposed", root] = compose(outer, inner)
        return out

    def _linear(self, linear: products.Linear) -> Maps:
        outer = am.matrix(linear.weight, _bias(linear.bias, linear.weight.shape[0]))
        return self._after(outer, linear.x, linear.node, "feature")

    def _left_product(self, product: products.Linear) -> Maps:
        """``weight @ x`` mixes the axis that is a convolution's channels: a pointwise one."""
        rows, columns = product.weight.shape
        weight = product.weight.map((rows, columns, 1), lambda w: w.unsqueeze(-1))
        outer = am.convolution(weight, _bias(None, rows), 1, (1,), (0,), (1,))
        return self._after(outer, product.x, product.node, "conv")

    def _trailing_product(self, product: products.Linear) -> Maps:
        """The rows of the matrix span several axes of ``x``, and so do those of its maps."""
        outer = am.matrix(product.weight, _bias(None, product.weight.shape[0]))
        out: Maps = {}
        for key, inner in self.of(product.x).items():
            have, want = inner.out_channels, outer.in_channels
            wider = max(have, want)
            if key[0] != "feature" or wider % min(have, want):
                continue
            out[key] = am.compose(_repeated(outer, wider // want), _repeated(inner, wider // have))
        return out

    def _embedding(self, node: fx.Node) -> Maps:
        args = nodes.arguments(node)
        table, picked = constants.exact(args["weight"]), args["indices"]
        if table is None or not is_tensor(picked):
            return {}
        matrix = table.map(table.shape[::-1], lambda rows: rows.t())
        return {("table", picked): am.matrix(matrix, _bias(None, table.shape[1]))}

    def _affine(self, affine: scale_shifts.Affine) -> Maps:
        out: Maps = {}
        for kind, axis in _axes(affine.node):
            size = shape(affine.node)[axis]
            scale, shift = _along(affine.scale, axis, size), _along(affine.shift, axis, size)
            if scale is None or shift is None:
                continue
            outer = am.diagonal(scale, shift, _spatial(kind, affine.node))
            out.update(self._after(outer, affine.x, affine.node, kind))
        for key, inner in self.of(affine.x).items():
            if key[0] != "feature" or key in out:
                continue  # rows that span several axes
            wide = [
                _over(f, shape(affine.node), inner.out_channels)
                for f in (affine.scale, affine.shift)
            ]
            if wide[0] is not None and wide[1] is not None:
                out[key] = am.compose(am.diagonal(wide[0], wide[1], 0), inner)
        return out

    def _sum(self, total: sums.Addition) -> Maps:
        left, right = self.of(total.left), self.of(total.right)
        _bridge(left, right, total.left, total.right)
        _enter_pads(left, right)
        out: Maps = {}
        for key, a in left.items():
            b = right.get(key)
            if b is None:
                continue
            if addable(a, b):
                out[key] = am.add([a, am.scale(b, total.alpha)])
            elif a.stride != b.stride:
                self.refusals[total.node] = (
                    f"its terms read {key[1].name} with strides {a.stride} and {b.stride}: they "
                    f"share no grid"
                )
        if not out:
            self._explain_pads(total, left, right)
        return out

    def _weighted(self, total: sums.WeightedSum) -> Maps:
        views = [self.of(x) for x, _ in total.terms]
        out: Maps = {}
        for kind, axis in _axes(total.node):
            factors = [_along(f, axis, shape(total.node)[axis]) for _, f in total.terms]
            for key in views[0]:
                found = [v.get(key) for v in views]
                if (
                    key[0] != kind
                    or any(m is None for m in found)
                    or any(f is None for f in factors)
                ):
                    continue
                maps = [
                    am.compose(am.diagonal(f, torch.zeros_like(f), m.spatial), m)
                    for m, f in zip(found, factors, strict=True)
                    if m is not None and f is not None
                ]
                if all(addable(maps[0], m) for m in maps[1:]):
                    out[key] = am.add(maps)
        return out

    def _explain_pads(self, total: sums.Addition, left: Maps, right: Maps) -> None:
        """Says why branches that pad one tensor in different modes do not merge."""
        for term, others in ((total.left, right), (total.right, left)):
            conv = convolutions.conv(term)
            pad = windows.pad(conv.x) if conv is not None else None
            if pad is not None and pad.mode != "constant" and ("conv", pad.x) in others:
                self.refusals[total.node] = (
                    f"its branches pad {pad.x.name} in different modes ({pad.mode} and another): "
                    f"they differ at the border"
                )

    def _pool(self, pool: windows.AvgPool) -> Maps:
        if not pool.uniform:
            if any(pool.padding):
                self.refusals[pool.node] = (
                    "the average pool divides by another number at the border "
                    "(count_include_pad=False or ceil_mode), so it is not a convolution"
                )
            return {}
        channels = shape(pool.x)[1]
        if not isinstance(channels, int):
            return {}
        outer = am.average_pool(channels, pool.kernel, pool.stride, pool.padding, pool.divisor)
        return self._after(outer, pool.x, pool.node, "conv")

    def _pad(self, pad: windows.Pad) -> Maps:
        rank, count = len(shape(pad.x)), len(pad.low)
        if count > rank - 2 or not isinstance(shape(pad.x)[1], int):
            return {}
        if pad.mode != "constant":
            return self._mirrored(pad)
        low = (0,) * (rank - 2 - count) + pad.low
        high = (0,) * (rank - 2 - count) + pad.high
        outer = am.window(int(shape(pad.x)[1]), tuple(-a for a in low), (1,) * (rank - 2))
        out: Maps = {}
        for key, inner in self.of(pad.x).items():
            if key[0] != "conv" or inner.spatial != rank - 2:
                continue
            reason = reads_outside(outer, inner, key[1], pad.x, low, high)
            if reason is not None:
                self.refusals[pad.node] = reason
                continue
            base = am.compose(outer, inner)
            value = torch.full_like(base.bias, pad.value)
            sides = {
                (a, s): (w, value)
                for a in range(rank - 2)
                for s, w in ((0, low[a]), (1, high[a]))
                if w > 0
            }
            self._settle(pad.node, key, Border(base, sides), out)
        return out

    def _mirrored(self, pad: windows.Pad) -> Maps:
        """Padding that repeats pixels commutes with a pointwise map: pad its root instead."""
        out: Maps = {}
        for key, inner in self.of(pad.x).items():
            if key[0] != "conv" or key[1] is pad.x or key[1] in self.proposed:
                continue
            if not inner.is_pointwise or len(shape(key[1])) != len(shape(pad.node)):
                continue
            if not same(shape(key[1])[2:], shape(pad.x)[2:]):
                continue  # a crop: the pad repeats pixels of what is left of the root
            root = self.propose(pad.node, key[1])
            self.proposed.add(root)
            out[("conv", root)] = inner
        return out

    def _settle(self, node: fx.Node, key: Key, border: Border, out: Maps) -> None:
        """A bordered map is a map once every side equals the bias."""
        if all(border.base.bias_is(v) for _, v in border.sides.values()):
            out[key] = border.base
        self.borders.setdefault(node, {})[key] = border

    def _slice_scatter(self, node: fx.Node) -> Maps:
        """Writing a channel constant over exactly one side of a pad (Ding et al., DBB, 3.3)."""
        args = nodes.arguments(node)
        base, source, axis = args["self"], args["src"], int(args["dim"])
        rank = len(shape(base))
        if base not in self.borders or args["step"] != 1 or axis < 2:
            return {}
        extent = shape(base)[axis]
        start = args["start"] if args["start"] is not None else 0
        end = args["end"] if args["end"] is not None else extent
        if not isinstance(start, int) or not isinstance(end, (int, torch.SymInt)):
            return {}
        value = constants.compact(source)
        out: Maps = {}
        for key, border in self.borders[base].items():
            sides = dict(border.sides)
            written = covered_side(sides, axis - 2, start, end, extent)
            if value is None or written is None or nodes.dtype(source) != nodes.dtype(base):
                continue
            full = (1,) * (rank - len(value.shape)) + value.shape
            if any(s != 1 for i, s in enumerate(full) if i != 1):
                continue
            channels = value.get().reshape(-1).expand(border.base.out_channels)
            sides[(axis - 2, written)] = (sides[(axis - 2, written)][0], channels)
            self._settle(node, key, Border(border.base, sides), out)
        return out

    def _cat(self, cat: concatenations.Cat) -> Maps:
        node, parts, axis = cat.node, cat.parts, cat.axis
        if any(nodes.dtype(p) != nodes.dtype(node) for p in parts):
            return {}
        out: Maps = {}
        for kind, channel in _axes(node):
            if channel != axis:
                continue
            views = [self.of(p) for p in parts]
            for key in views[0]:
                found = [v.get(key) for v in views]
                if key[0] != kind or any(m is None for m in found):
                    continue
                whole = [m for m in found if m is not None]
                if not same([m.out_channels for m in whole], [shape(p)[axis] for p in parts]):
                    continue
                if all(m.in_channels == whole[0].in_channels for m in whole) and all(
                    m.stride == whole[0].stride for m in whole
                ):
                    out[key] = am.concatenate(whole)
        return out

    def _slice(self, node: fx.Node) -> Maps:
        args = nodes.arguments(node)
        u, axis, step = args["self"], int(args["dim"]), args["step"]
        rank = len(shape(u))
        axis %= rank
        size = shape(u)[axis]
        start = args["start"] if args["start"] is not None else 0
        if not isinstance(start, int) or not isinstance(step, int):
            return {}
        if start < 0:
            if not isinstance(size, int):
                return {}
            start = max(size + start, 0)
        out: Maps = {}
        for kind, channel in _axes(node):
            if channel == axis:
                if not isinstance(size, int) or not isinstance(shape(node)[axis], int):
                    continue
                index = torch.arange(start, start + step * int(shape(node)[axis]), step)
                for key, inner in self.of(u).items():
                    if key[0] == kind and inner.out_channels == size:
                        out[key] = am.select(inner, index)
            elif kind == "conv" and axis >= 2 and isinstance(shape(u)[1], int):
                starts, steps = [0] * (rank - 2), [1] * (rank - 2)
                starts[axis - 2], steps[axis - 2] = start, step
                outer = am.window(int(shape(u)[1]), tuple(starts), tuple(steps))
                out.update(self._after(outer, u, node, "conv"))
        return out

    def _part(self, node: fx.Node) -> Maps:
        """One part of a split or chunk along the channels."""
        parent, index = node.args[0], node.args[1]
        if not isinstance(parent, fx.Node) or not isinstance(index, int):
            return {}
        if not is_call(parent, aten.split, aten.split_with_sizes, aten.chunk):
            return {}
        args = nodes.arguments(parent)
        u = args["self"]
        axis = int(args["dim"]) % len(shape(u))
        values = parent.meta["val"]
        sizes = [v.shape[axis] for v in values]
        if any(not isinstance(s, int) for s in sizes):
            return {}
        start = sum(sizes[:index])
        out: Maps = {}
        for kind, channel in _axes(node):
            if channel != axis:
                continue
            for key, inner in self.of(u).items():
                if key[0] == kind and inner.out_channels == sum(sizes):
                    out[key] = am.select(inner, torch.arange(start, start + sizes[index]))
        return out

    def _shuffle(self, node: fx.Node) -> Maps:
        u, groups = node.args[0], node.args[1]
        if not is_tensor(u) or not isinstance(shape(u)[1], int) or not isinstance(groups, int):  # type: ignore[arg-type]
            return {}
        order = torch.arange(shape(u)[1]).reshape(groups, -1).t().reshape(-1)  # type: ignore[arg-type]
        return {
            key: am.select(inner, order)
            for key, inner in self.of(u).items()  # type: ignore[arg-type]
            if key[0] == "conv"
        }

    def _picked(self, node: fx.Node) -> Maps:
        """Channels repeated, reversed or picked by a constant index, and nothing else moved."""
        out: Maps = {}
        args = nodes.arguments(node)
        u = args.get("self")  # a call of `repeat_interleave` may have its counts alone
        if not isinstance(u, fx.Node) or not is_tensor(u) or len(shape(u)) != len(shape(node)):
            return out
        for kind, axis in _axes(node):
            size = shape(u)[axis]
            order = _order(node, args, axis, size) if isinstance(size, int) else None
            if order is None:
                continue
            for key, inner in self.of(u).items():
                if key[0] == kind and inner.out_channels == size:
                    out[key] = am.select(inner, order)
        return out

    def _reshape(self, node: fx.Node) -> Maps:
        """Reshapes are transparent to feature maps: they keep the row-major order of elements.

        A longer last axis lays rows side by side, which repeats the matrix; a shorter one leaves a
        map whose rows span several axes.
        """
        u = node.args[0]
        if not is_tensor(u) or not shape(node) or not shape(u):  # type: ignore[arg-type]
            return {}
        new, old = shape(node)[-1], shape(u)[-1]  # type: ignore[arg-type]
        if not isinstance(new, int) or not isinstance(old, int) or old == 0:
            return {}
        out: Maps = {}
        for key, inner in self.of(u).items():  # type: ignore[arg-type]
            if key[0] != "feature":
                continue
            if new % inner.out_channels == 0 and new != inner.out_channels:
                out[key] = am.repeat_features(inner, new // inner.out_channels)
            else:
                out[key] = inner
        return out


def _grown(sizes: Sequence[nodes.Size], base: AffineMap, kind: str) -> list[Any]:
    """The sizes of a map's whole result: all that its taps reach, and nothing cropped."""
    if kind == "conv":
        return list(sizes)
    if any(base.origin):
        return []
    taps = zip(sizes, base.stride, base.kernel, strict=True)
    return [stride * (size - 1) + kernel for size, stride, kernel in taps]


def _order(node: fx.Node, args: Any, axis: int, size: int) -> torch.Tensor | None:
    """Which channel each channel of the result is, if a call rearranges them alone."""
    every, rank = torch.arange(size), len(shape(node))
    if is_call(node, aten.repeat.default):
        times = list(args["repeats"])
        others = [t for a, t in enumerate(times) if a != axis]
        alone = set(others) <= {1} and isinstance(times[axis], int)
        return every.repeat(times[axis]) if alone else None
    if is_call(node, aten.flip.default):
        return every.flip(0) if [d % rank for d in args["dims"]] == [axis] else None
    if is_call(node, aten.index.Tensor):
        given = list(args["indices"])
        others = [i for a, i in enumerate(given) if a != axis]
        return _picks(given[axis], every) if len(given) > axis and not any(others) else None
    if args.get("dim") is None or int(args["dim"]) % rank != axis:
        return None
    if is_call(node, aten.repeat_interleave.self_int) and isinstance(args["repeats"], int):
        return every.repeat_interleave(args["repeats"])
    return _picks(args["index"], every) if is_call(node, aten.index_select.default) else None


def _picks(index: Any, every: torch.Tensor) -> torch.Tensor | None:
    """What a constant index picks."""
    if not constants.is_fixed(index):
        return None
    picked = constants.tensor(index).to(every.device)
    return every[picked] if picked.dim() == 1 else None


def _bridge(left: Maps, right: Maps, a: fx.Node, b: fx.Node) -> None:
    """Where one term is a matrix over a root and the other a convolution of it: two matrices."""
    for ours, theirs, node in ((left, right, a), (right, left, b)):
        for kind, root in list(theirs):
            key = ("conv", root)
            if kind != "feature" or (kind, root) in ours or key not in ours:
                continue
            base, sizes, results = ours[key], shape(root)[1:], shape(node)[1:]
            if any(not isinstance(s, int) for s in (*sizes, *results)) or base.spatial > 3:
                continue
            size, result = tuple(map(int, sizes)), tuple(map(int, results))
            if math.prod(size) * math.prod(result) <= _MAX_MATRIX:
                ours[(kind, root)] = am.as_matrix(base, size[1:], result[1:])


def _enter_pads(left: Maps, right: Maps) -> None:
    """Where one term reads a padded tensor and the other, pointwise, the tensor inside.

    A pad of any mode keeps its inside, so the pointwise term reads the padded tensor too.
    """
    for ours, theirs in ((left, right), (right, left)):
        for kind, padded in list(theirs):
            pad = windows.pad(padded)
            key = ("conv", pad.x) if pad is not None else None
            if pad is None or key not in ours or ("conv", padded) in ours:
                continue
            base = ours[key]
            if kind != "conv" or not base.is_pointwise or min((*pad.low, *pad.high)) < 0:
                continue
            low = (0,) * (base.spatial - len(pad.low)) + pad.low
            ours[("conv", padded)] = replace(base, origin=tuple(-a for a in low))


def _is_empty(node: fx.Node) -> bool:
    return is_tensor(node) and nodes.is_empty(node)


def identity_maps(node: fx.Node) -> Maps:
    """A tensor as an affine map of itself, in every kind that fits its shape."""
    if not is_tensor(node) or not node.meta["val"].is_floating_point():
        return {}
    return {
        (kind, node): am.identity(int(shape(node)[axis]), _spatial(kind, node))
        for kind, axis in _axes(node)
    }


def _axes(node: fx.Node) -> list[tuple[str, int]]:
    sizes = shape(node)
    out: list[tuple[str, int]] = []
    if len(sizes) >= 3 and isinstance(sizes[1], int) and sizes[1] > 0:
        out.append(("conv", 1))
    if len(sizes) >= 2 and isinstance(sizes[-1], int) and sizes[-1] > 0:
        out.append(("feature", len(sizes) - 1))
    return out


def _spatial(kind: str, node: fx.Node) -> int:
    return len(shape(node)) - 2 if kind == "conv" else 0


def _bias(bias: Any, channels: int) -> torch.Tensor:
    return torch.zeros(channels, dtype=torch.float64) if bias is None else bias.get().reshape(-1)


def _along(factor: Lazy, axis: int, size: nodes.Size) -> torch.Tensor | None:
    """A constant as one finite value per channel, if it varies along that axis alone."""
    if not isinstance(size, int) or any(s != 1 for a, s in enumerate(factor.shape) if a != axis):
        return None
    values = factor.get().reshape(-1).expand(size)
    return values if bool(values.isfinite().all()) else None


def _repeated(base: AffineMap, times: int) -> AffineMap:
    return base if times == 1 else am.repeat_features(base, times)


def _over(factor: Lazy, sizes: Sequence[nodes.Size], count: int) -> torch.Tensor | None:
    """A constant as one finite value for each of ``count`` features in the last axes."""
    axis, found = len(sizes), 1
    while found < count and axis > 1 and isinstance(sizes[axis - 1], int):
        axis -= 1
        found *= int(sizes[axis])
    if found != count or any(s != 1 for s in factor.shape[:axis]):
        return None
    values = factor.get().expand(*(1,) * axis, *(int(s) for s in sizes[axis:])).reshape(-1)
    return values if bool(values.isfinite().all()) else None


def addable(a: AffineMap, b: AffineMap) -> bool:
    """True if two maps over one root may be summed: same grid, same channels."""
    return (
        a.stride == b.stride
        and a.out_channels == b.out_channels
        and a.in_channels == b.in_channels
        and a.spatial == b.spatial
    )
