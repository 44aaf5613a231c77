"""Fold parallel branches and sequences of affine operations into one.

    sum_j conv(x, W_j, b_j) = conv(x, sum_j embed(W_j), sum_j b_j)
    conv(conv(x, W_1), W_2) = conv(x, W_2 * W_1)         where no border intervenes

Between two non-linearities a network computes affine maps of a few tensors. This pass reads, for
every node, its maps over earlier tensors (roots), and replaces the node by one convolution or
matrix product wherever that is cheaper. Identity, scaled identity, batch norm, average pooling,
padding, differences, concatenation, slices and low-rank branches are all maps, so no architecture
is known here: RepVGG, ACNet, DBB, MobileOne, ECBSR and LoRA are one rule.

The choice is forward and greedy: in topological order, at each node, the root with the largest
gain (cost of the nodes that die minus cost of the merged one). At least one convolution or matrix
product must die. Terms of a sum on other roots stay as addends.
Terms that a sum adds and subtracts go: a straight-through ``x + (q - x)`` is ``q``, where ``x`` has
bounds (a clamp, a tanh) and ``q`` is computed from it element by element, so that it is NaN where
``x`` is. Of another ``x`` the sum stays: at infinity it is NaN, and ``q`` need not be.
Branches that look one way (causal convolutions) become one pad and one convolution.

A layer whose result only layers read (``k(p(x))`` and ``v(p(x))``) goes into each of them, where
that is cheaper in all.

A constant matrix on the left, ``W @ x`` over tokens, is a pointwise convolution with them as its
channels. An einsum of a tensor with constants (``btd,edh,e->bth``, ``btgi,gio->btgo``) is a matrix
over the last axes. Transposed convolutions of one stride merge in sums likewise, and with pointwise
layers after them, or before them if those have no bias, and so do two in sequence; one of stride 1
is a convolution.

Exact when: strides agree; a padded outer map meets only padding and no bias of the inner one (see
:mod:`refold.passes.branches.maps`). Otherwise it declines.

Before::

    %a = conv2d(%x, @w3, @b3, padding=[1, 1])
    %c = conv2d(%x, @w1, @b1)
    %s = add(%a, %c)
    %y = add(%s, %x)

After::

    %y = conv2d(%x, @folded_weight, @folded_bias, padding=[1, 1])

Sources: Ding et al., RepVGG (CVPR 2021), section 3.3; Ding et al., Diverse Branch Block (CVPR
2021), section 3.2, transforms I to VI; Hu et al., LoRA (ICLR 2022), section 4.1.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx

from refold.algebra import affine_map as am
from refold.algebra.affine_map import AffineMap
from refold.algebra.lazy import Lazy
from refold.errors import Declined
from refold.graph import bounds, constants, layout, nodes
from refold.graph.nodes import hints
from refold.graph.ops import kind, op_name
from refold.graph.records import sums
from refold.passes.branches import maps
from refold.passes.branches.emit import Emission, Emitter
from refold.passes.branches.maps import Key, MapReader
from refold.passes.scale_shift.push.weights import overflows
from refold.rewrite.context import Context
from refold.rewrite.cost import FREE, CostModel, Price
from refold.rewrite.edit import Editor
from refold.rewrite.result import Decline, PassResult, applied, declined

_PRODUCTS = ("conv", "conv-transpose", "linear", "matmul")
_NOTHING = 1e-6  # a gain below this share is rounding of equal costs
_GROWS_FROM = 1 << 20  # bytes below which a larger constant is never refused
_OWN_FROM = 1 << 13  # likewise, where the weight that it is made of stays, for other layers
_OWN = 0.25  # of all constants: how many bytes may be added that way


@dataclass(frozen=True)
class FoldBranches:
    """Folds branches and sequences; see the module docstring.

    Attributes:
        prefer: ``cost`` takes a merge only where the cost table calls it cheaper; ``nodes`` takes
            every merge that leaves fewer nodes.
        max_growth: how many times larger a merged weight may be than the weights it replaces.
    """

    name: str = "fold-branches"
    exactness: str = "reassociates"
    prefer: Literal["cost", "nodes"] = "cost"
    max_growth: float = 2.0

    def run(self, gm: fx.GraphModule, context: Context = Context()) -> PassResult:
        growth = context.growth_or(self.max_growth)
        return _BranchFolder(gm, replace(self, max_growth=growth), context.costs).run()


@dataclass(frozen=True)
class _Growth:
    """Bytes of a merged weight, of the weights that go for it, and one that stays for others."""

    size: int
    freed: int
    stays: fx.Node | None

    @classmethod
    def of(cls, merged: AffineMap, dead: list[fx.Node], node: fx.Node) -> _Growth:
        width = node.meta["val"].element_size()
        size = merged.out_channels * merged.weight.shape[1] * math.prod(merged.taps) * width
        gone = set(dead)
        read = {c for n in dead for c in n.all_input_nodes if c.op == "get_attr"}
        stays = [c for c in read if not gone.issuperset(c.users)]
        freed = sum(constants.size_in_bytes(c) for c in read if c not in stays)
        return cls(size, freed, max(stays, key=constants.size_in_bytes, default=None))

    @property
    def unshared(self) -> int:
        """Bytes that are added because the weight stays for other layers, too."""
        return 0 if self.stays is None else max(self.size - self.freed, 0)

    def refusal(self, most: float, spare: float) -> str | None:
        """Why the merged weight is too large for what it saves, or ``None``."""
        if self.stays is not None and self.unshared > max(spare, _OWN_FROM):
            return (
                f"{self.stays.name} is shared by {len(self.stays.users)} layers, and a merged "
                f"weight beside it would grow the constants too far"
            )
        if self.size > _GROWS_FROM and self.size > most * self.freed:
            return (
                f"the merged weight would be more than {most}x larger than the weights it replaces"
            )
        return None


@dataclass
class _Candidate:
    """One way to rewrite a node: a merged map on a root, the addends left over, what dies.

    Of layers whose weight stays for others ``unshared`` has the bytes that are added, and ``shape``
    what is computed: where one layer is applied often, calls of one shape read one merged weight.
    """

    key: Key
    merged: AffineMap
    rest: list[tuple[float, fx.Node]]
    dead: list[fx.Node]
    now: Price
    then: Price
    emit: Callable[[], fx.Node]
    unshared: int = 0
    shape: Any = None

    @property
    def gain(self) -> float:
        return self.now.over(self.then)


@dataclass
class _BranchFolder:
    gm: fx.GraphModule
    options: FoldBranches
    costs: CostModel
    dearer: dict[fx.Node, str] = field(default_factory=dict)
    barred: set[tuple[fx.Node, Key]] = field(default_factory=set)  # what the door refused
    alike: dict[Any, dict[str, fx.Node]] = field(default_factory=dict)  # merged weights by shape

    def __post_init__(self) -> None:
        self.editor = Editor(self.gm, self.options.name)
        self.emitter = Emitter(self.gm, self.options.name, self.costs)
        self.reader = MapReader(self.emitter.pad_earlier)
        self.spare = _OWN * constants.stored_bytes(self.gm)

    def run(self) -> PassResult:
        result = self.editor.result
        for node in list(self.gm.graph.nodes):
            if node.op != "call_function" or not node.users:
                continue
            with self.editor.candidate(node):
                self._visit(node, result)
        for node in list(self.gm.graph.nodes):
            if kind(node) in _PRODUCTS and len(node.users) > 1 and not nodes.pinned(node):
                with self.editor.candidate(node):
                    self._into_readers(node, result)
        with self.editor.edit() as edit:
            edit.remove(n for n in self.reader.proposed if not n._erased)
        result.modified = bool(result.applied)
        result.declined += self._declined()
        return result

    def _visit(self, node: fx.Node, result: PassResult) -> None:
        self.reader.visit(node)
        if self._inside_a_sum(node):
            return  # the whole sum is merged at once, where it ends
        node = self._settle(self._cancelled(node, result), result)
        if sums.add(node) is not None:
            inner = self._leaves(node)[1]
            for part in sorted(inner):
                self._settle(part, result)
            if inner:
                self._settle(node, result)

    def _settle(self, node: fx.Node, result: PassResult) -> fx.Node:
        """Merges at a node for as long as that gains; returns what stands in its place."""
        while node.users and (choice := self._choose(node)) is not None:
            try:
                node = self._apply(node, choice, result)
            except Declined as refusal:
                self.barred.add((node, choice.key))
                self.reader.refusals.setdefault(node, str(refusal))
        return node

    def _into_readers(self, node: fx.Node, result: PassResult) -> None:
        """A layer that only layers read goes into each of them, where that is cheaper in all."""
        readers = _layers_behind(node)
        for key in self.reader.of(node):
            if key[1] is node or not readers:
                continue
            found = [self._reads(reader, key) for reader in readers]
            choices = [c for c in found if c is not None]
            if len(choices) < len(readers):
                continue
            now = sum((c.now for c in choices), self._price(node, node))
            then = sum((c.then for c in choices), FREE)
            if now.over(then) > _NOTHING * now.total:
                for reader, choice in zip(readers, choices, strict=True):
                    self._apply(reader, choice, result)
                return

    def _reads(self, reader: fx.Node, key: Key) -> _Candidate | None:
        """A reader over what the layer before it reads."""
        merged = self.reader.of(reader).get(key)
        if merged is None or (reader, key) in self.barred or not nodes.is_tensor(reader):
            return None
        return self._weigh(reader, key, merged, [], {reader})

    def _cancelled(self, node: fx.Node, result: PassResult) -> fx.Node:
        """A sum without the terms that it adds and subtracts: ``x + (q - x)`` is ``q``.

        Infinity minus infinity is NaN, so the terms that go must be finite, or NaN with what stays.
        A single term takes the sum's place only where nobody sees other strides or storage.
        """
        if sums.add(node) is None or nodes.pinned(node):
            return node
        leaves, inner = self._leaves(node)
        totals: dict[fx.Node, float] = {}
        cancels: dict[fx.Node, None] = {}
        for factor, leaf in leaves:
            if factor * totals.get(leaf, 0.0) < 0:
                cancels[leaf] = None
            totals[leaf] = totals.get(leaf, 0.0) + factor
        rest = sorted(((f, leaf) for leaf, f in totals.items() if f), key=lambda t: t[0] != 1.0)
        if not cancels or not rest or rest[0][0] != 1.0:
            return node
        for leaf in cancels:
            if not any(bounds.nan_follows(leaf, kept) for _, kept in rest):
                self.reader.refusals[node] = (
                    f"{leaf.name} is added and subtracted, but infinity minus infinity is NaN and "
                    f"{leaf.name} has no bounds, or what stays is not computed from it alone"
                )
                return node
        new = rest[0][1]
        gone = [*sorted(inner), node]
        done = applied(self.options.name, gone, [], f"terms of {node.name} that cancel")
        try:
            with self.editor.edit() as edit:
                with edit.before(node):
                    for term in rest[1:]:
                        new = self.emitter.plus(new, [term], node)
                edit.replace(node, new)
                edit.remove(gone)
        except Declined as refusal:
            self.reader.refusals.setdefault(node, f"its terms that cancel stay: {refusal}")
            return node
        for made in edit.made:
            self.reader.visit(made)
        for part in gone:
            self.reader.maps.pop(part, None)
        result.applied.append(done)
        return new

    def _inside_a_sum(self, node: fx.Node) -> bool:
        users = list(node.users)
        if len(users) != 1 or nodes.pinned(users[0]):
            return False
        return sums.add(node) is not None and sums.add(users[0]) is not None

    def _declined(self) -> Iterable[Decline]:
        alive = {n for n in self.gm.graph.nodes if n.users}
        for node, reason in {**self.reader.refusals, **self.dearer}.items():
            if node in alive:
                yield declined(
                    self.options.name, node, reason,
                    "pipeline='min-nodes' takes it" if node in self.dearer else "",
                )  # fmt: skip

    # -- choosing -------------------------------------------------------------------------------

    def _choose(self, node: fx.Node) -> _Candidate | None:
        if nodes.pinned(node) or not nodes.is_tensor(node) or nodes.dtype(node) not in (
            torch.float16, torch.bfloat16, torch.float32, torch.float64,
        ):  # fmt: skip
            return None
        best: _Candidate | None = None
        for choice in self._candidates(node):
            if choice.gain <= _NOTHING * choice.now.total:
                if choice.gain < 0 and self.options.prefer == "cost":
                    self.dearer.setdefault(
                        node,
                        f"merging it over {choice.key[1].name} "
                        f"{self.costs.at(node).dearer(choice.now, choice.then)}",
                    )
                continue
            if best is None or choice.gain > best.gain:
                best = choice
        return best

    def _candidates(self, node: fx.Node) -> Iterable[_Candidate]:
        if layout.is_layout(node) and layout.escapes(node):
            return  # a view of its own strides: a merged tensor's reshape would share storage
        for key, merged in self.reader.of(node).items():
            if (node, key) in self.barred:
                continue
            if key[1] is not node and (choice := self._weigh(node, key, merged, [], {node})):
                yield choice
        if sums.add(node) is not None and not self._inside_a_sum(node):
            yield from self._partial_sums(node)

    def _partial_sums(self, node: fx.Node) -> Iterable[_Candidate]:
        """Merges the leaves of an add tree that share a root; the others stay as addends."""
        leaves, inner = self._leaves(node)
        if len(leaves) < 3:
            return
        views = [self.reader.of(leaf) for _, leaf in leaves]
        keys = {k for v in views for k in v}
        for key in sorted(keys, key=lambda k: (k[0], k[1].name)):
            if (node, key) in self.barred:
                continue
            group = [i for i, v in enumerate(views) if key in v]
            if len(group) == len(leaves):  # a leaf that others read too may better stay an addend
                group = [i for i in group if leaves[i][1] is key[1] or len(leaves[i][1].users) == 1]
            if not 2 <= len(group) < len(leaves):
                continue
            first = views[group[0]][key]
            group = [i for i in group if maps.addable(first, views[i][key])]
            if len(group) < 2:
                continue
            merged = am.add([am.scale(views[i][key], leaves[i][0]) for i in group])
            rest = [leaf for i, leaf in enumerate(leaves) if i not in group]
            choice = self._weigh(node, key, merged, rest, {node, *inner})
            if choice is not None:
                yield choice

    def _leaves(self, node: fx.Node) -> tuple[list[tuple[float, fx.Node]], set[fx.Node]]:
        leaves: list[tuple[float, fx.Node]] = []
        inner: set[fx.Node] = set()
        stack = [(1.0, node)]
        while stack:
            factor, current = stack.pop()
            total = sums.add(current)
            if total is None or (
                current is not node and (len(current.users) != 1 or nodes.pinned(current))
            ):
                leaves.append((factor, current))
                continue
            if current is not node:
                inner.add(current)
            stack.append((factor * total.alpha, total.right))
            stack.append((factor, total.left))
        return leaves, inner

    def _weigh(
        self, node: fx.Node, key: Key, merged: AffineMap,
        rest: list[tuple[float, fx.Node]], replaced: set[fx.Node],
    ) -> _Candidate | None:  # fmt: skip
        dead = self._dying(node, key[1], replaced, {leaf for _, leaf in rest})
        if not any(kind(n) in (("embedding",) if key[0] == "table" else _PRODUCTS) for n in dead):
            return None
        emission = self.emitter.emission(node, key, merged)
        if isinstance(emission, str):
            self.reader.refusals.setdefault(node, emission)
        if not isinstance(emission, Emission):
            return None
        then = emission.price
        per_node = self.options.prefer == "nodes"
        extra = self.costs.at(node).elementwise(hints(node), 2, node.meta["val"].element_size())
        if per_node:
            then, extra = Price((float(emission.calls),)), Price((1.0,))
        now = sum((self._price(n, node) for n in dead), FREE)
        then += len(rest) * extra
        if key[1] in self.reader.proposed and not key[1].users:
            then += self._price(key[1], node)
        if nodes.dtype(node) == torch.float16 and (
            overflows(merged.weight) or overflows(Lazy.of(merged.bias))
        ):
            self.reader.refusals[node] = "the merged weights would overflow float16"
            return None
        growth = _Growth.of(merged, dead, node)
        choice = _Candidate(key, merged, rest, dead, now, then, emission.write)
        if growth.stays is not None or self.alike:
            choice.shape = _shape(choice)
            if self._serves_all(choice, growth.stays):
                growth = replace(growth, stays=None)
            choice.unshared = growth.unshared
        if not per_node and choice.gain > _NOTHING * now.total:
            reason = growth.refusal(self.options.max_growth, self.spare)
            if reason is not None:
                self.dearer[node] = reason
                return None
        return choice

    def _serves_all(self, choice: _Candidate, weight: fx.Node | None) -> bool:
        """True if one merged weight does for all readers of a weight, as far as can be seen."""
        copies = self.alike.get(choice.shape, {})
        if weight is None or (copies and not any(node._erased for node in copies.values())):
            return True
        return _all_follow(weight, set(choice.dead))

    def _price(self, node: fx.Node, at: fx.Node) -> Price:
        """What a node costs, by the model that holds where a merged call would stand."""
        price = self.costs.at(at).of(node)
        if self.options.prefer == "nodes":
            return Price((float(price.total > 0),))
        return price

    def _dying(
        self, node: fx.Node, root: fx.Node, replaced: set[fx.Node], kept: set[fx.Node]
    ) -> list[fx.Node]:
        """Nodes that nobody reads once ``node`` is computed from ``root`` and ``kept``."""
        dead = dict.fromkeys(sorted(replaced, reverse=True))
        queue: list[_Last] = []
        seen: set[fx.Node] = set()

        def enqueue(current: fx.Node) -> None:
            for source in current.all_input_nodes:
                if source.op == "call_function" and source not in seen:
                    seen.add(source)
                    heapq.heappush(queue, _Last(source))

        for current in replaced:
            enqueue(current)
        while queue:
            current = heapq.heappop(queue).node
            if current is root or current in kept or current in dead or nodes.pinned(current):
                continue
            if all(user in dead for user in current.users):
                dead[current] = None
                enqueue(current)
        return sorted(dead, reverse=True)

    # -- applying -------------------------------------------------------------------------------

    @contextmanager
    def _sharing(self, choice: _Candidate) -> Iterator[None]:
        """Lets what is written read the constants of calls of one shape."""
        if choice.shape is not None:
            self.emitter.copies = self.alike.setdefault(choice.shape, {})
        try:
            yield
        finally:
            self.emitter.copies = None

    def _apply(self, node: fx.Node, choice: _Candidate, result: PassResult) -> fx.Node:
        sources = [n for n in choice.dead if n is not node] + [node]
        with self._sharing(choice), self.editor.edit() as edit:
            with edit.before(node):
                merged = choice.emit()
                new = self.emitter.plus(merged, choice.rest, node)
            edit.stamp(new, sources)
            edit.replace(node, new)
            done = applied(
                self.options.name,
                choice.dead,
                [new],
                f"{_summary(choice.dead)} over {choice.key[1].name} into one {kind(new)}",
            )
            edit.remove(choice.dead)
        result.applied.append(done)
        self.spare -= choice.unshared
        self.reader.maps[merged] = {choice.key: choice.merged}
        self.reader.inherit(new, node, set(choice.dead))
        for gone in edit.gone:
            self.reader.maps.pop(gone, None)
        return new


def _shape(choice: _Candidate) -> Any:
    """What a candidate computes of its root and the addends left over, of which constants."""
    names: dict[fx.Node, object] = {choice.key[1]: "root"}
    names.update({leaf: ("rest", i) for i, (_, leaf) in enumerate(choice.rest)})
    parts = [choice.key[0], tuple(factor for factor, _ in choice.rest)]
    for node in sorted(choice.dead):
        parts.append(nodes.but_for(node, names))
        names[node] = len(names)
    return tuple(parts)


def _all_follow(weight: fx.Node, gone: set[fx.Node]) -> bool:
    """True if a weight's other readers stand where those do that go: they will merge, too."""
    ours = [user for user in weight.users if user in gone]
    if not ours:
        return False
    before = any(n in gone for n in ours[0].all_input_nodes)
    places = [_place(user, before) for user in weight.users]
    return all(place == places[0] for place in places)


