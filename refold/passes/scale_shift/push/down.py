"""The way down: every reader of a tensor takes its scale and shift."""

from __future__ import annotations

import operator

import torch
from torch import fx

from refold.algebra.lazy import Lazy
from refold.errors import Declined
from refold.graph import aliasing, constants, layout, nodes
from refold.graph.nodes import aten, is_call, is_tensor
from refold.graph.ops import op_name
from refold.graph.records import (
    comparisons,
    concatenations,
    convolutions,
    products,
    recurrences,
    scale_shifts,
    sums,
    windows,
)
from refold.passes.scale_shift.push import carry, thresholds, weights
from refold.passes.scale_shift.push.factor import Factor, preimage
from refold.passes.scale_shift.push.plan import Draft, Plan, came_to
from refold.passes.scale_shift.push.region import SMALL, Copies, Region
from refold.rewrite.edit import Edit


class Downward:
    """Plans the way into all that reads a scale-shift.

    Args:
        region: the scale-shift, and where it stands.
    """

    def __init__(self, region: Region) -> None:
        self._region = region
        self._draft = Draft()

    def plan(self) -> Plan:
        """The ways to the readers that take the scale and shift.

        Raises:
            Declined: one of them cannot; its ``node`` is how far they came.
        """
        self._readers(self._region.record.node, self._region.factor)
        return self._draft.done()

    def _readers(self, n: fx.Node, factor: Factor) -> None:
        """Plans every reader of ``n`` to read a value to which the factor was not applied."""
        if factor.is_identity:
            return
        with came_to(n):
            for user in list(n.users):
                self._reader(user, n, factor)

    def _reader(self, c: fx.Node, n: fx.Node, factor: Factor) -> None:
        if nodes.pinned(c):
            raise Declined(f"{c.name} is excluded")
        if c.op != "call_function" or carry.reads(c, n) != 1:
            raise Declined(f"{c.name} reads it")
        if is_tensor(c) and nodes.is_empty(c):
            return  # it takes nothing of what it reads
        if self._terminal(c, n, factor):
            self._draft.take(c, keeps=True)
            return
        self._draft.enter(c)
        try:
            self._draft.check_new(c)
            self._passing(c, n, factor)
        finally:
            self._draft.leave()

    def _unshare(self, weight: fx.Node, layer: fx.Node, factor: Factor) -> Copies:
        """Plans that a layer reads another weight; returns what alike calls of it read already."""
        self._draft.spent += self._region.growth(weight, factor, self._draft.spent, layer)
        return self._region.copies(layer, factor)

    def _terminal(self, c: fx.Node, n: fx.Node, factor: Factor) -> bool:
        if (conv := convolutions.conv(c)) is not None and conv.x is n:
            channels = (
                conv.weight.shape[0] if conv.transposed else (conv.weight.shape[1] * conv.groups)
            )
            reason = carry.uneven(conv, factor) if factor.shifts else None
            if reason is not None and not self._pad_before_cast(conv, factor):
                self._map(conv, factor, reason)
                factor = Factor(factor.scale, torch.zeros_like(factor.scale))
            scale, shift = factor.vectors(1, channels)
            copies = self._unshare(conv.weight_node, c, factor)

            def scaled(w: torch.Tensor) -> torch.Tensor:
                ones = (1,) * (w.dim() - 2)
                if conv.transposed:
                    return w * scale.reshape(-1, 1, *ones)
                blocks = w.reshape(conv.groups, -1, *w.shape[1:])
                return (blocks * scale.reshape(conv.groups, 1, w.shape[1], *ones)).reshape(w.shape)

            def moved() -> torch.Tensor:
                w = conv.weight.get()
                w = w.reshape(conv.groups, -1, w.shape[1], w[0, 0].numel()).sum(-1)
                extra = torch.einsum("goi,gi->go", w, shift.reshape(conv.groups, -1)).reshape(-1)
                return extra if conv.bias is None else extra + conv.bias.get()

            weight = conv.weight.map(conv.weight.shape, scaled)
            parents = [part for part in (conv.weight, conv.bias) if part is not None]
            bias = conv.bias
            if factor.shifts:
                bias = Lazy((conv.out_channels,), moved, parents=parents)
            weights.check_range(c, weight)
            weights.check_range(c, bias)
            self._draft.later(lambda edit: weights.set_conv(edit, conv, weight, bias, copies))
        elif (linear := products.linear(c)) is not None and linear.x is n:
            scale, shift = factor.vectors(-1, linear.weight.shape[1])
            copies = self._unshare(linear.weight_node, c, factor)
            weight = linear.weight.times(scale)

            def total() -> torch.Tensor:
                extra = linear.weight.get() @ shift
                return extra if linear.bias is None else extra + linear.bias.get()

            parents = [part for part in (linear.weight, linear.bias) if part is not None]
            bias = linear.bias
            if factor.shifts:
                bias = Lazy((weight.shape[0],), total, parents=parents)
            weights.check_range(c, weight)
            weights.check_range(c, bias)
            self._draft.later(lambda edit: weights.set_linear(edit, linear, weight, bias, copies))
        elif (layer := recurrences.recurrence(c)) is not None and layer.x is n:
            self._recurrence(layer, factor)
        else:
            return False
        return True

    def _recurrence(self, layer: recurrences.Recurrence, factor: Factor) -> None:
        """``(s * x + h) @ w.T + b = x @ (w * s).T + (b + w @ h)`` in each direction's gates."""
        c, pairs = layer.node, []
        for weight_node, bias_node in layer.inputs:
            weight, bias = constants.exact(weight_node), constants.exact(bias_node)
            assert weight is not None
            scale, shift = factor.vectors(-1, weight.shape[1])
            if factor.shifts and bias is None:
                raise Declined(f"{c.name} has no bias to take the shift")
            self._draft.spent += self._region.growth(weight_node, factor, self._draft.spent)
            if bias is not None and factor.shifts:
                bias = _biased(weight, bias, shift)
            scaled = weight.times(scale)
            weights.check_range(weight_node, scaled)
            weights.check_range(weight_node, bias)
            pairs.append((scaled, bias))
        self._draft.later(lambda edit: weights.set_recurrence(edit, layer, pairs))

    def _pad_before_cast(self, conv: convolutions.Conv, factor: Factor) -> bool:
        """Pads integers with the one value that the scale and shift take to zero.

        Only where the cast to floats follows, so that narrow elements move instead of wide ones.
        """
        record, c = self._region.record, conv.node
        cast = record.x
        if record.ends is not None or conv.x is not record.node or not nodes.only_user(conv.x, c):
            return False
        if not is_call(cast, aten.to.dtype) or not nodes.only_user(cast, record.reader):
            return False
        source = cast.args[0]
        assert isinstance(source, fx.Node)
        if nodes.dtype(source) not in (torch.uint8, torch.int8) or nodes.pinned(cast):
            return False
        if (
            conv.transposed
            or factor.varies() - {1}
            or isinstance(nodes.arguments(c)["padding"], str)
        ):
            return False
        value, limits = preimage(factor, 0.0), torch.iinfo(nodes.dtype(source))
        if value is None or value != round(value) or not limits.min <= value <= limits.max:
            return False
        costs = self._region.costs.at(self._region.record.node)
        padded = costs.elementwise(nodes.hints(source), 1, 1)
        if costs.of(self._region.record.node).over(padded) <= 0:
            return False

        def write(edit: Edit) -> None:
            amounts = [p for p in reversed(conv.padding) for _ in (0, 1)]
            with edit.before(cast):
                args = (source, amounts, "constant", value)
                padded = edit.call(aten.pad.default, args, sources=[conv.x])
            for node in (padded, cast):  # neither has the value of a node of the original
                edit.stamp(node, [node], value=None)
            wider = aliasing.run_fake(cast, {source: padded.meta["val"]})
            edit.set(cast, args=(padded, *cast.args[1:]), value=wider)
            edit.set_arguments(c, {4: [0] * conv.spatial})

        self._draft.later(write)
        return True

    def _map(self, conv: convolutions.Conv, factor: Factor, reason: str) -> None:
        """Adds to the output what the layer makes of the shift, computed once."""
        c = conv.node
        sizes, results = nodes.shape(conv.x)[1:], nodes.shape(c)[1:]
        region = self._region
        alone = region.widens or region.record.ends is not None
        if not region.border_maps or 0 in factor.varies() or alone:
            raise Declined(reason)
        if any(not isinstance(s, int) for s in (*sizes, *results)):
            raise Declined(f"{reason}; a map of what it adds needs a fixed height and width")
        shape = (1, *map(int, results))
        rest = list(nodes.arguments(c).values())[3:]

        def compute() -> torch.Tensor:
            shift = factor.shift.expand(1, *map(int, sizes))
            out: torch.Tensor = c.target(shift, conv.weight.get(), None, *rest)  # type: ignore[operator]
            return out

        added = Lazy(shape, compute, parents=(conv.weight,))
        width = c.meta["val"].element_size()
        costs = self._region.costs.at(c)
        self._draft.price += costs.elementwise(nodes.hints(c), 1, width, added.numel())
        now, then = costs.of(self._region.record.node), self._draft.price
        if now.over(then) <= 0:
            raise Declined(f"{reason}; a map of what it adds {costs.dearer(now, then)}")
        size = added.numel() * width
        if size > SMALL:
            if size > self._region.budget - self._draft.spent:
                raise Declined(f"{reason}; a map of what it adds would grow the constants too far")
            self._draft.spent += size
        weights.check_range(c, added)

        def write(edit: Edit) -> None:
            with edit.before(c.next):
                data = edit.constant(f"{c.name}.map", added, c.meta["val"])
                total = edit.call(aten.add.Tensor, (c, data), sources=[c], like=c)
            edit.stamp(c, [c], value=None)
            edit.replace(c, total)

        self._draft.later(write)

    def _passing(self, c: fx.Node, n: fx.Node, factor: Factor) -> None:
        """Plans a reader that lets the scale and shift through, or moves its threshold."""
        if c.args and c.args[0] is n and layout.is_layout(c):
            return self._layout(c, n, factor)
        if (cat := concatenations.cat(c)) is not None:
            return self._behind(c, self._joined(cat, n, factor))
        if (record := scale_shifts.affine(c)) is not None and record.x is n:
            return self._affine(record, factor)
        if (total := sums.add(c)) is not None and bool((factor.scale == 1).all()):
            alpha = 1.0 if total.left is n else total.alpha
            return self._behind(c, Factor(factor.scale, alpha * factor.shift))
        if is_call(c, aten.mul.Tensor, aten.div.Tensor) and not factor.shifts:
            return self._product(c, n, factor)
        if op_name(c) in ("matmul", "bmm") and not factor.shifts:
            return self._matmul(c, n, factor)
        if (pad := windows.pad(c)) is not None and pad.x is n and pad.mode == "constant":
            return self._behind(c, self._padded(pad, factor))
        if c.args and c.args[0] is n and carry.commutes(c, factor):
            factor = carry.at_output(factor, c)
            return self._behind(c, factor) if is_tensor(c) else self._pool(c, factor)
        if is_call(c, aten.sign, aten.sgn):
            return self._sign(c, n, factor)
        if (comparison := comparisons.comparison(c)) is not None and comparison.x is n:
            return self._comparison(comparison, factor)
        raise Declined(carry.not_linear(c))

    def _behind(self, c: fx.Node, factor: Factor) -> None:
        """On into what reads a call."""
        self._draft.cross(c)
        self._readers(c, factor)

    def _layout(self, c: fx.Node, n: fx.Node, factor: Factor) -> None:
        if is_tensor(c):
            return self._behind(c, self._gathered(c, n, factor))
        self._draft.cross(c)
        for part in list(c.users):
            if part.target is not operator.getitem:
                raise Declined(f"{part.name} reads it")
            if not nodes.is_empty(part):  # that takes nothing of what is split
                self._behind(part, self._gathered(part, n, factor))
        return None

    def _pool(self, c: fx.Node, factor: Factor) -> None:
        """A max pool that says where its values lay, which nothing reads."""
        part = next(iter(c.users))
        if carry.first_result(part) is not c:
            raise Declined(f"where the values of {c.name} lay is read, too")
        self._draft.cross(c)
        self._behind(part, factor)

    def _sign(self, c: fx.Node, n: fx.Node, factor: Factor) -> None:
        """Moves the threshold, by one addition; the readers take the signs of the scale."""
        if bool((factor.scale == 1).all()) or self._region.record.ends is not None:
            raise Declined(f"{c.name} has no threshold of its own that could take the shift")
        added, after = thresholds.of_sign(factor, nodes.dtype(n))
        if after.is_identity:
            self._draft.take(c, keeps=True)
        else:
            self._behind(c, after)
        if not bool(added.any()):
            return
        current = carry.operand(c, n)

        def write(edit: Edit) -> None:
            x = current()
            with edit.before(c):
                data = edit.constant(f"{c.name}.threshold", Lazy.of(added), n.meta["val"])
                moved = edit.call(
                    aten.add.Tensor, (x, data), sources=[self._region.record.node], like=n
                )
            edit.stamp(moved, [self._region.record.node], value=None)
            edit.set_operand(c, x, moved)

        self._draft.later(write)

    def _comparison(self, record: comparisons.Comparison, factor: Factor) -> None:
        """Compares with another threshold; what comes out is the same."""
        c, n = record.node, record.x
        operation, value = thresholds.of_comparison(
            factor, record.operation, record.value.get(), nodes.dtype(n)
        )
        current = carry.operand(c, n)

        def write(edit: Edit) -> None:
            with edit.before(c):
                data = edit.constant(f"{c.name}.threshold", Lazy.of(value), n.meta["val"])
            target = getattr(aten, operation).Tensor
            edit.set(c, target=target, args=(current(), data), kwargs={})

        self._draft.take(c, keeps=True)
        self._draft.later(write)

    def _affine(self, record: scale_shifts.Affine, factor: Factor) -> None:
        """Into a norm; the scale alone passes a shift: ``s * x + h = s * (x + h / s)``."""
        c, n = record.node, record.x
        inner = Factor(record.scale.get(), record.shift.get())
        both = Factor(inner.scale * factor.scale, inner.scale * factor.shift + inner.shift)
        if record.is_norm:
            if both.varies() - {1}:
                raise Declined(f"the constant varies along another axis than {c.name}'s channels")
            self._draft.take(c, keeps=True)
            self._draft.later(lambda edit: weights.emit_norm(edit, c, n, both))
            return
        if not factor.shifts and not inner.shifts:
            return self._behind(c, factor)
        if bool((factor.scale == 1).all()):
            raise Declined(f"{c.name} scales or shifts, too, and is pushed by itself")
        if bool((both.scale == 0).any()):
            raise Declined(f"a zero scale does not pass {c.name}, which shifts")
        if nodes.dtype(c) == torch.float16:
            raise Declined(f"{c.name} could overflow float16 before the scale")
        self._behind(c, Factor(both.scale, torch.zeros_like(both.scale)))
        ones, shift = torch.ones_like(both.scale), both.shift / both.scale
        self._draft.later(lambda edit: weights.emit_affine(edit, c, n, ones, shift))

    def _product(self, c: fx.Node, n: fx.Node, factor: Factor) -> None:
        """``(s * x) * y = s * (x * y)``, and ``(s * x) / y``; ``y`` may broadcast ``x``."""
        if is_call(c, aten.div.Tensor) and c.args[0] is not n:
            raise Declined(f"{c.name} divides by it")
        if nodes.dtype(c) != nodes.dtype(n):
            raise Declined(f"{c.name} promotes its dtype")
        if nodes.dtype(c) == torch.float16 and bool((factor.scale.abs() < 1).any()):
            raise Declined(f"{c.name} could overflow float16 before the scale")
        self._behind(c, factor.of_rank(len(nodes.shape(c))))

    def _matmul(self, c: fx.Node, n: fx.Node, factor: Factor) -> None:
        """``(x * s) @ y = x @ (s[:, None] * y)`` for a constant ``y``; other axes go on behind."""
        left, right = c.args[:2]
        if not is_tensor(left) or not is_tensor(right):
            raise Declined(carry.not_linear(c))
        other = right if n is left else left
        assert isinstance(other, fx.Node)
        if min(len(nodes.shape(n)), len(nodes.shape(other))) < 2:
            raise Declined(carry.not_linear(c))
        if nodes.dtype(c) == torch.float16 and bool((factor.scale.abs() < 1).any()):
            raise Declined(f"{c.name} could overflow float16 before the scale")
        summed = factor.scale.dim() - (1 if n is left else 2)
        if summed not in factor.varies():
            return self._behind(c, factor.of_rank(len(nodes.shape(c))))
        if factor.varies() != {summed}:
            raise Declined("the constant varies along both axes of a product")
        column = factor.scale.reshape(-1, 1) if n is left else factor.scale.reshape(-1)
        moved = Factor(column, torch.zeros_like(column)).of_rank(len(nodes.shape(other)))
        weights.into_constant(self._draft, other, c, moved)
        self._draft.take(c, keeps=True)
        return None

    def _padded(self, pad: windows.Pad, factor: Factor) -> Factor:
        """The factor behind a pad with a constant: one, and no shift, where the pad has written.

        An axis on which the factor is one value stays such an axis: the pad takes the constant
        that the scale and shift take to its own. A crop takes nothing but its part of the factor.
        """
        first = factor.scale.dim() - len(pad.low)
        amounts = {a: p for a, p in enumerate(zip(pad.low, pad.high, strict=True), first) if any(p)}
        along = sorted(factor.varies() & amounts.keys())
        written = any(max(p) > 0 for a, p in amounts.items() if a not in along)
        if written and (factor.shifts or pad.value != 0):
            if along:
                raise Declined("the constant varies along a padded axis")
            self._pad_preimage(pad, factor)
        return factor.padded({a: amounts[a] for a in along})

    def _pad_preimage(self, pad: windows.Pad, factor: Factor) -> None:
        """Pads with the value that the scale and shift take to the pad's own."""
        value = preimage(factor, pad.value)
        if value is None:
            raise Declined(f"{pad.node.name} would have to pad each channel with another value")
        if abs(value) > torch.finfo(nodes.dtype(pad.node)).max:
            raise Declined(f"the value that {pad.node.name} would pad with overflows its dtype")
        index = 2 if is_call(pad.node, aten.constant_pad_nd.default) else 3
        self._draft.later(lambda edit: edit.set_arguments(pad.node, {index: value}))

    def _gathered(self, c: fx.Node, n: fx.Node, factor: Factor) -> Factor:
        return Factor(*layout.push(c, n, (factor.scale, factor.shift), self._region.graph))

    def _joined(self, cat: concatenations.Cat, n: fx.Node, factor: Factor) -> Factor:
        """The factor behind a concatenation: one, and no shift, in the other parts."""
        axis = cat.axis
        sizes = [nodes.shape(p)[axis] for p in cat.parts]
        if any(not isinstance(s, int) for s in sizes):
            raise Declined("the concatenated axis is dynamic")

        def spread(value: torch.Tensor, fill: float) -> torch.Tensor:
            parts = []
            for part, size in zip(cat.parts, sizes, strict=True):
                sizes_ = list(value.shape)
                sizes_[axis] = int(size)
                parts.append(value.expand(sizes_) if part is n else value.new_full(sizes_, fill))
            return torch.cat(parts, axis)

        return Factor(spread(factor.scale, 1.0), spread(factor.shift, 0.0))


def _biased(weight: Lazy, bias: Lazy, shift: torch.Tensor) -> Lazy:
    return Lazy(bias.shape, lambda: bias.get() + weight.get() @ shift, parents=(weight, bias))
