"""Reads mixtures whose experts share tensors: weights with an expert axis.

Either every expert sees every token (``bmm``, ``baddbmm``, ``matmul``, ``einsum`` over the expert
axis), or each row chose its expert (a grouped product, or weights gathered row by row).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from refold.algebra.lazy import Lazy
from refold.errors import Declined
from refold.graph import constants
from refold.graph.nodes import arguments, aten, is_call, is_tensor, pinned, same, shape
from refold.graph.records import products
from refold.passes.experts.read import (
    AFFINE,
    DEEPEST,
    INPUT,
    LARGEST,
    REDUCTIONS,
    SPLITS,
    ExpertStep,
    Gate,
    Mixture,
    Operand,
    Ref,
    Routing,
    Slot,
    dense_routing,
    dims,
    gated,
    joined,
    named,
    rows_selected,
)


@dataclass
class _Axis:
    """Reads a value with an expert axis, or with rows that each chose an expert, as one expert.

    Attributes:
        count: how many experts there are; learnt from the first weight.
        entry: the common input behind a node, for rows that each chose an expert.
        chosen: the experts of the rows, where weights are gathered by them.
        offsets: where each expert's rows end, for grouped products.
        x: the common input.
        steps: the steps of one expert.
        slots: the constants by slot and expert.
    """

    count: int | None = None
    entry: Callable[[fx.Node], fx.Node | None] | None = None
    chosen: list[fx.Node] = field(default_factory=list)
    offsets: list[fx.Node] = field(default_factory=list)
    x: fx.Node | None = None
    steps: list[ExpertStep] = field(default_factory=list)
    slots: list[list[Operand]] = field(default_factory=list)
    _known: dict[fx.Node, Ref] = field(default_factory=dict)
    _depth: int = 0

    def read(self, node: Any, axis: int | None) -> Ref:
        """The value of ``node`` for one expert; ``axis`` is its expert axis."""
        if not isinstance(node, fx.Node) or node.op not in ("call_function", "placeholder"):
            raise Declined("the value is no call")
        if node not in self._known:
            self._depth += 1
            if self._depth > DEEPEST:
                raise Declined("the experts are too deep")
            self._known[node] = self._read(node, axis)
            self._depth -= 1
        return self._known[node]

    def mixture(
        self, root: fx.Node, form: str, gates: tuple[float, ...] | None, routing: Routing | None
    ) -> Mixture:
        if self.x is None or self.count is None or self.count < 2 or not self.steps:
            raise Declined("it holds no experts")
        if all(named(s.node) in AFFINE or s.target is aten.linear.default for s in self.steps):
            raise Declined("the experts are affine")
        if gates is not None and len(gates) != self.count:
            raise Declined("there are not as many gates as experts")
        return Mixture(root, self.x, form, tuple(self.steps),
                       tuple(zip(*self.slots, strict=True)), gates, routing)  # fmt: skip

    # --- values -----------------------------------------------------------------------------------

    def _input(self, node: fx.Node) -> Ref:
        if self.x is not None and self.x is not node:
            raise Declined("the experts read several tensors")
        self.x = node
        return INPUT

    def _step(self, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> Ref:
        if pinned(node) or len(self.steps) >= LARGEST:
            raise Declined("a call of an expert must stay as it is")
        self.steps.append(ExpertStep(target, args, kwargs, node))
        return Ref(len(self.steps) - 1)

    def _read(self, node: fx.Node, axis: int | None) -> Ref:
        if self.entry is not None:
            source = self.entry(node)
            if source is not None:
                return self._input(source)
        elif axis is None:
            return self._input(node)
        name = named(node)
        if self.entry is None and name in ("expand", "unsqueeze"):
            return self._repeated(node, axis)
        product = self._product(node, name, axis)
        if product is not None:
            return product
        if name == "getitem":
            return self._step(node, node.target, self.read(node.args[0], axis), node.args[1])
        if constants.impurity(node) is not None:
            raise Declined("a call of an expert must stay as it is")
        if torch.Tag.pointwise in getattr(node.target, "tags", ()) or name in ("to", "clone"):
            return self._pointwise(node, axis)
        given = arguments(node)
        if name in SPLITS or name in ("slice", *REDUCTIONS):
            return self._along_last(node, axis, given)
        raise Declined(f"{node.name} is not understood")

    def _repeated(self, node: fx.Node, axis: int | None) -> Ref:
        source: Any = node.args[0]
        if axis != 0:
            raise Declined("the input is repeated along another axis")
        if named(node) == "expand" and named(source) == "unsqueeze":
            node, source = source, source.args[0]
        if named(node) == "unsqueeze" and node.args[1] != 0:
            raise Declined("the input is repeated along another axis")
        outer = shape(node)[1:]
        if not same(outer, shape(source)):
            raise Declined("the input is repeated along several axes")
        return self._input(source)

    def _pointwise(self, node: fx.Node, axis: int | None) -> Ref:
        rank = len(shape(node))

        def operand(value: Any) -> Any:
            if not isinstance(value, fx.Node):
                return value
            constant = self._constant_operand(value, rank, axis)
            if constant is not None:
                return constant
            if not is_tensor(value) or len(shape(value)) != rank:
                raise Declined(f"{node.name} reads something else")
            return self.read(value, axis)

        args = tuple(operand(a) for a in node.args)
        kwargs = {k: operand(a) for k, a in node.kwargs.items()}
        return self._step(node, node.target, *args, **kwargs)

    def _along_last(self, node: fx.Node, axis: int | None, given: Mapping[str, Any]) -> Ref:
        source = node.args[0]
        rank = len(source.meta["val"].shape)  # type: ignore[union-attr]
        along = [d % rank for d in dims(given) if isinstance(d, int)]
        if along != [rank - 1] or axis == rank - 1 or given.get("keepdim", True) is not True:
            raise Declined(f"{node.name} is not along the last axis")
        given = dict(given)
        positional = [a.name for a in node.target._schema.arguments if not a.kwarg_only]  # type: ignore[union-attr]
        keyword = {k: v for k, v in given.items() if k not in positional}
        given["dim"] = [-1] if isinstance(given["dim"], (list, tuple)) else -1
        rest = [given[name] for name in positional[1:]]
        return self._step(node, node.target, self.read(source, axis), *rest, **keyword)

    # --- products with the experts' weights -------------------------------------------------------

    def _product(self, node: fx.Node, name: str, axis: int | None) -> Ref | None:
        if self.entry is not None:
            if name in ("grouped_mm_fallback", "_grouped_mm"):
                return self._grouped(node)
            if name == "squeeze":
                return self._gathered(node)
            return None
        if axis is None:
            return None
        if name == "einsum":
            return self._einsum(node, axis)
        if name == "baddbmm":
            given = arguments(node)
            if given["beta"] != 1 or given["alpha"] != 1 or axis != 0:
                raise Declined("the product is scaled")
            weight = self._slices(given["batch2"], 0)
            x = self.read(given["batch1"], 0)
            bias = self._constant_operand(given["self"], 3, 0)
            product = self._linear(node, x, weight)
            return product if bias is None else self._step(node, aten.add.Tensor, product, bias)
        if name in ("bmm", "matmul"):
            left, right = node.args[0], node.args[1]
            if axis != 0 or not is_tensor(right) or len(shape(right)) != 3:  # type: ignore[arg-type]
                raise Declined("the product has another expert axis")
            weight = self._slices(right, 0)
            alone = is_tensor(left) and len(shape(left)) == 2  # type: ignore[arg-type]
            return self._linear(node, self.read(left, None if alone else 0), weight)
        return None

    def _linear(self, node: fx.Node, x: Ref, weight: list[Operand]) -> Ref:
        turned = [Operand(o.value.map(o.value.shape[::-1], torch.t), o.node, False) for o in weight]
        return self._step(node, aten.linear.default, x, self._slot(turned))

    def _slot(self, each: list[Operand]) -> Slot:
        self.slots.append(each)
        return Slot(len(self.slots) - 1)

    def _einsum(self, node: fx.Node, axis: int) -> Ref:
        equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
        inputs, arrow, result = equation.partition("->")
        terms = inputs.split(",")
        if not arrow or len(terms) != 2 or "." in equation or products.einsum_broadcasts(node):
            raise Declined("the einsum is not understood")
        if constants.compact(operands[0]) is not None:
            terms, operands = terms[::-1], operands[::-1]
        left, right = terms
        letter = result[axis]
        weight_letters = right.replace(letter, "")
        if letter not in right or len(weight_letters) != 2 or len(right) != 3:
            raise Declined("the einsum holds no experts")
        weight = self._slices(operands[1], right.index(letter))
        plain, outer = left.replace(letter, ""), ""
        if len(set(left)) != len(left) or not plain or plain[-1] not in weight_letters:
            raise Declined("the einsum is no product over the last axis")
        outer = weight_letters.replace(plain[-1], "")
        if outer in left or result.replace(letter, "") != plain[:-1] + outer:
            raise Declined("the einsum is no product over the last axis")
        if letter in left and left.index(letter) == len(left) - 1:
            raise Declined("the einsum is no product over the last axis")
        x = self.read(operands[0], left.index(letter) if letter in left else None)
        if weight_letters[0] == plain[-1]:
            return self._linear(node, x, weight)
        return self._step(node, aten.linear.default, x, self._slot(weight))

    def _grouped(self, node: fx.Node) -> Ref:
        data, weight, offsets = node.args[:3]
        if not isinstance(offsets, fx.Node) or len(node.args) > 3:
            raise Declined("the grouped product is not understood")
        self.offsets.append(offsets)
        return self._linear(node, self.read(data, None), self._slices(weight, 0))

    def _gathered(self, node: fx.Node) -> Ref:
        """``squeeze(bmm(W[chosen], x[..., None]))`` and ``squeeze(bmm(x[:, None], W[chosen]))``."""
        product: Any = node.args[0]
        if named(product) != "bmm":
            raise Declined(f"{node.name} is not understood")
        left, right = product.args
        sides = [
            (weight, column, at)
            for weight, column, at in ((left, right, 2), (right, left, 1))
            if named(column) == "unsqueeze" and _axis(column) == at == _axis(node, product)
        ]
        if not sides:
            raise Declined("the product is not understood")
        weight, column, at = sides[0]
        each = self._chosen(weight)
        if each is None:
            raise Declined("the product is not with the chosen experts' weights")
        x = self.read(column.args[0], None)
        if at == 1:
            return self._linear(node, x, each)
        return self._step(node, aten.linear.default, x, self._slot(each))

    # --- constants --------------------------------------------------------------------------------

    def _chosen(self, node: Any) -> list[Operand] | None:
        """The experts' slices of ``constant[chosen]``."""
        if not isinstance(node, fx.Node) or named(node) != "index":
            return None
        indices: Any = node.args[1]
        if len(indices) != 1 or constants.compact(node.args[0]) is None:
            return None
        self.chosen.append(indices[0])
        return self._slices(node.args[0], 0)

    def _slices(self, node: Any, axis: int) -> list[Operand]:
        exact = constants.exact(node)
        if exact is None or not same(exact.shape, shape(node)):
            raise Declined("the experts' weights are not constant")
        if self.count is None:
            self.count = exact.shape[axis]
        if exact.shape[axis] != self.count:
            raise Declined("the experts' weights disagree on how many experts there are")
        rest = exact.shape[:axis] + exact.shape[axis + 1 :]

        view = _view(node)

        def one(index: int) -> Lazy:
            # A slice of the stored tensor is widened alone, not with those of all experts.
            if view is not None:
                return Lazy.of(view.select(axis, index))
            return exact.map(rest, lambda t: t.select(axis, index))

        return [Operand(one(i), node, False) for i in range(self.count)]

    def _constant_operand(self, node: Any, rank: int, axis: int | None) -> Slot | None:
        if self.entry is not None:
            each = self._chosen(node)
            if each is not None:
                return self._slot(each)
        exact = constants.exact(node)
        if exact is None:
            return None
        if not same(exact.shape, shape(node)):
            raise Declined("a constant is repeated")
        if axis is None:
            if self.count is None or len(exact.shape) > 1:
                raise Declined("a constant differs between tokens")
            return self._slot([Operand(exact, node, True)] * self.count)
        at = axis - (rank - len(exact.shape))
        if at >= 0 and exact.shape[at] != 1:
            return self._slot(self._slices(node, at))
        if self.count is None:
            raise Declined("a constant stands before the experts")
        if at < 0:
            return self._slot([Operand(exact, node, True)] * self.count)
        rest = exact.shape[:at] + exact.shape[at + 1 :]
        one = Operand(exact.map(rest, lambda t: t.squeeze(at)), node, False)
        return self._slot([one] * self.count)


