"""Pushes a constant scale and shift into what produces or consumes the tensor.

    y = s * f(x) + t    ->    y = f'(x)          (up: f takes the scale and shift into its weights)
    y = f(s * x + t)    ->    y = f'(x)          (down: every consumer takes them)

On its way it passes operations that commute with it: layouts, concatenation, sums, unpadded
averages, resizing, and, for a positive scale without shift, ReLU-like activations. A whole path is
planned before anything changes: one node that cannot take its part, and nothing happens.

``fold-batch-norm`` and ``absorb-scale-shift`` are this mechanism, seen by kind of node.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from refold.algebra.lazy import Lazy
from refold.graph import constants, nodes, provenance, records
from refold.graph.evaluate import discontinuous
from refold.graph.kinds import kind, op_name
from refold.graph.nodes import aten, is_call, is_tensor
from refold.rewrite import cost, layout
from refold.rewrite.result import Applied, PassResult, applied, declined

Edit = Callable[[], None]
_SMALL = 1 << 13  # bytes below which un-sharing a weight is never refused

_HOMOGENEOUS = {"relu", "leaky_relu", "prelu", "_prelu_kernel"}
_MAX_POOLS = {"max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool2d"}
_MEANS = {"adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"}
_MIXES = {"add", "sub", "rsub", "mul", "div", "cat", "stack", "addcmul", "lerp", "where"}
_UNREAD = {
    "conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "addmm", "baddbmm", "matmul", "bmm",
    "einsum", "sum", "cumsum", "slice_scatter", "copy_", "copy", "to", "_to_copy", "index",
    "scaled_dot_product_attention", "batch_norm", "im2col", "fft_rfft2", "fft_irfft2", "pad",
}  # fmt: skip
_RESIZES = {
    "upsample_bilinear2d", "upsample_linear1d", "upsample_trilinear3d", "upsample_bicubic2d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
}  # fmt: skip


class Refused(Exception):
    """One step of a path cannot take the scale and shift."""


@dataclass(frozen=True)
class _Factor:
    """``scale * x + shift``: float64, rank of the tensor, every axis 1 or full."""

    scale: torch.Tensor
    shift: torch.Tensor

    @property
    def shifts(self) -> bool:
        return bool(self.shift.any())

    @property
    def is_identity(self) -> bool:
        return not self.shifts and bool((self.scale == 1).all())

    @property
    def is_positive(self) -> bool:
        return bool((self.scale > 0).all())

    def varies(self) -> set[int]:
        """Axes along which the scale or the shift varies."""
        return {a for t in (self.scale, self.shift) for a in range(t.dim()) if t.shape[a] != 1}

    def vectors(self, axis: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift as ``[size]`` vectors along the one axis they may vary on."""
        if self.varies() - {axis % self.scale.dim()}:
            raise Refused("the constant varies along another axis than the channels")
        return self.scale.reshape(-1).expand(size), self.shift.reshape(-1).expand(size)


@dataclass
class _Plan:
    """Edits to make, nodes whose value changes or that go, and parts of a tensor still to push.

    ``parts`` holds, per tensor that several paths reach through disjoint slices, its reader on the
    path and the joint factor; it is pushed once, when every path has arrived.
    """

    edits: list[Edit] = field(default_factory=list)
    touched: list[fx.Node] = field(default_factory=list)
    removed: list[fx.Node] = field(default_factory=list)
    parts: dict[fx.Node, tuple[fx.Node, _Factor]] = field(default_factory=dict)

    kept: set[fx.Node] = field(default_factory=set)
    price: float = 0.0  # of what the plan adds, in microseconds

    def keeps_value(self, node: fx.Node) -> bool:
        """True for a consumer that takes the factor in: what it computes stays the same."""
        return node in self.kept

    def touch(self, node: fx.Node) -> None:
        if node in self.touched:
            raise Refused(f"the path reaches {node.name} twice")
        self.touched.append(node)

    def mark(self) -> tuple[int, int, int, dict[fx.Node, tuple[fx.Node, _Factor]]]:
        return len(self.edits), len(self.touched), len(self.removed), dict(self.parts)

    def rewind(self, mark: tuple[int, int, int, dict[fx.Node, tuple[fx.Node, _Factor]]]) -> None:
        del self.edits[mark[0] :], self.touched[mark[1] :], self.removed[mark[2] :]
        self.parts = mark[3]


