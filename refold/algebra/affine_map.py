"""Affine maps over one root tensor: the arithmetic that folds branches of any architecture.

A map over a root ``x``, zero-extended beyond its borders, is

    y[b, o, p] = bias[o] + sum_{i, t} weight[o, i, t] * x[b, i, stride * p + t - origin]

with any number of spatial axes (none: a matrix over the last axis of a tensor). It stores no
padding on the high side: the output's extent belongs to the node and the input's to the root, so
strides, crops, asymmetric and 'same' padding are all arithmetic on ``origin``, and a sum aligns
its terms by it. Dilation is expanded into zero taps. Weights are lazy (computed for survivors
alone); biases are eager, because border checks need them.

The same numbers are a transposed convolution too, whose stride is that of its output:

    y[b, o, stride * p + t - origin] += weight[o, i, t] * x[b, i, p]

Such maps are summed, and composed with pointwise maps, by the same functions.

Grouped maps keep their groups while the blocks stay contiguous and in order; otherwise the result
is dense and the caller's cost model decides whether it is wanted.

Sources: Ding et al., RepVGG (CVPR 2021, section 3.3) for branches, Diverse Branch Block
(CVPR 2021, section 3.2) for sequences, average pooling and bias padding; here in one form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from refold.algebra.lazy import Lazy

Ints = tuple[int, ...]

ROUNDING = 64 * torch.finfo(torch.float64).eps  # of a few operations, relative to their operands


@dataclass(frozen=True)
class AffineMap:
    """One affine map; see the module docstring for its meaning.

    Attributes:
        weight: ``[out, in / groups, *kernel]``, float64, lazy.
        bias: ``[out]``, float64.
        groups: number of contiguous blocks.
        stride: per spatial axis.
        origin: per spatial axis: tap ``t`` of output ``p`` reads ``stride * p + t - origin``.
        support: per spatial axis, the taps that may be non-zero (known without the numbers).
        reach: the largest bias on the way here: what rounding of the bias is relative to.
    """

    weight: Lazy
    bias: torch.Tensor
    groups: int
    stride: Ints
    origin: Ints
    support: tuple[frozenset[int], ...]
    reach: Lazy

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def kernel(self) -> Ints:
        return self.weight.shape[2:]

    @property
    def spatial(self) -> int:
        return len(self.stride)

    @property
    def is_pointwise(self) -> bool:
        """True if every output position reads the root at the same position only."""
        return all(k == 1 for k in self.kernel) and not any(self.origin) and set(self.stride) <= {1}

    @property
    def dilation(self) -> Ints:
        """Per axis, the step of the coarsest lattice that holds the support."""
        return tuple(math.gcd(*(t - min(taps) for t in taps)) or 1 for taps in self.support)

    @property
    def taps(self) -> Ints:
        """Per axis, the kernel size that an execution needs (trimmed, on its lattice)."""
        return tuple(
            (max(taps) - min(taps)) // step + 1
            for taps, step in zip(self.support, self.dilation, strict=True)
        )

    @property
    def is_diagonal(self) -> bool:
        """True for a per-channel scale and shift."""
        return self.is_pointwise and self.weight.shape[1] == 1 and self.out_channels == self.groups

    @property
    def has_bias(self) -> bool:
        return bool(self.bias.any())

    def bias_is(self, value: torch.Tensor | float) -> bool:
        """True if the bias equals ``value`` to the rounding of float64.

        A border that the network pads with its own bias cancels it in exact arithmetic. The model's
        own dtype is no measure: what it rounds away here may be a layer's whole output.
        """
        return bool(((self.bias - value).abs() <= ROUNDING * self.reach.evaluate()).all())


def identity(channels: int, spatial: int) -> AffineMap:
    """``y = x``."""
    return diagonal(
        torch.ones(channels, dtype=torch.float64),
        torch.zeros(channels, dtype=torch.float64),
        spatial,
    )


def diagonal(scale: torch.Tensor, shift: torch.Tensor, spatial: int) -> AffineMap:
    """``y = scale * x + shift`` per channel; ``scale`` and ``shift`` are float64 ``[C]``."""
    channels = scale.shape[0]
    weight = Lazy((channels, 1) + (1,) * spatial, lambda: scale.reshape(-1, 1, *(1,) * spatial))
    ones, zeros = (1,) * spatial, (0,) * spatial
    support = (frozenset((0,)),) * spatial
    return AffineMap(weight, shift, channels, ones, zeros, support, _largest(shift))


def convolution(
    weight: Lazy, bias: torch.Tensor, groups: int, stride: Ints, padding: Ints, dilation: Ints
) -> AffineMap:
    """A convolution with zero padding (``padding`` is the low side's)."""
    expanded = tuple(d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True))
    support = tuple(frozenset(range(0, k, d)) for d, k in zip(dilation, expanded, strict=True))
    if expanded != weight.shape[2:]:

        def dilate(w: torch.Tensor) -> torch.Tensor:
            out = w.new_zeros(*w.shape[:2], *expanded)
            out[(slice(None), slice(None), *(slice(None, None, d) for d in dilation))] = w
            return out

        weight = weight.map((*weight.shape[:2], *expanded), dilate)
    return AffineMap(weight, bias, groups, stride, padding, support, _largest(bias))