def _view(node: fx.Node) -> torch.Tensor | None:
    """The stored tensor behind a constant, as it is or transposed; ``None`` if it is not stored."""
    if constants.is_fixed(node):
        return None if "refold_exact" in node.meta else constants.tensor(node)
    if named(node) not in ("transpose", "permute"):
        return None
    stored = _view(node.args[0])  # type: ignore[arg-type]
    return None if stored is None else node.target(stored, *node.args[1:])  # type: ignore[operator]


def _axis(node: fx.Node, source: fx.Node | None = None) -> int:
    """The axis that an ``unsqueeze`` adds, or that a ``squeeze`` of ``source`` takes away."""
    dim = node.args[1] if len(node.args) > 1 else None
    rank = len(shape(node)) if source is None else len(shape(source))
    return dim % rank if isinstance(dim, int) and rank else -1


def stacked(root: fx.Node) -> Mixture | None:
    parts = joined(root)
    if parts is None or named(parts[0]) == "stack":
        return None
    value, axis, scales, gates = parts
    reader = _Axis()
    try:
        reader.read(value, axis)
        if gates is None:
            assert scales is not None
            return reader.mixture(root, "stacked", tuple(scales), None)
        count = reader.count or 0
        routing = dense_routing([Gate(*gates, i) for i in range(count)], [1.0] * count)
        return reader.mixture(root, "routed over all experts", None, routing)
    except Declined:
        return None


