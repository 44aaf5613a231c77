"""The sketches that networks are drawn from: one idea each, with sizes of its own.

Each takes the network as it grows and a value, adds calls, and returns the last result. One that
does not fit raises :class:`refold.fuzz.draw.Unfit`, and what it added is taken back.
"""

from __future__ import annotations

import math

import torch

from refold.fuzz.draw import EFFECTS, SIZES, SKETCHES, Draw, fits, sketch
from refold.fuzz.network import Cond, Drawn, DrawnCall, DrawnNetwork, Held, Value

__all__ = ["EFFECTS", "SKETCHES"]  # which this file fills

# --- layers ---------------------------------------------------------------------------------------


@sketch(6)
def _conv(d: Draw, x: Value) -> Value:
    rank, c = d.spatial(x), d.shape(x)[1]
    groups = d.one([g for g in (1, 1, 1, c, 2) if c % g == 0])
    out = d.one([n for n in (c, *SIZES) if n % groups == 0])
    kernel = [d.one((1, 1, 2, 3)) for _ in range(rank)]
    stride = [d.one((1, 1, 1, 2)) for _ in range(rank)]
    dilation = [d.one((1, 1, 1, 2)) for _ in range(rank)]
    weight = d.hold(d.one(("normal", "normal", "sparse")), out, c // groups, *kernel)
    if d.chance(0.1) and stride == [1] * rank:
        return d.call(f"conv{rank}d", x, weight, d.maybe(out), stride, d.one(("same", "valid")),
                      dilation, groups)  # fmt: skip
    padding = [d.one((0, 0, 1, 2)) for _ in range(rank)]
    return d.call(f"conv{rank}d", x, weight, d.maybe(out), stride, padding, dilation, groups)


@sketch(2)
def _conv_transpose(d: Draw, x: Value) -> Value:
    rank, c = d.spatial(x, 1, 2), d.shape(x)[1]
    groups = d.one([g for g in (1, 1, c, 2) if c % g == 0])
    out = d.one((1, 2))
    kernel = [d.one((1, 2, 3)) for _ in range(rank)]
    stride = [d.one((1, 2)) for _ in range(rank)]
    padding = [d.one((0, 0, 1)) for _ in range(rank)]
    more = [d.one((0, 0, 1)) if s > 1 else 0 for s in stride]
    name = {1: "conv_transpose1d", 2: "conv_transpose2d"}[rank]
    return d.call(name, x, d.hold("normal", c, out, *kernel), d.maybe(out * groups), stride,
                  padding, more, groups)  # fmt: skip


@sketch(5)
def _linear(d: Draw, x: Value) -> Value:
    return d.linear(x, d.one((d.shape(x)[-1], *SIZES)))


@sketch(1)
def _addmm(d: Draw, x: Value) -> Value:
    fits(len(d.shape(x)) == 2)
    out = d.one(SIZES)
    scales = {"alpha": d.one((1, 2, 0.5)), "beta": d.one((1, 1, -1, 0.5))}
    return d.call("addmm", d.numbers(out), x, d.hold("normal", d.shape(x)[1], out), **scales)


@sketch(4)
def _norm(d: Draw, x: Value) -> Value:
    fits(2 <= len(d.shape(x)) <= 5)
    return d.norm(x)


@sketch(2)
def _other_norm(d: Draw, x: Value) -> Value:
    shape = d.shape(x)
    fits(len(shape) >= 2)
    kind = d.one(("layer_norm", "rms_norm", "group_norm", "instance_norm"))
    if kind in ("layer_norm", "rms_norm"):
        n = shape[-1]
        fits(n > 1)
        if kind == "rms_norm":
            return d.call(kind, x, [n], d.numbers(n), d.one((None, 1e-5)))
        return d.call(kind, x, [n], d.maybe(n), d.maybe(n), 1e-5, True)
    c = shape[1]
    fits(len(shape) >= 3 and math.prod(shape[2:]) > 1)
    if kind == "group_norm":
        groups = d.one([g for g in (1, 2, c) if c % g == 0])
        return d.call(kind, x, groups, d.maybe(c), d.maybe(c), 1e-5, True)
    return d.call(kind, x, d.numbers(c), d.numbers(c), None, None, True, 0.1, 1e-5, True)


@sketch(2)
def _product(d: Draw, x: Value) -> Value:
    """A product with a held matrix, in one of its spellings."""
    shape = d.shape(x)
    fits(len(shape) >= 2)
    kind = d.one(("right", "left", "vector", "einsum", "heads"))
    if kind == "right":
        return d.call("matmul", x, d.hold("normal", shape[-1], d.one(SIZES)))
    if kind == "vector":
        return d.call("matmul", x, d.hold("normal", shape[-1]))
    fits(len(shape) >= 3)
    out = d.one(SIZES)
    if kind == "left":
        return d.call("matmul", d.hold("normal", out, shape[-2]), x)
    if kind == "heads":
        return d.call("matmul", x, d.hold("normal", *shape[1:-2], shape[-1], out))
    return d.call("einsum", "bc...,co->bo...", [x, d.hold("normal", shape[1], out)])


@sketch(1)
def _embedding(d: Draw, x: Value) -> Value:
    whole = [i for i, v in enumerate(d.values[: len(d.inputs)]) if v.dtype == torch.int64]
    fits(whole)
    width = d.shape(x)[-1] if len(d.shape(x)) == 3 else d.one(SIZES)
    at = Value(d.one(whole))
    return d.call("embedding", d.hold("normal", d.inputs[at.index].detail, width), at)


# --- scales and shifts ----------------------------------------------------------------------------


def _channel(d: Draw, x: Value) -> tuple[int, ...]:
    """A shape that lies along one axis, or along the last few."""
    shape = d.shape(x)
    fits(shape)
    if d.chance(0.2):
        return (1, *(n if d.chance(0.6) else 1 for n in shape[1:]))
    axis = d.axis(x)
    size = 1 if axis == 0 else shape[axis] if d.chance(0.9) else 1
    return (size, *[1] * (len(shape) - 1 - axis))


@sketch(7)
def _scale_or_shift(d: Draw, x: Value) -> Value:
    shape = _channel(d, x)
    kind = d.one(("mul", "mul", "add", "add", "sub", "rsub", "div", "flip_mul", "flip_add",
                  "alpha", "affine", "addcmul"))  # fmt: skip
    if kind == "div":
        return d.call("div", x, d.hold("positive", *shape))
    held = d.numbers(*shape)
    if kind == "rsub":
        return d.call("sub", held, x)
    if kind.startswith("flip"):
        return d.call(kind[5:], held, x)
    if kind == "alpha":
        return d.call("add", x, held, alpha=d.one((2, -1, 0.5)))
    if kind == "affine":
        return d.call("add", d.call("mul", x, held), d.numbers(*shape))
    if kind == "addcmul":
        return d.call("addcmul", d.numbers(*shape), x, held)
    return d.call(kind, x, held)


@sketch(3)
def _scalar(d: Draw, x: Value) -> Value:
    number = d.one((2.5, 0.5, -1.0, 2, 1, 0, 1.0, 0.0, -3))
    name = d.one(("mul", "add", "sub", "rsub", "div", "neg", "square_sum", "pow"))
    if name == "neg":
        return d.call("neg", x)
    if name == "pow":
        return d.call("pow", x, d.one((1, 2, 3)))
    if name == "square_sum":
        return d.call("sub", x, d.call("mul", x, 0.25))
    if name == "div":
        return d.call("div", x, d.one((2, 4.0, -0.5)))
    return d.call(name, x, number)


@sketch(4)
def _activation(d: Draw, x: Value) -> Value:
    name = d.one(("relu", "relu", "leaky_relu", "silu", "gelu", "relu6", "tanh", "sigmoid",
                  "hardswish", "elu", "hardtanh", "softplus", "prelu", "abs", "clamp", "mish",
                  "clamp_min", "square", "exp", "hardsigmoid", "erf"))  # fmt: skip
    if name == "prelu":
        fits(len(d.shape(x)) >= 2)
        return d.call("prelu", x, d.numbers(d.one((1, d.shape(x)[1]))))
    if name == "clamp":
        return d.call("clamp", x, d.one((None, 0.0, -1.0)), d.one((1.0, 6.0)))
    if name == "clamp_min":
        return d.call(name, x, d.one((0.0, -0.5)))
    return d.call(name, x)


@sketch(1)
def _gate(d: Draw, x: Value) -> Value:
    axis = d.axis(x)
    mean = d.call("mean", x, [axis], True)
    return d.call("mul", x, d.call(d.one(("sigmoid", "hardsigmoid", "tanh")), mean))


@sketch(1)
def _softmax(d: Draw, x: Value) -> Value:
    fits(len(d.shape(x)) >= 2)
    return d.call(d.one(("softmax", "softmax", "log_softmax")), x, d.axis(x))


@sketch(1)
def _glu(d: Draw, x: Value) -> Value:
    return d.call("glu", x, d.axis(x))


# --- pads, pools, resizes -------------------------------------------------------------------------


@sketch(3)
def _pad(d: Draw, x: Value) -> Value:
    shape = d.shape(x)
    fits(len(shape) >= 2)
    axes = d.rng.randint(1, min(len(shape) - 1, 3))
    amounts = [d.one((0, 0, 1, 1, 2, -1)) for _ in range(2 * axes)]
    mode = d.one(("constant", "constant", "reflect", "replicate", "circular"))
    if mode != "constant":
        fits(3 <= len(shape) <= 5)
        amounts = [max(a, 0) for a in amounts[:2] * (len(shape) - 2)]
        return d.call("pad", x, amounts, mode)
    if d.chance(0.4):
        return d.call("constant_pad_nd", x, amounts, d.one((0.0, 1.5)))
    return d.call("pad", x, amounts, mode, d.one((None, 0.0, 0.0, 1.5)))


@sketch(3)
def _pool(d: Draw, x: Value) -> Value:
    rank = d.spatial(x)
    kernel = [d.one((1, 2, 2, 3))] * rank
    stride = [d.one((1, 1, 2))] * rank
    padding = [d.one((0, 0, kernel[0] // 2))] * rank
    ceil = d.chance(0.2)
    if d.chance(0.6):
        return d.call(f"avg_pool{rank}d", x, kernel, stride, padding, ceil, d.chance(0.6))
    return d.call(f"max_pool{rank}d", x, kernel, stride, padding, [1] * rank, ceil)


@sketch(2)
def _adaptive_pool(d: Draw, x: Value) -> Value:
    rank = d.spatial(x)
    size = [d.one((1, 1, 2, 3)) for _ in range(rank)]
    if d.chance(0.7):
        return d.call(f"adaptive_avg_pool{rank}d", x, size)
    return d.item(d.call(f"adaptive_max_pool{rank}d", x, size))


@sketch(2)
def _resize(d: Draw, x: Value) -> Value:
    rank, shape = d.spatial(x, 1, 2), d.shape(x)
    mode = d.one(("nearest", "nearest", "linear"))
    factor = d.one((1, 2, 2))
    sizes = [n * factor for n in shape[2:]]
    if mode == "nearest":
        return d.call(f"upsample_nearest{rank}d", x, sizes)
    name = {1: "upsample_linear1d", 2: d.one(("upsample_bilinear2d", "upsample_bicubic2d"))}[rank]
    return d.call(name, x, sizes, d.chance(0.3))


# --- reductions and orders ------------------------------------------------------------------------


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


# --- layouts --------------------------------------------------------------------------------------


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
    worked = _linear(d, merged) if d.chance(0.6) else _scale_or_shift(d, merged)
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


# --- several values -------------------------------------------------------------------------------


@sketch(6)
def _pair(d: Draw, x: Value) -> Value:
    """Two values of one shape meet."""
    other = d.alike(x)
    fits(other)
    assert other is not None
    name = d.one(("add", "add", "add", "sub", "mul", "cat", "stack", "maximum", "alpha", "rsub",
                  "where"))  # fmt: skip
    if name in ("cat", "stack"):
        given = d.one(([x, other], [other, x], [x, x, other]))
        return d.call(name, given, d.axis(x))
    if name == "alpha":
        return d.call("add", x, other, alpha=d.one((2, -0.5)))
    if name == "where":
        return d.call("where", d.hold("mask", d.shape(x)[-1], dtype=torch.bool), x, other)
    return d.call(name, x, other)


@sketch(1)
def _with_itself(d: Draw, x: Value) -> Value:
    kind = d.one(("add", "mul", "matmul", "cat", "residual"))
    if kind == "matmul":
        fits(len(d.shape(x)) >= 3)
        return d.call("matmul", x, d.call("transpose", x, -1, -2))
    if kind == "cat":
        return d.call("cat", [x, d.call("mul", x, 2.0)], d.axis(x))
    if kind == "residual":
        width = d.shape(x)[-1]
        return d.call("add", x, d.linear(x, width))
    return d.call(kind, x, x)


@sketch(3)
def _branches(d: Draw, x: Value) -> Value:
    """Parallel branches that are summed: kernels, norms, the identity (Ding et al. 2021)."""
    d.spatial(x)
    c = d.shape(x)[1]
    out = c if d.chance(0.7) else d.one(SIZES)
    made = []
    for _ in range(d.one((2, 2, 3, 4))):
        kind = d.one(("conv3", "conv1", "same", "pooled", "two", "scaled", "wide"))
        if kind == "same":
            fits(out == c)
            branch = d.norm(x) if d.chance(0.7) else x
        elif kind == "two":
            branch = d.conv(d.conv(x, d.one(SIZES), 1, bias=d.chance(0.5)), out, 3)
        elif kind == "pooled":
            rank = d.spatial(x)
            branch = d.call(f"avg_pool{rank}d", d.conv(x, out), [3] * rank, [1] * rank,
                            [1] * rank)  # fmt: skip
        elif kind == "scaled":
            branch = d.call("mul", d.conv(x, out, 3), d.numbers(out, *[1] * d.spatial(x)))
        else:
            branch = d.conv(x, out, {"conv3": 3, "conv1": 1, "wide": 5}[kind], bias=d.chance(0.5))
            if d.chance(0.7):
                branch = d.norm(branch)
        made.append(branch)
    total = made[0]
    for branch in made[1:]:
        total = d.call(d.one(("add", "add", "add", "sub")), total, branch)
    return d.call("relu", total) if d.chance(0.4) else total


@sketch(2)
def _low_rank(d: Draw, x: Value) -> Value:
    """A layer and an adapter beside it (Hu et al. 2021)."""
    width = d.shape(x)[-1]
    out = d.one((width, 4))
    base = d.linear(x, out)
    low = d.linear(d.linear(x, d.one((1, 2)), bias=False), out, bias=False)
    if d.chance(0.6):
        low = d.call("mul", low, d.one((2.0, 0.5)))
    return d.call("add", base, low)


@sketch(2)
def _parallel(d: Draw, x: Value) -> Value:
    """Layers that read one value."""
    width = d.shape(x)[-1]
    out = d.one((width, 4))
    made = [d.linear(x, out) for _ in range(d.one((2, 3)))]
    if d.chance(0.5):
        return d.call("cat", made, -1)
    return d.call("mul", d.call("silu", made[0]), made[1])


@sketch(2)
def _attention(d: Draw, x: Value) -> Value:
    """Queries, keys and values of one sequence."""
    shape = d.shape(x)
    fits(len(shape) == 3 and shape[2] % 2 == 0)
    _, tokens, width = shape
    heads = d.one([h for h in (1, 2, 4) if width % h == 0])
    if d.chance(0.3):
        joint = d.call("reshape", d.linear(x, 3 * width), [-1, tokens, 3, heads, width // heads])
        parts = d.call("unbind", d.call("permute", joint, [2, 0, 3, 1, 4]), 0)
        q, k, v = (d.item(parts, i) for i in range(3))
    else:
        q, k, v = (
            d.call("transpose", d.call("reshape", d.linear(x, width),
                                       [-1, tokens, heads, width // heads]), 1, 2)
            for _ in range(3)
        )  # fmt: skip
    if d.chance(0.5):
        mixed = d.call("scaled_dot_product_attention", q, k, v)
    else:
        scaled = d.call("mul", q, (width // heads) ** -0.5) if d.chance(0.8) else q
        scores = d.call("matmul", scaled, d.call("transpose", k, -2, -1))
        if d.chance(0.5):
            scores = d.call("add", scores, d.hold("normal", heads, tokens, tokens))
        if d.chance(0.2):
            mask = d.hold("given", tokens, tokens,
                          detail=[[0.0 if j <= i else float("-inf") for j in range(tokens)]
                                  for i in range(tokens)])  # fmt: skip
            scores = d.call("add", scores, mask, keep=True)
        mixed = d.call("matmul", d.call("softmax", scores, -1), v)
    merged = d.call("reshape", d.call("transpose", mixed, 1, 2), [-1, tokens, width])
    made = d.linear(merged, width)
    return d.call("add", x, made) if d.chance(0.5) else made


@sketch(1)
def _experts(d: Draw, x: Value) -> Value:
    """Layers that are weighted and summed, by constants or by the input."""
    width = d.shape(x)[-1]
    count, out = d.one((2, 3)), d.one((width, 4))
    kind = d.one(("constant", "router", "stacked", "equal"))
    if kind == "equal":
        shared, bias = d.hold("normal", out, width), d.maybe(out)
        made = [d.call("linear", x, shared, bias) for _ in range(count)]
        total = made[0]
        for one in made[1:]:
            total = d.call("add", total, one)
        return d.call("div", total, count)
    if kind == "stacked":
        shares = d.call("softmax", d.hold("normal", count), 0)
        weight = d.call("einsum", "e,eoi->oi", [shares, d.hold("normal", count, out, width)])
        return d.call("linear", x, weight, None)
    made = [d.linear(x, out) for _ in range(count)]
    if kind == "constant":
        shares = d.call("softmax", d.hold("normal", count), 0)
        parts = [d.call("mul", one, d.call("select", shares, 0, i)) for i, one in enumerate(made)]
    else:
        scores = d.call("softmax", d.linear(x, count), -1)
        parts = [d.call("mul", one, d.call("slice", scores, -1, i, i + 1))
                 for i, one in enumerate(made)]  # fmt: skip
    total = parts[0]
    for one in parts[1:]:
        total = d.call("add", total, one)
    return total


@sketch(1)
def _quantiser(d: Draw, x: Value) -> Value:
    """Fake quantisers on a weight and on a value; the codes are rounded alike, or not at all."""
    out = d.one(SIZES)
    width = d.shape(x)[-1]
    weight = d.call("fake_quantize_per_channel_affine", d.hold("normal", out, width),
                    d.hold("full", out, detail=0.125, dtype=torch.float32),
                    d.hold("full", out, detail=0, dtype=torch.int32), 0, -128, 127)  # fmt: skip
    if d.chance(0.4):
        x = d.call("fake_quantize_per_tensor_affine", x, 0.0625, 0, -128, 127)
    return d.call("linear", x, weight, d.maybe(out))


@sketch(2)
def _generated_weight(d: Draw, x: Value) -> Value:
    """A weight that is computed from others in each call."""
    out, width = d.one(SIZES), d.shape(x)[-1]
    v = d.hold("normal", out, width)
    kind = d.one(("normed", "masked", "product", "standardised"))
    if kind == "normed" and d.chance(0.5):
        weight = d.call("_weight_norm", v, d.numbers(out, 1), 0)
    elif kind == "normed":
        length = d.call("linalg_vector_norm", v, 2, [1], True)
        weight = d.call("mul", d.call("div", v, length), d.numbers(out, 1))
    elif kind == "masked":
        weight = d.call("mul", v, d.hold("mask", out, width, dtype=torch.bool))
    elif kind == "product":
        weight = d.call("matmul", d.hold("normal", out, 2), d.hold("normal", 2, width))
    else:
        weight = d.call("sub", v, d.call("mean", v, [1], True))
    return d.call("linear", x, weight, d.maybe(out))


@sketch(1)
def _token(d: Draw, x: Value) -> Value:
    """A token that all samples share stands in front of the others."""
    shape = d.shape(x)
    fits(len(shape) == 3)
    token = d.call("expand", d.hold("normal", 1, 1, shape[2]), [d.size(x, 0), -1, -1])
    if d.chance(0.3):
        token = d.call("add", token, d.numbers(1, 1, shape[2]))
    joined = d.call("cat", [token, x], 1)
    if d.chance(0.5):
        joined = d.call("add", joined, d.hold("normal", 1, shape[1] + 1, shape[2]))
    if d.chance(0.4):
        joined = d.linear(joined, shape[2])
    return d.call("select", joined, 1, 0) if d.chance(0.3) else joined


@sketch(1)
def _of_batch(d: Draw, x: Value) -> Value:
    """What depends on the size of the batch alone."""
    shape = d.shape(x)
    name = d.one(("zeros", "ones", "full", "arange", "ones_like", "zeros_like", "full_like",
                  "new_zeros", "rows"))  # fmt: skip
    if name in ("ones_like", "zeros_like"):
        made = d.call(name, x)
    elif name == "full_like":
        made = d.call(name, x, 1.5)
    elif name == "new_zeros":
        made = d.call(name, x, [d.size(x, 0), *shape[1:]])
    elif name == "arange":
        made = d.call(name, shape[-1], dtype=d.dtype)
    elif name == "rows":
        rows = d.call("arange", d.size(x, 0), dtype=d.dtype)
        made = d.call("reshape", rows, [-1, *[1] * (len(shape) - 1)])
    else:
        sizes = [d.size(x, 0), *shape[1:]]
        made = (d.call(name, sizes, 0.5, dtype=d.dtype) if name == "full"
                else d.call(name, sizes, dtype=d.dtype))  # fmt: skip
    if d.chance(0.5):
        made = d.call("mul", made, d.numbers(shape[-1]))
    return d.call(d.one(("add", "mul", "sub")), x, made)


@sketch(1)
def _pyramid(d: Draw, x: Value) -> Value:
    """A level that is resized and added to a larger one."""
    rank = d.spatial(x, 2)
    c, h, w = d.shape(x)[1:]
    fits(h % 2 == 0 and w % 2 == 0)
    low = d.call("avg_pool2d", x, [2, 2])
    low = d.conv(low, c)
    sizes = [h, w]
    if d.chance(0.7):
        large = d.call(f"upsample_nearest{rank}d", low, sizes)
    else:
        large = d.call("upsample_bilinear2d", low, sizes, d.chance(0.3))
    if d.chance(0.6):
        large = d.conv(large, c, d.one((1, 1, 3)))
    return d.call("add", large, d.conv(x, c) if d.chance(0.5) else x)


@sketch(1)
def _zero_channels(d: Draw, x: Value) -> Value:
    """A layer some of whose outputs are zero, and one that reads it."""
    width = d.shape(x)[-1]
    between = d.one((4, 6, 8))
    weight = d.hold("given", between, width, buffer=d.chance(0.3), detail=[
        [0.0 if row % 2 else d.rng.gauss(0, 1) for _ in range(width)] for row in range(between)
    ])  # fmt: skip
    bias = d.hold("given", between, detail=[
        0.0 if row % 2 else d.rng.gauss(0, 1) for row in range(between)
    ])  # fmt: skip
    made = d.call("linear", x, weight, bias if d.chance(0.6) else None)
    made = d.call(d.one(("relu", "silu", "gelu", "sigmoid")), made)
    return d.linear(made, d.one((width, 4)))


@sketch(2)
def _plain(d: Draw, x: Value) -> Value:
    """Calls that change nothing, or only the dtype and back."""
    kind = d.one(("dropout", "clone", "contiguous", "cast", "detach", "alias", "to", "there"))
    if kind == "dropout":
        return d.call(kind, x, 0.5, False)
    if kind == "cast":
        half = d.call("to", x, torch.float32 if d.dtype is torch.float64 else torch.float64)
        return d.call("to", half, d.dtype) if d.chance(0.8) else half
    if kind == "to":
        return d.call("to", x, d.dtype)
    if kind == "there":
        rank = len(d.shape(x))
        fits(rank >= 3)
        return d.call("transpose", d.call("transpose", x, 1, 2), 1, 2)
    return d.call(kind, x)


@sketch(1)
def _compared(d: Draw, x: Value) -> Value:
    """A mask of the values themselves."""
    mask = d.call(d.one(("gt", "lt", "ge")), x, d.one((0.0, 0.5)))
    if d.chance(0.5):
        return d.call("where", mask, x, d.call("mul", x, 0.1))
    return d.call("masked_fill", x, mask, d.one((0.0, -1.0)))


# --- what only tracing takes ----------------------------------------------------------------------


@sketch(3, effect=True)
def _write(d: Draw, x: Value) -> Value:
    """An in-place call, on a value, a view of it, or an input."""
    name = d.one(("add_", "mul_", "relu_", "clamp_", "copy_", "sub_", "zero_", "fill_"))
    at = x
    if d.chance(0.4):
        fits(len(d.shape(x)) >= 2)
        at = d.call("slice", x, 1, 0, max(1, d.shape(x)[1] - 1))
    if name in ("relu_", "zero_"):
        d.call(name, at)
    elif name == "fill_":
        d.call(name, at, 0.5)
    elif name == "clamp_":
        d.call(name, at, -1.0, 1.0)
    elif name == "copy_":
        d.call(name, at, d.call("mul", at, 2.0))
    else:
        d.call(name, at, d.one((2.0, 0.5)))
    return d.call("mul", x, 1.5) if d.chance(0.5) else x


@sketch(1, effect=True)
def _state(d: Draw, x: Value) -> Value:
    """A buffer that each call writes."""
    width = d.shape(x)[-1]
    name = f"state{len(d.held)}"
    d.held[name] = Drawn("normal", (width,), d.dtype, d.rng.randrange(10**6), buffer=True)
    d.weights[name] = d.held[name].make()
    buffer = Held(name)
    old = d.call("mul", buffer, 1.0)
    if d.chance(0.5):
        d.call("add_", buffer, 1.0)
    else:
        axes = list(range(len(d.shape(x)) - 1))
        fits(axes)
        d.call("copy_", buffer, d.call("mean", x, axes))
    return d.call("add", x, old if d.chance(0.5) else buffer)


@sketch(1, effect=True)
def _choice(d: Draw, x: Value) -> Value:
    """One of two networks, by the sign of a sum."""
    shape = d.shape(x)
    first = Value(0)

    def branch() -> DrawnNetwork:
        own = Draw(d.rng, d.dtype)
        own.values = [d.values[x.index].clone()]
        y = own.linear(first, shape[-1])
        y = own.call(d.one(("relu", "tanh")), y) if d.chance(0.5) else own.call("mul", y, 2.0)
        base = len(d.held)
        names = {old: f"p{base + i}" for i, old in enumerate(own.held)}
        for old, new in names.items():
            d.held[new] = own.held[old]
            d.weights[new] = own.weights[old]
        steps = tuple(_renamed(s, names) for s in own.steps)
        return DrawnNetwork((Drawn("normal", shape),), {names[n]: h for n, h in own.held.items()},
                       steps, y)  # fmt: skip

    then, otherwise = branch(), branch()
    pick = d.call("gt", d.call("sum", x), 0)
    return d.call(Cond(then, otherwise), pick, x)


def _renamed(step: DrawnCall, names: dict[str, str]) -> DrawnCall:
    from refold.fuzz.network import mapped

    def moved(leaf: object) -> object:
        return Held(names[leaf.name]) if isinstance(leaf, Held) else leaf

    return DrawnCall(
        step.target, mapped(step.args, moved), mapped(dict(step.kwargs), moved), step.part
    )
