"""The way up: what produces a tensor takes its scale and shift."""

from __future__ import annotations

import operator
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
from refold.passes.scale_shift.push.factor import Factor, Plan, aligned, narrow
from refold.passes.scale_shift.push.walk import (
    Walk,
    constant_name,
    embedding_table,
    not_linear,
    operand,
    reads,
    scale_outputs,
    shifted,
)

_REGION = 32  # calls between a producer and what is pushed into it along several paths


class Upward(Walk):
    """Plans producers."""

    def _up(self, u: fx.Node, consumer: fx.Node, factor: Factor, plan: Plan) -> None:
        """Plans ``u`` to produce ``scale * u + shift``; ``consumer`` is its one reader."""
        if factor.is_identity:
            return
        if u.op == "get_attr":
            return self._into_constant(u, consumer, factor, plan)
        if u.op == "placeholder":
            raise Declined("its input is the network's input")
        if nodes.pinned(u):
            raise Declined(f"{u.name} is excluded")
        if reads(consumer, u) != 1:
            raise Declined(f"{consumer.name} reads {u.name} twice")
        if not nodes.only_user(u, consumer):
            if not self._is_inside(u):
                raise Declined(f"{u.name} has other users")
            self.joined = True
            plan.shared[u, consumer] = factor
            return None
        return self._into(u, factor, plan)

    def _into(self, u: fx.Node, factor: Factor, plan: Plan) -> None:
        with self._step(u):
            for step in (self._up_terminal, self._up_affine, self._up_layout, self._up_passing):
                if step(u, factor, plan):
                    return
        several = u.target is operator.getitem and isinstance(u.args[0], fx.Node)
        raise Declined(not_linear(u.args[0] if several else u))  # type: ignore[arg-type]

    def _is_inside(self, u: fx.Node) -> bool:
        """True if all that is computed from ``u`` ends in the scale-shift that is pushed."""
        if not self.joins or self.record is None:
            return False
        ends = {self.record.node, self.record.reader}
        seen, stack = {u}, [u]
        while stack:
            for user in stack.pop().users:
                if user in ends or user in seen:
                    continue
                if user.op != "call_function" or len(seen) == _REGION:
                    return False
                seen.add(user)
                stack.append(user)
        return True

    def _up_joint(self, u: fx.Node, plan: Plan) -> None:
        """Pushes into a tensor of which all readers want the same."""
        wanted = {c: plan.shared.pop((u, c)) for (v, c) in list(plan.shared) if v is u}
        first, *others = wanted.values()
        if set(wanted) != set(u.users) or any(not first.equals(other) for other in others):
            raise Declined(f"{u.name} has other users")
        self._into(u, first, plan)

    def _into_constant(self, u: fx.Node, consumer: fx.Node, factor: Factor, plan: Plan) -> None:
        base = constants.exact(u)
        if base is None:
            raise Declined(f"{u.name} is not a constant")
        if reads(consumer, u) != 1:
            raise Declined(f"{consumer.name} reads {u.name} twice")
        shape = torch.broadcast_shapes(base.shape, factor.scale.shape, factor.shift.shape)
        if tuple(shape) != base.shape:
            raise Declined("the constant would grow")

        def edit() -> None:
            new = base.map(base.shape, lambda b: b * factor.scale + factor.shift)
            node = self._constant(consumer, constant_name(u), new, u)
            self.door.set_operand(consumer, u, node)

        plan.edits.append(edit)

    def _up_terminal(self, u: fx.Node, factor: Factor, plan: Plan) -> bool:
        if (conv := convolutions.conv(u)) is not None:
            scale, shift = factor.vectors(1, conv.out_channels)
            self._check_sharing(conv.weight_node)

            rows = scale.reshape(-1, *(1,) * (conv.spatial + 1))
            weight = conv.weight.times(rows)
            if conv.transposed:
                weight = conv.weight.map(conv.weight.shape, lambda w: scale_outputs(w, conv, scale))
            bias = shifted(conv.bias, scale, shift)
            self._check_range(u, weight)
            self._check_range(u, bias)
            plan.edits.append(
                lambda: self._set_weights(u, 1, conv.weight_node, weight, 2, conv.bias_node, bias)
            )
        elif (linear := products.linear(u)) is not None:
            scale, shift = factor.vectors(-1, linear.weight.shape[0])
            self._check_sharing(linear.weight_node)
            weight = linear.weight.times(scale[:, None])
            bias = shifted(linear.bias, scale, shift)
            self._check_range(u, weight)
            self._check_range(u, bias)
            plan.edits.append(lambda: self._set_linear(linear, weight, bias))
        elif (norm := scale_shifts.norm_affine(u)) is not None:
            self._up_norm(norm, factor, plan)
        elif (layer := quantised.quantised(u)) is not None:
            self._up_quantised(layer, factor, plan)
        elif is_call(u, aten.embedding.default) and embedding_table(u) is not None:
            table = embedding_table(u)
            assert table is not None
            scale, shift = factor.vectors(-1, table.shape[1])
            self._check_sharing(u.args[0])  # type: ignore[arg-type]
            new = table.map(table.shape, lambda w: w * scale + shift)
            plan.edits.append(lambda: self._set_weights(u, 0, u.args[0], new))
        else:
            return False
        plan.touch(u)
        return True

    def _up_norm(self, norm: scale_shifts.NormAffine, factor: Factor, plan: Plan) -> None:
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
        new_bias = shifted(bias, scale, shift) if norm.shifts else None
        plan.edits.append(
            lambda: self._set_weights(
                u, norm.weight_index, norm.weight, new_weight, norm.bias_index, norm.bias, new_bias
            )
        )

    def _up_quantised(self, layer: quantised.Quantised, factor: Factor, plan: Plan) -> None:
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
        bias = shifted(layer.bias, scale, shift)
        self._check_range(u, new_scales)
        self._check_range(u, bias)
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

        def edit() -> None:
            name = constant_name(layer.integers)
            kind_of = layer.integers.meta["val"]
            with self.door.before(u):
                q = layer.integers
                if integers is not None:
                    q = self.door.constant(name, integers)
                scales = self.door.constant(f"{name}.scales", new_scales, u.meta["val"])
                stored_zeros = self.door.constant(f"{name}.zeros", zeros.to(kind_of.device))
                weight = self.door.call(
                    torch.ops.quantized_decomposed.dequantize_per_channel.default,
                    (q, scales, stored_zeros, 0, *layer.limits, layer.dtype), sources=[u],
                )  # fmt: skip
                self.door.stamp(weight, [u], value=None)
                values: dict[int, Any] = {1: weight}
                if bias is not None:
                    values[2] = self.door.constant(f"{name}.bias", bias, u.meta["val"])
            self.door.set_arguments(u, values)

        plan.edits.append(edit)

    def _up_affine(self, u: fx.Node, factor: Factor, plan: Plan) -> bool:
        record = scale_shifts.affine(u)
        if record is None:
            return False
        inner = Factor(record.scale.get(), record.shift.get())
        both = Factor(factor.scale * inner.scale, factor.scale * inner.shift + factor.shift)
        current = operand(record.reader, record.x)
        mark = plan.mark()
        try:
            self._up(record.x, record.reader, both, plan)
            plan.edits.append(lambda: self.door.replace(u, current()))
            plan.removed.append(u)
            return True
        except Declined:
            plan.rewind(mark)
        if record.is_norm and not (both.varies() - {1}):
            plan.edits.append(lambda: self._emit_norm(u, current(), both))
            plan.touch(u)
            return True
        # A plain shift lets the scale pass and scales itself.
        if bool((inner.scale == 1).all()) and not factor.scale.eq(1).all():
            self._up(
                record.x, record.reader, Factor(factor.scale, torch.zeros_like(factor.shift)), plan
            )
            plan.edits.append(lambda: self._emit_affine(u, current(), torch.ones(()), both.shift))
            plan.touch(u)
            return True
        keeps_kind = (
            (not inner.shifts and not both.shifts)
            or (bool((inner.scale == 1).all()) and bool((both.scale == 1).all()))
        )  # fmt: skip
        if keeps_kind:
            plan.edits.append(lambda: self._emit_affine(u, current(), both.scale, both.shift))
            plan.touch(u)
            return True
        raise Declined(f"{u.name} is a lone scale or shift")

    def _up_layout(self, u: fx.Node, factor: Factor, plan: Plan) -> bool:
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
        if self.escapes and any(layout.escapes(sibling) for sibling in siblings):
            raise Declined("two outputs would share storage")
        scale, shift = layout.pull(u, source, (factor.scale, factor.shift), disjoint, self.graph)
        affected = (scale != 1) | (shift != 0)
        if any(layout.overlaps(o, source, affected, self.graph) for o in others):
            raise Declined(f"{source.name} has other users")
        pulled = Factor(scale, shift)
        if not disjoint:
            self._up(source, consumer, pulled, plan)
            return True
        if source in plan.parts:  # another slice of it: where one factor acts, the other is one
            before = plan.parts[source][1]
            pulled = Factor(before.scale * pulled.scale, before.shift + pulled.shift)
        plan.parts[source] = (consumer, pulled)
        return True

    def _up_shared(self, u: fx.Node, consumer: fx.Node, factor: Factor, plan: Plan) -> None:
        """Pushes into a tensor whose other readers read elements with a factor of one."""
        if factor.is_identity:
            return
        if list(u.users) == [consumer]:
            return self._up(u, consumer, factor, plan)
        if u.op != "call_function" or nodes.pinned(u):
            raise Declined(f"{u.name} has other users")
        if not self._up_terminal(u, factor, plan) and not self._up_layout(u, factor, plan):
            raise Declined(f"{u.name} has other users")

    def _up_passing(self, u: fx.Node, factor: Factor, plan: Plan) -> bool:
        name = op_name(u)
        plan.touch(u)
        if (cat := concatenations.cat(u)) is not None:
            self._up_cat(cat, factor, plan)
        elif (total := sums.add(u)) is not None:
            self._up_sum(total, factor, plan)
        elif (pool := self._first_result(u)) is not None and self._commutes(pool, factor):
            plan.touch(pool)
            self._up(pool.args[0], pool, factor, plan)  # type: ignore[arg-type]
        elif self._commutes(u, factor):
            source = u.args[0]
            assert isinstance(source, fx.Node)
            self._up(source, u, self._reshaped(factor, u, source), plan)
        elif name in ("mul", "div") and not factor.shifts:
            self._up_product(u, factor, plan)
        elif name in ("matmul", "bmm", "scaled_dot_product_attention") and not factor.shifts:
            self._up_matmul(u, factor, plan)
        elif is_call(u, aten.einsum.default) and not factor.shifts:
            self._up_einsum(u, factor, plan)
        else:
            plan.touched.pop()
            return False
        return True

    def _up_cat(self, cat: concatenations.Cat, factor: Factor, plan: Plan) -> None:
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
            self._up(part, u, piece, plan)

    def _up_sum(self, total: sums.Addition, factor: Factor, plan: Plan) -> None:
        zero = torch.zeros_like(factor.shift)
        mark = plan.mark()
        try:
            self._up(total.left, total.node, factor, plan)
            self._up(total.right, total.node, Factor(factor.scale, zero), plan)
        except Declined:
            if total.alpha == 0 or not factor.shifts:
                raise
            plan.rewind(mark)
            self._up(total.left, total.node, Factor(factor.scale, zero), plan)
            scaled = Factor(factor.scale, factor.shift / total.alpha)
            self._up(total.right, total.node, scaled, plan)

    def _up_product(self, u: fx.Node, factor: Factor, plan: Plan) -> None:
        if op_name(u) == "div" and nodes.arguments(u).get("rounding_mode") is not None:
            raise Declined("the division rounds")
        left, right = u.args[0], u.args[1]
        operands = [left] if op_name(u) == "div" else [left, right]
        reason = "neither factor can take the scale"
        for side in operands:
            if not is_tensor(side) or nodes.dtype(side) != nodes.dtype(u):  # type: ignore[arg-type]
                continue
            mark = plan.mark()
            try:
                self._up(side, u, aligned(factor, side), plan)  # type: ignore[arg-type]
                return
            except Declined as refusal:
                reason = str(refusal)
                plan.rewind(mark)
        raise Declined(reason)

    def _up_matmul(self, u: fx.Node, factor: Factor, plan: Plan) -> None:
        rank = factor.scale.dim()
        if op_name(u) == "scaled_dot_product_attention":
            value = u.args[2]
            if rank - 2 in factor.varies() or not is_tensor(value):
                raise Declined("the constant varies along the queries")
            if not nodes.same(nodes.shape(value)[:-2], nodes.shape(u)[:-2]):  # type: ignore[arg-type]
                raise Declined("attention broadcasts its value")
            return self._up(value, u, factor, plan)  # type: ignore[arg-type]
        left, right = u.args[0], u.args[1]
        if not (is_tensor(left) and is_tensor(right)):
            raise Declined("not a product of two tensors")
        if min(len(nodes.shape(left)), len(nodes.shape(right))) < 2:  # type: ignore[arg-type]
            return self._up_vector_product(u, factor, plan)
        side = right if rank - 2 not in factor.varies() else left
        free = rank - 2 if side is right else rank - 1
        if free in factor.varies() or len(nodes.shape(side)) != rank:  # type: ignore[arg-type]
            raise Declined("the constant varies along both axes of a product")
        if (
            any(a < rank - 2 for a in factor.varies())
            and not nodes.same(
                nodes.shape(side)[:-2],  # type: ignore[arg-type]
                nodes.shape(u)[:-2],
            )
        ):
            raise Declined("the product broadcasts this operand")
        return self._up(side, u, factor, plan)  # type: ignore[arg-type]

    def _up_vector_product(self, u: fx.Node, factor: Factor, plan: Plan) -> None:
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
        reason = "neither factor can take the scale"
        for side, moved in wanted:
            mark = plan.mark()
            try:
                return self._up(side, u, moved, plan)
            except Declined as refusal:
                reason = str(refusal)
                plan.rewind(mark)
        raise Declined(reason)

    def _up_einsum(self, u: fx.Node, factor: Factor, plan: Plan) -> None:
        """Into one operand: a sum of products is linear in each.

        The operand must have every axis along which the scale varies, in full.
        """
        equation, operands = str(u.args[0]).replace(" ", ""), list(u.args[1])  # type: ignore[arg-type]
        inputs, _, result = equation.partition("->")
        terms = inputs.split(",")
        if not result or "." in equation or any(len(set(t)) != len(t) for t in (*terms, result)):
            raise Declined("the einsum does not name its axes")
        wide = {result[axis]: nodes.shape(u)[axis] for axis in factor.varies()}
        reason = "no operand of the einsum has the axes of the scale"
        for term, side in zip(terms, operands, strict=True):
            sizes = dict(zip(term, nodes.shape(side), strict=True))
            if any(
                letter not in sizes or not nodes.same(sizes[letter], size)
                for letter, size in wide.items()
            ):
                continue
            mark = plan.mark()
            try:
                scale = _for_term(factor.scale, result, term)
                return self._up(side, u, Factor(scale, torch.zeros_like(scale)), plan)
            except Declined as refusal:
                reason = str(refusal)
                plan.rewind(mark)
        raise Declined(reason)


def _reshaped_to(factor: Factor, sizes: tuple[int, ...]) -> Factor:
    return Factor(factor.scale.reshape(sizes), torch.zeros(sizes, dtype=torch.float64))


def _for_term(scale: torch.Tensor, result: str, term: str) -> torch.Tensor:
    """A scale of an einsum's result as one operand broadcasts with it."""
    sizes = dict(zip(result, scale.shape, strict=True))
    order = [*(a for a in term if a in sizes), *(a for a in result if a not in term)]
    moved = scale.permute([result.index(letter) for letter in order])
    return moved.reshape([sizes.get(letter, 1) for letter in term])
