"""Layouts, picks, reductions and orders: what rules look through."""

from __future__ import annotations

import torch

from refold.fuzz.draw import Draw, fits, sketch
from refold.fuzz.network import Value
from refold.fuzz.sketches.layers import linear, scale_or_shift


@sketch(3)
def _reduction(d: Draw, x: Value) -> Value:
    fits(len(d.shape(x)) >= 2)
    axis, keep = d.axis(x), d.chance(0.5)
    name = d.one(("mean", "sum", "amax", "amin", "logsumexp", "var", "prod", "cumsum", "max",
                  "sort", "topk", "argmax"))  # fmt: skip
    if name in ("mean", "sum"):
        axes = [axis] if d.chance(0.6) else sorted({axis, d.axis(x)})
        return d.call(name, x, axes, keep)
    if name in ("amax", "amin", "logsumexp"):
        return d.call(name, x, [axis], keep)
    if name == "var":
        fits(d.shape(x)[axis] > 1)
        return d.call("var", x, [axis], correction=d.one((0, 1)), keepdim=keep)
    if name == "cumsum":
        return d.call(name, x, axis)
    if name == "topk":
        return d.item(d.call(name, x, 1, axis))
    if name == "sort":
        return d.item(d.call(name, x, axis))
    if name == "max":
        return d.item(d.call(name, x, axis, keep))
    return d.call(name, x, axis, keep) if name == "prod" else d.call(name, x, axis)


@sketch(3)
def _permute(d: Draw, x: Value) -> Value:
    rank = len(d.shape(x))
    fits(rank >= 2)
    first = 0 if d.chance(0.08) else 1
    order = list(range(first, rank))
    d.rng.shuffle(order)
    if d.chance(0.5):
        fits(rank >= 3)
        a, b = d.rng.sample(range(first, rank), 2)
        return d.call("transpose", x, a, b)
    return d.call("permute", x, [*range(first), *order])


@sketch(4)
def _reshape(d: Draw, x: Value) -> Value:
    shape = d.shape(x)
    if d.chance(0.5):
        fits(len(shape) >= 3)
        at = d.rng.randrange(1, len(shape) - 1)
        if d.chance(0.3):
            return d.call("flatten", x, at, at + 1)
        return d.reshape(x, [*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :]])
    found = [(i, k) for i in range(1, len(shape)) for k in (1, 2, 3, 4)
             if shape[i] % k == 0 and shape[i] >= k]  # fmt: skip
    fits(found and len(shape) < 5)
    at, parts = d.one(found)
    if d.chance(0.2):
        return d.call("unflatten", x, at, [parts, -1])
    return d.reshape(x, [*shape[:at], parts, shape[at] // parts, *shape[at + 1 :]])


@sketch(1)
def _merge_batch(d: Draw, x: Value) -> Value:
    """Another axis becomes part of the batch, is worked on, and comes back."""
    shape = d.shape(x)
    fits(len(shape) >= 3)
    batch = d.size(x, 0)
    merged = d.call("reshape", x, [-1, *shape[2:]])
    worked = linear(d, merged) if d.chance(0.6) else scale_or_shift(d, merged)
    return d.call("reshape", worked, [batch, shape[1], *d.shape(worked)[1:]])


@sketch(2)
def _unit_axis(d: Draw, x: Value) -> Value:
    shape = d.shape(x)
    ones = [i for i in range(1, len(shape)) if shape[i] == 1]
    if ones and d.chance(0.6):
        at = d.one(ones)
        if d.chance(0.4):
            return d.call("expand", x, [-1 if i != at else d.one((2, 3, 4))
                                        for i in range(len(shape))])  # fmt: skip
        return d.call("squeeze", x, at)
    fits(len(shape) < 5)
    return d.call("unsqueeze", x, d.rng.randrange(1, len(shape) + 1))


@sketch(3)
def _part(d: Draw, x: Value) -> Value:
    shape, axis = d.shape(x), d.axis(x)
    size = shape[axis]
    kind = d.one(("slice", "slice", "select", "split", "chunk", "unbind", "narrow"))
    if kind == "slice":
        start = d.one((0, 0, 1, -1))
        stop = d.one((2**63 - 1, size - 1, size))
        return d.call("slice", x, axis, start, stop, d.one((1, 1, 2)))
    if kind == "select":
        fits(len(shape) >= 3)
        return d.call("select", x, axis, d.rng.randrange(-size, size))
    if kind == "narrow":
        return d.call("narrow", x, axis, 0, max(1, size - 1))
    if kind == "unbind":
        fits(len(shape) >= 3)
        parts = d.call("unbind", x, axis)
    elif kind == "chunk":
        parts = d.call("chunk", x, 2, axis)
    else:
        fits(size >= 2)
        parts = d.call("split_with_sizes", x, [1, size - 1], axis)
    count = len(d.values[parts.index])
    chosen = [d.item(parts, at) for at in range(count)] if d.chance(0.6) else []
    if not chosen:
        return d.item(parts, d.rng.randrange(count))
    if kind != "unbind" and d.chance(0.7):
        middle = d.call("mul", chosen[-1], d.one((2.0, -1.0)))
        return d.call("cat", [*chosen[:-1], middle], axis)
    return chosen[-1]


@sketch(2)
def _pick(d: Draw, x: Value) -> Value:
    shape, axis = d.shape(x), d.axis(x)
    size = shape[axis]
    kind = d.one(("index_select", "flip", "roll", "repeat", "repeat_interleave", "index",
                  "gather", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
                  "unfold"))  # fmt: skip
    if kind in ("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"):
        d.spatial(x, 2)
        return d.call(kind, x, 2)
    if kind == "flip":
        return d.call(kind, x, [axis])
    if kind == "roll":
        return d.call(kind, x, [1], [axis])
    if kind == "unfold":
        return d.call(kind, x, axis, min(2, size), 1)
    if kind == "repeat":
        fits(size <= 6)
        return d.call(kind, x, [2 if i == axis else 1 for i in range(len(shape))])
    if kind == "repeat_interleave":
        fits(size <= 6)
        return d.call(kind, x, 2, axis)
    fits(size > 0)
    count = d.one((size, 2, 3))
    at = d.hold("given", count, dtype=torch.int64,
                detail=[d.rng.randrange(size) for _ in range(count)])  # fmt: skip
    if kind == "index":
        return d.call("index", x, [None] * axis + [at])
    if kind == "gather":
        fits(axis == len(shape) - 1 and axis > 0)
        positions = d.call("expand", at, [*shape[:-1], -1])
        return d.call("gather", x, axis, positions)
    return d.call(kind, x, axis, at)
