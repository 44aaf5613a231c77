"""Join scale-shifts of one tensor that are added: a norm beside its input, a scale minus one.

    (g1 * x + h1) + a * (g2 * x + h2) = (g1 + a * g2) * x + (h1 + a * h2)

Each side is a chain of scale-shifts (batch norms, depthwise 1x1 convolutions, ``g*x``, ``x+h`` in
any spelling), or the tensor itself. What comes out is one scale-shift, which the layers around it
may then absorb, where the sum could not go.

A chain of them by itself is one product and one sum, or fewer:

    s * (x + h1) + h2 = s * x + (s * h1 + h2)
    h2 - (x + h1)     = (h2 - h1) - x

Exact when: both chains start from one tensor, nothing else reads what lies between, and the
constants stay as small as the ones that they replace. What comes out has fewer calls. In float16 a
product in front of the sum could overflow, so a chain stays.

Before::

    %n = batch_norm(%x, @gamma, @beta, @mean, @var)
    %s = mul(%x, @alpha)
    %y = add(%n, %s)

After::

    %s = mul(%x, @folded_scale)
    %y = add(%s, @folded_shift)

Source: RepBN (Guo et al., SLAB, ICML 2024, section 3.2); RIFormer (Wang et al., CVPR 2023, section
3.3).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from refold.algebra.lazy import Lazy
from refold.graph import constants, nodes, ops
from refold.graph.nodes import aten
from refold.graph.records import scale_shifts, sums
from refold.rewrite.build import Builder
from refold.rewrite.context import Context
from refold.rewrite.driver import apply_rules
from refold.rewrite.pattern import Call, Match, Var
from refold.rewrite.result import PassResult
from refold.rewrite.rule import RewriteRule

_ARITHMETIC = (*ops.packets(ops.ARITHMETIC), aten.addcmul)


@dataclass(frozen=True)
class _Chain:
    """``scale * x + shift``, and the calls that compute it from ``x``.

    ``widest`` is the number of elements of the largest constant that one of them reads.
    """

    x: fx.Node
    scale: torch.Tensor
    shift: torch.Tensor
    calls: tuple[fx.Node, ...] = ()
    widest: int = 1

    @property
    def is_finite(self) -> bool:
        return bool(self.scale.isfinite().all() & self.shift.isfinite().all())


@dataclass(frozen=True)
class JoinScaleShifts:
    """Joins scale-shifts that are added; see the module docstring."""

    name: str = "join-scale-shifts"
    exactness: str = "reassociates"

    def run(self, gm: fx.GraphModule, context: Context = Context()) -> PassResult:
        return apply_rules(gm, (JoinAdded(), JoinChained()))


class JoinAdded(RewriteRule):
    """The sum of two scale-shifts of one tensor is one scale-shift of it."""

    name = "join-scale-shifts"
    exactness = "reassociates"
    pattern = Call(
        (aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor), Var("a"), Var("b"), ...
    ).where(lambda node: _joined(node) is not None)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        joined = _joined(match.root)
        assert joined is not None
        return _written(joined, match.root, build)


class JoinChained(RewriteRule):
    """Scale-shifts one after another are one, if that takes fewer calls."""

    name = "join-scale-shifts/chain"
    exactness = "reassociates"
    pattern = Call(_ARITHMETIC, ...).where(lambda node: _chained(node) is not None)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        chain = _chained(match.root)
        assert chain is not None
        return _written(chain, match.root, build)


def _written(chain: _Chain, root: fx.Node, build: Builder) -> fx.Node:
    """The chain's product and sum, whichever are needed."""
    result = chain.x
    for target, name, value in _steps(chain):
        data: Any = constants.add(build.gm, f"{root.name}.{name}", Lazy.of(value), root.meta["val"])
        args = (data, result) if name == "minuend" else (result, data)
        result = nodes.call(
            build.graph, target, args, rule=build.rule, sources=chain.calls, like=root
        )
    return result


def _steps(joined: _Chain) -> list[tuple[Any, str, torch.Tensor]]:
    steps: list[tuple[Any, str, torch.Tensor]] = []
    if bool((joined.scale == -1).all()) and bool((joined.shift != 0).any()):
        return [(aten.sub.Tensor, "minuend", joined.shift)]
    if not bool((joined.scale == 1).all()):
        steps.append((aten.mul.Tensor, "scale", joined.scale))
    if not bool((joined.shift == 0).all()):
        steps.append((aten.add.Tensor, "shift", joined.shift))
    return steps


def _joined(root: fx.Node) -> _Chain | None:
    total = sums.add(root)
    if total is None:
        return None
    right = {chain.x: chain for chain in _chains(total.right, root)}
    for left in _chains(total.left, root):
        other = right.get(left.x)
        if other is None or not (left.calls or other.calls):
            continue
        calls = tuple(dict.fromkeys((*left.calls, *other.calls, root)))  # two at least
        scale = left.scale + total.alpha * other.scale
        shift = left.shift + total.alpha * other.shift
        widest = max(t.numel() for c in (left, other) for t in (c.scale, c.shift))
        if max(scale.numel(), shift.numel()) > widest:
            return None  # one varies along one axis, one along another
        largest = torch.finfo(nodes.dtype(root)).max  # float16 overflows where its parts did not
        fits = all(bool((t.abs() <= largest).all()) for t in (scale, shift))
        return _Chain(left.x, scale, shift, calls) if fits else None
    return None


def _chained(root: fx.Node) -> _Chain | None:
    """The longest chain that ends in a call and would be fewer calls."""
    if nodes.pinned(root) or nodes.dtype(root) == torch.float16:
        return None
    found = None
    for chain in _chains(root, None)[1:]:
        fits = max(chain.scale.numel(), chain.shift.numel()) <= chain.widest
        calls = sum(call.target is not operator.getitem for call in chain.calls)
        if fits and chain.is_finite and len(_steps(chain)) < calls:
            found = chain
    return found


def _chains(node: fx.Node, reader: fx.Node | None) -> list[_Chain]:
    """A node as a scale-shift of itself, of what it scales and shifts, and so on upwards."""
    one = torch.ones((1,) * len(nodes.shape(node)), dtype=torch.float64)
    found = [_Chain(node, one, torch.zeros_like(one))]
    while True:
        last = found[-1]
        step = scale_shifts.affine(last.x)
        alone = reader is None or nodes.only_user(last.x, reader)
        if step is None or nodes.pinned(last.x) or not alone:
            return found
        scale, shift = step.scale.get(), step.shift.get()
        own = (last.x,) if step.reader is last.x else (step.reader, last.x)
        calls = (*own, *last.calls)
        widest = max(last.widest, scale.numel(), shift.numel())
        shift = last.scale * shift + last.shift
        found.append(_Chain(step.x, last.scale * scale, shift, calls, widest))
        reader = step.reader
