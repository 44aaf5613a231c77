"""Layout operations by execution: which input element each output element reads.

One code path instead of an axis rule per operation: the operation runs once on an ``arange`` of
its input. Symbolic sizes run at two assignments of their symbols; what depends on a symbolic axis,
or differs between the two, is not proven and declines.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from refold.errors import Declined
from refold.graph import constants, ops
from refold.graph.nodes import Size, arguments, aten, is_call, is_tensor, shape
from refold.graph.ops import op_name
from refold.graph.records import windows

_MAX_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Symbols:
    """An assignment of the graph's size symbols to integers."""

    values: dict[Any, int]

    def size(self, value: Size) -> int:
        if not isinstance(value, torch.SymInt):
            return int(value)
        expr = value.node.expr
        result = expr.xreplace({k: sympy.Integer(v) for k, v in self.values.items()})
        if result.free_symbols:
            raise Declined(f"the size {expr} is not known from the inputs")
        return int(result)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self.size(s) for s in shape(node))


def assignments(graph: fx.Graph) -> tuple[Symbols, Symbols]:
    """Two assignments of every input symbol: the trace's sizes, and larger multiples of them."""
    found: dict[Any, int] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        for size in sizes:
            if isinstance(size, torch.SymInt):
                for symbol in size.node.expr.free_symbols:
                    if size.node.expr == symbol and size.node.hint is not None:
                        found[symbol] = int(size.node.hint)
    return Symbols(found), Symbols({k: v + 1 if v == 2 else 2 * v for k, v in found.items()})


def permutation(node: fx.Node) -> list[int]:
    """Which axis of its input each axis of a permutation's result is."""
    rank = len(shape(node))
    order = list(range(rank))
    args = arguments(node)
    if "dims" in args:
        return [int(d) % rank for d in args["dims"]]
    if is_call(node, aten.t):
        return order[::-1]
    first, second = (a for name, a in args.items() if name != "self")
    order[first % rank], order[second % rank] = order[second % rank], order[first % rank]
    return order


def is_layout(node: fx.Node) -> bool:
    """True if every element of the result is an element of the one tensor input."""
    if node.op != "call_function":
        return False
    if ops.has(node, ops.MOVES | ops.NEAREST):
        return True
    name = op_name(node)
    if name in ("pad", "constant_pad_nd") and windows.crops(node):
        return True
    if name == "pad":
        return str(node.args[2] if len(node.args) > 2 else node.kwargs.get("mode")) in (
            "reflect", "replicate", "circular",
        )  # fmt: skip
    if name == "dropout":
        return len(node.args) > 2 and node.args[2] is False
    if name == "index":
        return all(
            i is None or constants.is_fixed(i)
            for i in node.args[1]  # type: ignore[union-attr]
        )
    return False


def source_of(node: fx.Node) -> fx.Node | None:
    """The tensor (or tuple of tensors) that a layout operation reads."""
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else None


def index_of(node: fx.Node, source: fx.Node, symbols: Symbols) -> torch.Tensor:
    """Runs a layout from ``source`` to ``node`` on an arange of the source: int64 indices.

    ``source`` is ``node``'s input, or the input of the split whose part ``node`` takes.
    """
    sizes = symbols.shape(source)
    count = 1
    for s in sizes:
        count *= s
    if count > _MAX_ELEMENTS:
        raise Declined("the tensor is too large to track its layout by execution")
    data = torch.arange(count, dtype=torch.float64).reshape(sizes)
    parts = node.args[0]
    if node.target is operator.getitem and parts is not source:
        return _execute(parts, data, symbols)[node.args[1]].to(torch.int64)  # type: ignore[arg-type,index,no-any-return]
    out = _execute(node, data, symbols)
    return out.to(torch.int64)


def _execute(node: fx.Node, data: torch.Tensor, symbols: Symbols) -> Any:
    def operand(arg: fx.Node) -> Any:
        if arg is node.args[0]:
            return data
        value = arg.meta.get("val")
        if isinstance(value, (int, torch.SymInt)):
            return symbols.size(value)
        if constants.is_fixed(arg):
            return constants.tensor(arg).cpu()
        raise Declined("its layout depends on data")

    args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
    args = torch.utils._pytree.tree_map_only(torch.SymInt, symbols.size, args)
    kwargs = {k: v for k, v in kwargs.items() if k not in ("memory_format", "dtype", "device")}
    if op_name(node) == "view" or op_name(node) == "_unsafe_view":
        return data.reshape(args[1])
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except RuntimeError as error:
        raise Declined(f"its layout could not be executed: {error}") from error


