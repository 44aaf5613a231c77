"""Several values: branches, adapters, attention, experts, tokens."""

from __future__ import annotations

import torch

from refold.fuzz.draw import SIZES, Draw, fits, sketch
from refold.fuzz.network import Held, Value


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


def _expert(d: Draw, x: Value, out: int, seeds: list[int], bias: Held | None) -> Value:
    """Two layers whose weights follow from seeds: experts of the same seeds are equal."""
    width = d.shape(x)[-1]
    hidden = d.call("linear", x, d.hold("normal", 6, width, seed=seeds[0]))
    return d.call("linear", d.call("gelu", hidden), d.hold("normal", out, 6, seed=seeds[1]), bias)


@sketch(1)
def _experts(d: Draw, x: Value) -> Value:
    """Layers that are weighted and summed, by constants or by the input."""
    width = d.shape(x)[-1]
    count, out = d.one((2, 3)), d.one((width, 4))
    kind = d.one(("constant", "router", "stacked", "equal"))
    if kind == "equal":
        seeds, bias = [d.rng.randrange(10**6) for _ in range(2)], d.maybe(out)
        made = [_expert(d, x, out, seeds, bias) for _ in range(count)]
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
