"""What the way up and the way down share: what commutes, and how weights are set."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from refold.algebra import affine_map as am
from refold.algebra.lazy import Lazy
from refold.errors import Declined
from refold.graph import constants, nodes, ops
from refold.graph.evaluate import discontinuous
from refold.graph.nodes import aten, is_call
from refold.graph.ops import op_name
from refold.graph.records import convolutions, products, scale_shifts, windows
from refold.passes.scale_shift.push.factor import Factor
from refold.rewrite.cost import CostModel
from refold.rewrite.edit import Edit, Editor

_LONGEST = 80  # calls on a path; a plan takes some frames of Python's stack for each
SMALL = 1 << 13  # bytes below which un-sharing a weight is never refused


class Walk:
    """One pass over a graph that pushes affine operations; see the package's docstring."""

    def __init__(
        self,
        gm: fx.GraphModule,
        rule: str,
        wants: Callable[[scale_shifts.Affine], bool],
        max_growth: float,
        costs: CostModel,
        *,
        border_maps: bool = False,
    ) -> None:
        self.border_maps, self.costs = border_maps, costs
        self.gm, self.graph, self.rule, self.wants = gm, gm.graph, rule, wants
        self.editor = Editor(gm, rule)
        self.edit: Edit | None = None  # what a plan that is carried out goes through
        self.budget = (max_growth - 1.0) * constants.stored_bytes(gm)
        self.refusals: dict[fx.Node, tuple[str, str]] = {}
        self.escapes = False
        self.record: scale_shifts.Affine | None = None
        self.steps = 0  # calls between the scale-shift and where its plan has come to
        self.joins = True  # whether a tensor may take what all of its readers want
        self.joined = False  # whether that made a difference to the plan

    def _commutes(self, u: fx.Node, factor: Factor) -> bool:
        """True if ``u(scale * x + shift) == scale * u(x) + shift`` for ``u``'s first input."""
        name = op_name(u)
        rank = factor.scale.dim()
        pooled = next((int(c) for c in name if c.isdigit()), 0)
        spatial = {a for a in factor.varies() if a >= rank - pooled}
        if ops.has(u, ops.HOMOGENEOUS | ops.ORDER):
            if not factor.is_positive:
                raise Declined(f"a negative or zero scale does not pass {name}")
            if ops.has(u, ops.ORDER):
                return not spatial
            if factor.shifts:
                raise Declined(f"a shift does not pass {name}")
            return True
        if (pool := windows.avg_pool(u)) is not None:
            if factor.shifts and not pool.keeps_constants:
                if any(pool.padding):
                    raise Declined(f"{name} averages zero padding in, which the shift would change")
                raise Declined(f"{name} divides by another number than it adds up")
            return not spatial
        if ops.has(u, ops.MEAN) or (ops.has(u, ops.RESIZE) and not ops.has(u, ops.NEAREST)):
            return not spatial
        if is_call(u, aten.mean.dim):
            return self._reduced(u) is not None and not (
                factor.varies() & (self._reduced(u) or set())
            )
        if (pad := windows.pad(u)) is not None and pad.mode == "constant":
            axes = range(rank - len(pad.low), rank)
            if pad.value != 0:
                raise Declined(f"{u.name} pads with {pad.value:g}, which would change with it")
            if factor.shifts:
                raise Declined("a shift does not pass zero padding")
            return not (factor.varies() & set(axes))
        return False

    def _first_result(self, part: fx.Node) -> fx.Node | None:
        """The max pool whose values ``part`` is, if nothing reads where they lay."""
        pool = part.args[0] if part.target is operator.getitem else None
        if not isinstance(pool, fx.Node) or not ops.has(pool, ops.ORDER):
            return None
        return pool if part.args[1] == 0 and nodes.only_user(pool, part) else None

    def _reduced(self, u: fx.Node) -> set[int] | None:
        args = nodes.arguments(u)
        source = args["self"]
        if args["dtype"] is not None or (not args["keepdim"] and not args["dim"]):
            return None
        rank = len(nodes.shape(source))
        return {int(d) % rank for d in args["dim"] or range(rank)}

    def _reshaped(self, factor: Factor, u: fx.Node, source: fx.Node) -> Factor:
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

        return Factor(spread(factor.scale), spread(factor.shift))

    @contextmanager
    def _step(self, node: fx.Node) -> Iterator[None]:
        """One call further on a path, which is planned by recursion."""
        if self.steps == _LONGEST:
            raise Declined(f"{node.name} is more than {_LONGEST} calls away")
        self.steps += 1
        try:
            yield
        finally:
            self.steps -= 1

    @property
    def door(self) -> Edit:
        """The transaction that the plan's edits are part of."""
        assert self.edit is not None
        return self.edit

    def _constant(self, before: fx.Node, name: str, data: Lazy, like: fx.Node) -> fx.Node:
        with self.door.before(before):
            return self.door.constant(name, data, like.meta["val"])

    def _set_weights(
        self, node: fx.Node, weight_index: int, weight_node: Any, weight: Lazy,
        bias_index: int = -1, bias_node: Any = None, bias: Lazy | None = None,
    ) -> None:  # fmt: skip
        like = next(n for n in (weight_node, bias_node, node) if n is not None)
        base = constant_name(like) if like.op == "get_attr" else node.name
        new = self._constant(node, base, weight, like)
        values: dict[int, Any] = {weight_index: new}
        if bias is not None and bias_index >= 0:
            stem = base.removesuffix("weight").rstrip("._")
            values[bias_index] = self._constant(node, f"{stem}.bias", bias, like)
        self.door.set_arguments(node, values)

    def _set_linear(self, linear: products.Linear, weight: Lazy, bias: Lazy | None) -> None:
        node = linear.node
        base = (
            constant_name(linear.weight_node) if linear.weight_node.op == "get_attr" else node.name
        )
        new = self._constant(node, base, weight, linear.weight_node)
        bias_node = None
        if bias is not None:
            stem = base.removesuffix("weight").rstrip("._")
            bias_node = self._constant(node, f"{stem}.bias", bias, linear.weight_node)
        args = (linear.x, new, bias_node)
        self.door.set(node, target=aten.linear.default, args=args, kwargs={})

    def _emit_norm(self, node: fx.Node, x: fx.Node, factor: Factor) -> None:
        channels = nodes.shape(node)[1]
        scale, shift = factor.vectors(1, int(channels))
        with self.door.before(node):
            parts = [
                self.door.constant(f"{node.name}.{label}", Lazy.of(value), node.meta["val"])
                for label, value in (
                    ("weight", scale), ("bias", shift),
                    ("mean", torch.zeros_like(scale)), ("var", torch.ones_like(scale)),
                )
            ]  # fmt: skip
            args = (x, *parts, False, 0.0, 0.0, False)
            new = self.door.call(aten.batch_norm.default, args, sources=[node], like=node)
        self.door.replace(node, new)

    def _emit_affine(
        self, node: fx.Node, x: fx.Node, scale: torch.Tensor, shift: torch.Tensor
    ) -> None:
        out = x
        with self.door.before(node):
            for target, value, neutral in (
                (aten.mul.Tensor, scale, 1.0), (aten.add.Tensor, shift, 0.0),
            ):  # fmt: skip
                if bool((value == neutral).all()):
                    continue
                name = f"{node.name}.{target._schema.name[6:]}"
                data = self.door.constant(name, Lazy.of(value), node.meta["val"])
                out = self.door.call(target, (out, data), sources=[node])
        self.door.replace(node, out)

    def _check_range(self, node: fx.Node, value: Lazy | None) -> None:
        """fp16 overflows where its parts did not; wider dtypes do not come near their limits."""
        if value is not None and nodes.dtype(node) == torch.float16 and overflows(value):
            raise Declined(f"the folded weights of {node.name} would overflow float16")

    def _check_sharing(self, weight: fx.Node) -> None:
        readers = len(weight.users)
        size = constants.size_in_bytes(weight)
        held = constants.compact(weight) if weight.op == "call_function" else None
        repeats = held is not None and held.numel() < weight.meta["val"].numel()
        if (readers < 2 and not repeats) or size <= SMALL:
            return
        if size > self.budget:
            why = f"is shared by {readers} layers, and storing it once more"
            if readers < 2:
                why = "repeats what it stores, and storing it in full"
            raise Declined(f"{weight.name} {why} would grow the constants past max_growth")
        self.budget -= size


