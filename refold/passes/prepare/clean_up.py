"""Removes what computes nothing: no-ops, repeated layout calls, common subexpressions, dead code.

Each line is an identity that holds bit for bit, written as a rule:

    dropout(x, p, train=False) = x        clone(x) = contiguous(x) = alias(x) = x
    x + 0 = 0 + x = x - 0 = x             x * 1 = 1 * x = x / 1 = x
    -(-x) = x                             relu(relu(x)) = relu(x)
    to(x, dtype of x) = x                 cat([x]) = x
    leaky_relu(x, 1) = prelu(x, 1) = x
    reshape(reshape(x)) = reshape(x)      permute(permute(x)) = permute(x), or x
    x[:] = x, and every reshape, expand, repeat, pad that leaves the shape as it is
    expand(g) * x = g * x, likewise +, - and /, for an x of the result's shape
    pad(pad(x)) = pad(x)                  avg_pool(pad(x)) = avg_pool(x, padding)
    slice_scatter(x, y, d, a, b) = cat([x[:a], y, x[b:]], d), for a computed y

and those of :mod:`refold.passes.prepare.identities`.

0 and 1 are Python numbers or constant tensors of that value, and only where the result has the
shape and the dtype of ``x``. NaN and infinity pass unchanged. One liberty is taken: ``-0.0 + 0.0``
is ``+0.0``, and becomes ``-0.0``. ``x * 0`` is never folded, for ``inf * 0`` is NaN.

Conditions: no output comes to share storage with an input, a constant or another output; no view
and no output sees other strides, and no norm whose kernel depends on the memory format (group norm
loses half of its digits channels last) another one; nothing moves across a write. Views become
``reshape``, which does the same wherever the view worked, and does not depend on strides.

Before::

    %x : f32[s0, 8, 14, 14] = input
    %dropout : f32[s0, 8, 14, 14] = dropout(%x, 0.5, False)
    %add : f32[s0, 8, 14, 14] = add(%dropout, 0)
    %relu : f32[s0, 8, 14, 14] = relu(%add)
    %relu_1 : f32[s0, 8, 14, 14] = relu(%relu)
    return (%relu_1,)

After::

    %x : f32[s0, 8, 14, 14] = input
    %relu : f32[s0, 8, 14, 14] = relu(%x)
    return (%relu,)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from refold.graph import aliasing, constants, layout, nodes, ops
from refold.passes.prepare import identities, join_pads
from refold.rewrite.build import Builder
from refold.rewrite.context import Context
from refold.rewrite.driver import apply_rules
from refold.rewrite.edit import Editor
from refold.rewrite.pattern import Attr, Call, Const, Match, Pattern, Var, Where
from refold.rewrite.result import Applied, PassResult
from refold.rewrite.rule import RewriteRule

aten = torch.ops.aten

x = Var("x")

_RESHAPES = tuple(p.default if p is aten.view else p for p in ops.packets(ops.VIEW))
# Reshapes whose second argument is the new shape.
_SIZED = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
_EXPANDS = ops.packets(ops.EXPAND)
# Arithmetic that expands its operands by itself.
_BROADCASTING = (
    aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor,
)  # fmt: skip
_PERMUTES = ops.packets(ops.PERMUTE)
_COPIES = (aten.clone, aten.contiguous)
# Layers that take one sample without a batch.
_CONVOLUTIONS = tuple(getattr(aten, f"conv{t}{n}d") for t in ("", "_transpose") for n in (1, 2, 3))
_LAYERS = (aten.linear, *_CONVOLUTIONS)
# The bitwise ones keep truth values alone, which a trait does not say.
_ANDS = (aten.bitwise_and, aten.__and__, aten.logical_and)
# The same of these.
_ORS = (aten.bitwise_or, aten.__or__, aten.logical_or)
# Roundings to whole numbers: one with decimals is another overload.
_ROUNDINGS = (aten.floor.default, aten.ceil.default, aten.round.default, aten.trunc.default)
_RESIZES = ops.packets(ops.RESIZE)
_ROUNDS = 8
_COMMON = "clean-up/common-subexpression"


@dataclass(frozen=True)
class CleanUp:
    """The pass: rules, common subexpressions and dead code, until nothing changes.

    Attributes:
        last: nothing follows that reads layers: what frontends write for passes to read goes.
    """

    name: str = "clean-up"
    exactness: str = "exact"
    last: bool = False

    def run(self, gm: fx.GraphModule, context: Context = Context()) -> PassResult:
        """Cleans a graph in place."""
        editor = Editor(gm, self.name)
        done, swept = _remove_dead(editor)  # a dead user would hold the call that it reads
        modified = _loosen_views(editor)
        rules = _rules(gm.graph, strides_matter=aliasing.reads_strides(gm.graph))
        rules += identities.rules(
            strides_matter=aliasing.reads_strides(gm.graph), last=self.last
        ) + ((OfOneSample(),) if self.last else ())
        for _ in range(_ROUNDS):
            result = apply_rules(gm, rules)
            merged = merge_common(Editor(gm, _COMMON, result))
            done += [*result.applied, *merged]
            if not merged:
                break
        last, swept_again = _remove_dead(editor)
        done += last
        modified = modified or bool(done) or swept or swept_again
        return PassResult(modified, _by_rule(done), result.declined)


class Drop(RewriteRule):
    """A call whose value is its input's: it goes."""

    def __init__(self, name: str, pattern: Pattern) -> None:
        self.name = f"clean-up/{name}"
        self.pattern = pattern

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        result: fx.Node = match["x"]
        return result


