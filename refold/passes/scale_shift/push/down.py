"""The way down: every reader of a tensor takes its scale and shift."""

from __future__ import annotations

import operator

import torch
from torch import fx

from refold.algebra.lazy import Lazy
from refold.errors import Declined
from refold.graph import aliasing, layout, nodes
from refold.graph.nodes import aten, is_call, is_tensor
from refold.graph.records import (
    comparisons,
    concatenations,
    convolutions,
    products,
    scale_shifts,
    sums,
    windows,
)
from refold.passes.scale_shift.push import thresholds
from refold.passes.scale_shift.push.factor import Factor, Plan, preimage
from refold.passes.scale_shift.push.walk import (
    SMALL,
    Walk,
    not_linear,
    operand,
    reads,
    uneven,
    widens,
)


class Downward(Walk):
    """Plans readers."""

    def _down(self, n: fx.Node, factor: Factor, plan: Plan) -> None:
        """Plans every reader of ``n`` to read a value to which the factor was not applied."""
        if factor.is_identity:
            return
        for user in list(n.users):
            if nodes.pinned(user):
                raise Declined(f"{user.name} is excluded")
            if user.op != "call_function" or reads(user, n) != 1:
                raise Declined(f"{user.name} reads it")
            if is_tensor(user) and nodes.is_empty(user):
                continue  # it takes nothing of what it reads
            if not self._down_terminal(user, n, factor, plan):
                with self._step(user):
                    self._down_passing(user, n, factor, plan)

    def _down_terminal(self, c: fx.Node, n: fx.Node, factor: Factor, plan: Plan) -> bool:
        if (conv := convolutions.conv(c)) is not None and conv.x is n:
            channels = (
                conv.weight.shape[0] if conv.transposed else (conv.weight.shape[1] * conv.groups)
            )
            reason = uneven(conv, factor) if factor.shifts else None
            if reason is not None and not self._pad_before_cast(conv, factor, plan):
                self._down_map(conv, factor, reason, plan)
                factor = Factor(factor.scale, torch.zeros_like(factor.scale))
            scale, shift = factor.vectors(1, channels)
            self._check_sharing(conv.weight_node)

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
            self._check_range(c, weight)
            self._check_range(c, bias)
            plan.edits.append(
                lambda: self._set_weights(c, 1, conv.weight_node, weight, 2, conv.bias_node, bias)
            )
        elif (linear := products.linear(c)) is not None and linear.x is n:
            scale, shift = factor.vectors(-1, linear.weight.shape[1])
            self._check_sharing(linear.weight_node)
            weight = linear.weight.times(scale)

            def total() -> torch.Tensor:
                extra = linear.weight.get() @ shift
                return extra if linear.bias is None else extra + linear.bias.get()

            parents = [part for part in (linear.weight, linear.bias) if part is not None]
            bias = linear.bias
            if factor.shifts:
                bias = Lazy((weight.shape[0],), total, parents=parents)
            self._check_range(c, weight)
            self._check_range(c, bias)
            plan.edits.append(lambda: self._set_linear(linear, weight, bias))
        else:
            return False
        plan.kept.add(c)
        plan.touch(c)
        return True

    def _pad_before_cast(self, conv: convolutions.Conv, factor: Factor, plan: Plan) -> bool:
        """Pads integers with the one value that the scale and shift take to zero.

        Only where the cast to floats follows, so that narrow elements move instead of wide ones.
        """
        assert self.record is not None
        cast, c = self.record.x, conv.node
        if conv.x is not self.record.node or not nodes.only_user(conv.x, c):
            return False
        if not is_call(cast, aten.to.dtype) or not nodes.only_user(cast, self.record.reader):
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
        costs = self.costs.at(self.record.node)
        padded = costs.elementwise(nodes.hints(source), 1, 1)
        if costs.of(self.record.node).over(padded) <= 0:
            return False

        def edit() -> None:
            amounts = [p for p in reversed(conv.padding) for _ in (0, 1)]
            with self.door.before(cast):
                args = (source, amounts, "constant", value)
                padded = self.door.call(aten.pad.default, args, sources=[conv.x])
            for node in (padded, cast):  # neither has the value of a node of the original
                self.door.stamp(node, [node], value=None)
            wider = aliasing.run_fake(cast, {source: padded.meta["val"]})
            self.door.set(cast, args=(padded, *cast.args[1:]), value=wider)
            self.door.set_arguments(c, {4: [0] * conv.spatial})

        plan.edits.append(edit)
        return True

    def _down_map(self, conv: convolutions.Conv, factor: Factor, reason: str, plan: Plan) -> None:
        """Adds to the output what the layer makes of the shift, computed once."""
        c = conv.node
        assert self.record is not None
        sizes, results = nodes.shape(conv.x)[1:], nodes.shape(c)[1:]
        if not self.border_maps or 0 in factor.varies() or widens(self.record):
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
        costs = self.costs.at(c)
        plan.price += costs.elementwise(nodes.hints(c), 1, width, added.numel())
        now = costs.of(self.record.node)
        if now.over(plan.price) <= 0:
            raise Declined(f"{reason}; a map of what it adds {costs.dearer(now, plan.price)}")
        size = added.numel() * width
        if size > SMALL:
            if size > self.budget:
                raise Declined(f"{reason}; a map of what it adds would grow the constants too far")
            self.budget -= size
        self._check_range(c, added)

        def edit() -> None:
            with self.door.before(c.next):
                data = self.door.constant(f"{c.name}.map", added, c.meta["val"])
                total = self.door.call(aten.add.Tensor, (c, data), sources=[c], like=c)
            self.door.stamp(c, [c], value=None)
            self.door.replace(c, total)

        plan.edits.append(edit)

    def _down_passing(self, c: fx.Node, n: fx.Node, factor: Factor, plan: Plan) -> None:
        plan.touch(c)
        if c.args and c.args[0] is n and layout.is_layout(c):
            if is_tensor(c):
                return self._down(c, self._gathered(c, n, factor), plan)
            for part in list(c.users):
                if part.target is not operator.getitem:
                    raise Declined(f"{part.name} reads it")
                if not nodes.is_empty(part):  # that takes nothing of what is split
                    self._down(part, self._gathered(part, n, factor), plan)
            return None
        if (cat := concatenations.cat(c)) is not None:
            return self._down_cat(cat, n, factor, plan)
        if (record := scale_shifts.affine(c)) is not None and record.x is n:
            return self._down_affine(record, factor, plan)
        if (total := sums.add(c)) is not None and bool((factor.scale == 1).all()):
            alpha = 1.0 if total.left is n else total.alpha
            return self._down(c, Factor(factor.scale, alpha * factor.shift), plan)
        if is_call(c, aten.mul.Tensor, aten.div.Tensor) and not factor.shifts:
            return self._down_product(c, n, factor, plan)
        if (pad := windows.pad(c)) is not None and pad.x is n and pad.mode == "constant":
            return self._down(c, self._padded(pad, factor, plan), plan)
        if c.args and c.args[0] is n and self._commutes(c, factor):
            if is_call(c, aten.mean.dim) and not nodes.arguments(c)["keepdim"]:
                reduced = self._reduced(c) or set()
                sizes = [s for a, s in enumerate(factor.scale.shape) if a not in reduced]
                shifts = [s for a, s in enumerate(factor.shift.shape) if a not in reduced]
                factor = Factor(factor.scale.reshape(sizes), factor.shift.reshape(shifts))
            if is_tensor(c):
                return self._down(c, factor, plan)
            part = next(iter(c.users))
            if self._first_result(part) is not c:
                raise Declined(f"where the values of {c.name} lay is read, too")
            plan.touch(part)
            return self._down(part, factor, plan)
        if is_call(c, aten.sign, aten.sgn):
            return self._down_sign(c, n, factor, plan)
        if (comparison := comparisons.comparison(c)) is not None and comparison.x is n:
            return self._down_comparison(comparison, factor, plan)
        raise Declined(not_linear(c))

    def _down_sign(self, c: fx.Node, n: fx.Node, factor: Factor, plan: Plan) -> None:
        """Moves the threshold, by one addition; the readers take the signs of the scale."""
        if bool((factor.scale == 1).all()):
            raise Declined(f"{c.name} has no threshold of its own that could take the shift")
        added, after = thresholds.of_sign(factor, nodes.dtype(n))
        if after.is_identity:
            plan.kept.add(c)
        self._down(c, after, plan)
        if not bool(added.any()):
            return
        current = operand(c, n)

        def edit() -> None:
            assert self.record is not None
            x = current()
            with self.door.before(c):
                data = self.door.constant(f"{c.name}.threshold", Lazy.of(added), n.meta["val"])
                moved = self.door.call(
                    aten.add.Tensor, (x, data), sources=[self.record.node], like=n
                )
            self.door.stamp(moved, [self.record.node], value=None)
            self.door.set_operand(c, x, moved)

        plan.edits.append(edit)

    def _down_comparison(self, record: comparisons.Comparison, factor: Factor, plan: Plan) -> None:
        """Compares with another threshold; what comes out is the same."""
        c, n = record.node, record.x
        operation, value = thresholds.of_comparison(
            factor, record.operation, record.value.get(), nodes.dtype(n)
        )
        current = operand(c, n)

        def edit() -> None:
            with self.door.before(c):
                data = self.door.constant(f"{c.name}.threshold", Lazy.of(value), n.meta["val"])
            target = getattr(aten, operation).Tensor
            self.door.set(c, target=target, args=(current(), data), kwargs={})

        plan.kept.add(c)
        plan.edits.append(edit)

    def _down_affine(self, record: scale_shifts.Affine, factor: Factor, plan: Plan) -> None:
        """Into a norm; the scale alone passes a shift: ``s * x + h = s * (x + h / s)``."""
        c, n = record.node, record.x
        inner = Factor(record.scale.get(), record.shift.get())
        both = Factor(inner.scale * factor.scale, inner.scale * factor.shift + inner.shift)
        if record.is_norm:
            if both.varies() - {1}:
                raise Declined(f"the constant varies along another axis than {c.name}'s channels")
            plan.kept.add(c)
            plan.edits.append(lambda: self._emit_norm(c, n, both))
            return
        if not factor.shifts and not inner.shifts:
            return self._down(c, factor, plan)
        if bool((factor.scale == 1).all()):
            raise Declined(f"{c.name} scales or shifts, too, and is pushed by itself")
        if bool((both.scale == 0).any()):
            raise Declined(f"a zero scale does not pass {c.name}, which shifts")
        if nodes.dtype(c) == torch.float16:
            raise Declined(f"{c.name} could overflow float16 before the scale")
        moved = Factor(both.scale, torch.zeros_like(both.scale))
        self._down(c, moved, plan)
        ones, shift = torch.ones_like(both.scale), both.shift / both.scale
        plan.edits.append(lambda: self._emit_affine(c, n, ones, shift))

    def _down_product(self, c: fx.Node, n: fx.Node, factor: Factor, plan: Plan) -> None:
        """``(s * x) * y = s * (x * y)``, and ``(s * x) / y``; ``y`` may broadcast ``x``."""
        if is_call(c, aten.div.Tensor) and c.args[0] is not n:
            raise Declined(f"{c.name} divides by it")
        if nodes.dtype(c) != nodes.dtype(n):
            raise Declined(f"{c.name} promotes its dtype")
        if nodes.dtype(c) == torch.float16 and bool((factor.scale.abs() < 1).any()):
            raise Declined(f"{c.name} could overflow float16 before the scale")
        lead = (1,) * (len(nodes.shape(c)) - factor.scale.dim())
        wide = [t.reshape(*lead, *t.shape) for t in (factor.scale, factor.shift)]
        self._down(c, Factor(*wide), plan)

    def _padded(self, pad: windows.Pad, factor: Factor, plan: Plan) -> Factor:
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
            self._pad_preimage(pad, factor, plan)
        return factor.padded({a: amounts[a] for a in along})

    def _pad_preimage(self, pad: windows.Pad, factor: Factor, plan: Plan) -> None:
        """Pads with the value that the scale and shift take to the pad's own."""
        value = preimage(factor, pad.value)
        if value is None:
            raise Declined(f"{pad.node.name} would have to pad each channel with another value")
        if abs(value) > torch.finfo(nodes.dtype(pad.node)).max:
            raise Declined(f"the value that {pad.node.name} would pad with overflows its dtype")
        index = 2 if is_call(pad.node, aten.constant_pad_nd.default) else 3
        plan.edits.append(lambda: self.door.set_arguments(pad.node, {index: value}))

    def _gathered(self, c: fx.Node, n: fx.Node, factor: Factor) -> Factor:
        return Factor(*layout.push(c, n, (factor.scale, factor.shift), self.graph))

    def _down_cat(self, cat: concatenations.Cat, n: fx.Node, factor: Factor, plan: Plan) -> None:
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

        self._down(cat.node, Factor(spread(factor.scale, 1.0), spread(factor.shift, 0.0)), plan)