def overflows(value: Lazy) -> bool:
    """True if a constant does not fit float16."""
    return bool((value.evaluate().abs() > torch.finfo(torch.float16).max).any())


def widens(record: scale_shifts.Affine) -> bool:
    return nodes.dtype(record.x) != nodes.dtype(record.node)


def embedding_table(node: fx.Node) -> Lazy | None:
    table = node.args[0]
    return constants.exact(table) if isinstance(table, fx.Node) else None


def not_linear(node: fx.Node) -> str:
    name = op_name(node)
    if name.startswith("dequantize"):
        return f"{name} gives integers their scale, which the quantiser before it shares"
    if discontinuous(node):
        what = "rounds" if ops.has(node, ops.ROUNDS) else "decides by"
        return f"{name} {what} its input, so a scale and shift cannot cross it"
    if ops.has(node, ops.NONLINEAR):
        return f"{name} is not linear in its input, so a scale and shift cannot cross it"
    if ops.has(node, ops.MIXES) and sum(map(nodes.is_tensor, node.all_input_nodes)) > 1:
        return f"{name} reads another tensor, which would have to change with it"
    return f"nothing is known of how {name} carries a scale and shift"


def operand(reader: fx.Node, x: fx.Node) -> Callable[[], fx.Node]:
    """The node that stands where ``reader`` reads ``x`` now: an edit may replace ``x``."""
    index = reader.args.index(x)
    return lambda: reader.args[index]  # type: ignore[return-value]