def reduce(value: torch.Tensor, read: torch.Tensor | None, fill: float) -> torch.Tensor:
    """Collapses every axis along which ``value`` is constant; unread elements take any value."""
    if not value.numel():  # nothing is scaled or shifted: any number will do
        return torch.ones((1,) * value.dim(), dtype=value.dtype)
    if read is None:
        for axis in range(value.dim()):
            first = value.narrow(axis, 0, 1)
            if torch.equal(value, first.expand_as(value)):
                value = first
        return value
    lowest = torch.where(read, value, torch.inf)
    highest = torch.where(read, value, -torch.inf)
    for axis in range(value.dim()):
        low, high = lowest.amin(axis, keepdim=True), highest.amax(axis, keepdim=True)
        if bool(((low == high) | (low > high)).all()):
            lowest, highest = low, high
    return torch.where(lowest > highest, fill, lowest)


Pair = tuple[torch.Tensor, torch.Tensor]  # a scale and a shift; one and zero where none acts
_NEUTRAL = (1.0, 0.0)


def pull(node: fx.Node, source: fx.Node, pair: Pair, disjoint: bool, graph: fx.Graph) -> Pair:
    """Moves a per-element scale and shift from a layout's output to its input.

    Args:
        node: the layout operation (or the part of a split).
        source: its tensor input.
        pair: scale and shift, broadcastable against ``node``.
        disjoint: other readers of ``source`` exist, so unread elements keep scale 1 and shift 0;
            otherwise they are free.
        graph: the graph, for its symbols.

    Raises:
        Declined: two outputs of one element disagree, or an axis is symbolic.
    """
    if (known := _known(node, node, source, pair)) is not None:
        return known
    results: list[Pair] = []
    for symbols in assignments(graph):
        index = index_of(node, source, symbols)
        sizes = symbols.shape(source)
        read = None
        if not disjoint:
            read = torch.zeros(math.prod(sizes), dtype=torch.bool)
            read[index.reshape(-1)] = True
            read = None if bool(read.all()) else read.reshape(sizes)
        moved = (_scatter(v, index, sizes, read, f) for v, f in zip(pair, _NEUTRAL, strict=True))
        results.append((next(moved), next(moved)))
        if not symbols.values:
            break
    return _proven(results)


def _known(node: fx.Node, start: fx.Node, end: fx.Node, pair: Pair) -> Pair | None:
    """Moves a pair through a permutation or a reshape, either way, without executing it in full.

    By far the most frequent layouts, and of large tensors. A permutation is executed on none of
    the elements. A reshape is known where the pair varies within a block of last axes alone: the
    rows before it are alike, so one stands for all, however many there are.
    """
    rank = len(shape(start))
    if not ops.has(node, ops.PERMUTE | ops.VIEW) or any(v.dim() != rank for v in pair):
        return None
    pair = reduce(pair[0], None, 0.0), reduce(pair[1], None, 0.0)
    if ops.has(node, ops.PERMUTE):
        sizes = range(2, 2 + rank)  # no two axes alike
        source = torch.empty(tuple(sizes), device="meta")
        moved = node.target(source, *node.args[1:], **node.kwargs)  # type: ignore[operator]
        order = [size - 2 for size in moved.shape]
        if node is start:
            order = [order.index(axis) for axis in range(rank)]
        return pair[0].permute(order), pair[1].permute(order)
    block = _block(shape(start), shape(end), pair)
    return block and (_through(pair[0], *block), _through(pair[1], *block))


