"""Reads mixtures of experts by structure: copies of one subgraph with constants of their own.

Whatever spelling a mixture comes in, it reads as the steps of one expert, the constants that each
expert puts into them, and how the experts' values are joined:

- *random partition*: ``cat(E_i(part_i(x[p])))`` with the permutation ``p`` undone; in expectation
  every token sees the mean of the experts;
- *ensemble* and *stacked*: ``sum of g_i * E_i(x)`` with constant gates, spelled as subgraphs side
  by side or as products with weights that have an expert axis;
- *routed*: the same sum with gates that depend on the data, over all experts or over the chosen.

Experts are read in lockstep from their values up to where their operands coincide (the common
input), so a mixture costs its own size to find, and anything else costs one comparison.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from refold.algebra.lazy import Lazy
from refold.errors import Declined
from refold.graph import constants, ops
from refold.graph.nodes import (
    arguments,
    aten,
    dtype,
    is_call,
    is_tensor,
    known,
    pinned,
    same,
    shape,
)
from refold.graph.ops import op_name
from refold.graph.records import products

LARGEST = 256  # steps of one expert; what is larger is no expert of a layer
DEEPEST = 64  # steps one after the other, in an expert or in a sum
SPLITS = ops.names(ops.SPLIT) - {"unbind"}  # whose parts keep the axis
# Reductions along their ``dim`` that are read with an axis of experts before it.
REDUCTIONS = frozenset({"mean", "sum", "amax", "amin", "var", "softmax", "log_softmax"})
# An expert of these alone is affine: the mean of the weights is the mean of the results.
AFFINE = frozenset({
    "linear", "addmm", "mm", "matmul", "conv1d", "conv2d", "conv3d", "convolution", "batch_norm",
    "add", "sub", "neg", "getitem",
})  # fmt: skip


@dataclass(frozen=True)
class Ref:
    """The value of a step, or of the experts' common input (-1)."""

    step: int


@dataclass(frozen=True)
class Slot:
    """A constant that each expert has its own of."""

    index: int


INPUT = Ref(-1)


@dataclass(frozen=True)
class ExpertStep:
    """One call of an expert; its arguments are literals, :class:`Ref` and :class:`Slot`."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    node: fx.Node


@dataclass(frozen=True)
class Operand:
    """One constant of one expert.

    Attributes:
        value: its numbers in float64.
        node: the constant that it is, or that it is a slice of.
        whole: it is all of ``node``.
    """

    value: Lazy
    node: fx.Node
    whole: bool


@dataclass(frozen=True)
class Routing:
    """Gates that depend on the data.

    Attributes:
        watch: nodes whose values say how the tokens were routed.
        read: from those values, the sum of the gates of each expert over all tokens, and how many
            expert evaluations there were.
    """

    watch: tuple[fx.Node, ...]
    read: Callable[[Mapping[fx.Node, torch.Tensor]], tuple[torch.Tensor, int]]


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts.

    Attributes:
        root: the node whose value the mixture is.
        x: the experts' common input, of which the last axis holds a token's features.
        form: how it is spelled.
        steps: one expert.
        operands: the constants by expert and slot.
        gates: the experts' constant factors; ``None`` where they are routed.
        routing: how to learn what the router did; ``None`` where the gates are constant.
    """

    root: fx.Node
    x: fx.Node
    form: str
    steps: tuple[ExpertStep, ...]
    operands: tuple[tuple[Operand, ...], ...]
    gates: tuple[float, ...] | None
    routing: Routing | None = None

    @property
    def plain_sum(self) -> bool:
        """No gate and no mean: branches of a network are spelled like this too."""
        return self.form == "ensemble" and self.gates == (1.0,) * len(self.operands)