class Pusher:
    """Pushes every affine operation of one family in a graph; see the module docstring.

    Args:
        gm: the graph module.
        rule: id for the records.
        wants: which affine records to push.
        max_growth: how much larger the stored constants may become by un-sharing weights.
        border_maps: let a shift that a convolution cannot take as a bias become a map of its
            values, one for each position of the output, where that is cheaper.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        rule: str,
        wants: Callable[[records.Affine], bool],
        max_growth: float,
        *,
        border_maps: bool = False,
    ) -> None:
        self.border_maps = border_maps
        self.gm, self.graph, self.rule, self.wants = gm, gm.graph, rule, wants
        self.budget = (max_growth - 1.0) * constants.stored_bytes(gm)
        self.refusals: dict[fx.Node, tuple[str, str]] = {}
        self.escapes = False
        self.record: records.Affine | None = None

    def run(self) -> PassResult:
        result = PassResult()
        changed = True
        while changed:
            changed = False
            for node in list(self.graph.nodes):
                if node.op != "call_function" or not node.users or nodes.pinned(node):
                    continue  # erased nodes have no users
                record = records.affine(node) or records.widening_affine(node)
                if record is None or not self.wants(record):
                    continue
                done = self.push(record)
                if done is not None:
                    result.applied.append(done)
                    self.refusals.pop(node, None)
                    changed = True
            if changed:
                self.graph.eliminate_dead_code()
        result.modified = bool(result.applied)
        result.declined = [
            declined(self.rule, node, reason, hint)
            for node, (reason, hint) in self.refusals.items()
            if node in self._alive()
        ]
        return result

    def _alive(self) -> set[fx.Node]:
        return set(self.graph.nodes)

    def push(self, record: records.Affine) -> Applied | None:
        """Tries up, then down; records why when neither works."""
        factor = _Factor(record.scale.get(), record.shift.get())
        if factor.is_identity:
            return None  # clean-up removes it, where no output would come to share storage
        self.escapes, self.record = layout.escapes(record.node), record
        if not bool(torch.isfinite(factor.scale).all() & torch.isfinite(factor.shift).all()):
            self.refusals[record.node] = (
                "its constant is not finite (a mask, zero variance without eps, NaN weights)",
                "if that is not meant, check the weights and statistics of this layer",
            )
            return None
        plan = _Plan()
        try:
            if _widens(record):
                raise Refused("its input is an integer tensor")
            self._up(record.x, record.reader, factor, plan)
            while plan.parts:  # the last in the graph first: its path may lead to an earlier one
                source = max(plan.parts)
                self._up_shared(source, *plan.parts.pop(source), plan)
            return self._commit(record, plan)
        except Refused as refusal:
            upward = str(refusal)
        plan = _Plan()
        try:
            self._down(record.node, factor, plan)
            return self._commit(record, plan)
        except Refused as refusal:
            downward = str(refusal)
        self.refusals[record.node] = (f"into its input: {upward}; into its users: {downward}", "")
        return None

    def _commit(self, record: records.Affine, plan: _Plan) -> Applied:
        done = applied(
            self.rule,
            [record.node, *plan.removed],
            plan.touched,
            f"{kind(record.node)} into {', '.join(sorted({kind(t) for t in plan.touched}))}",
        )
        for node in plan.touched:
            value: fx.Node | None = None  # upward, what lies between has a value of its own
            if node is record.x:
                value = record.node
            elif plan.keeps_value(node):
                value = node
            provenance.derive(node, [record.node, node], self.rule, value=value)
        current = _operand(record.reader, record.x)
        for edit in plan.edits:
            edit()
        new = current()
        if _widens(record):
            with self.graph.inserting_before(record.node):
                new = nodes.call(
                    self.graph, aten.to.dtype, (new, nodes.dtype(record.node)),
                    rule=self.rule, sources=[record.node],
                )  # fmt: skip
            provenance.derive(new, [record.node], self.rule, value=None)
        nodes.replace(record.node, new)
        for node in dict.fromkeys((record.node, record.reader)):
            if not node.users:
                self.graph.erase_node(node)
        return done

    # -- up ---------------------------------------------------------------------------------

    def _up(self, u: fx.Node, consumer: fx.Node, factor: _Factor, plan: _Plan) -> None:
        """Plans ``u`` to produce ``scale * u + shift``; ``consumer`` is its one reader."""
        if factor.is_identity:
            return
        if u.op == "get_attr":
            return self._into_constant(u, consumer, factor, plan)
        if u.op == "placeholder":
            raise Refused("its input is the network's input")
        if nodes.pinned(u):
            raise Refused(f"{u.name} is excluded")
        if not nodes.only_user(u, consumer) or _reads(consumer, u) != 1:
            raise Refused(f"{u.name} has other users")
        for step in (self._up_terminal, self._up_affine, self._up_layout, self._up_passing):
            if step(u, factor, plan):
                return None
        raise Refused(_not_linear(u))

    def _into_constant(self, u: fx.Node, consumer: fx.Node, factor: _Factor, plan: _Plan) -> None:
        base = constants.exact(u)
        if base is None:
            raise Refused(f"{u.name} is not a constant")
        shape = torch.broadcast_shapes(base.shape, factor.scale.shape, factor.shift.shape)
        if tuple(shape) != base.shape:
            raise Refused("the constant would grow")

        def edit() -> None:
            new = base.map(base.shape, lambda b: b * factor.scale + factor.shift)
            node = self._constant(consumer, _name(u), new, u)
            consumer.replace_input_with(u, node)

        plan.edits.append(edit)

    def _up_terminal(self, u: fx.Node, factor: _Factor, plan: _Plan) -> bool:
        if (conv := records.conv(u)) is not None:
            scale, shift = factor.vectors(1, conv.out_channels)
            self._check_sharing(conv.weight_node)

            rows = scale.reshape(-1, *(1,) * (conv.spatial + 1))
            weight = conv.weight.times(rows)
            if conv.transposed:
                weight = conv.weight.map(
                    conv.weight.shape, lambda w: _scale_outputs(w, conv, scale)
                )
            bias = _shifted(conv.bias, scale, shift, u)
            self._check_range(u, weight)
            self._check_range(u, bias)
            plan.edits.append(
                lambda: self._set_weights(u, 1, conv.weight_node, weight, 2, conv.bias_node, bias)
            )
        elif (linear := records.linear(u)) is not None:
            scale, shift = factor.vectors(-1, linear.weight.shape[0])
            self._check_sharing(linear.weight_node)
            weight = linear.weight.times(scale[:, None])
            bias = _shifted(linear.bias, scale, shift, u)
            self._check_range(u, weight)
            self._check_range(u, bias)
            plan.edits.append(lambda: self._set_linear(linear, weight, bias))
        elif (norm := records.norm_affine(u)) is not None:
            self._up_norm(norm, factor, plan)
        elif (quantised := records.quantised(u)) is not None:
            self._up_quantised(quantised, factor, plan)
        elif is_call(u, aten.embedding.default) and _embedding_table(u) is not None:
            table = _embedding_table(u)
            assert table is not None
            scale, shift = factor.vectors(-1, table.shape[1])
            self._check_sharing(u.args[0])  # type: ignore[arg-type]
            new = table.map(table.shape, lambda w: w * scale + shift)
            plan.edits.append(lambda: self._set_weights(u, 0, u.args[0], new))
        else:
            return False
        plan.touch(u)
        return True

    def _up_norm(self, norm: records.NormAffine, factor: _Factor, plan: _Plan) -> None:
        u = norm.node
        if factor.varies() - set(norm.axes):
            raise Refused(f"the constant varies along another axis than {kind(u)}'s weight")
        if factor.shifts and not norm.shifts:
            raise Refused(f"{kind(u)} has no bias to take the shift")
        sizes = nodes.shape(u)
        full = tuple(sizes[a] if a in norm.axes else 1 for a in range(len(sizes)))
        if any(not isinstance(s, int) for s in full):
            raise Refused("the normalised axes are dynamic")
        target = tuple(int(sizes[a]) for a in norm.axes)
        scale = factor.scale.expand(full).reshape(target)
        shift = factor.shift.expand(full).reshape(target)
        weight = constants.exact(norm.weight) if norm.weight is not None else None
        bias = constants.exact(norm.bias) if norm.bias is not None else None
        new_weight = Lazy(target, lambda: scale if weight is None else scale * weight.get())
        new_bias = _shifted(bias, scale, shift, u) if norm.shifts else None
        plan.edits.append(
            lambda: self._set_weights(
                u, norm.weight_index, norm.weight, new_weight, norm.bias_index, norm.bias, new_bias
            )
        )

    def _up_quantised(self, layer: records.Quantised, factor: _Factor, plan: _Plan) -> None:
        """Into the scales of the weight: ``s * d * (q - z) = |s| * d * (sign(s) * (q - z))``.

        The integers stay what they are but for channels of a negative or zero factor.
        """
        u = layer.node
        scale, shift = factor.vectors(layer.axis, layer.out_channels)
        new_scales = layer.scales.map(
            layer.scales.shape, lambda d: torch.where(scale == 0, d, d * scale.abs())
        )
        bias = _shifted(layer.bias, scale, shift, u)
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
                raise Refused(f"{u.name} has a quantised weight that a negative scale would clip")
            integers = turned.to(dtype=stored.dtype, device=stored.device)

        def edit() -> None:
            name = _name(layer.integers)
            kind_of = layer.integers.meta["val"]
            with self.graph.inserting_before(u):
                q = layer.integers
                if integers is not None:
                    q = constants.add(self.gm, name, integers)
                scales = constants.add(self.gm, f"{name}.scales", new_scales, u.meta["val"])
                stored_zeros = constants.add(self.gm, f"{name}.zeros", zeros.to(kind_of.device))
                weight = nodes.call(
                    self.graph, torch.ops.quantized_decomposed.dequantize_per_channel.default,
                    (q, scales, stored_zeros, 0, *layer.limits, layer.dtype),
                    rule=self.rule, sources=[u],
                )  # fmt: skip
                provenance.derive(weight, [u], self.rule, value=None)
                values: dict[int, Any] = {1: weight}
                if bias is not None:
                    values[2] = constants.add(self.gm, f"{name}.bias", bias, u.meta["val"])
            set_arguments(u, values)

        plan.edits.append(edit)

    def _up_affine(self, u: fx.Node, factor: _Factor, plan: _Plan) -> bool:
        record = records.affine(u)
        if record is None:
            return False
        inner = _Factor(record.scale.get(), record.shift.get())
        both = _Factor(factor.scale * inner.scale, factor.scale * inner.shift + factor.shift)
        current = _operand(record.reader, record.x)
        mark = plan.mark()
        try:
            self._up(record.x, record.reader, both, plan)
            plan.edits.append(lambda: nodes.replace(u, current()))
            plan.removed.append(u)
            return True
        except Refused:
            plan.rewind(mark)
        if record.is_norm and not (both.varies() - {1}):
            plan.edits.append(lambda: self._emit_norm(u, current(), both))
            plan.touch(u)
            return True
        # A plain shift lets the scale pass and scales itself.
        if bool((inner.scale == 1).all()) and not factor.scale.eq(1).all():
            self._up(
                record.x, record.reader, _Factor(factor.scale, torch.zeros_like(factor.shift)), plan
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
        raise Refused(f"{u.name} is a lone scale or shift")

    def _up_layout(self, u: fx.Node, factor: _Factor, plan: _Plan) -> bool:
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
        try:
            others = [r for r in source.users if r is not consumer]
            disjoint = disjoint or bool(others)
            siblings = [*others, *(r for r in consumer.users if consumer is not u and r is not u)]
            if self.escapes and any(layout.escapes(sibling) for sibling in siblings):
                raise Refused("two outputs would share storage")
            scale, shift = layout.pull(
                u, source, (factor.scale, factor.shift), disjoint, self.graph
            )
            affected = (scale != 1) | (shift != 0)
            if any(layout.overlaps(o, source, affected, self.graph) for o in others):
                raise Refused(f"{source.name} has other users")
        except layout.Unproven as unproven:
            raise Refused(str(unproven)) from unproven
        pulled = _Factor(scale, shift)
        if not disjoint:
            self._up(source, consumer, pulled, plan)
            return True
        if source in plan.parts:  # another slice of it: where one factor acts, the other is one
            before = plan.parts[source][1]
            pulled = _Factor(before.scale * pulled.scale, before.shift + pulled.shift)
        plan.parts[source] = (consumer, pulled)
        return True

    def _up_shared(self, u: fx.Node, consumer: fx.Node, factor: _Factor, plan: _Plan) -> None:
        """Pushes into a tensor whose other readers read elements with a factor of one."""
        if factor.is_identity:
            return
        if list(u.users) == [consumer]:
            return self._up(u, consumer, factor, plan)
        if u.op != "call_function" or nodes.pinned(u):
            raise Refused(f"{u.name} has other users")
        if not self._up_terminal(u, factor, plan) and not self._up_layout(u, factor, plan):
            raise Refused(f"{u.name} has other users")

    def _up_passing(self, u: fx.Node, factor: _Factor, plan: _Plan) -> bool:
        name = op_name(u)
        plan.touch(u)
        if is_call(u, aten.cat.default):
            self._up_cat(u, factor, plan)
        elif (total := records.add(u)) is not None:
            self._up_sum(total, factor, plan)
        elif self._commutes(u, factor):
            source = u.args[0]
            assert isinstance(source, fx.Node)
            self._up(source, u, self._reshaped(factor, u, source), plan)
        elif name in ("mul", "div") and not factor.shifts:
            self._up_product(u, factor, plan)
        elif name in ("matmul", "bmm", "scaled_dot_product_attention") and not factor.shifts:
            self._up_matmul(u, factor, plan)
        else:
            plan.touched.pop()
            return False
        return True

    def _up_cat(self, u: fx.Node, factor: _Factor, plan: _Plan) -> None:
        args = nodes.arguments(u)
        parts = args["tensors"]
        if any(nodes.dtype(p) != nodes.dtype(u) for p in parts):
            raise Refused("the concatenation promotes a dtype")
        axis = int(args["dim"]) % factor.scale.dim()
        sizes = [nodes.shape(p)[axis] for p in parts]
        varies = axis in factor.varies()
        if varies and any(not isinstance(s, int) for s in sizes):
            raise Refused("the concatenated axis is dynamic")
        start = 0
        for part, size in zip(parts, sizes, strict=True):
            piece = factor
            if varies:
                piece = _Factor(
                    _narrow(factor.scale, axis, start, int(size)),
                    _narrow(factor.shift, axis, start, int(size)),
                )
                start += int(size)
            self._up(part, u, piece, plan)

    def _up_sum(self, total: records.Sum, factor: _Factor, plan: _Plan) -> None:
        zero = torch.zeros_like(factor.shift)
        mark = plan.mark()
        try:
            self._up(total.left, total.node, factor, plan)
            self._up(total.right, total.node, _Factor(factor.scale, zero), plan)
        except Refused:
            if total.alpha == 0 or not factor.shifts:
                raise
            plan.rewind(mark)
            self._up(total.left, total.node, _Factor(factor.scale, zero), plan)
            scaled = _Factor(factor.scale, factor.shift / total.alpha)
            self._up(total.right, total.node, scaled, plan)

    def _up_product(self, u: fx.Node, factor: _Factor, plan: _Plan) -> None:
        if op_name(u) == "div" and nodes.arguments(u).get("rounding_mode") is not None:
            raise Refused("the division rounds")
        left, right = u.args[0], u.args[1]
        operands = [left] if op_name(u) == "div" else [left, right]
        reason = "neither factor can take the scale"
        for operand in operands:
            if not is_tensor(operand) or nodes.dtype(operand) != nodes.dtype(u):  # type: ignore[arg-type]
                continue
            mark = plan.mark()
            try:
                self._up(operand, u, _aligned(factor, operand), plan)  # type: ignore[arg-type]
                return
            except Refused as refusal:
                reason = str(refusal)
                plan.rewind(mark)
        raise Refused(reason)

    def _up_matmul(self, u: fx.Node, factor: _Factor, plan: _Plan) -> None:
        rank = factor.scale.dim()
        if op_name(u) == "scaled_dot_product_attention":
            value = u.args[2]
            if rank - 2 in factor.varies() or not is_tensor(value):
                raise Refused("the constant varies along the queries")
            if not nodes.same(nodes.shape(value)[:-2], nodes.shape(u)[:-2]):  # type: ignore[arg-type]
                raise Refused("attention broadcasts its value")
            return self._up(value, u, factor, plan)  # type: ignore[arg-type]
        left, right = u.args[0], u.args[1]
        if not (is_tensor(left) and is_tensor(right)):
            raise Refused("not a product of two tensors")
        side = right if rank - 2 not in factor.varies() else left
        free = rank - 2 if side is right else rank - 1
        if free in factor.varies() or len(nodes.shape(side)) != rank:  # type: ignore[arg-type]
            raise Refused("the constant varies along both axes of a product")
        if (
            any(a < rank - 2 for a in factor.varies())
            and not nodes.same(
                nodes.shape(side)[:-2],  # type: ignore[arg-type]
                nodes.shape(u)[:-2],
            )
        ):
            raise Refused("the product broadcasts this operand")
        return self._up(side, u, factor, plan)  # type: ignore[arg-type]

    # -- what commutes, in both directions -----------------------------------------------------

    def _commutes(self, u: fx.Node, factor: _Factor) -> bool:
        """True if ``u(scale * x + shift) == scale * u(x) + shift`` for ``u``'s first input."""
        name = op_name(u)
        rank = factor.scale.dim()
        pooled = next((int(c) for c in name if c.isdigit()), 0)
        spatial = {a for a in factor.varies() if a >= rank - pooled}
        if name in _HOMOGENEOUS or name in _MAX_POOLS:
            if not factor.is_positive:
                raise Refused(f"a negative or zero scale does not pass {name}")
            if name in _MAX_POOLS:
                return not spatial
            if factor.shifts:
                raise Refused(f"a shift does not pass {name}")
            return True
        if (pool := records.avg_pool(u)) is not None:
            if factor.shifts and not pool.keeps_constants:
                raise Refused(f"{name} averages zero padding in, which the shift would change")
            return not spatial
        if name in _MEANS:
            return not spatial
        if name in _RESIZES:
            return not spatial
        if is_call(u, aten.mean.dim):
            return self._reduced(u) is not None and not (
                factor.varies() & (self._reduced(u) or set())
            )
        if (pad := records.pad(u)) is not None and pad.mode == "constant":
            axes = range(rank - len(pad.low), rank)
            if factor.shifts or pad.value != 0:
                raise Refused("a shift does not pass zero padding")
            return not (factor.varies() & set(axes))
        return False

    def _reduced(self, u: fx.Node) -> set[int] | None:
        args = nodes.arguments(u)
        source = args["self"]
        if args["dtype"] is not None or (not args["keepdim"] and not args["dim"]):
            return None
        rank = len(nodes.shape(source))
        return {int(d) % rank for d in args["dim"] or range(rank)}

    def _reshaped(self, factor: _Factor, u: fx.Node, source: fx.Node) -> _Factor:
        """The factor at ``u``'s input: a mean without ``keepdim`` has fewer axes."""
        if not is_call(u, aten.mean.dim) or nodes.arguments(u)["keepdim"]:
            return factor
        reduced = self._reduced(u) or set()
        rank = len(nodes.shape(source))
        kept = [a for a in range(rank) if a not in reduced]

        def spread(t: torch.Tensor) -> torch.Tensor:
            sizes = [1] * rank
            for axis, size in zip(kept, t.shape, strict=True):
                sizes[axis] = size
            return t.reshape(sizes)

        return _Factor(spread(factor.scale), spread(factor.shift))

    # -- down -------------------------------------------------------------------------------

    def _down(self, n: fx.Node, factor: _Factor, plan: _Plan) -> None:
        """Plans every reader of ``n`` to read a value to which the factor was not applied."""
        if factor.is_identity:
            return
        for user in list(n.users):
            if nodes.pinned(user):
                raise Refused(f"{user.name} is excluded")
            if user.op != "call_function" or _reads(user, n) != 1:
                raise Refused(f"{user.name} reads it")
            if not self._down_terminal(user, n, factor, plan):
                self._down_passing(user, n, factor, plan)

    def _down_terminal(self, c: fx.Node, n: fx.Node, factor: _Factor, plan: _Plan) -> bool:
        if (conv := records.conv(c)) is not None and conv.x is n:
            channels = (
                conv.weight.shape[0] if conv.transposed else (conv.weight.shape[1] * conv.groups)
            )
            reason = _uneven(conv, factor) if factor.shifts else None
            if reason is not None and not self._pad_before_cast(conv, factor, plan):
                self._down_map(conv, factor, reason, plan)
                factor = _Factor(factor.scale, torch.zeros_like(factor.scale))
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
            bias = Lazy((conv.out_channels,), moved) if factor.shifts else conv.bias
            self._check_range(c, weight)
            self._check_range(c, bias)
            plan.edits.append(
                lambda: self._set_weights(c, 1, conv.weight_node, weight, 2, conv.bias_node, bias)
            )
        elif (linear := records.linear(c)) is not None and linear.x is n:
            scale, shift = factor.vectors(-1, linear.weight.shape[1])
            self._check_sharing(linear.weight_node)
            weight = linear.weight.times(scale)

            def total() -> torch.Tensor:
                extra = linear.weight.get() @ shift
                return extra if linear.bias is None else extra + linear.bias.get()

            bias = Lazy((weight.shape[0],), total) if factor.shifts else linear.bias
            self._check_range(c, weight)
            self._check_range(c, bias)
            plan.edits.append(lambda: self._set_linear(linear, weight, bias))
        else:
            return False
        plan.kept.add(c)
        plan.touch(c)
        return True

    def _pad_before_cast(self, conv: records.Conv, factor: _Factor, plan: _Plan) -> bool:
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
        value, limits = _preimage(factor, 0.0), torch.iinfo(nodes.dtype(source))
        if value is None or value != round(value) or not limits.min <= value <= limits.max:
            return False
        if cost.elementwise(nodes.hints(source), 1, 1) >= cost.of(self.record.node):
            return False

        def edit() -> None:
            amounts = [p for p in reversed(conv.padding) for _ in (0, 1)]
            with self.graph.inserting_before(cast):
                padded = nodes.call(
                    self.graph, aten.pad.default, (source, amounts, "constant", value),
                    rule=self.rule, sources=[conv.x],
                )  # fmt: skip
            for node in (padded, cast):  # neither has the value of a node of the original
                provenance.derive(node, [node], self.rule, value=None)
            cast.replace_input_with(source, padded)
            cast.meta["val"] = nodes.fake_result(cast)
            set_arguments(c, {4: [0] * conv.spatial})

        plan.edits.append(edit)
        return True

    def _down_map(self, conv: records.Conv, factor: _Factor, reason: str, plan: _Plan) -> None:
        """Adds to the output what the layer makes of the shift, computed once."""
        c = conv.node
        assert self.record is not None
        sizes, results = nodes.shape(conv.x)[1:], nodes.shape(c)[1:]
        if not self.border_maps or 0 in factor.varies() or _widens(self.record):
            raise Refused(reason)
        if any(not isinstance(s, int) for s in (*sizes, *results)):
            raise Refused(f"{reason}; a map of what it adds needs a fixed height and width")
        shape = (1, *map(int, results))
        rest = list(nodes.arguments(c).values())[3:]

        def compute() -> torch.Tensor:
            shift = factor.shift.expand(1, *map(int, sizes))
            out: torch.Tensor = c.target(shift, conv.weight.get(), None, *rest)  # type: ignore[operator]
            return out

        added = Lazy(shape, compute)
        width = c.meta["val"].element_size()
        plan.price += cost.elementwise(nodes.hints(c), 1, width, added.numel())
        now = cost.of(self.record.node)
        if plan.price >= now:
            raise Refused(
                f"{reason}; a map of what it adds would cost {plan.price:.1f} us instead of "
                f"{now:.1f} us (cost table)"
            )
        size = added.numel() * width
        if size > _SMALL:
            if size > self.budget:
                raise Refused(f"{reason}; a map of what it adds would grow the constants too far")
            self.budget -= size
        self._check_range(c, added)

        def edit() -> None:
            with self.graph.inserting_before(c.next):
                data = constants.add(self.gm, f"{c.name}.map", added, c.meta["val"])
                total = nodes.call(
                    self.graph, aten.add.Tensor, (c, data), rule=self.rule, sources=[c], like=c
                )
            provenance.derive(c, [c], self.rule, value=None)
            c.replace_all_uses_with(total, lambda user: user is not total, propagate_meta=False)

        plan.edits.append(edit)

    def _down_passing(self, c: fx.Node, n: fx.Node, factor: _Factor, plan: _Plan) -> None:
        plan.touch(c)
        if c.args and c.args[0] is n and layout.is_layout(c):
            try:
                if not is_tensor(c):
                    for part in list(c.users):
                        if part.target is not operator.getitem:
                            raise Refused(f"{part.name} reads it")
                        self._down(part, self._gathered(part, n, factor), plan)
                    return
                return self._down(c, self._gathered(c, n, factor), plan)
            except layout.Unproven as unproven:
                raise Refused(str(unproven)) from unproven
        if is_call(c, aten.cat.default):
            return self._down_cat(c, n, factor, plan)
        if (record := records.affine(c)) is not None and record.x is n:
            return self._down_affine(record, factor, plan)
        if (pad := records.pad(c)) is not None and pad.x is n and pad.mode == "constant":
            self._down_pad(pad, factor, plan)
            return self._down(c, factor, plan)
        if c.args and c.args[0] is n and self._commutes(c, factor):
            if is_call(c, aten.mean.dim) and not nodes.arguments(c)["keepdim"]:
                reduced = self._reduced(c) or set()
                sizes = [s for a, s in enumerate(factor.scale.shape) if a not in reduced]
                shifts = [s for a, s in enumerate(factor.shift.shape) if a not in reduced]
                factor = _Factor(factor.scale.reshape(sizes), factor.shift.reshape(shifts))
            return self._down(c, factor, plan)
        raise Refused(_not_linear(c))

    def _down_affine(self, record: records.Affine, factor: _Factor, plan: _Plan) -> None:
        """Into a norm; the scale alone passes a shift: ``s * x + h = s * (x + h / s)``."""
        c, n = record.node, record.x
        inner = _Factor(record.scale.get(), record.shift.get())
        both = _Factor(inner.scale * factor.scale, inner.scale * factor.shift + inner.shift)
        if record.is_norm:
            if both.varies() - {1}:
                raise Refused(f"the constant varies along another axis than {c.name}'s channels")
            plan.kept.add(c)
            plan.edits.append(lambda: self._emit_norm(c, n, both))
            return
        if not factor.shifts and not inner.shifts:
            return self._down(c, factor, plan)
        if bool((factor.scale == 1).all()):
            raise Refused(f"{c.name} scales or shifts, too, and is pushed by itself")
        if bool((both.scale == 0).any()):
            raise Refused(f"a zero scale does not pass {c.name}, which shifts")
        if nodes.dtype(c) == torch.float16:
            raise Refused(f"{c.name} could overflow float16 before the scale")
        moved = _Factor(both.scale, torch.zeros_like(both.scale))
        self._down(c, moved, plan)
        ones, shift = torch.ones_like(both.scale), both.shift / both.scale
        plan.edits.append(lambda: self._emit_affine(c, n, ones, shift))

    def _down_pad(self, pad: records.Pad, factor: _Factor, plan: _Plan) -> None:
        """Pads with the value that the scale and shift take to the pad's own."""
        if not factor.shifts and pad.value == 0:
            return
        padded = len(factor.scale.shape) - len(pad.low)
        if any(axis >= padded for axis in factor.varies()):
            raise Refused("the constant varies along a padded axis")
        value = _preimage(factor, pad.value)
        if value is None:
            raise Refused(f"{pad.node.name} would have to pad each channel with another value")
        if abs(value) > torch.finfo(nodes.dtype(pad.node)).max:
            raise Refused(f"the value that {pad.node.name} would pad with overflows its dtype")
        index = 2 if is_call(pad.node, aten.constant_pad_nd.default) else 3
        plan.edits.append(lambda: set_arguments(pad.node, {index: value}))

    def _gathered(self, c: fx.Node, n: fx.Node, factor: _Factor) -> _Factor:
        return _Factor(*layout.push(c, n, (factor.scale, factor.shift), self.graph))

    def _down_cat(self, c: fx.Node, n: fx.Node, factor: _Factor, plan: _Plan) -> None:
        args = nodes.arguments(c)
        axis = int(args["dim"]) % factor.scale.dim()
        sizes = [nodes.shape(p)[axis] for p in args["tensors"]]
        if any(not isinstance(s, int) for s in sizes):
            raise Refused("the concatenated axis is dynamic")

        def spread(value: torch.Tensor, fill: float) -> torch.Tensor:
            parts = []
            for part, size in zip(args["tensors"], sizes, strict=True):
                sizes_ = list(value.shape)
                sizes_[axis] = int(size)
                parts.append(value.expand(sizes_) if part is n else value.new_full(sizes_, fill))
            return torch.cat(parts, axis)

        self._down(c, _Factor(spread(factor.scale, 1.0), spread(factor.shift, 0.0)), plan)

    # -- edits ------------------------------------------------------------------------------

    def _constant(self, before: fx.Node, name: str, data: Lazy, like: fx.Node) -> fx.Node:
        with self.graph.inserting_before(before):
            return constants.add(self.gm, name, data, like.meta["val"])

    def _set_weights(
        self, node: fx.Node, weight_index: int, weight_node: Any, weight: Lazy,
        bias_index: int = -1, bias_node: Any = None, bias: Lazy | None = None,
    ) -> None:  # fmt: skip
        like = next(n for n in (weight_node, bias_node, node) if n is not None)
        base = _name(like) if like.op == "get_attr" else node.name
        new = self._constant(node, base, weight, like)
        values: dict[int, Any] = {weight_index: new}
        if bias is not None and bias_index >= 0:
            stem = base.removesuffix("weight").rstrip("._")
            values[bias_index] = self._constant(node, f"{stem}.bias", bias, like)
        set_arguments(node, values)

    def _set_linear(self, linear: records.Linear, weight: Lazy, bias: Lazy | None) -> None:
        node = linear.node
        base = _name(linear.weight_node) if linear.weight_node.op == "get_attr" else node.name
        new = self._constant(node, base, weight, linear.weight_node)
        bias_node = None
        if bias is not None:
            stem = base.removesuffix("weight").rstrip("._")
            bias_node = self._constant(node, f"{stem}.bias", bias, linear.weight_node)
        node.target = aten.linear.default
        node.args, node.kwargs = (linear.x, new, bias_node), {}

    def _emit_norm(self, node: fx.Node, x: fx.Node, factor: _Factor) -> None:
        channels = nodes.shape(node)[1]
        scale, shift = factor.vectors(1, int(channels))
        with self.graph.inserting_before(node):
            parts = [
                constants.add(self.gm, f"{node.name}.{label}", Lazy.of(value), node.meta["val"])
                for label, value in (
                    ("weight", scale), ("bias", shift),
                    ("mean", torch.zeros_like(scale)), ("var", torch.ones_like(scale)),
                )
            ]  # fmt: skip
            new = nodes.call(
                self.graph, aten.batch_norm.default,
                (x, *parts, False, 0.0, 0.0, False), rule=self.rule, sources=[node],
            )  # fmt: skip
        nodes.replace(node, new)

    def _emit_affine(
        self, node: fx.Node, x: fx.Node, scale: torch.Tensor, shift: torch.Tensor
    ) -> None:
        out = x
        with self.graph.inserting_before(node):
            for target, value, neutral in (
                (aten.mul.Tensor, scale, 1.0), (aten.add.Tensor, shift, 0.0),
            ):  # fmt: skip
                if bool((value == neutral).all()):
                    continue
                data = constants.add(
                    self.gm, f"{node.name}.{target._schema.name[6:]}", Lazy.of(value),
                    node.meta["val"],
                )  # fmt: skip
                out = nodes.call(self.graph, target, (out, data), rule=self.rule, sources=[node])
        nodes.replace(node, out)

    def _check_range(self, node: fx.Node, value: Lazy | None) -> None:
        """fp16 overflows where its parts did not; wider dtypes do not come near their limits."""
        if value is not None and nodes.dtype(node) == torch.float16 and overflows(value):
            raise Refused(f"the folded weights of {node.name} would overflow float16")

    def _check_sharing(self, weight: fx.Node) -> None:
        readers = len(weight.users)
        size = constants.size_in_bytes(weight)
        if readers < 2 or size <= _SMALL:
            return
        if size > self.budget:
            raise Refused(
                f"{weight.name} is shared by {readers} layers, and storing it once more would grow "
                f"the constants past max_growth"
            )
        self.budget -= size