def _block(
    start: tuple[Size, ...], end: tuple[Size, ...], pair: Pair
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The fewest last axes of two shapes with equally many elements, all that the pair varies on.

    The second are as many as the shape has, with ones in front.
    """
    varying = [a - len(start) for v in pair for a in range(v.dim()) if v.shape[a] != 1]
    least = -min(varying, default=0)
    before: list[int] = []
    after: list[int] = []
    while len(before) < least or math.prod(before) != math.prod(after):
        longer = len(before) < least or math.prod(before) < math.prod(after)
        sizes, taken = (start, before) if longer else (end, after)
        size = sizes[-1 - len(taken)] if len(taken) < len(sizes) else 0
        if not isinstance(size, int) or size == 0:
            return None
        taken.insert(0, size)
    return tuple(before), (1,) * (len(end) - len(after)) + tuple(after)


def _through(value: torch.Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> torch.Tensor:
    if value.numel() == 1:
        return value.reshape((1,) * len(after))
    inner = value.reshape(value.shape[value.dim() - len(before) :])
    return reduce(inner.expand(before).reshape(after), None, 0.0)


def _scatter(
    value: torch.Tensor, index: torch.Tensor, sizes: tuple[int, ...],
    read: torch.Tensor | None, fill: float,
) -> torch.Tensor:  # fmt: skip
    if value.numel() == 1 and bool(value == fill):
        return torch.full((1,) * len(sizes), fill, dtype=torch.float64)
    flat = torch.full((math.prod(sizes),), fill, dtype=torch.float64)
    spread = value.expand(index.shape)
    flat[index.reshape(-1)] = spread.reshape(-1)
    if not torch.equal(flat[index], spread):
        raise Declined("one element would need two different factors")
    return reduce(flat.reshape(sizes), read, fill)


def push(node: fx.Node, source: fx.Node, pair: Pair, graph: fx.Graph) -> Pair:
    """Moves a per-element scale and shift from a layout's input to its output."""
    if (known := _known(node, source, node, pair)) is not None:
        return known
    results: list[Pair] = []
    for symbols in assignments(graph):
        index = index_of(node, source, symbols)
        moved = (
            reduce(v.expand(symbols.shape(source)).reshape(-1)[index], None, 0.0)
            if v.numel() > 1
            else v.reshape((1,) * index.dim())
            for v in pair
        )
        results.append((next(moved), next(moved)))
        if not symbols.values:
            break
    return _proven(results)


def _proven(results: list[Pair]) -> Pair:
    first, last = results[0], results[-1]
    for a, b in zip(first, last, strict=True):
        if a.shape != b.shape or not torch.equal(a, b):
            raise Declined("the constant depends on a dynamic axis")
    return first


def along(source: fx.Node, axis: int, symbols: Symbols) -> dict[fx.Node, torch.Tensor]:
    """Where the places along one axis of a tensor come to lie, in all that layouts make of it.

    Each element is the number of its place. Axes without numbers have the size one: the calls run
    on an expanded vector, so this costs nothing however large the tensor is.
    """
    sizes = symbols.shape(source)
    shape_ = [size if a == axis else 1 for a, size in enumerate(sizes)]
    places = torch.arange(sizes[axis], dtype=torch.float64).reshape(shape_).expand(sizes)
    found, queue = {source: places}, [source]
    while queue:
        current = queue.pop()
        for user in current.users:
            if not is_layout(user) or source_of(user) is not current:
                continue
            made = _execute(user, found[current], symbols)
            parts = (
                {p: made[p.args[1]] for p in user.users} if not is_tensor(user) else {user: made}
            )
            found.update(parts)
            queue.extend(parts)
    return {
        node: value[tuple(slice(None, None if step else 1) for step in value.stride())]
        for node, value in found.items()
    }


def escapes(node: fx.Node) -> bool:
    """True if the node's storage reaches an output of the graph through layout operations."""
    seen, queue = {node}, [node]
    while queue:
        for user in queue.pop().users:
            if user.op == "output":
                return True
            if user not in seen and is_layout(user):
                seen.add(user)
                queue.append(user)
    return False


def overlaps(other: fx.Node, source: fx.Node, affected: torch.Tensor, graph: fx.Graph) -> bool:
    """True if another reader of ``source`` reads an element where ``affected`` holds."""
    if not is_layout(other) or not is_tensor(source) or not is_tensor(other):
        return True
    for symbols in assignments(graph):
        try:
            index = index_of(other, source, symbols)
            if bool(affected.expand(symbols.shape(source)).reshape(-1)[index].any()):
                return True
        except (Declined, RuntimeError):
            return True
    return False
