"""Resize late: products and sums of resized tensors run on what is resized.

    W * cat(x_1, .., x_n) + b = sum_i W_i * x_i + b
    W * resize(z) + b         = resize(W * z + b)
    resize(a) + resize(b)     = resize(a + b)

A resize (nearest, linear, bilinear, trilinear, bicubic, antialiased or not, any ``align_corners``)
takes a weighted mean over positions, the same for every channel and with weights that sum to one; a
pointwise product takes a weighted sum over channels, the same at every position. They commute. So
the product runs where the tensor is smallest, and what a pyramid concatenates at full size is added
there instead. A tensor of one pixel needs no resize at all: it is added by broadcasting.

Exact when: the convolution is 1x1 with stride 1, no padding and, over a concatenation, no groups;
the channels are concatenated; everything has one dtype. The bias stays on one part. Parts that the
same resize brings to size stay together. A product moves only where the cost table calls it
cheaper: an output of more channels than a part makes that part's resize dearer. Equal resizes of a
sum's two terms become one where they do not shrink, and nothing else reads them. In float16 sums
stay, because a term, or what is not yet averaged, may overflow where the whole does not.

Before::

    %u = upsample_bilinear2d(%z, [64, 64], False)
    %c = cat([%x, %u], 1)
    %y = conv2d(%c, @weight, @bias)

After::

    %a = conv2d(%x, @folded_weight, @folded_bias)
    %b = conv2d(%z, @folded_weight_1)
    %u = upsample_bilinear2d(%b, [64, 64], False)
    %y = add(%a, %u)

Where it occurs: pyramid pooling (Zhao et al., PSPNet, CVPR 2017, section 3.2), feature pyramids
that concatenate (Liu et al., PANet, CVPR 2018; Xie et al., SegFormer, NeurIPS 2021, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from refold.algebra.lazy import Lazy
from refold.graph import constants, nodes, ops
from refold.graph.nodes import aten, hints, is_tensor, only_user, same, shape
from refold.graph.records import concatenations, convolutions
from refold.rewrite.build import Builder
from refold.rewrite.context import Context
from refold.rewrite.cost import FREE, CostModel
from refold.rewrite.driver import apply_rules
from refold.rewrite.pattern import Attr, Call, Match, Var
from refold.rewrite.result import PassResult
from refold.rewrite.rule import RewriteRule

# The layers of the pattern: what follows asks that they are pointwise.
_CONVS = (aten.conv1d, aten.conv2d, aten.conv3d)
_WORTH = 0.1  # below this share of what the product costs, a gain is within the table's error


@dataclass(frozen=True)
class DeferResizes:
    """Moves products and sums below resizes; see the module docstring."""

    name: str = "defer-resizes"
    exactness: str = "reassociates"

    def run(self, gm: fx.GraphModule, context: Context = Context()) -> PassResult:
        return apply_rules(gm, (Split(context.costs), JoinResized()))


@dataclass(frozen=True)
class _Term:
    """The product of some input channels: ``parts`` that one resize, or none, brings to size.

    ``spans`` are the channels of the whole that each part holds.
    """

    parts: tuple[fx.Node, ...]
    spans: tuple[tuple[int, int], ...]
    resized: bool

    @property
    def sources(self) -> tuple[fx.Node, ...]:
        """What the product reads."""
        return tuple(p.all_input_nodes[0] for p in self.parts) if self.resized else self.parts

    @property
    def channels(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    @property
    def is_one_pixel(self) -> bool:
        return self.resized and all(same(s, 1) for s in shape(self.sources[0])[2:])

    def columns(self, weight: Lazy) -> Lazy:
        """The weight of these channels."""
        if self.channels >= weight.shape[1]:  # all of them; a grouped weight is narrower
            return weight
        return weight.map(
            (weight.shape[0], self.channels, *weight.shape[2:]),
            lambda w: torch.cat([w[:, start:stop] for start, stop in self.spans], 1),
        )


class Split(RewriteRule):
    """A pointwise convolution of resized tensors is the sum of resized convolutions."""

    name = "defer-resizes"
    exactness = "reassociates"
    pattern = Call(_CONVS, ...).where(lambda node: _read(node) is not None)

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs

    def check(self, match: Match) -> str | None:
        read = _read(match.root)
        assert read is not None
        if len(read[1]) > 1 and nodes.dtype(match.root) == torch.float16:
            return "a term of the split sum could overflow float16 where the whole does not"
        costs = self._costs.at(match.root)
        if _moved(costs, *read):
            return None
        if costs.rates is None:
            return (
                f"resizing what the product gives may take more than it saves: {costs.unmeasured}"
            )
        return "resizing what the product gives would cost more than is saved (cost table)"

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        read = _read(match.root)
        assert read is not None
        conv, terms = read
        result: fx.Node | None = None
        for term in _settled(terms, _moved(self._costs.at(match.root), conv, terms)):
            value = self._product(conv, term, build, with_bias=result is None)
            if result is None or not term.is_one_pixel:
                value = self._resized(term, value, build)
            result = value if result is None else build(aten.add.Tensor, result, value)
        assert result is not None
        return result

    def _product(
        self, conv: convolutions.Conv, term: _Term, build: Builder, *, with_bias: bool
    ) -> fx.Node:
        x = term.sources[0]
        if len(term.sources) > 1:
            x = build(aten.cat.default, list(term.sources), 1)
        like, label = x.meta["val"], f"{conv.node.name}."
        weight = constants.add(build.gm, label + "weight", term.columns(conv.weight), like)
        args: list[Any] = [x, weight]
        if with_bias and conv.bias is not None:
            args.append(constants.add(build.gm, label + "bias", conv.bias, like))
        target = {1: aten.conv1d, 2: aten.conv2d, 3: aten.conv3d}[conv.spatial].default
        return build(target, *args, **({"groups": conv.groups} if conv.groups > 1 else {}))

    def _resized(self, term: _Term, value: fx.Node, build: Builder) -> fx.Node:
        if not term.resized:
            return value
        resize = term.parts[0]
        return build(resize.target, value, *resize.args[1:], **resize.kwargs)


class JoinResized(RewriteRule):
    """The sum of two tensors that are resized alike is a sum that is resized."""

    name = "defer-resizes"
    exactness = "reassociates"
    pattern = Call(
        (aten.add.Tensor, aten.sub.Tensor), Var("a"), Var("b"), alpha=Attr("alpha")
    ).where(lambda node: _alike(node))

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        left, right = match["a"], match["b"]
        total = build(match.root.target, left.args[0], right.args[0], alpha=match["alpha"])
        return build(left.target, total, *left.args[1:], **left.kwargs)


def _alike(node: fx.Node) -> bool:
    """True for a sum of two tensors that equal resizes, which do not shrink, bring to size."""
    left, right = node.args[:2]
    if not (is_tensor(left) and is_tensor(right)) or left is right:
        return False
    if nodes.dtype(node) == torch.float16:
        return False
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    how = _resize(left)
    if how is None or how != _resize(right):
        return False
    source = left.args[0]
    same_channels = same(shape(left)[:2], shape(right)[:2])
    shrinks = math.prod(hints(left)) < math.prod(hints(source))  # type: ignore[arg-type]
    alone = only_user(left, node) and only_user(right, node)
    return alone and same_channels and not shrinks


def _read(node: fx.Node) -> tuple[convolutions.Conv, tuple[_Term, ...]] | None:
    """A pointwise convolution and its input by resize, if any of it is resized."""
    conv = convolutions.conv(node)
    if conv is None or conv.transposed or any(conv.padding) or nodes.pinned(node):
        return None
    if any(k != 1 for k in conv.weight.shape[2:]) or any(s != 1 for s in conv.stride):
        return None
    parts = [conv.x]
    cat = concatenations.cat(conv.x)
    if cat is not None and cat.axis == 1 and conv.groups == 1 and not nodes.pinned(conv.x):
        parts = list(cat.parts)
    found: dict[Any, list[tuple[fx.Node, tuple[int, int]]]] = {}
    start = 0
    for part in parts:
        channels = shape(part)[1] if is_tensor(part) else None
        if not isinstance(channels, int) or nodes.dtype(part) != nodes.dtype(node):
            return None
        found.setdefault(_resize(part), []).append((part, (start, start + channels)))
        start += channels
    if set(found) == {None}:
        return None
    return conv, tuple(
        _Term(tuple(p for p, _ in held), tuple(s for _, s in held), key is not None)
        for key, held in found.items()
    )


def _resize(node: fx.Node) -> tuple[Any, ...] | None:
    """What makes a resize the same as another: operator, extents and options."""
    if node.op != "call_function" or not ops.has(node, ops.RESIZE) or nodes.pinned(node):
        return None
    source = node.args[0]
    if not is_tensor(source) or nodes.dtype(source) != nodes.dtype(node):  # type: ignore[arg-type]
        return None
    extents = tuple(str(s) for s in shape(source)[2:])  # type: ignore[arg-type]
    return node.target, str(node.args[1:]), str(node.kwargs), extents


def _moved(
    costs: CostModel, conv: convolutions.Conv, terms: tuple[_Term, ...]
) -> tuple[_Term, ...]:
    """The terms that it pays to compute below their resize; each helps on its own, or not."""
    moved: tuple[_Term, ...] = ()
    gained = 0.0
    while True:
        rest = [t for t in terms if t.resized and t not in moved]
        tried = [((*moved, t), _gain(costs, conv, terms, (*moved, t))) for t in rest]
        best = max(tried, key=lambda pair: pair[1], default=None)
        if best is None or best[1] <= gained + _WORTH * costs.of(conv.node).total:
            return moved
        moved, gained = best


def _settled(terms: Iterable[_Term], moved: tuple[_Term, ...]) -> list[_Term]:
    """The terms to compute: what is not moved is one; what is of one pixel comes last."""
    stay = [pair for t in terms if t not in moved for pair in zip(t.spans, t.parts, strict=True)]
    out = sorted(moved, key=lambda t: t.is_one_pixel)
    if stay:
        spans, parts = zip(*sorted(stay, key=lambda pair: pair[0]), strict=True)
        out.insert(0, _Term(parts, spans, resized=False))
    return out


def _gain(
    costs: CostModel, conv: convolutions.Conv, terms: tuple[_Term, ...], moved: tuple[_Term, ...]
) -> float:
    """What moving some terms saves."""
    now, whole = costs.of(conv.node), only_user(conv.x, conv.node)
    joined = terms[0].parts[0] is not conv.x
    if joined and whole:
        now += costs.of(conv.x)
    reader = conv.x if joined else conv.node
    dying = [p for t in moved for p in t.parts if only_user(p, reader)] if whole else []
    width = conv.node.meta["val"].element_size()
    out = hints(conv.node)
    then = FREE
    for index, term in enumerate(_settled(terms, moved)):
        read = (out[0], term.channels, *hints(term.sources[0])[2:])
        made = (out[0], out[1], *read[2:])
        per_group = conv.weight.shape[1] if conv.groups > 1 else term.channels
        then += costs.convolution(made, read, per_group, conv.groups, (1,), width)
        if len(term.sources) > 1:
            then += costs.elementwise(read, 1, width)
        if term.resized and not (term.is_one_pixel and index):
            then += costs.resize(out, made, width)
        if index:
            then += costs.elementwise(out, 2, width)
    return sum(map(costs.of, dying), now).over(then)
