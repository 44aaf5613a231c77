"""Casts a folded float32 graph to half precision, where its numbers allow that.

TensorRT 11 takes the precision of each layer from the graph, so the graph has to hold it. Inputs
and outputs keep their dtypes. A layer stays float32, with casts around it, where

- its values come within a factor of two of the largest number of the dtype (the inputs at hand
  bound no other inputs),
- casting its weights, or the values that it reads or returns, loses more than rounding does:
  numbers that become subnormal, zero or infinite,
- it computes no tensor from a float tensor (positions, sizes, masks: an ``arange`` counts wrongly
  in half precision), or turns floats into integers or booleans,
- it was excluded from all passes.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from refold.errors import BackendError
from refold.graph import constants, nodes, provenance
from refold.graph.evaluate import Oracle, discontinuous
from refold.graph.ops import op_name

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_HEADROOM = 2.0
# Rounding alone moves a weight tensor by less than half a unit; two are past what it explains.
_WEIGHT_UNITS = 2.0
_aten = torch.ops.aten


@dataclass(frozen=True)
class LayerRange:
    """The range of one layer: what it computes, and what casting its weights costs.

    Attributes:
        node: its name in the folded graph.
        operator: what it computes.
        modules: the modules that it came from.
        largest: the largest value that it read or returned, in float64, over the inputs at hand.
        weight: the largest of its weights.
        flushed: how many of its weights, other than zero, become zero or subnormal.
        ratio: the largest channel of its weights, over the median channel.
        loss: relative distance of the cast weights or values (Euclidean), the larger.
        kept: why it stays float32; empty if it does not.
    """

    node: str
    operator: str
    modules: tuple[str, ...]
    largest: float
    weight: float
    flushed: int
    ratio: float
    loss: float
    kept: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def survey(
    gm: fx.GraphModule, call: tuple[tuple[Any, ...], dict[str, Any]], dtype: torch.dtype
) -> list[LayerRange]:
    """Measures each layer that has weights, and each other call that must stay float32."""
    largest: dict[str, float] = {}
    losses: dict[str, float] = {}

    def watch(node: fx.Node, value: Any) -> None:
        if node.op == "get_attr":
            return
        tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
        floats = [t for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1]
        finite = [t[t.isfinite()] for t in floats]
        largest[node.name] = max((float(t.abs().max()) for t in finite if t.numel()), default=0.0)
        losses[node.name] = max((_loss(t, dtype) for t in finite), default=0.0)

    Oracle(gm).run(*call, watch=watch)
    found = []
    for node in gm.graph.nodes:
        if node.op != "call_function" or not _is_float32(node):
            continue
        # What it reads is cast too, unless that overflows.
        names = [n.name for n in (node, *node.all_input_nodes) if n.name in largest]
        layer = _measure(node, max(largest[n] for n in names), max(losses[n] for n in names), dtype)
        if layer.kept or layer.weight:
            found.append(layer)
    return found


def _loss(exact: torch.Tensor, dtype: torch.dtype) -> float:
    norm = float(exact.norm())
    return float((exact.to(dtype).double() - exact).norm()) / norm if norm else 0.0


def _measure(node: fx.Node, largest: float, loss: float, dtype: torch.dtype) -> LayerRange:
    info = torch.finfo(dtype)
    weight = flushed = ratio = 0.0
    for operand in node.all_input_nodes:
        if not (constants.is_get_attr(operand) and _is_float32(operand)):
            continue
        exact = constants.tensor(operand).double()
        if not exact.numel():
            continue
        size = exact.abs()
        weight = max(weight, float(size.max()))
        flushed += int(((size > 0) & (size < info.smallest_normal)).sum())
        loss = max(loss, _loss(exact, dtype))
        if exact.dim() > 1:
            channels = size.flatten(1).amax(1)
            ratio = max(ratio, float(channels.max() / channels.median().clamp_min(info.tiny)))
    kept = ""
    if nodes.pinned(node):
        kept = "it is excluded"
    elif largest * _HEADROOM > info.max:
        kept = f"its values reach {largest:.3g}, {dtype} ends at {info.max:.3g}"
    elif weight > info.max:
        kept = f"its weights reach {weight:.3g}, {dtype} ends at {info.max:.3g}"
    elif not loss <= _WEIGHT_UNITS * info.eps:
        kept = f"casting its weights or values moves them by {loss:.1e} (relative)"
    modules = tuple(provenance.of(node)["modules"])
    return LayerRange(
        node.name, op_name(node), modules, largest, weight, int(flushed), ratio, loss, kept
    )


def cast(gm: fx.GraphModule, dtype: torch.dtype, kept: Mapping[str, str]) -> fx.GraphModule:
    """A copy of the graph that computes in ``dtype``; tensors that need no cast are shared.

    Args:
        gm: a functional graph; it is not changed.
        dtype: the dtype of what is float32 now.
        kept: names of the nodes that stay float32.
    """
    written = constants.written(gm.graph)
    if written:
        names = ", ".join(sorted(n.name for n in written))
        raise BackendError(f"the model writes {names} in place: it can be lowered as float32 only")
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
    wanted = {n: _chosen(n, dtype, kept) for n in gm.graph.nodes}
    stored = _stored(gm.graph, wanted, dtype)

    def operand(node: fx.Node, wish: torch.dtype | None) -> fx.Node:
        new = made[node]
        value = new.meta.get("val")
        if wish is None or not isinstance(value, torch.Tensor) or not _is_float32(node):
            return new
        if value.dtype == wish:
            return new
        if (new, wish) not in casts:
            to = graph.call_function(_aten._to_copy.default, (new,), {"dtype": wish})
            to.meta = dict(new.meta)
            to.meta["val"] = _as(value, wish)
            casts[new, wish] = to
        return casts[new, wish]

    for node in gm.graph.nodes:
        wish = wanted[node]
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], lambda n: operand(n, torch.float32)))
            continue
        new = graph.node_copy(node, functools.partial(operand, wish=wish))
        made[node] = new
        if node.op == "get_attr" and str(node.target) in stored:
            new.meta["val"] = _as(node.meta["val"], dtype)
        elif node.op == "call_function" and _is_float32(node):
            assert wish is not None
            new.args, new.kwargs = _with_dtype(new.args, wish), _with_dtype(new.kwargs, wish)
            new.meta["val"] = pytree.tree_map_only(
                torch.Tensor, functools.partial(_as, dtype=wish), node.meta["val"]
            )
    graph.set_codegen(gm.graph._codegen)
    copy = fx.GraphModule(gm, graph)
    for target, tensor in stored.items():
        path, _, name = target.rpartition(".")
        owner = copy.get_submodule(path)
        delattr(owner, name)
        owner.register_buffer(name, tensor.to(dtype))
    return copy


def _chosen(node: fx.Node, dtype: torch.dtype, kept: Mapping[str, str]) -> torch.dtype | None:
    """The dtype that a call computes in; ``None`` where its operands stay what they are."""
    if node.op == "output":
        return torch.float32
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return _chosen(node.all_input_nodes[0], dtype, kept)
    operands = [n for n in node.all_input_nodes if _is_float32(n)]
    if not operands and not _is_float32(node):
        return None
    if not _is_float32(node):
        tensors = pytree.tree_leaves(node.meta.get("val"))
        return torch.float32 if any(isinstance(t, torch.Tensor) for t in tensors) else None
    plain = isinstance(node.target, torch._ops.OpOverload)
    # A dequantised value has the dtype that its operator names, whatever that of its scale.
    fixed = not operands or op_name(node).startswith("dequantize")
    stays = fixed or node.name in kept or discontinuous(node) or not plain
    return torch.float32 if stays else dtype


def _is_float32(node: fx.Node) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(t, torch.Tensor) and t.dtype == torch.float32 for t in leaves)


def _as(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # A fake tensor: its mode has to be active where sizes are symbols.
    if value.dtype != torch.float32:
        return value
    return value.to(dtype)


def _with_dtype(arguments: Any, dtype: torch.dtype) -> Any:
    def change(leaf: Any) -> Any:
        return dtype if leaf is torch.float32 else leaf

    return fx.node.map_aggregate(arguments, change)


def _stored(
    graph: fx.Graph, wanted: Mapping[fx.Node, torch.dtype | None], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The weights that every reader wants in ``dtype``, by name."""
    readers: dict[str, set[torch.dtype | None]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for node in graph.nodes:
        if constants.is_get_attr(node) and _is_float32(node):
            name = str(node.target)
            readers.setdefault(name, set()).update(wanted[u] for u in node.users)
            tensors[name] = constants.tensor(node)
    return {name: tensors[name] for name, wishes in readers.items() if wishes == {dtype}}
