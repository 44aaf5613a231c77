"""Split what acts on each token alone where some tokens are constant: their part folds.

    f(cat(c, x)) = cat(f(c), f(x))                          for f that treats tokens one by one
    attend(cat(q, p), k, v) = cat(attend(q, k, v), attend(p, k, v))
    attend(q, cat(k, l), cat(v, w)) = attend(q, k, v)       where the mask hides l from q

Prompts, registers, class tokens and the known rows of a table are concatenated with the tokens of
the input, and share every layer with them. On their own their layers depend on constants alone, so
they fold away, up to the first attention that lets them see the input. Where the mask hides the
input from them, they stay constant through every layer: what is left of them are the keys and
values that the other tokens attend to.

Exact when: the call is elementwise, or mixes other axes only (a projection the last one, a norm the
normalised ones, a softmax its own), and its other operands are constant along the tokens, or
constants that are cut like them. Layouts may move the axis of the tokens, not merge it. Of an
attention the queries are rows; a key is left out where no query of the part sees it, for every size
that the trace allows: it has weight zero. The tokens are put together again where something else
reads them. Taken where a product of the constant part goes and the cost table calls the whole
cheaper, the concatenations that move behind the products included.

Of attentions only the fused operator is read, not one written out as products; and a mask of
symbolic size that hides some constant tokens from others (a causal one that is no flag) keeps it
whole.

Before::

    %t = cat([@prompt, %x], 1)
    %q = linear(%t, @weight, @bias)

After::

    %p = linear(@prompt, @weight, @bias)
    %l = linear(%x, @weight, @bias)
    %q = cat([%p, %l], 1)

Where it occurs: prompts of every layer (Jia et al., Visual Prompt Tuning, ECCV 2022, section 3.2),
tables that are known beforehand (Hollmann et al., TabPFN, ICLR 2023, section 3).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from refold.graph import aliasing, constants, ops, provenance
from refold.graph.nodes import (
    arguments,
    aten,
    call,
    hints,
    is_call,
    is_tensor,
    pinned,
    same,
    shape,
)
from refold.graph.ops import kind, op_name
from refold.passes.prepare.index_bounds import IndexBounds, Interval
from refold.rewrite.context import Context
from refold.rewrite.cost import FREE, CostModel
from refold.rewrite.edit import Edit, Editor
from refold.rewrite.result import Applied, PassResult, applied, declined

_PRODUCTS = ("linear", "matmul", "attention")
_MOVES = ops.VIEW | ops.PERMUTE | ops.ALIAS | ops.COPY | ops.PART | ops.CAST  # of those not sized
_READS_SIZES = ops.SIZED | ops.EXPAND
_MARK = 7919  # a size that no other axis has, to see where a layout takes an axis


@dataclass(frozen=True)
class SplitConstantTokens:
    """Splits calls over concatenations with constant tokens; see the module docstring."""

    name: str = "split-constant-tokens"
    exactness: str = "reassociates"

    def run(self, gm: fx.GraphModule, context: Context = Context()) -> PassResult:
        return _Splitter(gm, self.name, context.costs).run()


@dataclass(frozen=True)
class _Split:
    """A value that is its ``parts`` one after another along an axis."""

    axis: int
    parts: tuple[fx.Node, ...]

    @property
    def sizes(self) -> tuple[Any, ...]:
        return tuple(shape(p)[self.axis] for p in self.parts)


@dataclass
class _Splitter:
    gm: fx.GraphModule
    rule: str
    costs: CostModel
    found: dict[fx.Node, _Split] = field(default_factory=dict)  # with a part that is known
    picked: dict[fx.Node, _Split] = field(default_factory=dict)  # the part that a slice takes
    group: dict[fx.Node, fx.Node] = field(default_factory=dict)  # towards one of those split alike
    made: list[fx.Node] = field(default_factory=list)
    result: PassResult = field(default_factory=PassResult)

    def __post_init__(self) -> None:
        self.editor = Editor(self.gm, self.rule, self.result)
        self._constant = constants.constant_nodes(self.gm.graph)
        self._known = set(
            self._constant
        )  # constants, those that are expanded, what is made of them
        self._bounds = IndexBounds(self._constant)
        self._written = self.editor.written

    def run(self) -> PassResult:
        graph = self.gm.graph
        for node in list(graph.nodes):
            if node in self._constant or not _is_plain(node) or self._is_written(node):
                continue
            with self.editor.candidate(node):
                self._read(node)
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            if node in self.found or node in self.picked:
                groups.setdefault(self._leader(node), []).append(node)
        for held in groups.values():
            with self.editor.candidate(held[0]):
                self._settle(held)
        with self.editor.edit() as edit:
            edit.remove(self.made)
        self.result.modified = bool(self.result.applied)
        return self.result

    def _read(self, node: fx.Node) -> None:
        self._note(node)
        split = self._concatenation(node) or self._derived(node)
        if split is None:
            return
        if any(p in self._known for p in split.parts):
            self.found[node] = split
        elif len(split.parts) == 1:
            self.picked[node] = split

    def _is_written(self, node: fx.Node) -> bool:
        return bool(self._written) and bool(self._written & aliasing.roots(node))

    def _note(self, node: fx.Node) -> None:
        """Notes what depends on constants alone, and on sizes where it is expanded."""
        read = node.all_input_nodes[:1] if ops.has(node, _READS_SIZES) else node.all_input_nodes
        if all(a in self._known for a in read):
            self._known.add(node)

    # --- what is split ----------------------------------------------------------------------------

    def _concatenation(self, node: fx.Node) -> _Split | None:
        """A concatenation some of whose parts are known; their sizes are integers."""
        if not is_call(node, aten.cat.default):
            return None
        args = arguments(node)
        rank, dtype = len(shape(node)), node.meta["val"].dtype
        axis, parts = int(args["dim"]) % rank, list[fx.Node]()
        for source in args["tensors"]:
            split = self.found.get(source, self.picked.get(source))
            if split is not None and split.axis != axis:
                return None
            parts += [source] if split is None else split.parts
        if any(len(shape(p)) != rank or p.meta["val"].dtype != dtype for p in parts):
            return None
        if len(parts) < 2 or not any(p in self._known for p in parts):
            return None
        if any(self._is_written(p) for p in parts):
            return None  # who reads it later may read another value
        self._join_groups(node, [a for a in args["tensors"] if a in self.group])
        return _Split(axis, tuple(parts))

    def _derived(self, node: fx.Node) -> _Split | None:
        """A call of split values, part by part."""
        read = [a for a in node.all_input_nodes if a in self.found]
        if not read:
            return None
        sizes, name = self.found[read[0]].sizes, op_name(node)
        if name == "scaled_dot_product_attention":
            split = self._attended(node)
        elif any(not same(self.found[a].sizes, sizes) for a in read):
            return None
        elif ops.has(node, ops.VIEW | ops.EXPAND) and ops.has(node, ops.SIZED):
            split = self._reshaped(node)
        elif ops.has(node, _MOVES):
            split = self._moved(node)
        else:
            split = self._by_parts(node)
        if split is None or any(len(shape(p)) != len(shape(node)) for p in split.parts):
            return None  # a part of one token may lose its axis
        self._join_groups(node, read)
        return split

    def _join_groups(self, node: fx.Node, read: list[fx.Node]) -> None:
        self.group[node] = node
        for source in read:
            self.group[self._leader(source)] = node

    def _by_parts(self, node: fx.Node) -> _Split | None:
        axis = self._kept_axis(node)
        if axis is None:
            return None
        sizes = next(self.found[a] for a in node.all_input_nodes if a in self.found).sizes
        parts = []
        for index in range(len(sizes)):
            operands: dict[fx.Node, fx.Node] = {}
            for source in node.all_input_nodes:
                part = self._operand(source, node, axis, sizes, index)
                if part is None:
                    return None
                operands[source] = part
            parts.append(self._copy(node, operands))
        return _Split(axis, tuple(parts))

    def _operand(
        self, source: fx.Node, node: fx.Node, axis: int, sizes: Sequence[Any], index: int
    ) -> fx.Node | None:
        """What the part of a call reads of an operand."""
        if source in self.found:
            return self.found[source].parts[index]
        if not _is_pointwise(node) or not is_tensor(source):
            return source
        own = axis - len(shape(node)) + len(shape(source))
        if own < 0 or same(shape(source)[own], 1):
            return source
        if source not in self._known:
            return None
        return self._narrowed(node, source, own, sizes, (index, index))

    def _kept_axis(self, node: fx.Node) -> int | None:
        """The axis of a call's result along which it acts on each index of its operands alone."""
        split = {a: self.found[a].axis for a in node.all_input_nodes if a in self.found}
        rank = len(shape(node))
        if _is_pointwise(node):
            axes = {axis - len(shape(a)) + rank for a, axis in split.items()}
            return axes.pop() if len(axes) == 1 else None
        args, name = arguments(node), op_name(node)
        first = next(iter(args))
        data = args["indices" if name == "embedding" else first]
        if set(split) != {data}:
            return None
        axis, last = split[data], len(shape(data)) - 1
        others = [v for k, v in args.items() if v is not data and isinstance(v, fx.Node)]
        apart = (
            (name == "linear" and axis < last)
            or name == "embedding"
            or (name in ("layer_norm", "rms_norm") and axis <= last - len(args["normalized_shape"]))
            or (name in ("softmax", "_softmax", "log_softmax") and args["dim"] % (last + 1) != axis)
        )
        if name in ("matmul", "bmm") and axis == last - 1 and len(shape(others[0])) >= 2:
            return rank - 2
        return axis if apart else None

    def _reshaped(self, node: fx.Node) -> _Split | None:
        """A reshape, or expansion, that keeps the axis of the tokens as an axis."""
        source, target = node.all_input_nodes[0], aten.reshape.default
        split = self.found[source]
        before, after = shape(source), shape(node)
        axes = [
            a
            for a, size in enumerate(after)
            if same(size, before[split.axis])
            and same(math.prod(after[:a]), math.prod(before[: split.axis]))
        ]
        if op_name(node) == "expand":
            target = aten.expand.default
            axes = [split.axis + len(after) - len(before)]
            if not same(after[axes[0]], before[split.axis]):
                return None
        if len(axes) != 1 or len(node.args) < 2 or node.kwargs:
            return None
        parts = []
        for part in split.parts:
            sizes: list[Any] = list(node.args[1])  # type: ignore[arg-type]
            sizes[axes[0]] = self._size(node, part, split.axis)
            parts.append(self._call(node, target, (part, sizes)))
        return _Split(axes[0], tuple(parts))

    def _moved(self, node: fx.Node) -> _Split | None:
        """A layout that keeps, or moves, the axis of the tokens; or takes some of the parts."""
        source = node.all_input_nodes[0]
        split = self.found[source]
        if node.all_input_nodes != [source]:
            return None
        args, name = arguments(node), op_name(node)
        if ops.has(node, ops.PART) and int(args["dim"]) % len(shape(source)) == split.axis:
            return self._taken(split, args) if name == "slice" else None
        sizes = [*hints(source)]
        sizes[split.axis] = _MARK
        try:
            moved = node.target(torch.empty(sizes, device="meta"), *node.args[1:], **node.kwargs)  # type: ignore[operator]
        except RuntimeError:  # an explicit size of the merged axis
            return None
        if list(moved.shape).count(_MARK) != 1:
            return None
        parts = tuple(self._copy(node, {source: part}) for part in split.parts)
        return _Split(list(moved.shape).index(_MARK), parts)

    def _taken(self, split: _Split, args: Mapping[str, Any]) -> _Split | None:
        """The parts that a slice along the tokens takes, where it takes whole ones."""
        edges = {0: 0}  # by position, the part that begins there
        for index, size in enumerate(split.sizes):
            if not isinstance(size, int):
                break
            edges[max(edges) + size] = index + 1
        count = len(split.parts)
        start, end = args["start"] or 0, args["end"]
        first = edges.get(start) if isinstance(start, int) else None
        whole = end is None or (isinstance(end, int) and end == torch.iinfo(torch.int64).max)
        last = count if whole else edges.get(end) if isinstance(end, int) else None
        if first is None or last is None or args["step"] != 1 or last <= first:
            return None
        return _Split(split.axis, split.parts[first:last])

    # --- attention --------------------------------------------------------------------------------

    def _attended(self, node: fx.Node) -> _Split | None:
        """An attention by queries, each with the keys that it may see."""
        args = arguments(node)
        query, key, value, mask = (args[n] for n in ("query", "key", "value", "attn_mask"))
        rows, rank = self.found.get(query), len(shape(node))
        columns = self._columns(key, value, rank - 2)
        if rows is None or rows.axis != rank - 2 or columns is None or mask in self.found:
            return None
        if any(len(shape(n)) != rank for n in (query, key, value)):
            return None
        parts = []
        for index, queries in enumerate(rows.parts):
            seen: tuple[int, int, fx.Node | None] | None
            if args["is_causal"]:
                seen = self._past(node, rows, columns[0], index)
            else:
                seen = self._visible(node, mask, rows, columns[0], index)
            if seen is None:
                return None
            first, last, hiding = seen
            keys, values = (
                self._joined(node, split.parts[first : last + 1], rank - 2) for split in columns
            )
            operands = [queries, keys, values, *([] if hiding is None else [hiding])]
            options = {k: v for k, v in node.kwargs.items() if k in ("scale", "enable_gqa")}
            parts.append(self._call(node, node.target, tuple(operands), options))
        return _Split(rank - 2, tuple(parts))

    def _past(
        self, node: fx.Node, rows: _Split, columns: _Split, index: int
    ) -> tuple[int, int, fx.Node] | None:
        """What a part may see of keys in the same order: those before it, and its own past ones."""
        before = rows.sizes[:index]
        if not same(rows.sizes, columns.sizes) or not _fixed(before):
            return None
        start, own = sum(before), self._size(node, rows.parts[index], rows.axis)
        device = {"device": rows.parts[index].meta["val"].device}
        stop = own if not start else self._call(node, operator.add, (start, own))
        stop = start + own if isinstance(own, int) else stop
        places = self._call(node, aten.arange.start, (start, stop), device)
        all_places = self._call(node, aten.arange.default, (stop,), device)
        column = self._call(node, aten.unsqueeze.default, (places, 1))
        return 0, index, self._call(node, aten.ge.Tensor, (column, all_places))

    def _visible(
        self, node: fx.Node, mask: fx.Node | None, rows: _Split, columns: _Split, index: int
    ) -> tuple[int, int, fx.Node | None] | None:
        """The keys that a mask lets a part see, from the first to the last, and what it hides."""
        every = range(len(columns.parts))
        if mask is None:
            return 0, every[-1], None
        shown = [self._shown(mask, rows, columns, (index, j)) for j in every]
        seen = [j for j in every if shown[j] is not False]
        if not seen:
            return None
        first, last = seen[0], seen[-1]
        if all(shown[first : last + 1]):
            return first, last, None
        hiding = self._cut(node, mask, rows.sizes, (index, index), -2)
        hiding = hiding and self._cut(node, hiding, columns.sizes, (first, last), -1)
        return None if hiding is None else (first, last, hiding)

    def _columns(self, key: fx.Node, value: fx.Node, axis: int) -> tuple[_Split, _Split] | None:
        """Keys and values in parts that belong together, or each as one part."""
        k, v = (self.found.get(n, _Split(axis, (n,))) for n in (key, value))
        return (k, v) if k.axis == v.axis == axis and same(k.sizes, v.sizes) else None

    def _shown(
        self, mask: fx.Node, rows: _Split, columns: _Split, block: tuple[int, int]
    ) -> bool | None:
        """Whether a mask shows all of a part's keys to all of a part's queries, or none."""
        leading: list[Interval] = [(0.0, math.inf)] * (len(shape(mask)) - 2)
        places = [_extent(rows.sizes, block[0]), _extent(columns.sizes, block[1])]
        found = self._bounds.of(mask, [*leading, *places][-len(shape(mask)) :])
        if mask.meta["val"].dtype == torch.bool:
            return {(1.0, 1.0): True, (0.0, 0.0): False}.get(found)
        return {(0.0, 0.0): True, (-math.inf, -math.inf): False}.get(found)

    def _cut(
        self, node: fx.Node, mask: fx.Node, sizes: Sequence[Any], span: tuple[int, int], axis: int
    ) -> fx.Node | None:
        """The part of a mask along one of its two last axes."""
        own = len(shape(mask)) + axis
        if own < 0 or same(shape(mask)[own], 1):
            return mask
        return self._narrowed(node, mask, own, sizes, span)

    # --- calls on parts ---------------------------------------------------------------------------

    def _narrowed(
        self, node: fx.Node, source: fx.Node, axis: int, sizes: Sequence[Any], span: tuple[int, int]
    ) -> fx.Node | None:
        """What lies in some parts, counted from the side on which all sizes are integers."""
        first, last = span
        before, after = sizes[:first], sizes[last + 1 :]
        inside = sizes[first : last + 1]
        start: Any = sum(before) if _fixed(before) else None
        if start is None and _fixed([*inside, *after]):
            start = -sum([*inside, *after])
        end: Any = torch.iinfo(torch.int64).max
        if after:
            end = -sum(after) if _fixed(after) else None
            if end is None and _fixed([*before, *inside]):
                end = sum([*before, *inside])
        if start is None or end is None:
            return None
        return self._call(node, aten.slice.Tensor, (source, axis, start, end))

    def _joined(self, node: fx.Node, parts: Sequence[fx.Node], axis: int) -> fx.Node:
        if len(parts) == 1:
            return parts[0]
        return self._call(node, aten.cat.default, (list(parts), axis))

    def _size(self, node: fx.Node, part: fx.Node, axis: int) -> fx.Node | int:
        size = shape(part)[axis]
        return size if isinstance(size, int) else self._call(node, aten.sym_size.int, (part, axis))

    def _copy(self, node: fx.Node, operands: Mapping[fx.Node, fx.Node]) -> fx.Node:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: operands.get(n, n))
        return self._call(node, node.target, args, kwargs)

    def _call(
        self, node: fx.Node, target: Any, args: Any, kwargs: Mapping[str, Any] | None = None
    ) -> fx.Node:
        """A call on parts, which has no value of the original's."""
        with node.graph.inserting_before(node):
            made = call(
                node.graph, target, args, dict(kwargs or {}), rule=self.rule, sources=[node]
            )
        provenance.derive(made, [node], self.rule, value=None)
        self.made.append(made)
        self._note(made)
        return made

    # --- the rewrite ------------------------------------------------------------------------------

    def _leader(self, node: fx.Node) -> fx.Node:
        while self.group[node] is not node:
            node = self.group[node]
        return node

    def _settle(self, held: list[fx.Node]) -> None:
        """Splits what came of some concatenations, if that is cheaper."""
        with self.editor.edit() as edit:
            done = self._split(edit, held)
        if done is not None:
            self.result.applied.append(done)

    def _split(self, edit: Edit, held: list[fx.Node]) -> Applied | None:
        inside = dict.fromkeys(held)
        while True:
            self._prune(inside)
            border, kept = self._border(inside)
            dying = [n for n in inside if n not in kept]
            new = {n: self._whole(n) for n in border if n not in kept}
            needed = self._needed(new.values())
            products = [n for n in dying if n in self.found and kind(n) in _PRODUCTS]
            if not products:
                return None
            costs = self.costs.at(products[0])
            before = sum(map(costs.of, dying), FREE)
            after = sum((costs.of(n) for n in needed if n not in self._known), FREE)
            if before.over(after) <= 0:
                reason = (
                    f"putting the tokens together behind the products {costs.dearer(before, after)}"
                )
                self.result.declined.append(declined(self.rule, held[0], reason))
                return None
            refused = {n: why for n, made in new.items() if (why := edit.objection(n, made))}
            if not refused:
                break
            if not all(ops.is_layout(n) for n in refused):
                node, reason = next(iter(refused.items()))
                self.result.declined.append(declined(self.rule, node, reason))
                return None
            for node in refused:
                del inside[node]  # it stays, and reads what is put together in front of it
        detail = f"{len(products)} products need no constant tokens"
        done = applied(self.rule, dying, needed, detail)
        for old, made in new.items():
            edit.replace(old, made)
        edit.remove(dying)
        return done

    def _border(self, inside: dict[fx.Node, None]) -> tuple[list[fx.Node], set[fx.Node]]:
        """What is read from outside, and the concatenations among it, which stay as they are.

        What such a one reads is then read from outside, too: tokens that are put back.
        """
        kept: set[fx.Node] = set()
        while True:
            border = [n for n in inside if any(u not in inside or u in kept for u in n.users)]
            more = {n for n in border if self._is_root(n)} - kept
            if not more:
                return border, kept
            kept |= more

    def _prune(self, inside: dict[fx.Node, None]) -> None:
        """Drops layouts at the border: a layout of what is put together is as good."""
        for node in reversed(list(inside)):
            moves = ops.is_layout(node) and not self._is_root(node)
            whole = node in self.found and len(self.found[node].parts) > 1
            if moves and whole and not any(u in inside for u in node.users):
                del inside[node]

    def _is_root(self, node: fx.Node) -> bool:
        return is_call(node, aten.cat.default) and node in self.found

    def _whole(self, node: fx.Node) -> fx.Node:
        """The parts of a value, put together."""
        split = self.found[node] if node in self.found else self.picked[node]
        new = self._joined(node, split.parts, split.axis)
        if new in self.made:
            provenance.derive(new, [node], self.rule)
        return new

    def _needed(self, wanted: Any) -> list[fx.Node]:
        """The calls on parts that some values are computed by, in graph order."""
        made = set(self.made)
        found: dict[fx.Node, None] = {}
        stack = list(wanted)
        while stack:
            node = stack.pop()
            if node in made and node not in found:
                found[node] = None
                stack.extend(node.all_input_nodes)
        return sorted(found)


def _is_pointwise(node: fx.Node) -> bool:
    return ops.has(node, ops.ELEMENTWISE)


def _extent(sizes: Sequence[Any], index: int) -> Interval:
    """The first and the last position of a part, or wider where a size is symbolic."""
    first = sum(s for s in sizes[:index] if isinstance(s, int))
    fixed = _fixed(sizes[: index + 1])
    return float(first), float(sum(sizes[: index + 1]) - 1) if fixed else math.inf


def _fixed(sizes: Sequence[Any]) -> bool:
    return all(isinstance(s, int) for s in sizes)


def _is_plain(node: fx.Node) -> bool:
    """Pure calls of an operator that make one tensor, and that passes may rewrite."""
    return (
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and is_tensor(node)
        and not pinned(node)
        and constants.impurity(node) is None
    )
