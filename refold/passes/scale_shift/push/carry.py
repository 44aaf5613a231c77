"""What carries a scale and shift from its input to its output, and what stands in the way."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx

from refold.algebra.lazy import Lazy
from refold.errors import Declined
from refold.graph import constants, nodes, ops
from refold.graph.evaluate import discontinuous
from refold.graph.nodes import aten, is_call
from refold.graph.ops import op_name
from refold.graph.records import convolutions, windows
from refold.passes.scale_shift.push.factor import Factor


def commutes(u: fx.Node, factor: Factor) -> bool:
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
    if is_call(u, *_REDUCTIONS):
        return _reduces(u, factor)
    if (pad := windows.pad(u)) is not None and pad.mode == "constant":
        axes = range(rank - len(pad.low), rank)
        if pad.value != 0:
            raise Declined(f"{u.name} pads with {pad.value:g}, which would change with it")
        if factor.shifts:
            raise Declined("a shift does not pass zero padding")
        return not (factor.varies() & set(axes))
    return False


# Along axes that they name, with or without keeping them.
_REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)


def _reduces(u: fx.Node, factor: Factor) -> bool:
    """A mean takes both, a sum the scale, the largest and the smallest both if it is positive."""
    axes = reduced_axes(u)
    if axes is None or factor.varies() & axes:
        return False
    if is_call(u, aten.sum.dim_IntList):
        if factor.shifts:
            raise Declined(f"{u.name} adds up the shift of all its elements")
        if nodes.dtype(u) == torch.float16:
            raise Declined(f"{u.name} could overflow float16 before the scale")
        return True
    if not is_call(u, aten.mean.dim) and not factor.is_positive:
        raise Declined(f"a negative or zero scale does not pass {op_name(u)}")
    return True


def first_result(part: fx.Node) -> fx.Node | None:
    """The max pool whose values ``part`` is, if nothing reads where they lay."""
    pool = part.args[0] if part.target is operator.getitem else None
    if not isinstance(pool, fx.Node) or not ops.has(pool, ops.ORDER):
        return None
    return pool if part.args[1] == 0 and nodes.only_user(pool, part) else None


def reduced_axes(u: fx.Node) -> set[int] | None:
    args = nodes.arguments(u)
    source = args["self"]
    if args.get("dtype") is not None or (not args["keepdim"] and not args["dim"]):
        return None
    rank = len(nodes.shape(source))
    return {int(d) % rank for d in args["dim"] or range(rank)}


def at_input(factor: Factor, u: fx.Node, source: fx.Node) -> Factor:
    """The factor at ``u``'s input: a reduction without ``keepdim`` has fewer axes."""
    if not is_call(u, *_REDUCTIONS) or nodes.arguments(u)["keepdim"]:
        return factor
    gone = reduced_axes(u) or set()
    rank = len(nodes.shape(source))
    kept = [a for a in range(rank) if a not in gone]

    def spread(t: torch.Tensor) -> torch.Tensor:
        sizes = [1] * rank
        for axis, size in zip(kept, t.shape, strict=True):
            sizes[axis] = size
        return t.reshape(sizes)

    return Factor(spread(factor.scale), spread(factor.shift))


def at_output(factor: Factor, c: fx.Node) -> Factor:
    """The factor at ``c``'s output: a reduction without ``keepdim`` has fewer axes."""
    if not is_call(c, *_REDUCTIONS) or nodes.arguments(c)["keepdim"]:
        return factor
    gone = reduced_axes(c) or set()
    sizes = [[s for a, s in enumerate(t.shape) if a not in gone]
             for t in (factor.scale, factor.shift)]  # fmt: skip
    return Factor(factor.scale.reshape(sizes[0]), factor.shift.reshape(sizes[1]))


def uneven(conv: convolutions.Conv, factor: Factor) -> str | None:
    """Why the layer makes of a shift something else than a bias, or ``None``."""
    name = conv.node.name
    if factor.varies() - {1}:
        return "the constant varies along another axis than the channels"
    if conv.transposed:
        return convolutions.uneven_taps(conv)
    if any(conv.padding) or pads_high(conv):
        return f"{name} pads with zeros, and the shift would reach its border"
    return None


def pads_high(conv: convolutions.Conv) -> bool:
    """'same' padding of an even kernel pads the high side alone."""
    args = nodes.arguments(conv.node)
    return args["padding"] == "same" and any(
        d * (k - 1) % 2 for d, k in zip(conv.dilation, conv.weight.shape[2:], strict=True)
    )


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


def reads(consumer: fx.Node, u: fx.Node) -> int:
    return sum(a is u for a in torch.utils._pytree.tree_leaves((consumer.args, consumer.kwargs)))


def embedding_table(node: fx.Node) -> Lazy | None:
    table = node.args[0]
    return constants.exact(table) if isinstance(table, fx.Node) else None
