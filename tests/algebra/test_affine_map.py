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


def equal(a: torch.Tensor, b: torch.Tensor) -> None:
    """Of whole numbers below 1000, whose sums of products of three float64 has exactly."""
    assert torch.equal(a, b)


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
    w = whole(outputs, inputs // groups, *kernel, generator=generator)
    b = whole(outputs, generator=generator)
    m = am.convolution(Lazy.of(w), b, groups, step, padding, dilation)
    return m, lambda x: F.conv2d(x, w, b, step, padding, dilation, groups)


def whole(*shape: int, generator: torch.Generator | None = None) -> torch.Tensor:
    return torch.randint(-999, 1000, shape, generator=generator).double()


def image(channels: int, size: tuple[int, int] = (9, 8)) -> torch.Tensor:
    return whole(2, channels, *size)


@given(convolutions(4, 8))
@settings(max_examples=30, deadline=None)
def test_a_convolution_is_its_map(drawn) -> None:
    m, call = drawn
    x = image(4)
    equal(run(m, x, call(x).shape[2:]), call(x))


@given(
    convolutions(4, 4, stride=1), convolutions(4, 4, stride=1), st.sampled_from((1.0, -1.0, 0.5))
)
@settings(max_examples=40, deadline=None)
def test_a_sum_of_maps_is_the_map_of_the_sum(first, second, factor) -> None:
    (a, _), (b, _) = first, second
    x, extents = image(4), (6, 5)
    total = am.add([a, am.scale(b, factor)])
    equal(run(total, x, extents), run(a, x, extents) + factor * run(b, x, extents))


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
    equal(run(composed, wide, extents), run(o, middle, extents))


def replace_origin(m: AffineMap, origin: tuple[int, ...]) -> AffineMap:
    return replace(m, origin=origin)


@given(convolutions(4, 4))
@settings(max_examples=20, deadline=None)
def test_regroup_and_embed_change_nothing(drawn) -> None:
    m, call = drawn
    x = image(4)
    extents = call(x).shape[2:]
    equal(run(am.regroup(m, 1), x, extents), call(x))
    grown = am.embed(m, tuple(k + 3 for k in m.kernel), tuple(o + 1 for o in m.origin))
    equal(run(grown, x, extents), call(x))


@given(convolutions(4, 4, stride=1), convolutions(4, 8, stride=1))
@settings(max_examples=20, deadline=None)
def test_concatenate_and_select(first, second) -> None:
    (a, _), (b, _) = first, second
    x, extents = image(4), (6, 5)
    whole = torch.cat([run(a, x, extents), run(b, x, extents)], 1)
    joined = am.concatenate([a, b])
    equal(run(joined, x, extents), whole)
    index = torch.tensor([11, 0, 5])
    equal(run(am.select(joined, index), x, extents), whole[:, index])


@given(convolutions(2, 3))
@settings(max_examples=20, deadline=None)
def test_a_small_convolution_as_a_matrix(drawn) -> None:
    m, call = drawn
    x = image(2, (6, 5))
    y = call(x)
    probe = am.as_matrix(m, (6, 5), tuple(y.shape[2:]))
    equal(run(probe, x.flatten(1), ()), y.flatten(1))


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
            equal(y, expected)
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


@given(
    strides=st.tuples(st.integers(2, 3), st.integers(2, 3)),
    kernels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.integers(0, 1), groups=st.tuples(*[st.sampled_from((1, 2, 4))] * 2),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_transposed_convolutions_compose(strides, kernels, padding, groups) -> None:
    x, none = image(4, (4, 3)), torch.zeros(4, dtype=torch.float64)
    b = torch.randn(8).double()
    first = torch.randn(4, 4 // groups[0], kernels[0], 2).double()
    then = torch.randn(4, 8 // groups[1], kernels[1], 3).double()
    middle = F.conv_transpose2d(x, first, None, (strides[0], 2), 0, 0, groups[0])
    assume(strides[1] * (middle.shape[2] - 1) + kernels[1] > 2 * padding)
    call = ((strides[1], 2), (padding, 0), (0, 0), groups[1])
    expected = F.conv_transpose2d(middle, then, b, *call)
    inner = am.transposed_convolution(
        Lazy.of(first), none, groups[0], (strides[0], 2), (0, 0), (1, 1)
    )
    outer = am.transposed_convolution(
        Lazy.of(then), b, groups[1], (strides[1], 2), (padding, 0), (1, 1)
    )
    both = am.compose_transposed(outer, inner)
    close(run_transposed(both, x, expected.shape[2:]), expected)


# --- what a map says of itself --------------------------------------------------------------------


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def conv(
    w: torch.Tensor,
    b: torch.Tensor | None = None,
    groups: int = 1,
    stride: tuple[int, ...] | None = None,
    padding: tuple[int, ...] | None = None,
    dilation: tuple[int, ...] | None = None,
) -> AffineMap:
    """A convolution map; one of stride 1, without padding, dilation or bias unless told."""
    axes = w.dim() - 2
    bias = torch.zeros(w.shape[0], dtype=torch.float64) if b is None else b
    one, zero = (1,) * axes, (0,) * axes
    return am.convolution(Lazy.of(w), bias, groups, stride or one, padding or zero, dilation or one)


def supported(m: AffineMap) -> AffineMap:
    """The map, after asserting that its support is where the taps of its random weight are."""
    taps = (m.weight.get() != 0).any(0).any(0).nonzero()
    found = tuple(frozenset(axis) for axis in taps.t().tolist()) if m.spatial else ()
    assert m.support == found
    assert tuple(m.weight.get().shape) == m.weight.shape
    return m


def test_a_lattice_is_seen_wherever_its_first_tap_is() -> None:
    m = supported(conv(drawn(2, 2, 3, 1), dilation=(2, 3)))
    assert (m.kernel, m.dilation, m.taps) == ((5, 1), (2, 1), (3, 1))
    grown = supported(am.embed(m, (9, 4), (3, 2)))
    assert grown.support == (frozenset({3, 5, 7}), frozenset({2}))
    assert (grown.kernel, grown.dilation, grown.taps) == ((9, 4), (2, 1), (3, 1))
    assert (m.in_channels, m.out_channels, m.spatial) == (2, 2, 2)


@pytest.mark.parametrize(
    ("make", "pointwise", "diagonal"),
    [
        (lambda: am.identity(4, 2), True, True),
        (lambda: am.identity(4, 0), True, True),
        (lambda: conv(drawn(4, 4, 1, 1)), True, False),
        (lambda: am.matrix(Lazy.of(drawn(3, 4)), drawn(3)), True, False),
        (lambda: conv(drawn(1, 1, 1, 1)), True, True),
        (lambda: conv(drawn(4, 1, 1, 1)), True, False),  # four of one channel
        (lambda: conv(drawn(8, 1, 1, 1), groups=4), True, False),  # two of each channel
        (lambda: conv(drawn(4, 2, 1, 1), groups=4), True, False),  # one of two channels
        (lambda: conv(drawn(4, 1, 1, 3), groups=4), False, False),
        (lambda: conv(drawn(4, 1, 1, 1), groups=4, stride=(1, 2)), False, False),
        (lambda: conv(drawn(4, 1, 1, 1), groups=4, padding=(0, 1)), False, False),
    ],
)
def test_which_maps_are_pointwise_and_which_are_scales(make, pointwise, diagonal) -> None:
    m = make()
    assert m.is_pointwise is pointwise
    assert m.is_diagonal is diagonal


def test_a_bias_is_a_value_to_the_rounding_of_what_it_was_made_of() -> None:
    large = torch.tensor([1e6, -1e6, 0.0], dtype=torch.float64)
    m = am.diagonal(torch.ones(3, dtype=torch.float64), large, 2)
    assert m.has_bias
    assert m.bias_is(large)
    assert not m.bias_is(-large)
    # 1e6 is rounded by 1e-10, and so is what is left when it is taken away
    rest = am.add([m, am.scale(m, -1.0)])
    assert not rest.has_bias
    for off, same in ((1e-9, True), (-1e-9, True), (1e-7, False), (-1e-7, False)):
        near = am.add([rest, am.diagonal(torch.ones(3).double(), torch.full((3,), off), 2)])
        assert near.bias_is(0.0) is same
        assert near.has_bias
    one = am.diagonal(torch.ones(3).double(), torch.tensor([0.0, 1e-9, 0.0]).double(), 2)
    assert not one.bias_is(0.0)
    assert am.identity(3, 2).bias_is(0.0)


def test_the_reach_of_a_bias_follows_it_through_sums_scales_and_sequences() -> None:
    def reaching(value: float) -> AffineMap:
        return am.diagonal(torch.full((3,), 2.0).double(), torch.tensor([0, -value, 1]).double(), 0)

    def reach(m: AffineMap) -> float:
        return float(m.reach.evaluate())

    a, b = reaching(8.0), reaching(100.0)
    assert reach(a) == 8.0
    assert reach(am.scale(a, -0.5)) == 4.0
    assert am.scale(a, 1.0) is a
    assert reach(am.add([a, b])) == reach(am.add([b, a])) == 100.0
    assert reach(am.concatenate([a, b])) == reach(am.concatenate([b, a])) == 100.0
    assert reach(am.compose(b, a)) == 100.0
    assert reach(am.compose(a, b)) == 200.0  # b's bias, times two
    dense = am.matrix(Lazy.of(torch.full((2, 3), 3.0).double()), torch.ones(2).double())
    assert reach(am.compose(dense, b)) == 3 * 99.0
    assert reach(am.compose(dense, am.identity(3, 0))) == 1.0
    assert (
        reach(am.as_matrix(conv(drawn(2, 2, 1), torch.tensor([0.0, -5.0]).double()), (3,), (3,)))
        == 5.0
    )
    assert reach(am.matrix(Lazy.of(drawn(0, 3)), drawn(0))) == 0.0


# --- makers ---------------------------------------------------------------------------------------


def test_a_scale_and_shift_is_its_map() -> None:
    s, h, x = drawn(4), drawn(4), image(4)
    m = supported(am.diagonal(s, h, 2))
    close(run(m, x, (9, 8)), x * s.reshape(4, 1, 1) + h.reshape(4, 1, 1))
    close(run(am.identity(4, 2), x, (9, 8)), x)


@pytest.mark.parametrize("divisor", [6, 5])
def test_an_average_with_one_divisor_is_its_map(divisor: int) -> None:
    x = image(4)
    y = F.avg_pool2d(x, (3, 2), (2, 1), (1, 0), count_include_pad=True, divisor_override=divisor)
    m = supported(am.average_pool(4, (3, 2), (2, 1), (1, 0), divisor))
    assert m.groups == 4
    assert not m.has_bias
    close(run(m, x, y.shape[2:]), y)


def test_a_window_reads_every_so_many_from_its_start() -> None:
    x = image(3)
    m = supported(am.window(3, (2, -1), (3, 2)))
    expected = F.pad(x, (1, 0))[:, :, 2::3, ::2]
    close(run(m, x, expected.shape[2:]), expected)


def test_channels_are_selected_in_the_order_asked_for() -> None:
    x, base = image(4), am.diagonal(drawn(4), drawn(4), 2)
    assert am.select(base, torch.arange(4)) is base
    for index in ([0, 1, 2], [1, 0, 3, 2], [3, 3, 0, 1, 2]):
        kept = supported(am.select(base, torch.tensor(index)))
        close(run(kept, x, (9, 8)), run(base, x, (9, 8))[:, index])
    grouped = conv(drawn(4, 2, 1, 1), drawn(4), groups=2)
    kept = am.select(grouped, torch.arange(4))
    assert kept.groups == 1
    close(run(kept, x, (9, 8)), run(grouped, x, (9, 8)))


@pytest.mark.parametrize(("groups", "fewer"), [(6, 1), (6, 2), (6, 3), (6, 6), (4, 2)])
@pytest.mark.parametrize("per", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_a_map_with_fewer_groups_is_the_same_map(groups: int, fewer: int, per) -> None:
    out_per, in_per = per
    w, b = drawn(groups * out_per, in_per, 2), drawn(groups * out_per)
    x = drawn(2, groups * in_per, 7)
    m = conv(w, b, groups)
    other = supported(am.regroup(m, fewer))
    assert other.groups == fewer
    assert (other is m) == (fewer == groups)
    close(run(other, x, (6,)), F.conv1d(x, w, b, groups=groups))


def test_a_map_over_one_and_three_axes_as_a_matrix() -> None:
    w, b, x = drawn(4, 2, 3), drawn(4), drawn(2, 4, 7)
    y = F.conv1d(x, w, b, 2, 1, 1, 2)
    m = am.as_matrix(conv(w, b, 2, (2,), (1,)), (7,), (y.shape[2],))
    close(run(m, x.flatten(1), ()), y.flatten(1))
    w, x = drawn(2, 3, 2, 1, 3), drawn(2, 3, 3, 2, 4)
    y = F.conv3d(x, w, b[:2], (1, 2, 1), (1, 0, 1))
    m = am.as_matrix(conv(w, b[:2], 1, (1, 2, 1), (1, 0, 1)), (3, 2, 4), tuple(y.shape[2:]))
    close(run(m, x.flatten(1), ()), y.flatten(1))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_layout_and_back_is_the_weight(groups: int) -> None:
    w = drawn(4, 6 // groups, 3)
    there = am.swapped(Lazy.of(w), groups)
    assert there.shape == (6, 4 // groups, 3) == tuple(there.get().shape)
    x = drawn(2, 4, 5)
    flipped = there.get().flip(2)
    close(F.conv1d(x, flipped, padding=2, groups=groups), F.conv_transpose1d(x, w, groups=groups))
    assert torch.equal(am.swapped(there, groups).get(), w)


# --- sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_a_sum_of_finer_and_coarser_groups_of_any_extent(order, first: torch.dtype) -> None:
    x = image(12)
    weights = [drawn(12, 3, 3, 3), drawn(12, 1, 1, 1), drawn(12, 6, 3, 2)]
    groups, padding = (4, 12, 2), ((1, 1), (0, 0), (1, 0))
    weights[0] = weights[0].to(first)
    biases = [drawn(12) for _ in weights]
    maps = [conv(weights[i], biases[i], groups[i], None, padding[i]) for i in order]
    total = supported(am.add(maps))
    assert total.groups == 2
    assert (total.kernel, total.origin) == ((3, 3), (1, 1))
    close(run(total, x, (8, 7)), sum(run(m, x, (8, 7)) for m in maps))
    again = am.add([total, total])
    close(run(again, x, (8, 7)), 2 * run(total, x, (8, 7)))


def test_what_holds_two_maps_reaches_as_far_as_each() -> None:
    a, b = conv(drawn(2, 2, 3, 1), padding=(2, 0)), conv(drawn(2, 2, 2, 4), padding=(0, 1))
    assert am.aligned([a, b]) == am.aligned([b, a]) == ((4, 4), (2, 1))
    crop = am.window(2, (3, 0), (1, 1))  # it reads three further, and nothing in front
    assert am.aligned([crop, crop]) == ((1, 1), (-3, 0))
    assert am.embed(crop, (1, 1), (-3, 0)) is crop
    for m in (am.concatenate([a, b, crop]), am.add([a, b, crop])):
        assert (m.kernel, m.origin) == ((6, 4), (2, 1))
        supported(m)


@pytest.mark.parametrize("join", [am.add, am.concatenate])
def test_one_map_alone_and_the_layout_of_several(join) -> None:
    """What is made of weights of two layouts has the layout of none of them."""
    plain = conv(drawn(4, 4, 3, 3), drawn(4))
    turned = conv(drawn(4, 4, 3, 3).contiguous(memory_format=torch.channels_last))
    x = image(4)
    close(run(join([plain]), x, (7, 6)), run(plain, x, (7, 6)))
    for maps, last in (([plain], 0), ([turned, turned], 1), ([turned, plain], 0)):
        assert join(maps).weight.channels_last is bool(last)
    assert am.add([plain, turned]).weight.fresh
    assert am.compose(plain, turned).weight.fresh


# --- sequences ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outer", "inner", "groups"),
    [
        ((8, 4, 1), (4, 4, 4), 1),  # dense after a scale of each channel
        ((8, 4, 2), (4, 4, 4), 2),
        ((8, 4, 2), (4, 8, 4), 2),  # each channel of two inputs: not a scale
        ((8, 4, 1), (4, 2, 2), 1),  # the middle is wider than the input
        ((4, 4, 4), (4, 6, 1), 1),  # a scale after a dense map
        ((4, 4, 4), (4, 6, 2), 2),
        ((8, 4, 4), (4, 6, 2), 2),  # two of each channel: not a scale
        ((8, 8, 4), (8, 4, 4), 4),
        ((6, 12, 2), (12, 6, 6), 2),
        ((6, 12, 6), (12, 6, 2), 2),
        ((4, 12, 4), (12, 6, 6), 2),
        ((4, 12, 1), (12, 6, 3), 1),
        ((4, 12, 2), (12, 6, 3), 1),
        ((3, 6, 3), (6, 4, 2), 1),
    ],
)
@pytest.mark.parametrize(
    "kernels", [((), ()), ((1,), (1,)), ((2,), (3,)), ((1,), (2,)), ((2,), (1,))]
)
def test_channels_compose_in_groups_of_every_kind(outer, inner, groups: int, kernels) -> None:
    def made(spec: tuple[int, int, int], kernel: tuple[int, ...]) -> AffineMap:
        out, inputs, parts = spec
        w, b = drawn(out, inputs // parts, *kernel), drawn(out)
        if kernel:
            return conv(w, b, parts)
        return AffineMap(Lazy.of(w), b, parts, (), (), (), am.matrix(Lazy.of(w), b).reach)

    a, b = made(outer, kernels[0]), made(inner, kernels[1])
    both = supported(am.compose(a, b))
    x = drawn(2, inner[1], *(9,) * bool(kernels[0]))
    size = (9 - sum(k[0] - 1 for k in kernels),) if kernels[0] else ()
    middle = (9 - kernels[1][0] + 1,) if kernels[0] else ()
    assert both.groups == groups
    close(run(both, x, size), run(a, run(b, x, middle), size))


def test_taps_of_a_sequence_are_the_sums_of_its_taps() -> None:
    """Strides of the first spread the taps of the second; a tap of zeros is none."""
    inner = conv(drawn(3, 2, 2, 3), drawn(3), 1, (3, 2), (1, 2), (1, 2))
    w = drawn(4, 3, 3, 2)
    w[:, :, 1, 0] = 0
    outer = conv(w, drawn(4), 1, (2, 1), (1, 0))
    both = supported(am.compose(outer, inner))
    assert both.stride == (6, 2)
    assert both.origin == (3 * 1 + 1, 2 * 0 + 2)
    assert both.kernel == (3 * 2 + 2, 2 * 1 + 5)


@pytest.mark.parametrize("kernel", [(), (2,), (2, 3)])
@pytest.mark.parametrize("groups", [1, 2])
def test_what_a_constant_adds_behind_a_map(kernel: tuple[int, ...], groups: int) -> None:
    w, vector = drawn(4, 6 // groups, *kernel), drawn(6)
    m = AffineMap(Lazy.of(w), drawn(4), groups, (1,) * len(kernel), (0,) * len(kernel), (), None)
    x = vector.reshape(1, 6, *(1,) * len(kernel)).expand(1, 6, *kernel)
    dense = am.regroup(m, 1).weight.get()
    close(am.apply_taps(m, vector), (dense * x).flatten(1).sum(1))


# --- executions -----------------------------------------------------------------------------------


def test_a_convolution_is_executed_as_it_was_written() -> None:
    """The kernel itself, where nothing is to be trimmed; smaller ones come first."""
    w = drawn(2, 3, 3, 2)
    m = conv(w, None, 1, None, (1, 0))
    made = list(am.executions(m))
    assert made[0].weight is m.weight
    assert (made[0].padding, made[0].dilation) == ((1, 0), (1, 1))
    sizes = [e.weight.numel() for e in made[1:]]
    assert sizes == sorted(sizes)
    assert len(made) == 1 + 4 * 4
    assert len(list(am.executions(m, reach=1))) == 1 + 2 * 2
    assert {e.padding for e in made} == {(1 + extra, extra) for extra in range(4)}
    shapes = {(e.padding[0], *e.weight.shape[2:]) for e in made}
    assert shapes == {(1 + i, 3 + i + t, 2 + i + t) for i in range(4) for t in range(4)}
    for e in made:  # each reads what the map reads, further or less far along the end
        x = image(3)
        y = F.conv2d(x, e.weight.get(), None, 1, e.padding, e.dilation)
        close(y, run(m, x, tuple(y.shape[2:])))


def test_what_is_executed_has_no_taps_of_zeros() -> None:
    m = conv(drawn(2, 3, 3), None, 1, (2,), (2,), (2,))
    grown = am.embed(m, (9,), (4,))
    tight = am.trimmed(grown)
    assert tight is not None
    assert (tight.padding, tight.dilation, tight.weight.shape) == ((2,), (2,), (2, 3, 3))
    assert torch.equal(tight.weight.get(), m.weight.get()[:, :, ::2])


@pytest.mark.parametrize(("more", "low"), [(2, 1), (2, 2), (2, 0), (4, 3)])
def test_zero_taps_are_moved_where_another_padding_asks_for_it(more: int, low: int) -> None:
    """A kernel of the size that it had may hold its taps elsewhere."""
    m, x = conv(drawn(2, 3, 3), padding=(1,)), drawn(2, 3, 9)
    grown = am.embed(m, (3 + more,), (1 + low,))
    for e in am.executions(grown):
        y = F.conv1d(x, e.weight.get(), None, 1, e.padding, e.dilation)
        close(y, run(m, x, (y.shape[2],)))


def test_a_crop_is_executed_with_zero_taps_in_front() -> None:
    x = image(3, (9, 8))
    m = am.compose(conv(drawn(2, 3, 2, 2)), am.window(3, (2, 0), (1, 1)))
    assert am.trimmed(m) is None
    expected = run(m, x, (6, 7))
    fitting = []
    for e in am.executions(m):
        y = F.conv2d(x, e.weight.get(), None, 1, e.padding, e.dilation)
        if y.shape == expected.shape:
            close(y, expected)
            fitting.append(e)
    assert fitting[0].weight.shape[2:] == (4, 2)
    assert fitting[0].padding == (0, 0)