class OfOneSample(RewriteRule):
    """``squeeze(conv(unsqueeze(x, 0)), 0)`` is the layer of one sample, without a batch."""

    name = "clean-up/one-sample"
    pattern = Call(aten.squeeze.dim, Call(_LAYERS, Call(aten.unsqueeze, x, 0), ...), 0)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        conv: Any = match.root.args[0]
        return build(conv.target, match["x"], *conv.args[1:], **conv.kwargs)


class MergeReshapes(RewriteRule):
    """``reshape(reshape(x))`` is one reshape; a copy in between changes nothing."""

    name = "clean-up/reshape-chain"
    pattern = Call(_RESHAPES, Call((*_RESHAPES, *_COPIES), x, ...), ...).where(
        lambda node: _writable(node)
    )

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        source, root = match["x"], match.root
        # Symbolic sizes make a fake reshape slow; of a contiguous tensor its result is known.
        known = root if nodes.is_contiguous(source) and nodes.is_contiguous(root) else None
        return nodes.call(
            build.graph, aten.reshape.default, (source, _sizes(root)),
            rule=build.rule, sources=build.sources, like=known,
        )  # fmt: skip


class MergePermutes(RewriteRule):
    """``permute(permute(x))`` is one permutation, or none."""

    name = "clean-up/permute-chain"
    pattern = Call(_PERMUTES, Call(_PERMUTES, x, ...).shared(), ...)

    def check(self, match: Match) -> str | None:
        outer, inner = match.nodes
        if _composed(outer, inner) == _identity(outer) or len(inner.users) == 1:
            return None
        return "the inner permutation has other users, so that none would be saved"

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        outer, inner = match.nodes
        dims = _composed(outer, inner)
        if dims == _identity(outer):
            result: fx.Node = match["x"]
            return result
        return build(aten.permute.default, match["x"], dims)


class DropExpand(RewriteRule):
    """An expansion that its reader makes by itself: it broadcasts."""

    name = "clean-up/expand"
    pattern = Call(_BROADCASTING, ...).where(lambda node: _spare_expand(node) is not None)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        root, spare = match.root, _spare_expand(match.root)
        args = tuple(spare.args[0] if a is spare else a for a in root.args)  # type: ignore[union-attr]
        target: Any = root.target
        return nodes.call(
            build.graph, target, args, dict(root.kwargs),
            rule=build.rule, sources=build.sources, like=root,
        )  # fmt: skip


