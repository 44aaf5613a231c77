"""Bugs planted into what one rule of a pass made, and whether verification refuses them.

A rule is run alone (:class:`Only`), and then one thing that it made is broken as a slip in its code
would: a bias dropped, a channel's sign, scale or neighbour taken, a tap shifted, an axis or an
operand mistaken, a call left out. A rule that makes nothing is broken in what reads what it left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from refold.errors import VerificationError
from refold.frontends.export import trace
from refold.graph import constants, nodes
from refold.graph.copies import copy_sharing_tensors
from refold.graph.evaluate import Oracle
from refold.graph.ops import op_name
from refold.graph.program import Program
from refold.passes.prepare import clean_up
from refold.rewrite import driver
from refold.rewrite.context import Context
from refold.rewrite.pattern import root_targets
from refold.rewrite.pipeline import Pipeline
from refold.rewrite.result import Applied, Approximation, Decline, Pass, PassResult
from refold.rewrite.rule import RewriteRule
from refold.verify import codes
from refold.verify.compare import verify
from refold.verify.references import References, references

VISIBLE = 1e-3  # of the output's scale: what a bug must move to count as one

aten = torch.ops.aten

# --- rules ----------------------------------------------------------------------------------------

# What a pass does without the driver, by its function and what that returns where it does nothing.
_BY_HAND: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "clean-up/common-subexpression": (clean_up, "merge_common", lambda graph: []),
    "clean-up/dead-code": (clean_up, "_remove_dead", lambda gm: ([], False)),
}


def rules_of(item: Pass) -> tuple[str, ...]:
    """The rules of a pass: those that it gives to the driver, and those that it has by hand.

    Several rules of one id are told apart by the operators that they look at.
    """
    seen: list[RewriteRule] = []
    with _driving(lambda rules: seen.extend(rules) or []):
        item.run(trace(nn.Identity(), (torch.ones(2, 2),)).graph_module)
    by_hand = [rule for rule in _BY_HAND if rule.startswith(f"{item.name}/")]
    return tuple(dict.fromkeys([*_keys(seen).values(), *by_hand])) or (item.name,)


def id_of(key: str) -> str:
    """The id that the records of a rule carry."""
    return key.partition(" ")[0]


def _keys(rules: Sequence[RewriteRule]) -> dict[RewriteRule, str]:
    often = Counter(rule.name for rule in rules)
    return {r: r.name if often[r.name] == 1 else f"{r.name} ({_roots(r)})" for r in rules}


def _roots(rule: RewriteRule) -> str:
    names = [t.__name__.split(".")[0] for t in root_targets([rule.pattern])]
    return ", ".join(sorted(names)[:2])


@contextmanager
def _driving(choose: Callable[[Sequence[RewriteRule]], list[RewriteRule]]) -> Iterator[None]:
    """Lets the driver run the rules that ``choose`` picks of those that a pass gives to it."""
    real = driver._Driver
    with patch.object(driver, "_Driver", lambda gm, rules: real(gm, choose(rules))):
        yield


@dataclass(frozen=True)
class Only:
    """A pass with one of its rules alone."""

    inner: Pass
    key: str

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def exactness(self) -> str:
        return self.inner.exactness

    def run(self, gm: fx.GraphModule, context: Context = Context()) -> PassResult:
        with ExitStack() as stack:
            chosen = lambda rules: [r for r, key in _keys(rules).items() if key == self.key]
            stack.enter_context(_driving(chosen))
            for rule, (module, function, idle) in _BY_HAND.items():
                if rule.startswith(f"{self.name}/") and rule != self.key:
                    stack.enter_context(patch.object(module, function, idle))
            return self.inner.run(gm, context)


# --- bugs -----------------------------------------------------------------------------------------

Bug = tuple[str, Callable[[], Any]]


@dataclass
class Planted:
    """A pass, with the ``index``-th of the bugs that can be planted into what it made."""

    inner: Pass
    index: int
    bug: str = ""
    applied: list[Applied] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def exactness(self) -> str:
        return self.inner.exactness

    def run(self, gm: fx.GraphModule, context: Context = Context()) -> PassResult:
        before = {n: (_call(n), n.all_input_nodes) for n in gm.graph.nodes}
        result = self.inner.run(gm, context)
        self.applied = result.applied
        bugs = list(_bugs(gm, before)) if result.applied else []
        if self.index < len(bugs):
            self.bug, plant = bugs[self.index]
            plant()
            gm.recompile()
        if result.approximation is not None:
            result.approximation = replace(result.approximation, after=copy_sharing_tensors(gm))
        return result


_Call = tuple[Any, Any, Any]
_CHANGES: dict[str, Callable[[Tensor], Tensor | None]] = {
    "zeros": torch.zeros_like,
    "a channel's sign": lambda t: _with_row(t, -1.0),
    "a channel's scale": lambda t: _with_row(t, 1.5),
    "a little of a channel's scale": lambda t: _with_row(t, 1.02),
    "the next channel": lambda t: t.roll(1, 0),
    "a shifted tap": lambda t: t.roll(1, -1) if t.ndim > 1 else t.flip(0),
    "another axis": lambda t: _turned(t),
    "the next input": lambda t: t.roll(1, 1) if t.ndim > 1 else -t,
}
_BEHIND: dict[str, tuple[Any, Callable[[int], tuple[Any, ...]]]] = {
    "negated": (aten.neg.default, lambda last: ()),
    "flipped": (aten.flip.default, lambda last: ([last],)),
    "shifted": (aten.roll.default, lambda last: ([1], [last])),
    "scaled": (aten.mul.Tensor, lambda last: (1.25,)),
    "scaled a little": (aten.mul.Tensor, lambda last: (1.005,)),
}


def _call(node: fx.Node) -> _Call:
    return (node.target, node.args, tuple(node.kwargs.items()))


def _bugs(gm: fx.GraphModule, before: dict[fx.Node, tuple[_Call, list[fx.Node]]]) -> Iterator[Bug]:
    """Bugs of all kinds in turn, so that the first few are not of one."""
    alive = [n for n in gm.graph.nodes if n.op in ("call_function", "get_attr") and n.users]
    made = [n for n in alive if n not in before or _call(n) != before[n][0]]
    gone = [n for n in before if n._erased or not (n.users or n.op == "output")]
    # A rule that makes nothing: what lost a reader may be read wrongly, or be taken away too.
    beside = [n for g in gone for n in before[g][1] if n in alive or n.op == "placeholder"]
    kinds = [
        *([*_of_constants(gm, made, name)] for name in _CHANGES),
        [*_of_calls([n for n in made if n.op == "call_function"])],
        [*_of_operands(gm, made, before)],
        *([*_behind_all(gm, made, before, beside, kind)] for kind in _BEHIND),
        [*_left_out(made, beside)],
    ]
    for turn in zip_longest(*kinds):
        yield from (bug for bug in turn if bug is not None)


def _of_constants(gm: fx.GraphModule, made: list[fx.Node], name: str) -> Iterator[Bug]:
    for node in made:
        if not (constants.is_get_attr(node) and node.meta["val"].ndim):
            continue
        kind = node.meta["val"].dtype
        if (kind.is_floating_point or kind == torch.uint8) and _changed(node, name) is not None:
            yield f"{name} in {node.target}", lambda n=node: _store(gm, n, _changed(n, name))


def _changed(node: fx.Node, name: str) -> Tensor | None:
    constants.materialise(node)
    return _CHANGES[name](constants.tensor(node).detach().clone())


def _of_calls(calls: list[fx.Node]) -> Iterator[Bug]:
    for node in calls:
        at = {"linear": 2, "conv2d": 2, "bcq_linear": 3}.get(op_name(node), len(node.args))
        if isinstance((*node.args, None)[at], fx.Node):
            yield f"no bias in {node.name}", lambda n=node, i=at: n.update_arg(i, None)
        if op_name(node) == "add":
            yield f"{node.name} subtracts", lambda n=node: setattr(n, "target", aten.sub.Tensor)
        if op_name(node) == "mul":
            yield f"{node.name} adds", lambda n=node: setattr(n, "target", aten.add.Tensor)
        for at, wrong in _wrong_axes(node):
            yield f"axis {wrong} in {node.name}", lambda n=node, i=at, w=wrong: n.update_arg(i, w)


def _wrong_axes(node: fx.Node) -> Iterator[tuple[int, Any]]:
    """Other axes with which a call has a result of the same shape."""
    if not (isinstance(node.target, torch._ops.OpOverload) and nodes.is_tensor(node)):
        return
    names = [a.name for a in node.target._schema.arguments]
    rank = node.meta["val"].ndim
    for at, value in enumerate(node.args):
        others: list[Any] = []
        if names[at] == "dim" and isinstance(value, int):
            others = [axis for axis in range(rank) if axis != value % rank]
        if names[at] == "dims" and isinstance(value, (list, tuple)):
            others = [_swapped(list(value), i) for i in range(len(value) - 1)]
        for other in others:
            given, args = node.args, [*node.args]
            args[at] = other
            try:
                node.args = tuple(args)
                alike = str(nodes.fake_result(node).shape) == str(node.meta["val"].shape)
            except (RuntimeError, IndexError, ValueError):
                alike = False
            finally:
                node.args = given
            if alike:
                yield at, other


def _of_operands(
    gm: fx.GraphModule, made: list[fx.Node], before: dict[fx.Node, tuple[_Call, list[fx.Node]]]
) -> Iterator[Bug]:
    """The nearest other value of the same kind read instead of what a call reads anew."""
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    for reader in [*made, gm.graph.output_node()]:
        known = before[reader][1] if reader in before else ()
        for read in reader.all_input_nodes:
            if read in known:
                continue
            alike = [
                n for n in order if n is not read and order[n] < order[reader] and _same(n, read)
            ]
            for other in alike[-2:]:
                yield (
                    f"{reader.name} reads {other.name} for {read.name}",
                    lambda r=reader, a=read, b=other: r.replace_input_with(a, b),
                )


def _behind_all(
    gm: fx.GraphModule,
    made: list[fx.Node],
    before: dict[fx.Node, tuple[_Call, list[fx.Node]]],
    beside: list[fx.Node],
    kind: str,
) -> Iterator[Bug]:
    """Something wrong behind what a rule made, and before what reads other things than before."""
    edges: dict[tuple[fx.Node, tuple[fx.Node, ...]], None] = {}
    for node in made:
        if node.op == "call_function" and node not in before:
            edges[node, tuple(node.users)] = None
    for reader in [n for n in [*made, gm.graph.output_node()] if n in before]:
        for read in reader.all_input_nodes:
            if read not in before[reader][1] and read.op != "get_attr":
                edges[read, (reader,)] = None
    for node in beside:
        if node.op != "get_attr":
            edges[node, tuple(node.users)] = None
    for node, readers in edges:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim:
            yield (
                f"{node.name} {kind}",
                lambda n=node, r=readers: _insert(gm, n, r, *_BEHIND[kind]),
            )


def _left_out(made: list[fx.Node], beside: list[fx.Node]) -> Iterator[Bug]:
    calls = [n for n in [*made, *beside] if n.op == "call_function"]
    for node in dict.fromkeys([*calls, *(u for n in made for u in n.users)]):
        for source in node.all_input_nodes:
            if node.op == "call_function" and _same(source, node):
                yield (
                    f"{node.name} left out",
                    lambda n=node, s=source: n.replace_all_uses_with(s, propagate_meta=False),
                )


def _same(a: fx.Node, b: fx.Node) -> bool:
    values = [n.meta.get("val") for n in (a, b)]
    if not all(isinstance(v, Tensor) for v in values):
        return False
    return values[0].dtype == values[1].dtype and str(values[0].shape) == str(values[1].shape)


def _with_row(t: Tensor, factor: float) -> Tensor | None:
    """The largest row scaled; of the signs of a code, a row can only be negated."""
    if t.dtype == torch.uint8:
        row = torch.zeros_like(t)
        row[:, 0] = 255
        return t ^ row if factor == -1.0 else None
    axis = max(range(t.ndim), key=lambda i: t.shape[i]) if t.shape[0] == 1 else 0
    others = [i for i in range(t.ndim) if i != axis]
    row = int((t.abs().amax(others) if others else t.abs()).argmax())
    changed = t.clone()
    changed.select(axis, row).mul_(factor)
    return changed


def _turned(t: Tensor) -> Tensor | None:
    """Two axes of one length for each other, the last such."""
    pairs = [(i, j) for i in range(t.ndim) for j in range(i) if t.shape[i] == t.shape[j] > 1]
    return t.transpose(*pairs[-1]).contiguous() if pairs else None


def _swapped(values: list[int], at: int) -> list[int]:
    return [*values[:at], values[at + 1], values[at], *values[at + 2 :]]


def _store(gm: fx.GraphModule, node: fx.Node, value: Tensor | None) -> None:
    node.meta.pop("refold_exact", None)
    gm.register_buffer(f"bug_{node.name}", value)
    node.target = f"bug_{node.name}"


def _insert(
    gm: fx.GraphModule,
    node: fx.Node,
    readers: tuple[fx.Node, ...],
    target: Any,
    arguments: Callable[[int], tuple[Any, ...]],
) -> None:
    with gm.graph.inserting_after(node):
        wrong = gm.graph.call_function(target, (node, *arguments(node.meta["val"].ndim - 1)))
    wrong.meta["val"] = node.meta["val"]
    for reader in readers:
        reader.replace_input_with(node, wrong)


# --- what becomes of them -------------------------------------------------------------------------


@dataclass
class Outcome:
    """The bugs that were planted into one rule, by what became of them.

    Attributes:
        refused: by verification.
        missed: visible, and passed.
        hidden: they move the result by less than a thousandth.
        undone: the check between the passes refused the graph, and the pass was undone.
        broken: the graph does not run.
        ids: of the rules that fired.
    """

    refused: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    undone: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)

    @property
    def visible(self) -> int:
        return len(self.refused) + len(self.missed)


@dataclass
class Bench:
    """A traced network, what is known of it, and where failures of passes are recorded."""

    program: Program
    known: References
    failures: list[Decline]
    original: fx.GraphModule

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, failures: list[Decline]) -> Bench:
        program = trace(model, (x,))
        original = copy_sharing_tensors(program.graph_module)
        known = references(original, program, module=program.module)
        return cls(program, known, failures, original)

    def plant(
        self,
        item: Pass,
        before: fx.GraphModule,
        after: Sequence[Pass] = (),
        most: int = 24,
    ) -> Outcome:
        """Plants bugs into a pass on the graph that those before it left, until ``most`` show."""
        found, exact = Outcome(), self._leaves(self._run(item, before, after)[0])
        for index in range(400):
            planted = Planted(item, index)
            gm, substitution = self._run(planted, before, after)
            found.ids |= {record.rule for record in planted.applied}
            if not planted.bug or found.visible >= most:
                return found
            self._judge(planted.bug, gm, substitution, exact, found)
        raise AssertionError("more bugs than anyone asked for")

    def _run(
        self, item: Pass, before: fx.GraphModule, after: Sequence[Pass]
    ) -> tuple[fx.GraphModule, Approximation | None]:
        gm = copy_sharing_tensors(before)
        first, *_ = Pipeline("planted", (item, *after)).run(gm).runs
        return gm, first.result.approximation

    def _leaves(self, gm: fx.GraphModule) -> list[Tensor]:
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, self.program.example)
        return pytree.tree_leaves(Oracle(gm).run(args, kwargs))

    def _judge(
        self,
        bug: str,
        gm: fx.GraphModule,
        substitution: Approximation | None,
        exact: list[Tensor],
        found: Outcome,
    ) -> None:
        if self.failures:
            self.failures.clear()
            found.undone.append(bug)
            return
        try:
            wrong = self._leaves(gm)
        except (RuntimeError, IndexError, TypeError, ValueError):  # nobody would miss that
            found.broken.append(bug)
            return
        if all(map(_alike, wrong, exact)):
            found.hidden.append(bug)
            return
        try:
            if substitution is not None:
                codes.judge(substitution, self.original, self.known, self.program)
            else:
                verify(self.original, gm, self.known, folded_gm=gm)
        except VerificationError:
            found.refused.append(bug)
        else:
            found.missed.append(bug)


def _alike(wrong: Tensor, exact: Tensor) -> bool:
    if wrong.shape != exact.shape:
        return False
    scale = exact.abs().max().clamp_min(1e-300)
    return bool((wrong - exact).abs().max() / scale < VISIBLE)