def named(node: object) -> str:
    """The operator that a node calls, or ``""`` for a node that calls none."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    known = node.target is operator.getitem or isinstance(node.target, torch._ops.OpOverload)
    return op_name(node) if known else ""


# --- one expert -----------------------------------------------------------------------------------


class _Lockstep:
    """Reads experts side by side, from their values up to their common input."""

    def __init__(self, stop: Callable[[tuple[fx.Node, ...]], fx.Node | None]) -> None:
        self._stop = stop
        self.x: fx.Node | None = None
        self.steps: list[ExpertStep] = []
        self.slots: list[list[Operand]] = []
        self._known: dict[tuple[fx.Node, ...], Ref | Slot] = {}
        self._depth = 0

    def read(self, values: tuple[fx.Node, ...]) -> Ref | Slot:
        if values not in self._known:
            self._depth += 1
            if self._depth > DEEPEST:
                raise Declined("the experts are too deep")
            self._known[values] = self._read(values)
            self._depth -= 1
        return self._known[values]

    def operands(self) -> tuple[tuple[Operand, ...], ...]:
        return tuple(zip(*self.slots, strict=True))

    def _read(self, values: tuple[fx.Node, ...]) -> Ref | Slot:
        source = self._stop(values)
        if source is not None:
            if self.x is not None and self.x is not source:
                raise Declined("the experts read several tensors")
            self.x = source
            return INPUT
        exact = [constants.exact(v) for v in values]
        if all(e is not None for e in exact):
            return self._constant(values, [e for e in exact if e is not None])
        first = values[0]
        if any(v.op != "call_function" or v.target is not first.target for v in values):
            raise Declined("the experts compute different things")
        if any(constants.impurity(v) is not None for v in values) or any(map(pinned, values)):
            raise Declined("a call of an expert must stay as it is")
        if len(self.steps) >= LARGEST:
            raise Declined("the experts are too large")
        args = self._arguments(tuple(v.args for v in values))
        kwargs = self._arguments(tuple(dict(v.kwargs) for v in values))
        self.steps.append(ExpertStep(first.target, args, kwargs, first))
        return Ref(len(self.steps) - 1)

    def _constant(self, values: tuple[fx.Node, ...], exact: list[Lazy]) -> Slot:
        for value, lazy in zip(values, exact, strict=True):
            if not same(lazy.shape, shape(value)) or lazy.shape != exact[0].shape:
                raise Declined("the experts' constants have different shapes")
            if dtype(value) != dtype(values[0]):
                raise Declined("the experts' constants have different dtypes")
        self.slots.append([Operand(e, v, True) for e, v in zip(exact, values, strict=True)])
        return Slot(len(self.slots) - 1)

    def _arguments(self, each: tuple[Any, ...]) -> Any:
        first = each[0]
        if isinstance(first, fx.Node):
            if not all(isinstance(a, fx.Node) for a in each):
                raise Declined("the experts compute different things")
            return self.read(each)
        if isinstance(first, (list, tuple)):
            if any(not isinstance(a, (list, tuple)) or len(a) != len(first) for a in each):
                raise Declined("the experts compute different things")
            return tuple(self._arguments(part) for part in zip(*each, strict=True))
        if isinstance(first, dict):
            if any(not isinstance(a, dict) or a.keys() != first.keys() for a in each):
                raise Declined("the experts compute different things")
            return {k: self._arguments(tuple(a[k] for a in each)) for k in first}
        if any(type(a) is not type(first) or a != first for a in each):
            raise Declined("the experts compute different things")
        return first


def _experts(
    values: Sequence[fx.Node], stop: Callable[[tuple[fx.Node, ...]], fx.Node | None]
) -> _Lockstep:
    if len(values) < 2:
        raise Declined("one expert is no mixture")
    reader = _Lockstep(stop)
    last = reader.read(tuple(values))
    if reader.x is None or last != Ref(len(reader.steps) - 1) or not reader.slots:
        raise Declined("the experts read no common input, or hold no constants")
    if all(named(s.node) in AFFINE for s in reader.steps):
        raise Declined("the experts are affine: their sum is one layer, exactly")
    return reader


def _common(values: tuple[fx.Node, ...]) -> fx.Node | None:
    """The node that all experts read, where their operands are one node that is not constant."""
    first = values[0]
    if any(v is not first for v in values) or constants.compact(first) is not None:
        return None
    return first


def _check_rows(steps: Sequence[ExpertStep]) -> None:
    """Every step must treat the rows of a matrix on their own, however many there are."""
    for step in steps:
        node, name = step.node, named(step.node)
        if name == "getitem":
            continue
        given = arguments(node)
        results = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else (
            node.meta["val"],
        )  # fmt: skip
        if any(not isinstance(r, torch.Tensor) or r.dim() != 2 for r in results):
            raise Declined(f"{node.name} of an expert does not keep one row a token")
        if torch.Tag.pointwise in step.target.tags:
            fits = all(
                s.dim() < 2 or s.shape[0] == 1
                for s in (a.meta["val"] for a in node.all_input_nodes)
                if constants.compact(_node_of(s, node)) is not None
            )
        elif name in ("linear", "addmm", "mm", "matmul"):
            fits = _row_product(step)
        elif name in ("layer_norm", "rms_norm"):
            fits = len(given["normalized_shape"]) == 1
        elif name in ("batch_norm", "group_norm"):
            fits = given.get("training", False) is False and given.get("use_input_stats") is None
        elif name in SPLITS or name in ("slice", "narrow", "cat", "select"):
            fits = given["dim"] in (-1, 1) and name != "select"
        elif name in REDUCTIONS:
            fits = dims(given) in ([-1], [1]) and given.get("keepdim", True) is True
        else:
            fits = name in ("to", "_to_copy", "clone", "contiguous", "dropout")
        if not fits:
            raise Declined(f"{node.name} of an expert may mix the tokens of a part")


def _node_of(value: Any, user: fx.Node) -> fx.Node:
    return next(n for n in user.all_input_nodes if n.meta["val"] is value)


def _row_product(step: ExpertStep) -> bool:
    operands = [a for a in step.args if isinstance(a, (Ref, Slot))]
    data = 1 if named(step.node) == "addmm" else 0
    return isinstance(operands[data], Ref) and all(
        isinstance(o, Slot) for i, o in enumerate(operands) if i != data
    )


def dims(given: Mapping[str, Any]) -> list[Any]:
    dim = given.get("dim")
    return list(dim) if isinstance(dim, (list, tuple)) else [dim]


# --- random partition -----------------------------------------------------------------------------


def partition(root: fx.Node) -> Mixture | Declined | None:
    """A random partition, or why one cannot be read as a mixture."""
    undone = _undone(root)
    if undone is None:
        return None
    whole, order = undone
    if not is_call(whole, aten.cat.default) or arguments(whole)["dim"] not in (0, -2):
        return None
    values = tuple(arguments(whole)["tensors"])
    if not all(isinstance(v, fx.Node) for v in values):
        return None
    try:
        if len(shape(whole)) != 2:
            raise Declined("the tokens are not the rows of a matrix")
        reader = _experts(values, lambda nodes: _parts(nodes, order))
        _check_rows(reader.steps)
    except Declined as why:
        return Declined(f"a random partition: {why}", root)
    assert reader.x is not None
    if len(shape(root)) != 2 or not same(shape(root)[0], shape(reader.x)[0]):
        reason = "a random partition: the result does not have as many tokens as the input"
        return Declined(reason, root)
    count = len(values)
    return Mixture(
        root, reader.x, "random partition", tuple(reader.steps), reader.operands(),
        (1.0 / count,) * count,
    )  # fmt: skip


def _undone(root: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(joined parts, random order) of a node that puts the parts' rows back where they were."""
    name, given = named(root), arguments(root)
    if "reduce" in given:
        return None
    if name in ("index", "index_select"):
        selection = rows_selected(root)
        inverse = None if selection is None else _inverted(selection[1])
        return None if selection is None or inverse is None else (selection[0], inverse)
    if name == "index_put":
        indices = list(given["indices"])
        if len(indices) != 1 or given["accumulate"]:
            return None
        order, values = _plain(indices[0]), given["values"]
    elif name == "index_copy" and given["dim"] == 0:
        order, values = _plain(given["index"]), given["source"]
    elif name == "scatter" and given["dim"] == 0 and "src" in given:
        order, values = _plain(_unexpanded(given["index"])), given["src"]
    else:
        return None
    if not _is_order(order) or not is_tensor(values) or len(shape(values)) != 2:
        return None
    # Every row is written, so what was there before does not matter.
    return (values, order) if same(shape(root), shape(values)) else None