def transposed_convolution(
    weight: Lazy, bias: torch.Tensor, groups: int, stride: Ints, padding: Ints, dilation: Ints
) -> AffineMap:
    """A transposed convolution; ``weight`` is ``[in, out / groups, *kernel]``.

    One of stride 1 is a convolution with the kernel turned round, and comes as that.
    """
    base = convolution(swapped(weight, groups), bias, groups, stride, padding, dilation)
    if set(stride) != {1}:
        return base
    axes = tuple(range(2, 2 + base.spatial))
    last = tuple(k - 1 for k in base.kernel)
    return replace(
        base,
        weight=base.weight.map(base.weight.shape, lambda w: w.flip(axes)),
        origin=tuple(e - o for e, o in zip(last, base.origin, strict=True)),
        support=tuple(
            frozenset(e - t for t in taps) for e, taps in zip(last, base.support, strict=True)
        ),
    )


def swapped(weight: Lazy, groups: int) -> Lazy:
    """``[a, b / groups, *k]`` as ``[b, a / groups, *k]``: a weight in its transposed layout."""
    first, second, *kernel = weight.shape
    shape = (second * groups, first // groups, *kernel)
    return weight.map(shape, lambda w: w.unflatten(0, (groups, -1)).transpose(1, 2).reshape(shape))


def matrix(weight: Lazy, bias: torch.Tensor) -> AffineMap:
    """``y = x @ weight.T + bias`` over the last axis; ``weight`` is ``[out, in]``."""
    return AffineMap(weight, bias, 1, (), (), (), _largest(bias))


def average_pool(
    channels: int, kernel: Ints, stride: Ints, padding: Ints, divisor: int
) -> AffineMap:
    """An average pool whose divisor is the same everywhere."""
    weight = Lazy(
        (channels, 1, *kernel),
        lambda: torch.full((channels, 1, *kernel), 1.0 / divisor, dtype=torch.float64),
    )
    bias = torch.zeros(channels, dtype=torch.float64)
    support = tuple(frozenset(range(k)) for k in kernel)
    return AffineMap(weight, bias, channels, stride, padding, support, _largest(bias))


def window(channels: int, start: Ints, step: Ints) -> AffineMap:
    """``y[p] = x[start + step * p]`` per spatial axis (a crop; ``start < 0`` pads with zeros)."""
    base = identity(channels, len(start))
    return replace(base, stride=step, origin=tuple(-s for s in start))


def select(base: AffineMap, index: torch.Tensor) -> AffineMap:
    """Keeps the output channels ``index`` (int64), in that order."""
    count = int(index.numel())
    if (
        base.is_diagonal
        and count == base.out_channels
        and torch.equal(index, torch.arange(count, device=index.device))
    ):
        return base
    dense = regroup(base, 1)
    weight = dense.weight.map((count, *dense.weight.shape[1:]), lambda w: w[index])
    return replace(dense, weight=weight, bias=base.bias[index])


def scale(base: AffineMap, factor: float) -> AffineMap:
    """``factor * y``."""
    if factor == 1.0:
        return base
    weight = base.weight.times(torch.tensor(factor, dtype=torch.float64))
    reach = base.reach.map((), lambda t: t * abs(factor))
    return replace(base, weight=weight, bias=base.bias * factor, reach=reach)


def regroup(base: AffineMap, groups: int) -> AffineMap:
    """The same map written with fewer groups (``groups`` divides ``base.groups``)."""
    if groups == base.groups:
        return base
    assert base.groups % groups == 0, (base.groups, groups)
    ratio = base.groups // groups
    out, per_group, kernel = base.out_channels, base.weight.shape[1], base.kernel

    def embed(w: torch.Tensor) -> torch.Tensor:
        block = w.reshape(groups, ratio, out // base.groups, per_group, *kernel)
        full = w.new_zeros(groups, ratio, out // base.groups, ratio, per_group, *kernel)
        index = torch.arange(ratio, device=w.device)
        full[:, index, :, index] = block.transpose(0, 1)
        return full.reshape(out, ratio * per_group, *kernel)

    return replace(
        base, groups=groups, weight=base.weight.map((out, ratio * per_group, *kernel), embed)
    )


def aligned(maps: Sequence[AffineMap]) -> tuple[Ints, Ints]:
    """The common ``(kernel, origin)`` that holds every map of the sequence."""
    axes = range(maps[0].spatial)
    origin = tuple(max(m.origin[a] for m in maps) for a in axes)
    end = tuple(max(m.kernel[a] - m.origin[a] for m in maps) for a in axes)
    return tuple(o + e for o, e in zip(origin, end, strict=True)), origin


def embed(base: AffineMap, kernel: Ints, origin: Ints) -> AffineMap:
    """The same map with zero taps added around its kernel."""
    if kernel == base.kernel and origin == base.origin:
        return base
    low = tuple(o - b for o, b in zip(origin, base.origin, strict=True))
    shape = (*base.weight.shape[:2], *kernel)

    def place(w: torch.Tensor) -> torch.Tensor:
        out = w.new_zeros(shape)
        region = tuple(slice(a, a + k) for a, k in zip(low, base.kernel, strict=True))
        out[(slice(None), slice(None), *region)] = w
        return out

    support = tuple(
        frozenset(t + a for t in taps) for taps, a in zip(base.support, low, strict=True)
    )
    return replace(base, weight=base.weight.map(shape, place), origin=origin, support=support)


def add(maps: Sequence[AffineMap]) -> AffineMap:
    """The sum of maps over one root with equal strides and channel counts."""
    groups = math.gcd(*(m.groups for m in maps))
    kernel, origin = aligned(maps)
    shape = (maps[0].out_channels, maps[0].in_channels // groups, *kernel)

    def total() -> torch.Tensor:
        # Accumulating into a term saves a full tensor. One map may stand in the sum twice.
        rest = list(maps)
        start = next(
            (i for i, m in enumerate(rest) if m.weight.shape == shape and m.weight.fresh), None
        )
        if start is None:
            out = torch.zeros(shape, dtype=torch.float64)
        else:
            out = rest.pop(start).weight.get()
        for m in rest:
            low = (o - b for o, b in zip(origin, m.origin, strict=True))
            region = tuple(slice(a, a + k) for a, k in zip(low, m.kernel, strict=True))
            if m.weight.shape == shape:
                m.weight.add_to(out)
                continue
            target, w = out[(slice(None), slice(None), *region)], m.weight.get()
            if m.groups != groups:  # write the blocks of the finer map on their diagonal
                ratio = m.groups // groups
                target = target.unflatten(0, (groups, ratio, -1)).unflatten(3, (ratio, -1))
                target = target.diagonal(dim1=1, dim2=3)
                w = w.unflatten(0, (groups, ratio, -1)).movedim(1, -1)
            target += w
        return out

    bias = torch.stack([m.bias for m in maps]).sum(0)
    support = _union([embed(m, kernel, origin) for m in maps])
    weights = [m.weight for m in maps]
    last = all(w.channels_last for w in weights)  # else the sum has the layout of some other branch
    weight = Lazy(shape, total, fresh=True, parents=weights, channels_last=last)
    reach = _larger(*(m.reach for m in maps))
    return AffineMap(weight, bias, groups, maps[0].stride, origin, support, reach)


def concatenate(maps: Sequence[AffineMap]) -> AffineMap:
    """Maps over one root, their outputs side by side along the channels."""
    kernel, origin = aligned(maps)
    terms = [embed(regroup(m, 1), kernel, origin) for m in maps]
    shape = (sum(t.out_channels for t in terms), *terms[0].weight.shape[1:])
    parents = [t.weight for t in terms]
    weight = Lazy(
        shape,
        lambda: torch.cat([p.get() for p in parents]),
        parents=parents,
        channels_last=all(p.channels_last for p in parents),
    )
    bias = torch.cat([m.bias for m in maps])
    reach = _larger(*(m.reach for m in maps))
    return replace(terms[0], weight=weight, bias=bias, support=_union(terms), reach=reach)


def _union(terms: Sequence[AffineMap]) -> tuple[frozenset[int], ...]:
    return tuple(frozenset().union(*axis) for axis in zip(*(t.support for t in terms), strict=True))


def repeat_features(base: AffineMap, times: int) -> AffineMap:
    """The matrix over ``times`` rows laid side by side (row-major reshape ``[-1, times * F]``)."""
    shape = (base.out_channels * times, base.weight.shape[1])
    weight = base.weight.map(shape, lambda w: w.repeat(times, 1))
    return replace(base, weight=weight, bias=base.bias.repeat(times), groups=base.groups * times)


def as_matrix(base: AffineMap, size: Ints, result: Ints) -> AffineMap:
    """A convolution map over inputs of fixed extents as one matrix over the flattened tensor.

    Probes with an identity batch (Ding et al., RepMLP, 2021, section 3.3). ``size`` and ``result``
    are the spatial extents of the input and of the output.
    """
    inputs = base.in_channels * math.prod(size)
    outputs = base.out_channels * math.prod(result)
    pads: list[int] = []
    for axis in reversed(range(base.spatial)):
        last = base.stride[axis] * (result[axis] - 1) + base.kernel[axis] - base.origin[axis]
        pads += [base.origin[axis], last - size[axis]]
    conv = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[base.spatial]

    def probe() -> torch.Tensor:
        eye = torch.eye(inputs, dtype=torch.float64).reshape(inputs, base.in_channels, *size)
        padded = torch.nn.functional.pad(eye, pads)
        out = conv(padded, base.weight.get(), None, base.stride, 0, 1, base.groups)
        return out.reshape(inputs, outputs).t()

    bias = base.bias.repeat_interleave(math.prod(result))
    weight = Lazy((outputs, inputs), probe, parents=(base.weight,))
    return replace(matrix(weight, bias), reach=base.reach)


def compose(outer: AffineMap, inner: AffineMap) -> AffineMap:
    """``outer(inner(x))`` as one map, exact away from borders; see :func:`border_reason`."""
    stride = tuple(a * b for a, b in zip(outer.stride, inner.stride, strict=True))
    origin = tuple(
        i * oo + io for i, oo, io in zip(inner.stride, outer.origin, inner.origin, strict=True)
    )
    kernel = tuple(
        i * (ko - 1) + ki
        for i, ko, ki in zip(inner.stride, outer.kernel, inner.kernel, strict=True)
    )
    groups, product, per_group = _block_product(outer, inner)
    shape = (outer.out_channels, per_group, *kernel)

    bias, reach = outer.bias, outer.reach
    if inner.has_bias:
        moved = apply_taps(outer, inner.bias)
        bias, reach = bias + moved, _larger(reach, _largest(moved))
    if outer.is_diagonal:
        rows = outer.weight.get().reshape(-1, *(1,) * (len(inner.weight.shape) - 1))
        return replace(inner, weight=inner.weight.times(rows), bias=bias, reach=reach)

    def compute() -> torch.Tensor:
        w_out, w_in = outer.weight.get(), inner.weight.get()
        if all(k == 1 for k in outer.kernel):
            return product(w_out.reshape(w_out.shape[:2]), w_in).reshape(shape)
        out = w_out.new_zeros(shape)
        for tap in _taps(outer.kernel):
            at: tuple[Any, ...] = (slice(None), slice(None), *tap)
            part = w_out[at]
            if not part.any():
                continue
            region = tuple(
                slice(s * t, s * t + k)
                for s, t, k in zip(inner.stride, tap, inner.kernel, strict=True)
            )
            out[(slice(None), slice(None), *region)] += product(part, w_in)
        return out

    support = tuple(
        frozenset(s * a + b for a in so for b in si)
        for s, so, si in zip(inner.stride, outer.support, inner.support, strict=True)
    )
    weight = Lazy(shape, compute, fresh=True, parents=(outer.weight, inner.weight))
    if not kernel and outer.groups == inner.groups == 1:
        weight = Lazy.product(outer.weight, inner.weight)
    return AffineMap(weight, bias, groups, stride, origin, support, reach)


def compose_transposed(outer: AffineMap, inner: AffineMap) -> AffineMap:
    """Two transposed convolutions one after another, where the inner one has no bias and no crop.

    The transpose of a product is the product of the transposes in reverse order:
    ``(A B)^T = B^T A^T``, where ``A`` and ``B`` are strided convolutions.
    """
    reverse = compose(_transpose(inner), _transpose(outer))
    return replace(_transpose(reverse), bias=outer.bias, reach=outer.reach)


def _transpose(base: AffineMap) -> AffineMap:
    """The same taps from outputs to inputs, without the bias."""
    weight = swapped(base.weight, base.groups)
    return replace(base, weight=weight, bias=torch.zeros(weight.shape[0], dtype=torch.float64))


def _largest(vector: torch.Tensor) -> Lazy:
    return Lazy((), lambda: vector.abs().max() if vector.numel() else vector.new_zeros(()))


def _larger(*reaches: Lazy) -> Lazy:
    return Lazy((), lambda: torch.stack([r.get() for r in reaches]).max(), parents=reaches)


def apply_taps(outer: AffineMap, vector: torch.Tensor) -> torch.Tensor:
    """``sum_{i, t} weight[o, i, t] * vector[i]``: what a constant input adds to each output."""
    w = outer.weight.get()
    w = w.reshape(*w.shape[:2], -1).sum(-1)
    grouped = w.reshape(outer.groups, -1, w.shape[1])
    return torch.einsum("goi,gi->go", grouped, vector.reshape(outer.groups, -1)).reshape(-1)


def _taps(kernel: Ints) -> list[Ints]:
    grid = torch.cartesian_prod(*(torch.arange(k) for k in kernel)).reshape(-1, len(kernel))
    return [tuple(row) for row in grid.tolist()]


Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _block_product(outer: AffineMap, inner: AffineMap) -> tuple[int, Product, int]:
    """The product of two block-diagonal channel maps: groups, a function, inputs per group.

    The function takes ``outer[o, m / g_o]`` (one tap) and ``inner[m, i / g_i, *kernel]``.
    """
    middle = inner.out_channels
    g_out, g_in = outer.groups, inner.groups
    out, in_per, middle_per = outer.out_channels, inner.weight.shape[1], outer.weight.shape[1]

    if inner.groups == middle and in_per == 1:

        def scale_columns(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            columns = b.reshape(g_out, 1, middle_per, *b.shape[2:])
            rows = a.reshape(g_out, out // g_out, middle_per, *(1,) * (b.dim() - 2))
            return (rows * columns).reshape(out, middle_per, *b.shape[2:])

        return g_out, scale_columns, middle_per

    if outer.groups == middle and out == middle:

        def scale_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a.reshape(-1, *(1,) * (b.dim() - 1)) * b

        return g_in, scale_rows, in_per

    groups = math.gcd(g_out, g_in)
    if g_out == groups or g_in == groups:
        extra_out, extra_in = g_out // groups, g_in // groups

        def grouped(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            taps = b.shape[2:]
            if extra_in > 1:  # outer dense over the finer blocks of inner
                a_ = a.reshape(groups, out // groups, extra_in, -1)
                b_ = b.reshape(groups, extra_in, a_.shape[3], -1)
                full = torch.einsum("gonm,gnmx->gonx", a_, b_)
            else:
                a_ = a.reshape(groups, extra_out, -1, middle_per)
                b_ = b.reshape(groups, extra_out, middle_per, -1)
                full = torch.einsum("gnom,gnmx->gnox", a_, b_)
            return full.reshape(out, extra_in * in_per, *taps)

        return groups, grouped, extra_in * in_per

    def dense(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        o = replace(outer, weight=Lazy.of(a), stride=(), origin=(), support=())
        i = regroup(inner, groups).weight.shape[1]
        a_ = regroup(o, groups).weight.get().reshape(groups, out // groups, -1)
        b_ = regroup(replace(inner, weight=Lazy.of(b)), groups).weight.get()
        full = torch.einsum("gom,gmx->gox", a_, b_.reshape(groups, a_.shape[2], -1))
        return full.reshape(out, i, *b.shape[2:])

    return groups, dense, inner.in_channels // groups


@dataclass(frozen=True)
class Execution:
    """How a convolution executes a map: lazy weight on its lattice, low padding, dilation."""

    weight: Lazy
    padding: Ints
    dilation: Ints


def executions(base: AffineMap, reach: int = 3) -> Iterator[Execution]:
    """Spellings of a map as one symmetrically padded convolution, smallest kernel first.

    The trimmed kernel on its lattice comes first; the others add zero taps, for where the output's
    extent needs another padding (crops, asymmetric pads). Which one gives the exact extent depends
    on sizes, so the caller chooses.
    """
    if (tight := trimmed(base)) is not None:
        yield tight
    origin = _first_tap(base)
    ones = (1,) * base.spatial
    padded = (
        _execution(base, tuple(max(o, 0) + extra for o in origin), (tail,) * base.spatial, ones)
        for extra in range(reach + 1)
        for tail in range(reach + 1)
    )
    yield from sorted(padded, key=lambda e: e.weight.numel())


def trimmed(base: AffineMap) -> Execution | None:
    """The kernel without its zero taps, on its lattice; ``None`` where it starts inside."""
    origin = _first_tap(base)
    if any(o < 0 for o in origin):
        return None
    return _execution(base, origin, (0,) * base.spatial, base.dilation)


def _first_tap(base: AffineMap) -> Ints:
    """How far in front of its output each axis of the kernel starts to read."""
    return tuple(o - min(taps) for o, taps in zip(base.origin, base.support, strict=True))


def _execution(base: AffineMap, padding: Ints, tail: Ints, dilation: Ints) -> Execution:
    low = tuple(min(taps) for taps in base.support)
    high = tuple(max(taps) for taps in base.support)
    before = tuple(p - (o - a) for p, o, a in zip(padding, base.origin, low, strict=True))
    span = tuple(b + (h - a) + 1 + t for b, h, a, t in zip(before, high, low, tail, strict=True))
    kernel = tuple((s - 1) // d + 1 for s, d in zip(span, dilation, strict=True))

    def place(w: torch.Tensor) -> torch.Tensor:
        full = w.new_zeros(*w.shape[:2], *span)
        take = tuple(slice(a, h + 1) for a, h in zip(low, high, strict=True))
        put = tuple(slice(b, b + h - a + 1) for b, h, a in zip(before, high, low, strict=True))
        every = (slice(None), slice(None))
        full[(*every, *put)] = w[(*every, *take)]
        return full[(*every, *(slice(None, None, d) for d in dilation))]

    shape = (*base.weight.shape[:2], *kernel)
    if shape == base.weight.shape and before == low:  # nothing to trim or to add
        return Execution(base.weight, padding, dilation)
    return Execution(base.weight.map(shape, place), padding, dilation)