def _place(layer: fx.Node, before: bool) -> Any:
    """A call with those that it reads, those that read it and what they read beside it."""
    read = list(layer.all_input_nodes) if before else []
    beside = [n for user in layer.users for n in user.all_input_nodes if n is not layer]
    calls = [layer, *layer.users, *(n for n in (*read, *beside) if n.op == "call_function")]
    data = {n: "data" for call in calls for n in call.all_input_nodes if n.op != "get_attr"}
    return [nodes.but_for(call, data) for call in calls]


def _layers_behind(node: fx.Node) -> list[fx.Node]:
    """The layers that read a tensor, through layouts; none where anything else reads it."""
    found: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if nodes.pinned(user) or user.op != "call_function":
                return []
            if kind(user) in _PRODUCTS:
                found[user] = None
            elif layout.is_layout(user) and nodes.is_tensor(user):
                stack.append(user)
            else:
                return []
    return sorted(found)


@dataclass(order=False)
class _Last:
    """Heap entry: the node that stands last in the graph comes first."""

    node: fx.Node

    def __lt__(self, other: _Last) -> bool:
        return other.node < self.node


def _summary(dead: list[fx.Node]) -> str:
    counts: dict[str, int] = {}
    for node in dead:
        if op_name(node) != "getitem":
            counts[kind(node)] = counts.get(kind(node), 0) + 1
    return ", ".join(f"{c} {k}" for k, c in sorted(counts.items()))