def selected(root: fx.Node) -> Mixture | None:
    """Rows that each chose an expert, weighted, and summed over the choices of each token."""
    if not is_call(root, aten.sum.dim_IntList):
        return None
    given = arguments(root)
    grouped: Any = given["self"]
    if dims(given) != [1] or given["keepdim"] or named(grouped) not in ("reshape", "view"):
        return None
    rows: Any = grouped.args[0]
    choices = shape(grouped)[1]
    if len(shape(grouped)) != 3 or not isinstance(choices, int):
        return None
    if named(rows) == "index":
        selection = rows_selected(rows)
        rows = None if selection is None else selection[0]
    pair = gated(rows)
    if pair is None:
        return None
    value, gate = pair
    reader = _Axis(entry=lambda node: _repeated_rows(node, choices))
    reader.read(value, None)
    # A bias may be picked by index beside a grouped product, whose offsets then say all.
    sources = set(reader.offsets or reader.chosen)
    if len(sources) != 1:
        return None
    key = sources.pop()
    by_offset, count = bool(reader.offsets), reader.count or 0

    def read(watched: Mapping[fx.Node, torch.Tensor]) -> tuple[torch.Tensor, int]:
        weights, at = watched[gate].reshape(-1).double(), watched[key]
        if by_offset:
            every = torch.arange(len(weights), device=at.device)
            at = torch.searchsorted(at.to(torch.int64), every, right=True)
        totals = torch.zeros(count, dtype=torch.float64, device=weights.device)
        return totals.index_add(0, at.reshape(-1), weights), len(weights)

    return reader.mixture(root, "routed to chosen experts", None, Routing((gate, key), read))


def _repeated_rows(node: fx.Node, choices: int) -> fx.Node | None:
    """``x`` of rows that repeat each token as often as it chooses."""
    if named(node) == "repeat_interleave" and node.args[1] == choices:
        return node.args[0] if arguments(node)["dim"] == 0 else None  # type: ignore[return-value]
    if named(node) != "index":
        return None
    selection = rows_selected(node)
    index = None if selection is None else selection[1]
    if isinstance(index, fx.Node) and named(index) in ("floor_divide", "div"):
        return selection[0] if index.args[1] == choices and selection else None
    return None
