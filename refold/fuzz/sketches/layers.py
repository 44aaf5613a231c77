"""Layers, scales and shifts, pads, pools and resizes: what rules read and write."""

from __future__ import annotations

import math

import torch

from refold.fuzz.draw import SIZES, Draw, fits, sketch
from refold.fuzz.network import Value


@sketch(6)
def _conv(d: Draw, x: Value) -> Value:
    rank, c = d.spatial(x), d.shape(x)[1]
    groups = d.one([g for g in (1, 1, 1, c, 2) if c % g == 0])
    out = d.one([n for n in (c, *SIZES) if n % groups == 0])
    kernel = [d.one((1, 1, 2, 3)) for _ in range(rank)]
    stride = [d.one((1, 1, 1, 2)) for _ in range(rank)]
    dilation = [d.one((1, 1, 1, 2)) for _ in range(rank)]
    if d.dtype.itemsize == 2:  # with a kernel of one it ends the process in PyTorch 2.13
        dilation = [1 if k == 1 else step for k, step in zip(kernel, dilation, strict=True)]
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
def linear(d: Draw, x: Value) -> Value:
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
def scale_or_shift(d: Draw, x: Value) -> Value:
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