def overflows(value: Lazy) -> bool:
    """True if a constant does not fit float16."""
    return bool((value.evaluate().abs() > torch.finfo(torch.float16).max).any())


def _widens(record: records.Affine) -> bool:
    return nodes.dtype(record.x) != nodes.dtype(record.node)


def _embedding_table(node: fx.Node) -> Lazy | None:
    table = node.args[0]
    return constants.exact(table) if isinstance(table, fx.Node) else None


def set_arguments(node: fx.Node, values: dict[int, Any]) -> None:
    """Sets positional arguments by schema index, filling the ones between with defaults."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    bound = nodes.arguments(node)
    last = max(max(values), len(node.args) - 1)
    node.args = tuple(values[i] if i in values else bound[schema[i].name] for i in range(last + 1))
    names = {schema[i].name for i in range(last + 1)}
    node.kwargs = {k: v for k, v in node.kwargs.items() if k not in names}


def _not_linear(node: fx.Node) -> str:
    name = op_name(node)
    if name.startswith("dequantize"):
        return f"{name} gives integers their scale, which the quantiser before it shares"
    if discontinuous(node):
        return f"{name} rounds its input, so a scale and shift cannot cross it"
    if name in _MIXES:
        return f"{name} reads another tensor, which would have to change with it"
    if name in _UNREAD:
        return f"nothing is known of how {name} carries a scale and shift"
    return f"{name} is not linear in its input, so a scale and shift cannot cross it"


def _operand(reader: fx.Node, x: fx.Node) -> Callable[[], fx.Node]:
    """The node that stands where ``reader`` reads ``x`` now: an edit may replace ``x``."""
    index = reader.args.index(x)
    return lambda: reader.args[index]  # type: ignore[return-value]


def _name(constant: fx.Node) -> str:
    return str(constant.meta.get("refold_name", constant.target))


def _reads(consumer: fx.Node, u: fx.Node) -> int:
    return sum(a is u for a in torch.utils._pytree.tree_leaves((consumer.args, consumer.kwargs)))


def _scale_outputs(w: torch.Tensor, conv: records.Conv, scale: torch.Tensor) -> torch.Tensor:
    """Scales the output channels of a transposed convolution's ``[I, O / groups, *k]`` weight."""
    blocks = w.reshape(conv.groups, -1, *w.shape[1:])
    rows = scale.reshape(conv.groups, 1, w.shape[1], *(1,) * conv.spatial)
    return (blocks * rows).reshape(w.shape)