def _spare_expand(reader: fx.Node) -> fx.Node | None:
    """An expanded operand of an elementwise call whose other operand has the result's shape."""
    operands = list(reader.args[:2])
    for expanded, other in (operands, operands[::-1]):
        if not (nodes.is_call(expanded, *_EXPANDS) and nodes.is_tensor(other)):
            continue
        assert isinstance(expanded, fx.Node)
        assert isinstance(other, fx.Node)
        alike = nodes.dtype(other) == nodes.dtype(expanded)  # a scalar would promote less
        if alike and other is not expanded and nodes.same(nodes.shape(other), nodes.shape(reader)):
            return expanded
    return None


class MergeRelus(RewriteRule):
    """``relu(relu(x))`` is ``relu(x)``."""

    name = "clean-up/relu"
    pattern = Call(aten.relu, Call(aten.relu, x).shared().named("inner"))

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        result: fx.Node = match["inner"]
        return result


class JoinStoredSlice(RewriteRule):
    """``x[:, a:b] = y`` on a copy of ``x`` is a concatenation, which other rules can see through.

    A constant that is stored stays: branch folding reads it as the value of a border.
    """

    name = "clean-up/stored-slice"
    pattern = Call(aten.slice_scatter, x, Var("y"), ...).where(
        lambda node: _is_internal(node) and _stored_range(node) is not None
    )

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        stored = _stored_range(match.root)
        assert stored is not None
        axis, start, end, size = stored
        parts = [match["y"]]
        if start > 0:
            parts.insert(0, build(aten.slice.Tensor, match["x"], axis, 0, start))
        if end < size:
            parts.append(build(aten.slice.Tensor, match["x"], axis, end, size))
        return build(aten.cat.default, parts, axis)


def _stored_range(node: fx.Node) -> tuple[int, int, int, int] | None:
    """Axis, start, end and the axis' size of a slice that a computed tensor is stored to."""
    args = nodes.arguments(node)
    base, source, start, end = args["self"], args["src"], args["start"], args["end"]
    if not (nodes.is_tensor(base) and nodes.is_tensor(source)):
        return None
    if nodes.dtype(base) != nodes.dtype(source) or constants.compact(source) is not None:
        return None
    axis = int(args["dim"]) % len(nodes.shape(base))
    size = nodes.shape(base)[axis]
    bounds = (0 if start is None else start, size if end is None else end)
    if args["step"] != 1 or not isinstance(size, int):
        return None
    if any(not isinstance(bound, int) for bound in bounds):
        return None
    low, high, _ = slice(*bounds).indices(size)
    return (axis, low, high, size) if low < high else None


