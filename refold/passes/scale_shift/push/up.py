"""The way up: what produces a tensor takes its scale and shift."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from refold.algebra.lazy import Lazy
from refold.errors import Declined
from refold.graph import constants, layout, nodes
from refold.graph.nodes import aten, is_call, is_tensor
from refold.graph.ops import kind, op_name
from refold.graph.records import (
    concatenations,
    convolutions,
    products,
    quantised,
    scale_shifts,
    sums,
)
from refold.passes.scale_shift.push import carry, weights
from refold.passes.scale_shift.push.factor import Factor, aligned, narrow
from refold.passes.scale_shift.push.plan import Draft, Plan, came_to
from refold.passes.scale_shift.push.region import Copies, Region
from refold.rewrite.edit import Edit

_LARGEST = 32  # calls between a producer and what is pushed into it along several paths


class Upward:
    """Plans the way into what makes the tensor that a scale-shift reads.

    Args:
        region: the scale-shift, and where it stands.
        joins: whether a tensor may take what all of its readers want.

    Attributes:
        joined: whether that made a difference to the plan.
    """

    def __init__(self, region: Region, *, joins: bool = True) -> None:
        self.joined = False
        self._region, self._joins = region, joins
        self._draft = Draft()

    def plan(self) -> Plan:
        """The way to the layers that take the scale and shift.

        Raises:
            Declined: one of them cannot; its ``node`` is how far they came.
        """
        if self._region.widens:
            raise Declined("its input is an integer tensor")
        draft, record = self._draft, self._region.record
        self._produce(record.x, record.reader, self._region.factor)
        while draft.parts or draft.shared:
            # the last in the graph first: its path may lead to an earlier one
            source = max([*draft.parts, *(u for u, _ in draft.shared)])
            if source in draft.parts:
                reader, factor = draft.parts.pop(source)
                with came_to(reader):
                    self._part(source, reader, factor)
            else:
                self._joint(source)
        return draft.done()

    def _produce(self, u: fx.Node, consumer: fx.Node, factor: Factor) -> None:
        """Plans ``u`` to produce ``scale * u + shift``; ``consumer`` is its one reader."""
        if factor.is_identity:
            return
        with came_to(consumer):
            if u.op == "get_attr":
                weights.into_constant(self._draft, u, consumer, factor)
            elif self._takes_alone(u, consumer):
                self._into(u, factor)
            else:
                self._draft.shared[u, consumer] = factor

    def _takes_alone(self, u: fx.Node, consumer: fx.Node) -> bool:
        """True if one call alone reads ``u``, false if all of its readers are on the path."""
        if u.op == "placeholder":
            raise Declined("its input is the network's input")
        if nodes.pinned(u):
            raise Declined(f"{u.name} is excluded")
        if carry.reads(consumer, u) != 1:
            raise Declined(f"{consumer.name} reads {u.name} twice")
        if nodes.only_user(u, consumer):
            return True
        if not self._is_inside(u):
            raise Declined(f"{u.name} has other users")
        self.joined = True
        return False

    def _into(self, u: fx.Node, factor: Factor) -> None:
        self._draft.enter(u)
        try:
            for way in (self._terminal, self._affine, self._layout, self._passing):
                if way(u, factor):
                    return
        finally:
            self._draft.leave()
        several = u.target is operator.getitem and isinstance(u.args[0], fx.Node)
        raise Declined(carry.not_linear(u.args[0] if several else u))  # type: ignore[arg-type]

    def _is_inside(self, u: fx.Node) -> bool:
        """True if all that is computed from ``u`` ends in the scale-shift that is pushed."""
        if not self._joins:
            return False
        ends = self._region.ends
        seen, stack = {u}, [u]
        while stack:
            for user in stack.pop().users:
                if user in ends or user in seen:
                    continue
                if user.op != "call_function" or len(seen) == _LARGEST:
                    return False
                seen.add(user)
                stack.append(user)
        return True

    def _joint(self, u: fx.Node) -> None:
        """Pushes into a tensor of which all readers want the same."""
        shared = self._draft.shared
        wanted = {c: shared.pop((u, c)) for (v, c) in list(shared) if v is u}
        first, *others = wanted.values()
        with came_to(next(iter(wanted))):
            if set(wanted) != set(u.users) or any(not first.equals(other) for other in others):
                raise Declined(f"{u.name} has other users")
            self._into(u, first)

    def _unshare(self, weight: fx.Node, layer: fx.Node, factor: Factor) -> Copies:
        """Plans that a layer reads another weight; returns what alike calls of it read already."""
        self._draft.spent += self._region.growth(weight, factor, self._draft.spent, layer)
        return self._region.copies(layer, factor)

    def _terminal(self, u: fx.Node, factor: Factor) -> bool:
        if (conv := convolutions.conv(u)) is not None:
            scale, shift = factor.vectors(1, conv.out_channels)
            copies = self._unshare(conv.weight_node, u, factor)

            if conv.transposed:
                turned = partial(weights.scale_outputs, conv=conv, scale=scale)
                weight = conv.weight.map(conv.weight.shape, turned)
            else:
                weight = conv.weight.times(scale.reshape(-1, *(1,) * (conv.spatial + 1)))
            bias = weights.shifted(conv.bias, scale, shift)
            weights.check_range(u, weight)
            weights.check_range(u, bias)
            self._draft.later(lambda edit: weights.set_conv(edit, conv, weight, bias, copies))
        elif (linear := products.linear(u)) is not None:
            scale, shift = factor.vectors(-1, linear.weight.shape[0])
            copies = self._unshare(linear.weight_node, u, factor)
            weight = linear.weight.times(scale[:, None])
            bias = weights.shifted(linear.bias, scale, shift)
            weights.check_range(u, weight)
            weights.check_range(u, bias)
            self._draft.later(lambda edit: weights.set_linear(edit, linear, weight, bias, copies))
        elif (norm := scale_shifts.norm_affine(u)) is not None:
            self._norm(norm, factor)
        elif (layer := quantised.quantised(u)) is not None:
            self._quantised(layer, factor)
        elif is_call(u, aten.embedding.default) and carry.embedding_table(u) is not None:
            table = carry.embedding_table(u)
            assert table is not None
            scale, shift = factor.vectors(-1, table.shape[1])
            copies = self._unshare(u.args[0], u, factor)  # type: ignore[arg-type]
            new = table.map(table.shape, lambda w: w * scale + shift)
            self._draft.later(
                lambda edit: weights.set_weights(edit, u, 0, u.args[0], new, copies=copies)
            )
        else:
            return False
        self._draft.take(u)
        return True

    def _norm(self, norm: scale_shifts.NormAffine, factor: Factor) -> None:
        u = norm.node
        if factor.varies() - set(norm.axes):
            raise Declined(f"the constant varies along another axis than {kind(u)}'s weight")
        if factor.shifts and not norm.shifts:
            raise Declined(f"{kind(u)} has no bias to take the shift")
        sizes = nodes.shape(u)
        full = tuple(sizes[a] if a in norm.axes else 1 for a in range(len(sizes)))
        if any(not isinstance(s, int) for s in full):
            raise Declined("the normalised axes are dynamic")
        target = tuple(int(sizes[a]) for a in norm.axes)
        scale = factor.scale.expand(full).reshape(target)
        shift = factor.shift.expand(full).reshape(target)
        weight = constants.exact(norm.weight) if norm.weight is not None else None
        bias = constants.exact(norm.bias) if norm.bias is not None else None
        new_weight = Lazy(target, lambda: scale)
        if weight is not None:
            new_weight = weight.map(target, lambda w: scale * w)
        new_bias = weights.shifted(bias, scale, shift) if norm.shifts else None
        self._draft.later(lambda edit: weights.set_norm(edit, norm, new_weight, new_bias))

    def _quantised(self, layer: quantised.Quantised, factor: Factor) -> None:
        """Into the scales of the weight: ``s * d * (q - z) = |s| * d * (sign(s) * (q - z))``.

        The integers stay what they are but for channels of a negative or zero factor.
        """
        u = layer.node
        if layer.dtype.is_floating_point:
            # PyTorch has no kernel for a float8 tensor with a scale for each channel.
            raise Declined(f"{u.name} has a float8 weight, which has one scale for all channels")
        scale, shift = factor.vectors(layer.axis, layer.out_channels)
        new_scales = layer.scales.map(
            layer.scales.shape, lambda d: torch.where(scale == 0, d, d * scale.abs())
        )
        bias = weights.shifted(layer.bias, scale, shift)
        weights.check_range(u, new_scales)
        weights.check_range(u, bias)
        zeros = layer.zeros.to(torch.int64)
        integers = None
        if bool((scale <= 0).any()):
            stored = constants.tensor(layer.integers)
            rows = (-1, *(1,) * (stored.dim() - 1))
            origin = zeros.reshape(rows)
            turned = origin + scale.sign().long().reshape(rows) * (stored.cpu().long() - origin)
            low, high = layer.limits
            if bool(((turned < low) | (turned > high)).any()):
                raise Declined(f"{u.name} has a quantised weight that a negative scale would clip")
            integers = turned.to(dtype=stored.dtype, device=stored.device)

        def write(edit: Edit) -> None:
            name = weights.constant_name(layer.integers)
            kind_of = layer.integers.meta["val"]
            with edit.before(u):
                q = layer.integers
                if integers is not None:
                    q = edit.constant(name, integers)
                scales = edit.constant(f"{name}.scales", new_scales, u.meta["val"])
                stored_zeros = edit.constant(f"{name}.zeros", zeros.to(kind_of.device))
                weight = edit.call(
                    torch.ops.quantized_decomposed.dequantize_per_channel.default,
                    (q, scales, stored_zeros, 0, *layer.limits, layer.dtype), sources=[u],
                )  # fmt: skip
                edit.stamp(weight, [u], value=None)
                values: dict[int, Any] = {1: weight}
                if bias is not None:
                    values[2] = edit.constant(f"{name}.bias", bias, u.meta["val"])
            edit.set_arguments(u, values)

        self._draft.later(write)

    def _affine(self, u: fx.Node, factor: Factor) -> bool:
        record = scale_shifts.affine(u)
        if record is None:
            return False
        inner = Factor(record.scale.get(), record.shift.get())
        both = Factor(factor.scale * inner.scale, factor.scale * inner.shift + factor.shift)
        current, draft = carry.operand(record.reader, record.x), self._draft
        mark = draft.mark()
        try:
            draft.carry_off(u)
            self._produce(record.x, record.reader, both)
            draft.later(lambda edit: edit.replace(u, current()))
            return True
        except Declined:
            draft.rewind(mark)
        if record.is_norm and not (both.varies() - {1}):
            draft.later(lambda edit: weights.emit_norm(edit, u, current(), both))
            draft.take(u)
            return True
        # A plain shift lets the scale pass and scales itself.
        if bool((inner.scale == 1).all()) and not factor.scale.eq(1).all():
            draft.cross(u)
            alone = Factor(factor.scale, torch.zeros_like(factor.shift))
            self._produce(record.x, record.reader, alone)
            one = torch.ones(())
            draft.later(lambda edit: weights.emit_affine(edit, u, current(), one, both.shift))
            return True
        keeps_kind = (
            (not inner.shifts and not both.shifts)
            or (bool((inner.scale == 1).all()) and bool((both.scale == 1).all()))
        )  # fmt: skip
        if keeps_kind:
            draft.later(
                lambda edit: weights.emit_affine(edit, u, current(), both.scale, both.shift)
            )
            draft.take(u)
            return True
        raise Declined(f"{u.name} is a lone scale or shift")

    def _layout(self, u: fx.Node, factor: Factor) -> bool:
        if not layout.is_layout(u):
            return False
        source = layout.source_of(u)
        if source is None:
            return False
        consumer, disjoint = u, False
        if u.target is operator.getitem:
            if not layout.is_layout(source):
                return False
            consumer, disjoint = source, True
            inner = layout.source_of(source)
            if inner is None:
                return False
            source = inner
        others = [r for r in source.users if r is not consumer]
        disjoint = disjoint or bool(others)
        siblings = [*others, *(r for r in consumer.users if consumer is not u and r is not u)]
        if self._region.escapes and any(layout.escapes(sibling) for sibling in siblings):
            raise Declined("two outputs would share storage")
        graph, parts = self._region.graph, self._draft.parts
        scale, shift = layout.pull(u, source, (factor.scale, factor.shift), disjoint, graph)
        affected = (scale != 1) | (shift != 0)
        if any(layout.overlaps(o, source, affected, graph) for o in others):
            raise Declined(f"{source.name} has other users")
        for view in dict.fromkeys((u, consumer)):
            if not self._draft.has(view):  # another path has come to another part of a split
                self._draft.cross(view)
        pulled = Factor(scale, shift)
        if not disjoint:
            self._produce(source, consumer, pulled)
            return True
        if source in parts:  # another slice of it: where one factor acts, the other is one
            before = parts[source][1]
            pulled = Factor(before.scale * pulled.scale, before.shift + pulled.shift)
        parts[source] = (consumer, pulled)
        return True

    def _part(self, u: fx.Node, consumer: fx.Node, factor: Factor) -> None:
        """Pushes into a tensor whose other readers read elements with a factor of one."""
        if factor.is_identity:
            return
        if list(u.users) == [consumer]:
            return self._produce(u, consumer, factor)
        if u.op != "call_function" or nodes.pinned(u):
            raise Declined(f"{u.name} has other users")
        if not self._terminal(u, factor) and not self._layout(u, factor):
            raise Declined(f"{u.name} has other users")

    def _passing(self, u: fx.Node, factor: Factor) -> bool:
        self._draft.check_new(u)
        on = self._behind(u, factor)
        if on is None:
            return False
        self._draft.cross(u)
        on()
        return True

    def _behind(self, u: fx.Node, factor: Factor) -> Callable[[], None] | None:
        """The way on behind a call that carries the scale and shift through, if it does."""
        name = op_name(u)
        if (cat := concatenations.cat(u)) is not None:
            return partial(self._cat, cat, factor)
        if (total := sums.add(u)) is not None:
            return partial(self._sum, total, factor)
        if (pool := carry.first_result(u)) is not None and carry.commutes(pool, factor):
            return partial(self._pool, pool, factor)
        if carry.commutes(u, factor):
            source = u.args[0]
            assert isinstance(source, fx.Node)
            return partial(self._produce, source, u, carry.at_input(factor, u, source))
        if factor.shifts:
            return None
        if name in ("mul", "div"):
            return partial(self._product, u, factor)
        if name in ("matmul", "bmm", "scaled_dot_product_attention"):
            return partial(self._matmul, u, factor)
        if is_call(u, aten.einsum.default):
            return partial(self._einsum, u, factor)
        return None

    def _pool(self, pool: fx.Node, factor: Factor) -> None:
        """A max pool that says where its values lay, which nothing reads."""
        self._draft.cross(pool)
        self._produce(pool.args[0], pool, factor)  # type: ignore[arg-type]

    def _cat(self, cat: concatenations.Cat, factor: Factor) -> None:
        u, parts, axis = cat.node, cat.parts, cat.axis
        if any(nodes.dtype(p) != nodes.dtype(u) for p in parts):
            raise Declined("the concatenation promotes a dtype")
        sizes = [nodes.shape(p)[axis] for p in parts]
        varies = axis in factor.varies()
        if varies and any(not isinstance(s, int) for s in sizes):
            raise Declined("the concatenated axis is dynamic")
        start = 0
        for part, size in zip(parts, sizes, strict=True):
            piece = factor
            if varies:
                piece = Factor(
                    narrow(factor.scale, axis, start, int(size)),
                    narrow(factor.shift, axis, start, int(size)),
                )
                start += int(size)
            self._produce(part, u, piece)

    def _sum(self, total: sums.Addition, factor: Factor) -> None:
        zero = torch.zeros_like(factor.shift)
        mark = self._draft.mark()
        try:
            self._produce(total.left, total.node, factor)
            self._produce(total.right, total.node, Factor(factor.scale, zero))
        except Declined:
            if total.alpha == 0 or not factor.shifts:
                raise
            self._draft.rewind(mark)
            self._produce(total.left, total.node, Factor(factor.scale, zero))
            scaled = Factor(factor.scale, factor.shift / total.alpha)
            self._produce(total.right, total.node, scaled)

    def _product(self, u: fx.Node, factor: Factor) -> None:
        if op_name(u) == "div" and nodes.arguments(u).get("rounding_mode") is not None:
            raise Declined("the division rounds")
        left, right = u.args[0], u.args[1]
        operands = [left] if op_name(u) == "div" else [left, right]
        reason = Declined("neither factor can take the scale")
        for side in operands:
            if not is_tensor(side) or nodes.dtype(side) != nodes.dtype(u):  # type: ignore[arg-type]
                continue
            mark = self._draft.mark()
            try:
                self._produce(side, u, aligned(factor, side))  # type: ignore[arg-type]
                return
            except Declined as refusal:
                reason = refusal
                self._draft.rewind(mark)
        raise reason

    def _matmul(self, u: fx.Node, factor: Factor) -> None:
        rank = factor.scale.dim()
        if op_name(u) == "scaled_dot_product_attention":
            value = u.args[2]
            if rank - 2 in factor.varies() or not is_tensor(value):
                raise Declined("the constant varies along the queries")
            if not nodes.same(nodes.shape(value)[:-2], nodes.shape(u)[:-2]):  # type: ignore[arg-type]
                raise Declined("attention broadcasts its value")
            return self._produce(value, u, factor)  # type: ignore[arg-type]
        left, right = u.args[0], u.args[1]
        if not (is_tensor(left) and is_tensor(right)):
            raise Declined("not a product of two tensors")
        if min(len(nodes.shape(left)), len(nodes.shape(right))) < 2:  # type: ignore[arg-type]
            return self._vector_product(u, factor)
        # the right operand has no rows of the result, and the left one no columns
        sides = [s for s, other in ((right, -2), (left, -1)) if rank + other not in factor.varies()]
        reason = Declined("the constant varies along both axes of a product")
        for side in sides:
            mark = self._draft.mark()
            try:
                return self._produce(side, u, aligned(factor, side))  # type: ignore[arg-type]
            except Declined as refusal:
                reason = refusal
                self._draft.rewind(mark)
        raise reason

    def _vector_product(self, u: fx.Node, factor: Factor) -> None:
        """``s * (A @ v) = (s[:, None] * A) @ v``, and into ``v`` where ``s`` is one number.

        The result has no axis of the vector; from the left it is ``(v @ A) * s = v @ (A * s)``.
        """
        left, right = u.args[0], u.args[1]
        assert isinstance(left, fx.Node)
        assert isinstance(right, fx.Node)
        columns = len(nodes.shape(right)) == 1
        vector, matrix = (right, left) if columns else (left, right)
        wanted: list[tuple[fx.Node, Factor]] = []
        if factor.scale.numel() == 1:
            wanted.append((vector, _reshaped_to(factor, (1,))))
        if len(nodes.shape(matrix)) > 1:
            sizes = list(factor.scale.shape)
            sizes.insert(len(sizes) if columns else -1, 1)
            wanted.append((matrix, _reshaped_to(factor, tuple(sizes))))
        elif factor.scale.numel() == 1:
            wanted.append((matrix, _reshaped_to(factor, (1,))))
        reason = Declined("neither factor can take the scale")
        for side, moved in wanted:
            mark = self._draft.mark()
            try:
                return self._produce(side, u, moved)
            except Declined as refusal:
                reason = refusal
                self._draft.rewind(mark)
        raise reason

    def _einsum(self, u: fx.Node, factor: Factor) -> None:
        """Into one operand: a sum of products is linear in each.

        The operand must have every axis along which the scale varies, in full.
        """
        equation, operands = str(u.args[0]).replace(" ", ""), list(u.args[1])  # type: ignore[arg-type]
        inputs, _, result = equation.partition("->")
        terms = inputs.split(",")
        if not result or "." in equation or any(len(set(t)) != len(t) for t in (*terms, result)):
            raise Declined("the einsum does not name its axes")
        wide = {result[axis]: nodes.shape(u)[axis] for axis in factor.varies()}
        reason = Declined("no operand of the einsum has the axes of the scale")
        for term, side in zip(terms, operands, strict=True):
            sizes = dict(zip(term, nodes.shape(side), strict=True))
            if any(
                letter not in sizes or not nodes.same(sizes[letter], size)
                for letter, size in wide.items()
            ):
                continue
            mark = self._draft.mark()
            try:
                scale = _for_term(factor.scale, result, term)
                return self._produce(side, u, Factor(scale, torch.zeros_like(scale)))
            except Declined as refusal:
                reason = refusal
                self._draft.rewind(mark)
        raise reason


def _reshaped_to(factor: Factor, sizes: tuple[int, ...]) -> Factor:
    return Factor(factor.scale.reshape(sizes), torch.zeros(sizes, dtype=torch.float64))


def _for_term(scale: torch.Tensor, result: str, term: str) -> torch.Tensor:
    """A scale of an einsum's result as one operand broadcasts with it."""
    sizes = dict(zip(result, scale.shape, strict=True))
    order = [*(a for a in term if a in sizes), *(a for a in result if a not in term)]
    moved = scale.permute([result.index(letter) for letter in order])
    return moved.reshape([sizes.get(letter, 1) for letter in term])