def _shifted(
    bias: Lazy | None, scale: torch.Tensor, shift: torch.Tensor, node: fx.Node
) -> Lazy | None:
    """``scale * bias + shift``; what cancels to the rounding of the node's dtype is zero.

    A network that subtracts its own bias before a zero pad (Diverse Branch Block) does so up to
    rounding; the zero is what lets the pad be seen through.
    """
    if bias is None and not bool(shift.any()):
        return None
    eps = torch.finfo(nodes.dtype(node)).eps

    def compute() -> torch.Tensor:
        if bias is None:
            return shift.clone()
        moved = bias.get() * scale
        total = moved + shift
        noise = 8 * eps * torch.maximum(moved.abs(), shift.abs())
        return torch.where((total.abs() <= noise) & (shift != 0), 0.0, total)

    return Lazy(tuple(scale.shape), compute)


def _preimage(factor: _Factor, value: float) -> float | None:
    """The one number that becomes ``value`` in every channel, or ``None``."""
    if bool((factor.scale == 0).any()):
        return None
    found = (value - factor.shift) / factor.scale
    first = float(found.reshape(-1)[0])
    rounding = 8 * torch.finfo(torch.float64).eps * abs(first)
    return first if bool(((found - first).abs() <= rounding).all()) else None


def _narrow(t: torch.Tensor, axis: int, start: int, size: int) -> torch.Tensor:
    return t if t.shape[axis] == 1 else t.narrow(axis, start, size)


