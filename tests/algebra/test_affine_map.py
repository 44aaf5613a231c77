"""The arithmetic of affine maps against running the operations one after the other, in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from refold.algebra import affine_map as am
from refold.algebra.affine_map import AffineMap
from refold.algebra.lazy import Lazy

# Sums of at most a few hundred products in another order, each off by 1.1e-16.
EXACT = 1e-12


def run(m: AffineMap, x: torch.Tensor, extents: tuple[int, ...]) -> torch.Tensor:
    """The definition: zero-extend the input, convolve, read the wanted extents."""
    if not m.spatial:
        return F.linear(x, am.regroup(m, 1).weight.get(), m.bias)
    pads: list[int] = []
    for axis in reversed(range(m.spatial)):
        last = m.stride[axis] * (extents[axis] - 1) + m.kernel[axis] - m.origin[axis]
        pads += [m.origin[axis], last - x.shape[2 + axis]]
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[m.spatial]
    return conv(F.pad(x, pads), m.weight.get(), m.bias, m.stride, 0, 1, m.groups)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= EXACT * max(1.0, float(b.abs().max()))


@st.composite
def convolutions(draw: st.DrawFn, inputs: int, outputs: int, stride: int | None = None):
    """A random convolution map of two axes, and the call that it stands for."""
    common = [g for g in (1, 2, 4) if inputs % g == 0 and outputs % g == 0]
    groups = draw(st.sampled_from(common))
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    padding = (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    step = (stride or draw(st.integers(1, 2)),) * 2
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))
    w = torch.randn(outputs, inputs // groups, *kernel, generator=generator, dtype=torch.float64)
    b = torch.randn(outputs, generator=generator, dtype=torch.float64)
    m = am.convolution(Lazy.of(w), b, groups, step, padding, dilation)
    return m, lambda x: F.conv2d(x, w, b, step, padding, dilation, groups)


def image(channels: int, size: tuple[int, int] = (9, 8)) -> torch.Tensor:
    return torch.randn(2, channels, *size, dtype=torch.float64)


@given(convolutions(4, 8))
@settings(max_examples=30, deadline=None)
def test_a_convolution_is_its_map(drawn) -> None:
    m, call = drawn
    x = image(4)
    close(run(m, x, call(x).shape[2:]), call(x))


@given(
    convolutions(4, 4, stride=1), convolutions(4, 4, stride=1), st.sampled_from((1.0, -1.0, 0.5))
)
@settings(max_examples=40, deadline=None)
def test_a_sum_of_maps_is_the_map_of_the_sum(first, second, factor) -> None:
    (a, _), (b, _) = first, second
    x, extents = image(4), (6, 5)
    total = am.add([a, am.scale(b, factor)])
    close(run(total, x, extents), run(a, x, extents) + factor * run(b, x, extents))


@given(convolutions(4, 8), convolutions(8, 4))
@settings(max_examples=60, deadline=None)
def test_a_composition_is_exact_where_no_border_intervenes(first, second) -> None:
    (inner, _), (outer, _) = first, second
    x = image(4, (15, 14))
    # The inner map evaluated on a wider domain, so that the outer one never meets padding.
    wide = F.pad(x, (8, 8, 8, 8))
    middle = run(inner, wide, (24, 24))
    extents = (5, 5)
    shifted = am.compose(outer, inner)
    # Positions far inside: crop by starting both at an offset through the origin.
    offset = 6
    o = replace_origin(outer, tuple(a - offset for a in outer.origin))
    composed = replace_origin(
        shifted, tuple(a - i * offset for a, i in zip(shifted.origin, inner.stride, strict=True))
    )
    close(run(composed, wide, extents), run(o, middle, extents))


def replace_origin(m: AffineMap, origin: tuple[int, ...]) -> AffineMap:
    return replace(m, origin=origin)


@given(convolutions(4, 4))
@settings(max_examples=20, deadline=None)
def test_regroup_and_embed_change_nothing(drawn) -> None:
    m, call = drawn
    x = image(4)
    extents = call(x).shape[2:]
    close(run(am.regroup(m, 1), x, extents), call(x))
    grown = am.embed(m, tuple(k + 3 for k in m.kernel), tuple(o + 1 for o in m.origin))
    close(run(grown, x, extents), call(x))


@given(convolutions(4, 4, stride=1), convolutions(4, 8, stride=1))
@settings(max_examples=20, deadline=None)
def test_concatenate_and_select(first, second) -> None:
    (a, _), (b, _) = first, second
    x, extents = image(4), (6, 5)
    whole = torch.cat([run(a, x, extents), run(b, x, extents)], 1)
    joined = am.concatenate([a, b])
    close(run(joined, x, extents), whole)
    index = torch.tensor([11, 0, 5])
    close(run(am.select(joined, index), x, extents), whole[:, index])


@given(convolutions(2, 3))
@settings(max_examples=20, deadline=None)
def test_a_small_convolution_as_a_matrix(drawn) -> None:
    m, call = drawn
    x = image(2, (6, 5))
    y = call(x)
    probe = am.as_matrix(m, (6, 5), tuple(y.shape[2:]))
    close(run(probe, x.flatten(1), ()), y.flatten(1))


@given(convolutions(4, 4, stride=1))
@settings(max_examples=30, deadline=None)
def test_every_execution_with_the_right_extent_is_the_map(drawn) -> None:
    m, call = drawn
    x = image(4)
    expected = call(x)
    fitting = 0
    for e in am.executions(m):
        y = F.conv2d(x, e.weight.get(), m.bias, m.stride, e.padding, e.dilation, m.groups)
        if y.shape == expected.shape:
            fitting += 1
            close(y, expected)
    assert fitting
    first = next(am.executions(m))
    assert math.prod(first.weight.shape[2:]) <= math.prod(m.taps)


@pytest.mark.parametrize("times", [1, 3])
def test_repeat_features_is_a_reshape(times: int) -> None:
    w = torch.randn(5, 4, dtype=torch.float64)
    b = torch.randn(5, dtype=torch.float64)
    x = torch.randn(6, 4, dtype=torch.float64)
    m = am.repeat_features(am.matrix(Lazy.of(w), b), times)
    close(run(m, x.reshape(-1, 4 * times), ()), F.linear(x, w, b).reshape(-1, 5 * times))


@pytest.mark.parametrize(
    ("outer_groups", "inner_groups"), [(1, 4), (4, 1), (2, 4), (4, 2), (2, 3), (6, 4)]
)
def test_block_products_of_every_kind(outer_groups: int, inner_groups: int) -> None:
    channels = 12
    a = torch.randn(channels, channels // outer_groups, 3, dtype=torch.float64)
    b = torch.randn(channels, channels // inner_groups, 2, dtype=torch.float64)
    zero = torch.zeros(channels, dtype=torch.float64)
    outer = am.convolution(Lazy.of(a), zero, outer_groups, (1,), (0,), (1,))
    inner = am.convolution(Lazy.of(b), zero, inner_groups, (1,), (0,), (1,))
    x = torch.randn(2, channels, 9, dtype=torch.float64)
    expected = F.conv1d(F.conv1d(x, b, groups=inner_groups), a, groups=outer_groups)
    composed = am.compose(outer, inner)
    assert composed.groups == math.gcd(outer_groups, inner_groups)
    close(run(composed, x, (expected.shape[2],)), expected)


def test_depthwise_maps_stay_factored() -> None:
    """A per-channel scale after a pointwise map is an outer product, never a dense square."""
    w = torch.randn(6, 3, 1, 1, dtype=torch.float64)
    pointwise = am.convolution(
        Lazy.of(w), torch.zeros(6, dtype=torch.float64), 1, (1, 1), (0, 0), (1, 1)
    )
    pool = am.average_pool(6, (3, 3), (1, 1), (1, 1), 9)
    composed = am.compose(pool, pointwise)
    assert composed.weight.shape == (6, 3, 3, 3)
    scale = am.diagonal(torch.rand(3).double(), torch.rand(3).double(), 2)
    assert am.compose(pointwise, scale).weight.shape == (6, 3, 1, 1)
    assert am.compose(scale, scale).is_diagonal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_map_may_stand_in_a_sum_twice(dtype: torch.dtype) -> None:
    """Weights that are widened, and so may be accumulated into, count as often as they stand."""
    w = torch.randn(4, 4, 3, 3, dtype=dtype)
    zero = torch.zeros(4, dtype=torch.float64)
    m = am.convolution(Lazy.of(w), zero, 1, (1, 1), (1, 1), (1, 1))
    twice = am.add([m, m, am.identity(4, 2)])
    x = image(4)
    close(run(twice, x, (9, 8)), 2 * run(m, x, (9, 8)) + x)
    close(twice.weight.evaluate(), twice.weight.get())


def run_transposed(m: AffineMap, x: torch.Tensor, extents: tuple[int, ...]) -> torch.Tensor:
    """The definition: every input position writes its taps; read the wanted extents."""
    out = m.bias.reshape(1, -1, 1, 1).repeat(x.shape[0], 1, *extents)
    w = am.regroup(m, 1).weight.get()
    for at in itertools.product(*map(range, x.shape[2:])):
        for tap in itertools.product(*map(range, m.kernel)):
            q = [s * p + t - o for s, p, t, o in zip(m.stride, at, tap, m.origin, strict=True)]
            if all(0 <= i < n for i, n in zip(q, extents, strict=True)):
                out[:, :, q[0], q[1]] += x[:, :, at[0], at[1]] @ w[:, :, tap[0], tap[1]].T
    return out


@given(
    stride=st.integers(1, 3), kernel=st.integers(1, 3), padding=st.integers(0, 2),
    dilation=st.integers(1, 2), groups=st.sampled_from((1, 2)), extra=st.integers(0, 1),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_a_transposed_convolution_is_its_map(
    stride, kernel, padding, dilation, groups, extra
) -> None:
    x, steps, dilations = image(4, (5, 4)), (stride, 2 if stride > 1 else 1), (dilation, 1)
    w, b = torch.randn(4, 6 // groups, kernel, 2).double(), torch.randn(6).double()
    extra = min(extra, max(stride, dilation) - 1)
    assume(4 * stride - 2 * padding + dilation * (kernel - 1) + extra >= 0)
    call = (w, b, steps, (padding, 0), (extra, 0), groups, dilations)
    expected = F.conv_transpose2d(x, *call)
    m = am.transposed_convolution(Lazy.of(w), b, groups, steps, (padding, 0), dilations)
    compute = run if stride == 1 else run_transposed
    close(compute(m, x, expected.shape[2:]), expected)