def constant_name(constant: fx.Node) -> str:
    return str(constant.meta.get("refold_name", constant.target))


def reads(consumer: fx.Node, u: fx.Node) -> int:
    return sum(a is u for a in torch.utils._pytree.tree_leaves((consumer.args, consumer.kwargs)))


def scale_outputs(w: torch.Tensor, conv: convolutions.Conv, scale: torch.Tensor) -> torch.Tensor:
    """Scales the output channels of a transposed convolution's ``[I, O / groups, *k]`` weight."""
    blocks = w.reshape(conv.groups, -1, *w.shape[1:])
    rows = scale.reshape(conv.groups, 1, w.shape[1], *(1,) * conv.spatial)
    return (blocks * rows).reshape(w.shape)


def shifted(bias: Lazy | None, scale: torch.Tensor, shift: torch.Tensor) -> Lazy | None:
    """``scale * bias + shift``; what cancels to the rounding of float64 is zero.

    A network that subtracts its own bias before a zero pad (Diverse Branch Block) does so exactly
    over the reals; the zero is what lets the pad be seen through. A difference that its own dtype
    would round away is a bias nevertheless: the layers behind may make it large.
    """
    if bias is None and not bool(shift.any()):
        return None

    def compute() -> torch.Tensor:
        if bias is None:
            return shift.clone()
        moved = bias.get() * scale
        total = moved + shift
        noise = am.ROUNDING * torch.maximum(moved.abs(), shift.abs())
        return torch.where((total.abs() <= noise) & (shift != 0), 0.0, total)

    return Lazy(tuple(scale.shape), compute, parents=() if bias is None else (bias,))


def uneven(conv: convolutions.Conv, factor: Factor) -> str | None:
    """Why the layer makes of a shift something else than a bias, or ``None``."""
    name = conv.node.name
    if factor.varies() - {1}:
        return "the constant varies along another axis than the channels"
    if conv.transposed:
        return f"the kernel taps that meet an output of {name} differ in number"
    if any(conv.padding) or pads_high(conv):
        return f"{name} pads with zeros, and the shift would reach its border"
    return None


def pads_high(conv: convolutions.Conv) -> bool:
    """'same' padding of an even kernel pads the high side alone."""
    args = nodes.arguments(conv.node)
    return args["padding"] == "same" and any(
        d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.weight.shape[2:], strict=True)
    )
