"""Rules of ``clean-up`` for pads with a constant: each joins the call that could pad by itself.

    pad(pad(x, a), b) = pad(x, a + b)                       of one value, neither cuts what was put
    avg_pool(pad(x, p)) = avg_pool(x, padding=p)            of zeros, where all windows count them
    permute(pad(x, p)) = pad(permute(x), permuted p)        before a convolution, which then pads

A pool pads both sides alike, by half of its window at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from refold.graph import layout, nodes, ops
from refold.graph.records import convolutions, windows
from refold.graph.records.windows import Pad
from refold.rewrite.build import Builder
from refold.rewrite.pattern import Call, Match, Var
from refold.rewrite.rule import RewriteRule

aten = torch.ops.aten

_PADS = (aten.pad, aten.constant_pad_nd)
# That take a padding; adaptive ones take none.
_POOLS = (aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d)
_PERMUTES = ops.packets(ops.PERMUTE)
_PADDED = Call(_PADS, Var("x"), ...)


class JoinPads(RewriteRule):
    """A pad of a pad is one pad."""

    name = "clean-up/pad-chain"
    pattern = Call(_PADS, _PADDED, ...).where(lambda node: _joined(node) is not None)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        joined = _joined(match.root)
        assert joined is not None
        return _pad(build, match["x"], *joined)


class PadInPool(RewriteRule):
    """An average pool pads with zeros by itself."""

    name = "clean-up/pad-pool"
    pattern = Call(_POOLS, _PADDED, ...).where(lambda node: _pooled(node) is not None)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        padding, args = _pooled(match.root), nodes.arguments(match.root)
        changed = {"self": match["x"], "padding": padding, "count_include_pad": True}
        schema: Any = match.root.target
        return build(schema, *({**args, **changed}[a.name] for a in schema._schema.arguments))


class PadBehindPermute(RewriteRule):
    """A pad before a permutation and a convolution goes between the two."""

    name = "clean-up/pad-permute"
    pattern = Call(_PERMUTES, _PADDED, ...).where(lambda node: _moved(node) is not None)

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        moved = _moved(match.root)
        assert moved is not None
        permuted = build(aten.permute.default, match["x"], layout.permutation(match.root))
        return _pad(build, permuted, *moved)


RULES: tuple[RewriteRule, ...] = (JoinPads(), PadInPool(), PadBehindPermute())


@dataclass(frozen=True)
class _Amounts:
    """What a pad puts in front of every axis and behind it."""

    low: tuple[int, ...]
    high: tuple[int, ...]

    @classmethod
    def of(cls, pad: Pad) -> _Amounts:
        lead = (0,) * (len(nodes.shape(pad.x)) - len(pad.low))
        return cls(lead + pad.low, lead + pad.high)

    @property
    def sides(self) -> tuple[int, ...]:
        return self.low + self.high


def _constant(node: Any) -> Pad | None:
    pad = windows.pad(node)
    return pad if pad is not None and pad.mode == "constant" else None


def _joined(node: fx.Node) -> tuple[_Amounts, float] | None:
    outer = _constant(node)
    inner = _constant(outer.x) if outer is not None else None
    if outer is None or inner is None or outer.value != inner.value:
        return None
    first, then = _Amounts.of(inner), _Amounts.of(outer)
    if any(a < 0 or b < 0 for a, b in zip(first.sides, then.sides, strict=True)):
        return None
    low = tuple(map(sum, zip(first.low, then.low, strict=True)))
    high = tuple(map(sum, zip(first.high, then.high, strict=True)))
    return _Amounts(low, high), outer.value


def _pooled(node: fx.Node) -> list[int] | None:
    pool = windows.avg_pool(node)
    pad = _constant(pool.x) if pool is not None else None
    if pool is None or pad is None or pad.value != 0 or nodes.arguments(node)["ceil_mode"]:
        return None
    if any(pool.padding) and not nodes.arguments(node)["count_include_pad"]:
        return None
    amounts = _Amounts.of(pad)
    if amounts.low != amounts.high or any(amounts.low[:2]) or min(amounts.low) < 0:
        return None
    padding = [p + own for p, own in zip(amounts.low[2:], pool.padding, strict=True)]
    fits = all(2 * p <= k for p, k in zip(padding, pool.kernel, strict=True))
    return padding if fits else None


def _moved(node: fx.Node) -> tuple[_Amounts, float] | None:
    pad = _constant(node.args[0])
    if pad is None or pad.value != 0 or len(node.users) != 1:
        return None
    conv = convolutions.conv(next(iter(node.users)))
    if conv is None or conv.x is not node or conv.transposed:
        return None
    amounts, order = _Amounts.of(pad), layout.permutation(node)
    moved = _Amounts(*(tuple(s[a] for a in order) for s in (amounts.low, amounts.high)))
    return None if any(moved.low[:2]) or any(moved.high[:2]) else (moved, pad.value)


def _pad(build: Builder, x: fx.Node, amounts: _Amounts, value: float) -> fx.Node:
    axes = [i for i, pair in enumerate(zip(amounts.low, amounts.high, strict=True)) if any(pair)]
    first = min(axes, default=len(amounts.low))
    pairs = zip(amounts.low[first:], amounts.high[first:], strict=True)
    flat = [n for pair in reversed(list(pairs)) for n in pair]
    return build(aten.constant_pad_nd.default, x, flat, value)