def _rules(graph: fx.Graph, *, strides_matter: bool) -> tuple[RewriteRule, ...]:
    # A copy that one layer reads in another memory format chooses that layer's kernel.
    formats = any(map(aliasing.reads_format, graph.nodes))
    idle = lambda copy: not formats or aliasing.chooses_kernel(copy) is None
    zero = Const("c").where(_holds(0))
    one = Const("c").where(_holds(1))
    flag = identities.is_flag
    rules: list[RewriteRule] = [
        Drop("dropout", Call(
            (aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout),
            x, Attr("p"), False,
        )),
        Drop("alias", Call((aten.alias, aten.detach, aten.lift_fresh), x)),
        Drop("add-zero", Call((aten.add.Tensor, aten.add.Scalar), x, zero, ...)),
        Drop("add-zero", Call((aten.sub.Tensor, aten.sub.Scalar), x, zero, ...)),
        Drop("mul-one", Call((aten.mul.Tensor, aten.mul.Scalar), x, one)),
        Drop("mul-one", Call((aten.div.Tensor, aten.div.Scalar), x, one)),
        Drop("leaky-relu-one", Call((aten.leaky_relu, aten.prelu), x, one)),
        Drop("pow-one", Call((aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor), x, one)),
        *(Drop("and-true", Call(_ANDS, *pair).where(flag)) for pair in ((x, one), (one, x))),
        *(Drop("or-false", Call(_ORS, *pair).where(flag)) for pair in ((x, zero), (zero, x))),
        Drop("where", Call(aten.where.self, one.where(flag), x, Var("y"))),
        Drop("where", Call(aten.where.self, zero.where(flag), Var("y"), x)),
        Drop("rounded", Call(_ROUNDINGS, Call(_ROUNDINGS, Var("y")).shared().named("x"))),
        Drop("resize", _unchanged(Call(_RESIZES, x, ...)).where(identities.keeps_size)),
        Drop("double-neg", Call(aten.neg, Call(aten.neg, x).shared())),
        Drop("cast", _unchanged(Call((aten.to, aten.type_as, aten._to_copy), x, ...)).where(idle)),
        Drop("reshape", _unchanged(Call(_RESHAPES, x, ...))),
        Drop("slice", _unchanged(Call((aten.slice, aten.narrow), x, ...))),
        Drop("expand", _unchanged(
            Call((aten.expand, aten.expand_as, aten.broadcast_to, aten.repeat, aten.tile), x, ...)
        )),
        DropExpand(),
        Drop("pad", Call((aten.pad, aten.constant_pad_nd), x, Attr("pad").where(_all_zero), ...)),
        Drop("cat", Call(aten.cat, [x], ...)),
        MergeReshapes(),
        MergePermutes(),
        MergeRelus(),
        *join_pads.RULES,
    ]  # fmt: skip
    if not strides_matter:
        # Strides of inputs may differ from call to call: with a stride reader in the graph, what
        # the trace saw does not prove that a copy is not needed. One that feeds an output stays,
        # because the caller may rely on the layout that it asks for.
        rules.append(Drop("copy", Call(_COPIES, x, ...).where(_is_internal).where(idle)))
        rules.append(JoinStoredSlice())
    return tuple(rules)


def _is_internal(node: fx.Node) -> bool:
    return not aliasing.reached_outputs(node)


def _unchanged(pattern: Pattern) -> Pattern:
    """Calls whose result has the shape, dtype and device of their first argument."""
    return Where(pattern, _same_as_input)


def _same_as_input(node: fx.Node) -> bool:
    source = node.args[0]
    if not (isinstance(source, fx.Node) and nodes.is_tensor(source) and nodes.is_tensor(node)):
        return False
    before, after = source.meta["val"], node.meta["val"]
    return (
        before.dtype == after.dtype
        and before.device == after.device
        and before.layout == after.layout
        and nodes.same(before.shape, after.shape)
    )


def _all_zero(pad: Any) -> bool:
    return isinstance(pad, (list, tuple)) and all(isinstance(p, int) and p == 0 for p in pad)


def _holds(number: int) -> Callable[[Any], bool]:
    """A predicate: the constant is this number everywhere."""

    def predicate(value: Any) -> bool:
        if not isinstance(value, fx.Node):
            return bool(value == number)
        if not constants.is_fixed(value):
            return False
        data = constants.tensor(value)
        if isinstance(data, FakeTensor) or data.is_meta or not data.numel():
            return False
        # The first element decides nearly always, without reading the rest.
        return bool(data.flatten()[0] == number) and bool((data == number).all())

    return predicate


def _sizes(node: fx.Node) -> list[Any]:
    """The arguments with which ``reshape`` gives the shape of a reshape-like call."""
    if nodes.is_call(node, *_SIZED):
        return list(node.args[1])  # type: ignore[arg-type]
    shape = list(nodes.shape(node))
    return [-1 if isinstance(s, torch.SymInt) else s for s in shape]