def _aligned(factor: _Factor, operand: fx.Node) -> _Factor:
    """The factor for one operand of a broadcasting product."""
    sizes = nodes.shape(operand)
    rank = factor.scale.dim()
    lead = rank - len(sizes)
    for axis in factor.varies():
        if axis < lead or nodes.same(sizes[axis - lead], 1):
            raise Refused("the constant varies along an axis that this factor broadcasts")
    shape = (lambda t: t.reshape(t.shape[lead:])) if lead else (lambda t: t)
    return _Factor(shape(factor.scale), shape(factor.shift))


def _uneven(conv: records.Conv, factor: _Factor) -> str | None:
    """Why the layer makes of a shift something else than a bias, or ``None``."""
    name = conv.node.name
    if factor.varies() - {1}:
        return "the constant varies along another axis than the channels"
    if conv.transposed:
        return f"the kernel taps that meet an output of {name} differ in number"
    if any(conv.padding) or _pads_high(conv):
        return f"{name} pads with zeros, and the shift would reach its border"
    return None


def _pads_high(conv: records.Conv) -> bool:
    """'same' padding of an even kernel pads the high side alone."""
    args = nodes.arguments(conv.node)
    return args["padding"] == "same" and any(
        d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.weight.shape[2:], strict=True)
    )
