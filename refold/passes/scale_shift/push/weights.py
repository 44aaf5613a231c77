"""Writing, through the door: folded weights, and what is left of a scale and shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from refold.algebra import affine_map as am
from refold.algebra.lazy import Lazy
from refold.errors import Declined
from refold.graph import constants, nodes
from refold.graph.nodes import aten
from refold.graph.records import convolutions, products
from refold.graph.records.recurrences import Recurrence
from refold.graph.records.scale_shifts import NormAffine
from refold.passes.scale_shift.push import carry
from refold.passes.scale_shift.push.factor import Factor
from refold.passes.scale_shift.push.plan import Draft
from refold.passes.scale_shift.push.region import Copies
from refold.rewrite.edit import Edit


def constant(edit: Edit, before: fx.Node, name: str, data: Lazy, like: fx.Node) -> fx.Node:
    with edit.before(before):
        return edit.constant(name, data, like.meta["val"])


def into_constant(draft: Draft, u: fx.Node, consumer: fx.Node, factor: Factor) -> None:
    """Plans that a call reads ``scale * u + shift`` instead of a constant.

    Raises:
        Declined: it is none, or would grow.
    """
    base = constants.exact(u)
    if base is None:
        raise Declined(f"{u.name} is not a constant")
    if carry.reads(consumer, u) != 1:
        raise Declined(f"{consumer.name} reads {u.name} twice")
    shape = torch.broadcast_shapes(base.shape, factor.scale.shape, factor.shift.shape)
    if tuple(shape) != base.shape:
        raise Declined("the constant would grow")
    new = base.map(base.shape, lambda b: b * factor.scale + factor.shift)

    def write(edit: Edit) -> None:
        node = constant(edit, consumer, constant_name(u), new, u)
        edit.set_operand(consumer, u, node)

    draft.take_constant(u)
    draft.later(write)


def set_weights(
    edit: Edit, node: fx.Node, weight_index: int, weight_node: Any, weight: Lazy,
    bias_index: int = -1, bias_node: Any = None, bias: Lazy | None = None,
    copies: Copies | None = None,
) -> None:  # fmt: skip
    """Lets a layer read other weights: at which place of its arguments, and what it read there.

    ``copies`` has those that another call of the layer reads already, or comes to have them.
    """
    values: dict[int, Any] = _usable(copies, node)
    if not values:
        like = next(n for n in (weight_node, bias_node, node) if n is not None)
        base = constant_name(like) if like.op == "get_attr" else node.name
        values[weight_index] = constant(edit, node, base, weight, like)
        if bias is not None and bias_index >= 0:
            stem = base.removesuffix("weight").rstrip("._")
            values[bias_index] = constant(edit, node, f"{stem}.bias", bias, like)
    if copies is not None:
        copies.update(values)
    edit.set_arguments(node, values)


def _usable(copies: Copies | None, node: fx.Node) -> dict[int, Any]:
    """The constants of another call, where they are still there, and stand in front of this."""
    held = dict(copies or {})
    return held if all(not n._erased and n < node for n in held.values()) else {}


def set_conv(
    edit: Edit, conv: convolutions.Conv, weight: Lazy, bias: Lazy | None, copies: Copies
) -> None:
    places = (1, conv.weight_node, weight, 2, conv.bias_node, bias)
    set_weights(edit, conv.node, *places, copies)


def set_norm(edit: Edit, norm: NormAffine, weight: Lazy, bias: Lazy | None) -> None:
    places = (norm.weight_index, norm.weight, weight, norm.bias_index, norm.bias, bias)
    set_weights(edit, norm.node, *places)


def drop_norm_affine(edit: Edit, norm: NormAffine) -> None:
    """Leaves of a norm what it computes before its scale and shift."""
    edit.set_arguments(norm.node, {i: None for i in (norm.weight_index, norm.bias_index) if i >= 0})
    edit.stamp(norm.node, [norm.node], value=None)


def set_recurrence(edit: Edit, layer: Recurrence, pairs: list[tuple[Lazy, Lazy | None]]) -> None:
    """Lets a recurrent layer read other weights of its input, one pair for each direction."""
    new: dict[fx.Node, fx.Node] = {}
    for (weight_node, bias_node), (weight, bias) in zip(layer.inputs, pairs, strict=True):
        for old, value in ((weight_node, weight), (bias_node, bias)):
            if old is not None and value is not None:
                new[old] = constant(edit, layer.node, constant_name(old), value, old)
    args, kwargs = fx.map_arg((layer.node.args, layer.node.kwargs), lambda n: new.get(n, n))
    edit.set(layer.node, args=args, kwargs=kwargs)


def set_linear(
    edit: Edit, linear: products.Linear, weight: Lazy, bias: Lazy | None, copies: Copies
) -> None:
    node = linear.node
    values = _usable(copies, node)
    if not values:
        old = linear.weight_node
        base = constant_name(old) if old.op == "get_attr" else node.name
        values = {1: constant(edit, node, base, weight, old)}
        if bias is not None:
            stem = base.removesuffix("weight").rstrip("._")
            values[2] = constant(edit, node, f"{stem}.bias", bias, old)
    copies.update(values)
    args = (linear.x, values[1], values.get(2))
    edit.set(node, target=aten.linear.default, args=args, kwargs={})


def emit_norm(edit: Edit, node: fx.Node, x: fx.Node, factor: Factor) -> None:
    """Writes a scale and shift in a node's place as one batch norm."""
    channels = nodes.shape(node)[1]
    scale, shift = factor.vectors(1, int(channels))
    with edit.before(node):
        parts = [
            edit.constant(f"{node.name}.{label}", Lazy.of(value), node.meta["val"])
            for label, value in (
                ("weight", scale), ("bias", shift),
                ("mean", torch.zeros_like(scale)), ("var", torch.ones_like(scale)),
            )
        ]  # fmt: skip
        args = (x, *parts, False, 0.0, 0.0, False)
        new = edit.call(aten.batch_norm.default, args, sources=[node], like=node)
    edit.replace(node, new)


def emit_affine(
    edit: Edit, node: fx.Node, x: fx.Node, scale: torch.Tensor, shift: torch.Tensor
) -> None:
    """Writes them as a multiplication and an addition, what does nothing left out."""
    out = x
    with edit.before(node):
        for target, value, neutral in (
            (aten.mul.Tensor, scale, 1.0), (aten.add.Tensor, shift, 0.0),
        ):  # fmt: skip
            if bool((value == neutral).all()):
                continue
            name = f"{node.name}.{target._schema.name[6:]}"
            data = edit.constant(name, Lazy.of(value), node.meta["val"])
            out = edit.call(target, (out, data), sources=[node])
    edit.replace(node, out)


def check_range(node: fx.Node, value: Lazy | None) -> None:
    """fp16 overflows where its parts did not; wider dtypes do not come near their limits."""
    if value is not None and nodes.dtype(node) == torch.float16 and overflows(value):
        raise Declined(f"the folded weights of {node.name} would overflow float16")


def overflows(value: Lazy) -> bool:
    """True if a constant does not fit float16."""
    found = value.evaluate()
    if not found.numel():
        return False
    low, high = found.aminmax()  # one look: this is asked of every candidate, however large
    most = torch.finfo(torch.float16).max
    if low.isnan():  # what else there is does not show in the extremes
        return bool((found.abs() > most).any())
    return bool(low < -most or high > most)


def constant_name(constant: fx.Node) -> str:
    return str(constant.meta.get("refold_name", constant.target))


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
