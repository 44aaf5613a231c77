"""Branches and sequences of transposed convolutions are one, where their grids agree."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from refold.graph import printer
from refold.passes import PIPELINES
from refold.passes.branches.fold_branches import FoldBranches
from refold.rewrite.context import Context
from tests import golden
from tests.examples import examples, few
from tests.folding import Net, image, left, run
from tests.tracing import trace

BRANCHES = FoldBranches()
PRODUCTS = ("conv", "conv-transpose", "batch-norm", "add")


def up(i: int = 4, o: int = 6, k: int = 4, s: int = 2, p: int = 1, **options):
    return nn.ConvTranspose2d(i, o, k, s, p, **options)


def conv(i: int = 4, o: int = 6, k: int = 1, **options) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, **options)


def test_golden() -> None:
    net = Net(lambda s, x: s.a(x) + s.b(x), a=up(), b=up(k=3, output_padding=1))
    before = printer.render(trace(net, image(), dynamic=True))
    after, _ = run(BRANCHES, net, image())
    golden.check("transposed_branches", f"{before}\n---\n{printer.render(after)}")


@pytest.mark.parametrize(
    ("forward", "parts", "calls"),
    few([
        (lambda s, x: s.a(x) + s.b(x), {"a": up(), "b": up(k=2, p=0)}, {"conv-transpose": 1}),
        (lambda s, x: s.a(x) - s.b(x), {"a": up(), "b": up(k=3, output_padding=1)},
         {"conv-transpose": 1}),
        (lambda s, x: s.a(x) + s.b(x), {"a": up(k=6, p=2, bias=False), "b": up(k=2, p=0)},
         {"conv-transpose": 1}),
        (lambda s, x: s.a(x) + s.b(x), {"a": up(groups=2), "b": up(k=4, groups=1)},
         {"conv-transpose": 1}),
        (lambda s, x: s.a(x) + s.b(x), {"a": up(groups=2), "b": up(k=2, p=0, groups=2)},
         {"conv-transpose": 1}),
        (lambda s, x: s.a(x) + s.b(x), {"a": up(k=3, p=0), "b": up(k=2, p=0, output_padding=1)},
         {"conv-transpose": 1}),
        (lambda s, x: s.a(x) + s.b(x), {"a": up(k=3, p=0), "b": up(k=5, p=1)},
         {"conv-transpose": 1}),
        (lambda s, x: s.a(x) + s.b(x), {"a": up(k=2, p=1, dilation=3), "b": up()},
         {"conv-transpose": 1}),
        (lambda s, x: s.a(x) + s.b(x), {"a": up(s=(2, 1), k=(4, 3)), "b": up(s=(2, 1), k=(2, 1),
         p=0)}, {"conv-transpose": 1}),
        (lambda s, x: s.a(x) * 2 + (s.b(x) - s.c(x)),
         {"a": up(), "b": up(k=2, p=0), "c": up(k=2, p=0)}, {"conv-transpose": 1}),
        (lambda s, x: s.a(x) + s.b(x) + F.interpolate(s.c(x.relu()), scale_factor=2),
         {"a": up(), "b": up(k=2, p=0), "c": conv()},
         {"conv-transpose": 1, "relu": 1, "conv": 1, "upsample-nearest2d": 1, "add": 1}),
        # pointwise layers around them
        (lambda s, x: s.c(s.a(x)), {"a": up(), "c": conv(6, 5)}, {"conv-transpose": 1}),
        (lambda s, x: s.c(s.a(x)) + s.b(x), {"a": up(), "b": up(o=5), "c": conv(6, 5)},
         {"conv-transpose": 1}),
        (lambda s, x: s.a(s.c(x)), {"a": up(3), "c": conv(4, 3, bias=False)},
         {"conv-transpose": 1}),
        (lambda s, x: s.a(s.c(x)), {"a": up(4, groups=2), "c": conv(4, 4, groups=2, bias=False)},
         {"conv-transpose": 1}),
        (lambda s, x: s.a(s.c(x) - s.c.bias.view(1, -1, 1, 1)), {"a": up(3), "c": conv(4, 3)},
         {"conv-transpose": 1}),
        (lambda s, x: s.n(s.a(x)) + s.b(x), {"a": up(), "b": up(), "n": nn.BatchNorm2d(6)},
         {"conv-transpose": 1}),
        (lambda s, x: s.a(x)[..., :-1, :] + s.b(x), {"a": up(), "b": up(k=(3, 2), p=(1, 0))},
         {"conv-transpose": 1}),
        # a stride of one is a convolution
        (lambda s, x: s.a(x) + s.c(x), {"a": up(s=1, k=3), "c": conv(k=3, padding=1)},
         {"conv": 1}),
        (lambda s, x: s.a(x) + x, {"a": up(4, 4, s=1, k=3, groups=2)}, {"conv": 1}),
        (lambda s, x: s.c(s.a(x)), {"a": up(s=1, k=3, p=2), "c": conv(6, 5, k=3)}, {"conv": 1}),
        (lambda s, x: s.a(x) + s.b(x), {"a": up(s=1, k=3, p=0), "b": up(s=1, k=2, p=0,
         dilation=2)}, {"conv": 1}),
    ], 11),
)  # fmt: skip
def test_merges(forward, parts, calls) -> None:
    gm, _ = run(BRANCHES, Net(forward, **parts), image())
    assert left(gm) == calls


@pytest.mark.parametrize(
    ("forward", "parts", "reason"),
    few([
        (lambda s, x: s.a(x)[..., :9, :9] + s.b(x)[..., :9, :9], {"a": up(), "b": up(s=3)},
         "share no grid"),
        (lambda s, x: s.a(x) + s.b(x.relu()), {"a": up(), "b": up()}, ""),
        (lambda s, x: s.a(s.c(x)), {"a": up(3), "c": conv(4, 3)}, "differ in number"),
        (lambda s, x: s.a(s.c(x)), {"a": up(3, k=2, p=0), "c": conv(4, 3)},
         "side by side meet different kernel taps"),
        (lambda s, x: s.a(s.n(x)), {"a": up(), "n": nn.BatchNorm2d(4)}, "differ in number"),
        (lambda s, x: s.c(s.a(x)), {"a": up(), "c": conv(6, 5, k=3)}, ""),
        (lambda s, x: s.c(s.a(x)), {"a": up(), "c": conv(6, 5, stride=2)}, ""),
        (lambda s, x: s.c(s.a(x)), {"a": up(), "c": conv(6, 5, padding=1)}, ""),
        (lambda s, x: s.c(s.a(x)), {"a": up(), "c": conv(6, 5, k=3, padding=1)}, ""),
        (lambda s, x: s.a(s.c(x)), {"a": up(), "c": conv(4, 4, k=3, padding=1, bias=False)}, ""),
        (lambda s, x: s.a(s.c(x)[..., :-1, :-1]), {"a": up(), "c": conv(4, 4, bias=False)}, ""),
        (lambda s, x: s.a(s.c(x)[..., 1:, 1:]), {"a": up(), "c": conv(4, 4, bias=False)}, ""),
        (lambda s, x: s.a(F.pad(s.c(x), (0, 1))), {"a": up(), "c": conv(4, 4, bias=False)}, ""),
        (lambda s, x: s.c(s.a(x).relu()), {"a": up(), "c": conv(6, 5)}, ""),
        (lambda s, x: F.pad(s.a(x), (1, 1)) + s.b(x),
         {"a": up(), "b": up(k=(4, 6))}, ""),
        (lambda s, x: (lambda y: (s.c(y), y.relu()))(s.a(x)), {"a": up(), "c": conv(6, 5)}, ""),
        (lambda s, x: s.b(s.a(x)), {"a": up(), "b": up(6, 5)}, ""),
        (lambda s, x: s.a(x), {"a": up(s=1, k=3)}, ""),
        # a stride of one: the borders of a convolution
        (lambda s, x: s.c(s.a(x)), {"a": up(s=1, k=3), "c": conv(6, 5, k=3, padding=1)},
         "pads with zeros"),
        (lambda s, x: s.a(s.c(x)), {"a": up(s=1, k=3), "c": conv(4, 4)}, "pads with zeros"),
    ], 10),
)  # fmt: skip
def test_stays(forward, parts, reason) -> None:
    net = Net(forward, **parts)
    before = left(trace(net, image(), dynamic=True))
    for prefer in ("cost", "nodes"):  # whatever it costs
        gm, declined = run(FoldBranches(prefer=prefer), net, image())
        after = left(gm)
        assert {k: after.get(k) for k in PRODUCTS} == {k: before.get(k) for k in PRODUCTS}
        assert not reason or any(re.search(reason, d.reason) for d in declined), declined


def test_what_multiplies_more_stays() -> None:
    """A narrow middle: two cheap layers are not one dear one."""
    net = Net(lambda s, x: s.c(s.a(x)), a=up(64, 2), c=conv(2, 64))
    gm, declined = run(BRANCHES, net, image(64, 24, 24))
    assert left(gm) == {"conv-transpose": 1, "conv": 1}
    assert any("cost table" in d.reason for d in declined)


def test_excluded_layers_stay() -> None:
    with torch.no_grad():
        gm = trace(Net(lambda s, x: s.a(x) + s.b(x), a=up(), b=up()), image())
        PIPELINES["default"].run(gm, Context(exclude=("b",)))
        assert left(gm) == {"conv-transpose": 2, "add": 1}


def test_any_height_and_width() -> None:
    from refold.frontends.export import trace as trace_program

    net = Net(lambda s, x: s.a(x) + s.b(x), a=up(), b=up(k=3, output_padding=1))
    dynamic = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        gm = trace_program(
            net, (image(),), {}, dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
        ).graph_module
        BRANCHES.run(gm)
        assert left(gm) == {"conv-transpose": 1}
        for size in ((1, 4, 5, 9), (3, 4, 8, 3)):
            x = torch.randn(size, dtype=torch.float64)
            torch.testing.assert_close(gm(x), net(x), rtol=0, atol=1e-12)


@st.composite
def layers(draw: st.DrawFn):
    dims, stride = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    made = []
    for _ in range(2):
        kernel, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 2))
        padding = draw(st.integers(0, 2))
        extra = draw(st.integers(0, max(stride, dilation) - 1))
        groups, bias = draw(st.sampled_from((1, 2, 4))), draw(st.booleans())
        made.append((kernel, stride, padding, extra, groups, bias, dilation))
    return dims, made, draw(st.booleans())


@given(layers())
@examples(30)
def test_any_two_branches(drawn) -> None:
    dims, made, pointwise = drawn
    a, b = (getattr(nn, f"ConvTranspose{dims}d")(4, 8, *options) for options in made)
    size = (9, 8, 7)[:dims]
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    c = getattr(nn, f"Conv{dims}d")(8, 8, 1)

    def forward(s, x):
        y, z = s.a(x), s.b(x)
        crop = tuple(slice(0, min(m, n)) for m, n in zip(y.shape[2:], z.shape[2:], strict=True))
        y, z = y[(..., *crop)], z[(..., *crop)]
        return torch.add(s.c(y) if pointwise else y, z, alpha=-0.5)

    run(BRANCHES, Net(forward, a=a, b=b, c=c), x)  # checks the numbers, whatever merged


@pytest.mark.parametrize(
    ("first", "then"),
    few([
        (up(k=2, p=0, bias=False), up(6, k=2, p=0)),
        (up(k=3, p=0, bias=False), up(6, k=4)),
        (up(k=2, s=3, p=0, bias=False), up(6, k=3, p=0, output_padding=1)),
        (up(o=8, k=2, p=0, bias=False, groups=2), up(8, k=2, p=0, groups=2)),
        (up(o=8, k=2, p=0, bias=False, groups=2), up(8, 8, k=2, p=0, groups=4)),
        (up(k=2, p=0, bias=False, dilation=2), up(6, k=2, p=0, dilation=3)),
        (up(k=(2, 3), s=(2, 1), p=0, bias=False), up(6, k=(4, 1), s=(2, 3), p=(1, 0))),
    ], 4),
)  # fmt: skip
def test_two_in_sequence_are_one(first, then) -> None:
    net = Net(lambda s, x: s.b(s.a(x)), a=first, b=then)
    after, _ = run(FoldBranches(prefer="nodes"), net, image())
    assert left(after) == {"conv-transpose": 1}


def test_three_in_sequence_are_one() -> None:
    net = Net(
        lambda s, x: s.c(s.b(s.a(x))),
        a=up(o=4, k=2, p=0, bias=False), b=up(o=4, k=2, p=0, bias=False), c=up(k=2, p=0),
    )  # fmt: skip
    after, _ = run(BRANCHES, net, image())
    assert left(after) == {"conv-transpose": 1}


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (up(k=4, p=1, bias=False), ""),  # crops what the second would read
        (up(k=3, s=3, p=1, bias=False, output_padding=2), ""),  # likewise, of the same size
        (up(k=2, p=0), "side by side meet different kernel taps, so the bias of conv_transpose2d"),
        (up(k=3, p=0, bias=False, output_padding=1), ""),  # zeros that the one has not
    ],
)
def test_other_sequences_stay(first, reason) -> None:
    net = Net(lambda s, x: s.b(s.a(x)), a=first, b=up(6, k=2, p=0))
    after, declined = run(FoldBranches(prefer="nodes"), net, image())
    assert left(after) == {"conv-transpose": 2}
    assert not reason or any(reason in d.reason for d in declined)