def _writable(node: fx.Node) -> bool:
    """True if :func:`_sizes` can say the shape of a reshape-like call."""
    if nodes.is_call(node, *_SIZED):
        return True
    symbolic = [s for s in nodes.shape(node) if isinstance(s, torch.SymInt)]
    # One unknown size can be written as -1, unless an empty one makes it ambiguous.
    return len(symbolic) <= 1 and not any(nodes.known(s == 0) for s in nodes.shape(node))


def _composed(outer: fx.Node, inner: fx.Node) -> list[int]:
    first = layout.permutation(inner)
    return [first[d] for d in layout.permutation(outer)]


def _identity(node: fx.Node) -> list[int]:
    return list(range(len(nodes.shape(node))))


def _loosen_views(editor: Editor) -> bool:
    """Turns views into reshapes, so that what precedes them may have any strides."""
    written = editor.written
    with editor.edit() as edit:
        views = [
            node
            for node in editor.graph.find_nodes(op="call_function", target=aten.view.default)
            if not (nodes.pinned(node) or node.kwargs)
            # A view of what the graph writes must stay a view.
            and not (written and written & aliasing.roots(node))
        ]
        for node in views:
            edit.set(node, target=aten.reshape.default, value=node.meta["val"])
    return bool(views)


def merge_common(editor: Editor) -> list[Applied]:
    """Lets equal calls of the same inputs share one node; returns what was merged."""
    first: dict[Any, fx.Node] = {}
    merged: list[Applied] = []
    for node in list(editor.graph.nodes):
        if nodes.pinned(node) or not _is_pure(node):
            continue
        kept = first.setdefault(_key(node), node)
        if kept is node:
            continue
        with editor.candidate(node):
            with editor.edit() as edit:
                edit.replace(node, kept)
                edit.remove([node])
            if node.op == "call_function":
                merged.append(edit.record())
    return merged


def _is_pure(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return constants.is_get_attr(node)
    return (
        node.op == "call_function"
        and node.meta.get("val") is not None
        and not node.is_impure()
        and constants.impurity(node) is None
    )


def _key(node: fx.Node) -> Any:
    if node.op == "get_attr":
        return (node.op, node.target)
    if not isinstance(node.target, torch._ops.OpOverload):
        return (node.target, _frozen(node.args), _frozen(node.kwargs))
    return (node.target, _frozen(nodes.arguments(node)))


def _frozen(value: Any) -> Any:
    """A hashable form that tells 1 from 1.0 and True, and 0.0 from -0.0."""
    if isinstance(value, dict):
        return tuple((key, _frozen(v)) for key, v in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, (bool, int, float, complex)):
        return (type(value), repr(value))
    return value


def _remove_dead(editor: Editor) -> tuple[list[Applied], bool]:
    """Removes calls without users (impure and pinned ones stay), and whatever else is unread."""
    with editor.edit("clean-up/dead-code") as edit:
        edit.sweep(n for n in editor.graph.nodes if not n.users and n.op != "output")
    found = edit.record()
    swept = constants.sweep(editor.gm) or bool(edit.gone)
    return [found] if found.removed else [], swept


def _by_rule(records: Sequence[Applied]) -> list[Applied]:
    """One record a rule, so that a report is not a list of every dropout."""
    grouped: dict[str, list[Applied]] = {}
    for record in records:
        grouped.setdefault(record.rule, []).append(record)
    return [_joined(rule, group) for rule, group in grouped.items()]


def _joined(rule: str, group: Sequence[Applied]) -> Applied:
    removed = _flat(r.removed for r in group)
    return Applied(
        rule,
        removed,
        _flat(r.kinds for r in group),
        _flat(r.added for r in group),
        tuple(dict.fromkeys(_flat(r.modules for r in group))),
        f"{len(removed)} removed",
    )


def _flat(parts: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(item for part in parts for item in part)