def rows_selected(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(x, index) of ``x[index]`` along the first axis."""
    given = arguments(node)
    if named(node) == "index_select":
        return (given["self"], _plain(given["index"])) if given["dim"] == 0 else None
    if named(node) != "index":
        return None
    indices = list(given["indices"])
    x: fx.Node = given["self"]
    if len(indices) == 1:
        return x, _plain(indices[0])
    # x[None, index], made rows again by its only reader
    if len(indices) == 2 and indices[0] is None and named(x) == "unsqueeze" and x.args[1] == 0:
        return x.args[0], _plain(indices[1])  # type: ignore[return-value]
    return None


def _is_order(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and named(node) == "randperm"


def _plain(index: Any) -> Any:
    """An index without slices that take all of it."""
    while isinstance(index, fx.Node) and named(index) == "slice":
        given = arguments(index)
        source = given["self"]
        if given["step"] != 1 or not same(shape(index), shape(source)):
            break
        index = source
    return index


def _unexpanded(index: Any) -> Any:
    """``p`` of ``p[:, None]`` repeated over the columns."""
    if isinstance(index, fx.Node) and named(index) in ("expand", "expand_as"):
        column: Any = index.args[0]
        if named(column) == "unsqueeze" and column.args[1] in (1, -1):
            return column.args[0]
    return None


def _inverted(index: Any) -> fx.Node | None:
    """The random order whose inverse an index is."""
    if not isinstance(index, fx.Node) or index.op != "call_function":
        return None
    name = named(index)
    if name == "getitem" and index.args[1] == 1 and named(index.args[0]) == "sort":  # type: ignore[arg-type]
        index, name = index.args[0], "argsort"  # type: ignore[assignment]
    if name not in ("argsort", "index_put", "scatter"):
        return None
    given = arguments(index)
    if name == "argsort":
        order = _plain(given["self"])
        return order if not given["descending"] and _is_order(order) else None
    if name == "index_put" and not given["accumulate"] and len(given["indices"]) == 1:
        order, values = _plain(given["indices"][0]), given["values"]
    elif given.get("dim") in (0, -1) and "src" in given and "reduce" not in given:
        order, values = _plain(given["index"]), given["src"]
    else:
        return None
    if not _is_order(order) or not _counts_up(values):
        return None
    return order if same(shape(values), shape(order)) else None


def _counts_up(node: Any) -> bool:
    """True for ``0, 1, 2, ...``."""
    if constants.is_fixed(node):  # folded, where the number of tokens is static
        held = constants.tensor(node)
        return torch.equal(held, torch.arange(held.numel(), device=held.device))
    if not isinstance(node, fx.Node) or named(node) != "arange":
        return False
    given = arguments(node)
    return given.get("start", 0) == 0 and given.get("step", 1) == 1


def _parts(nodes: tuple[fx.Node, ...], order: fx.Node) -> fx.Node | None:
    """``x`` where the nodes are all parts of ``x[order]``, in order."""
    splits = {n.args[0] for n in nodes if n.target is operator.getitem}
    if len(splits) != 1 or any(n.target is not operator.getitem for n in nodes):
        return None
    split: Any = splits.pop()
    if named(split) not in SPLITS or len(split.meta["val"]) != len(nodes):
        return None
    if [n.args[1] for n in nodes] != list(range(len(nodes))) or arguments(split)["dim"] != 0:
        return None
    shuffled = split.args[0]
    if not isinstance(shuffled, fx.Node) or named(shuffled) not in ("index", "index_select"):
        return None
    selection = rows_selected(shuffled)
    if selection is None or selection[1] is not order or len(shape(shuffled)) != 2:
        return None
    x = selection[0]
    drawn = arguments(order)["n"]
    size = drawn.meta["val"] if isinstance(drawn, fx.Node) else drawn
    return x if len(shape(x)) == 2 and same(shape(x)[0], size) else None


# --- gated sums -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """A factor that depends on the data: a node, or one entry along an axis of it."""

    node: fx.Node
    axis: int | None = None
    index: int = 0

    def total(self, values: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor:
        value = values[self.node]
        return (value if self.axis is None else value.select(self.axis, self.index)).sum()


@dataclass(frozen=True)
class _Addend:
    value: fx.Node
    scale: float
    gate: Gate | None = None


def ensemble(root: fx.Node) -> Mixture | None:
    terms = _terms(root)
    if terms is None or len(terms) < 2:
        return None
    reader = _experts([t.value for t in terms], _common)
    assert reader.x is not None
    gates = [t.gate for t in terms if t.gate is not None]
    if gates and len(gates) != len(terms):
        return None
    parts = (root, reader.x, "routed over all experts" if gates else "ensemble",
             tuple(reader.steps), reader.operands())  # fmt: skip
    if not gates:
        return Mixture(*parts, tuple(t.scale for t in terms))
    return Mixture(*parts, None, dense_routing(gates, [t.scale for t in terms]))


def dense_routing(gates: Sequence[Gate], scales: Sequence[float]) -> Routing:
    def read(values: Mapping[fx.Node, torch.Tensor]) -> tuple[torch.Tensor, int]:
        totals = torch.stack([g.total(values) * s for g, s in zip(gates, scales, strict=True)])
        one = values[gates[0].node]
        size = one.numel() if gates[0].axis is None else one.numel() // one.shape[gates[0].axis]
        return totals, size * len(gates)

    return Routing(tuple({g.node: None for g in gates}), read)


def _terms(node: fx.Node, depth: int = 0) -> list[_Addend] | None:
    """The terms of a sum, with their factors; a node that is no sum is one term."""
    if depth and (len(node.users) != 1 or depth > DEEPEST):
        return [_Addend(node, 1.0)]
    if is_call(node, aten.add.Tensor, aten.add.Scalar) and arguments(node)["alpha"] == 1:
        left, right = node.args[0], node.args[1]
        if not isinstance(right, fx.Node):
            return _terms(left, depth + 1) if right == 0 else [_Addend(node, 1.0)]  # type: ignore[arg-type]
        sides = [_terms(s, depth + 1) for s in (left, right) if isinstance(s, fx.Node)]
        return [t for side in sides if side is not None for t in side]
    if is_call(node, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        return _scaled(node, depth)
    parts = joined(node)
    if parts is None:
        return [_Addend(node, 1.0)]
    value, axis, scales, gates = parts
    if named(value) != "stack" or arguments(value)["dim"] % len(shape(value)) != axis:
        return [_Addend(node, 1.0)]
    members = arguments(value)["tensors"]
    if scales is not None and len(scales) != len(members):
        return None
    return [
        _Addend(m, 1.0 if scales is None else scales[i],
              None if gates is None else Gate(gates[0], gates[1], i))
        for i, m in enumerate(members)
    ]  # fmt: skip


def _scaled(node: fx.Node, depth: int) -> list[_Addend] | None:
    left, right = node.args[0], node.args[1]
    if not _is_number(right) and named(node) == "mul":
        left, right = right, left
    if _is_number(right) and isinstance(left, fx.Node):
        inner = _terms(left, depth + 1)
        if inner is None:
            return None
        if not depth and len(inner) == 1:
            return [_Addend(node, 1.0)]  # no sum: the value of the factor decides nothing
        factor = _number(right)
        factor = 1.0 / factor if named(node) == "div" else factor
        return [_Addend(t.value, t.scale * factor, t.gate) for t in inner]
    if named(node) != "mul" or not is_tensor(left) or not is_tensor(right):
        return [_Addend(node, 1.0)]
    pair = gated(node)
    return [_Addend(node, 1.0)] if pair is None else [_Addend(pair[0], 1.0, Gate(pair[1]))]


def gated(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """(value, gate) of a product with one number per token, which is no constant."""
    if not is_call(node, aten.mul.Tensor):
        return None
    for value, gate in (node.args, node.args[::-1]):
        if not is_tensor(value) or not is_tensor(gate) or constants.compact(gate) is not None:
            continue
        sizes, wide = shape(gate), shape(value)
        if sizes and len(sizes) == len(wide) and same(sizes[-1], 1) and known(wide[-1] != 1):
            return value, gate
    return None


def _is_number(value: Any) -> bool:
    if isinstance(value, (int, float)):
        return not isinstance(value, bool)
    lazy = constants.compact(value)
    return lazy is not None and lazy.numel() == 1


def _number(value: Any) -> float:
    lazy = constants.compact(value)
    return float(value if lazy is None else lazy.get())


_Joined = tuple[fx.Node, int, list[float] | None, tuple[fx.Node, int] | None]


def joined(node: fx.Node) -> _Joined | None:
    """(value, expert axis, constant factors, (gates, their axis)) of a sum over an axis."""
    if is_call(node, aten.einsum.default):
        return _joined_by_einsum(node)
    if not is_call(node, aten.mean.dim, aten.sum.dim_IntList):
        return None
    given = arguments(node)
    value, along = given["self"], dims(given)
    if given["keepdim"] or len(along) != 1 or not isinstance(along[0], int) or not shape(value):
        return None
    axis = along[0] % len(shape(value))
    count = shape(value)[axis]
    if not isinstance(count, int) or given.get("dtype") is not None:
        return None
    if named(node) == "mean":
        return value, axis, [1.0 / count] * count, None
    if not is_call(value, aten.mul.Tensor) or len(value.users) != 1:
        return value, axis, [1.0] * count, None
    for inner, factor in (value.args, value.args[::-1]):
        if not is_tensor(factor) or not is_tensor(inner):
            continue
        rank = len(shape(value))
        sizes = (1,) * (rank - len(shape(factor))) + tuple(shape(factor))
        exact = constants.exact(factor)
        if exact is not None and same(sizes, (1,) * axis + (count,) + (1,) * (rank - axis - 1)):
            return inner, axis, exact.get().reshape(-1).tolist(), None
        per_token = len(shape(factor)) == rank and axis != rank - 1 and same(sizes[-1], 1)
        if exact is None and per_token and same(sizes[axis], count):
            return inner, axis, None, (factor, axis)
    return value, axis, [1.0] * count, None


def _joined_by_einsum(node: fx.Node) -> _Joined | None:
    """``e,etd->td`` with constant gates, ``te,etd->td`` with gates that depend on the data."""
    equation = str(node.args[0]).replace(" ", "")
    operands: Any = node.args[1]
    inputs, arrow, result = equation.partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2 or "." in equation or products.einsum_broadcasts(node):
        return None
    for at in (0, 1):
        gate, value = operands[at], operands[1 - at]
        letters, inner = terms[at], terms[1 - at]
        summed = set(inner) - set(result)
        if len(summed) != 1 or len(set(inner)) != len(inner) or len(set(letters)) != len(letters):
            continue
        letter = summed.pop()
        rest = letters.replace(letter, "")
        if letter not in letters or inner.replace(letter, "") != result:
            continue
        axis, exact = inner.index(letter), constants.exact(gate)
        if exact is not None and not rest:
            return value, axis, exact.get().reshape(-1).tolist(), None
        if exact is None and rest == result[: len(rest)] and len(rest) == len(result) - 1:
            return value, axis, None, (gate, letters.index(letter))
    return None


# --- routing to chosen experts, one after the other -----------------------------------------------


def loop(root: fx.Node) -> Mixture | None:
    """``zeros.index_add(0, rows_i, E_i(x[rows_i]) * gate_i)...``, one call an expert."""
    if any(named(u) == "index_add" and u.args[0] is root for u in root.users):
        return None
    rows: list[fx.Node] = []
    values: list[fx.Node] = []
    gates: list[fx.Node] = []
    node: Any = root
    while named(node) == "index_add":
        given = arguments(node)
        pair = gated(_uncast(given["source"]))
        if given["dim"] != 0 or given["alpha"] != 1 or pair is None:
            return None
        if node is not root and len(node.users) != 1:
            return None
        rows.append(given["index"])
        values.append(pair[0])
        gates.append(pair[1])
        node = given["self"]
    if named(node) not in ("zeros", "zeros_like", "new_zeros"):
        return None
    rows, values, gates = rows[::-1], values[::-1], gates[::-1]
    reader = _experts(values, lambda nodes: _gathered(nodes, rows))
    _check_rows(reader.steps)
    assert reader.x is not None
    if len(shape(reader.x)) != 2 or not same(shape(root)[0], shape(reader.x)[0]):
        return None

    def read(watched: Mapping[fx.Node, torch.Tensor]) -> tuple[torch.Tensor, int]:
        each = [watched[g] for g in gates]
        return torch.stack([g.sum() for g in each]), sum(g.numel() for g in each)

    return Mixture(root, reader.x, "routed to chosen experts", tuple(reader.steps),
                   reader.operands(), None, Routing(tuple(gates), read))  # fmt: skip


def _uncast(node: Any) -> Any:
    """The source of a cast that changes nothing."""
    while isinstance(node, fx.Node) and named(node) in ("to", "_to_copy"):
        source = node.args[0]
        if not is_tensor(source) or dtype(source) != dtype(node):  # type: ignore[arg-type]
            break
        node = source
    return node


def _gathered(nodes: tuple[fx.Node, ...], rows: Sequence[fx.Node]) -> fx.Node | None:
    """``x`` where each node is the rows of ``x`` that its expert was chosen for."""
    sources = []
    for node, index in zip(nodes, rows, strict=True):
        inner: Any = node
        if named(node) in ("reshape", "view") and len(shape(node)) == 2:
            inner = node.args[0]
        if named(inner) not in ("index", "index_select"):
            return None
        selection = rows_selected(inner)
        if selection is None or selection[1] is not index or len(shape(selection[0])) != 2:
            return None
        if not same(shape(selection[0])[1], shape(node)[1]):
            return None
        sources.append(selection[0])
    return sources[0] if all(s is sources[0] for s in sources) else None
