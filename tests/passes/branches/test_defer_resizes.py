from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from refold.graph import printer
from refold.passes import PIPELINES
from refold.passes.branches.defer_resizes import DeferResizes
from refold.rewrite.context import Context
from tests import golden
from tests.examples import examples, few
from tests.folding import Net, image, left, run
from tests.tracing import trace

DEFER = DeferResizes()
UP = {"scale_factor": 2, "mode": "bilinear", "align_corners": False}
BIG = 20  # of 20 x 20 pixels a product costs more than its launch


def net(forward, **parts) -> Net:
    return Net(lambda s, x: F.relu(forward(s, torch.tanh(x))), **parts)


def head(inputs: int = 128, outputs: int = 16, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, **options)


def big(channels: int = 64) -> torch.Tensor:
    return image(channels, BIG, BIG)


def test_golden() -> None:
    model = net(
        lambda s, x: s.f(torch.cat([F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2), up(x)], 1)), f=head()
    )
    before = printer.render(trace(model, big(), dynamic=True))
    after, _ = run(DEFER, model, big())
    golden.check("defer_resizes", f"{before}\n---\n{printer.render(after)}")


def up(x: torch.Tensor, **options) -> torch.Tensor:
    return F.interpolate(x, **{**UP, **options})


@pytest.mark.parametrize(
    ("forward", "calls"),
    [
        (lambda s, x: s.f(torch.cat([up(x), up(x.exp())], 1)), {"conv": 1}),
        (lambda s, x: s.f(torch.cat([up(x), up(x, mode="bicubic")], 1)), {"conv": 2, "add": 1}),
        (lambda s, x: s.one(up(x)), {"conv": 1}),
        (lambda s, x: s.groups(up(x)), {"conv": 1}),
        (
            lambda s, x: s.f(torch.cat([x, up(F.adaptive_avg_pool2d(x, 5), scale_factor=4)], 1)),
            {"conv": 2, "add": 1, "avg-pool": 1},
        ),
    ],
)
def test_products_go_below_resizes(forward, calls) -> None:
    model = net(forward, f=head(), one=head(64), groups=head(64, groups=4))
    after, _ = run(DEFER, model, big())
    found = {k: n for k, n in left(after).items() if k in ("conv", "add", "cat", "avg-pool")}
    assert found == calls
    for conv in after.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default):
        assert "upsample" not in conv.args[0].name


def test_a_tensor_of_one_pixel_is_added_by_broadcasting() -> None:
    def forward(s, x):
        pooled = F.adaptive_avg_pool2d(x, 1).relu()
        return s.f(torch.cat([up(pooled, size=x.shape[-2:], scale_factor=None), x], 1))

    after, _ = run(DEFER, net(forward, f=head()), big())
    assert left(after) == {"tanh": 1, "avg-pool": 1, "relu": 2, "conv": 2, "add": 1}


def test_one_pixel_alone_keeps_its_resize() -> None:
    def forward(s, x):
        return s.f(up(F.adaptive_avg_pool2d(x, 1).relu(), size=(20, 20), scale_factor=None))

    after, _ = run(DEFER, net(forward, f=head(64)), big())
    assert left(after)["upsample-bilinear2d"] == 1


@pytest.mark.parametrize(
    ("forward", "resizes"),
    [
        (lambda s, x: up(s.a(x)) + up(s.b(x)), 1),
        (lambda s, x: torch.sub(up(s.a(x)), up(s.b(x)), alpha=3), 1),
        (lambda s, x: up(x.exp()) + up(x.sin()) - up(x.cos()), 1),
        (lambda s, x: up(x) + up(x.exp(), mode="bicubic"), 2),
        (lambda s, x: up(x) + up(x.exp(), align_corners=True), 2),
        (lambda s, x: up(x) + F.interpolate(x[:, :, ::2].exp(), size=(12, 10), mode="bilinear"), 2),
        (lambda s, x: up(x) + up(x[:, :1].exp()), 2),
        (lambda s, x: up(x) * up(x.exp()), 2),
        (lambda s, x: (lambda y: y + up(x.exp()) + y.relu())(up(x)), 2),
        (lambda s, x: up(x, scale_factor=0.5) + up(x.exp(), scale_factor=0.5), 2),
    ],
)
def test_sums_go_below_resizes(forward, resizes) -> None:
    model = net(forward, a=nn.Conv2d(4, 4, 3, padding=1), b=head(4, 4))
    after, _ = run(DEFER, model, image(4, 6, 5))
    found = left(after)
    assert sum(n for kind, n in found.items() if "upsample" in kind) == resizes


def test_joined_sums_of_convolutions_merge() -> None:
    model = net(lambda s, x: up(s.a(x)) + up(s.b(x)), a=nn.Conv2d(4, 4, 3, padding=1), b=head(4, 4))
    after, _ = run(PIPELINES["default"].passes, model, image(4, 6, 5))
    assert left(after)["conv"] == 1


@st.composite
def pyramids(draw: st.DrawFn):
    spatial = draw(st.sampled_from((1, 2, 3)))
    modes = {
        1: ("nearest", "nearest-exact", "linear"),
        2: ("nearest", "nearest-exact", "bilinear", "bicubic", "antialias"),
        3: ("nearest", "nearest-exact", "trilinear"),
    }[spatial]
    part = st.tuples(st.sampled_from(modes), st.integers(1, 4), st.booleans(), st.integers(0, 3))
    parts = draw(st.lists(part, min_size=1, max_size=4))
    sizes = draw(st.lists(st.integers(2, 9), min_size=spatial, max_size=spatial))
    return spatial, parts, sizes, draw(st.booleans())


@given(pyramids())
@examples(25)
def test_any_pyramid(drawn) -> None:
    spatial, parts, sizes, bias = drawn
    pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[spatial]
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[spatial]

    def resized(x: torch.Tensor, mode: str, align: bool) -> torch.Tensor:
        options = {"align_corners": align} if "nearest" not in mode else {}
        if mode == "antialias":
            return F.interpolate(x, sizes, mode="bilinear", antialias=True, **options)
        return F.interpolate(x, sizes, mode=mode, **options)

    def forward(s, x):
        pieces = []
        for mode, extent, align, plain in parts:
            piece = pool(x, [extent + a for a in range(spatial)]).tanh()
            pieces.append(resized(piece, mode, align) if plain else pool(x, sizes).exp())
        return s.f(torch.cat(pieces, 1))

    channels = 48
    model = Net(forward, f=conv(channels * len(parts), 5, 1, bias=bias))
    x = torch.randn(2, channels, *(4 + a for a in range(spatial)), dtype=torch.float64)
    run(DEFER, model, x)


@pytest.mark.parametrize(
    ("reason", "forward"),
    few(
        [
            (None, lambda s, x: s.three(up(x))),
            (None, lambda s, x: s.strided(up(x))),
            (None, lambda s, x: s.padded(up(x))),
            (None, lambda s, x: s.f(torch.cat([up(x).relu(), up(x).exp()], 1))),
            (None, lambda s, x: s.groups2(torch.cat([up(x), up(x.exp())], 1))),
            (None, lambda s, x: s.back(up(x))),
            (None, lambda s, x: s.tall(torch.cat([up(x), up(x.exp())], 2))),
            ("cost", lambda s, x: s.wide(up(x[:, :2]))),
            ("cost", lambda s, x: (lambda y: s.one(y) + y.sum())(up(x, scale_factor=1.1))),
        ],
        5,
    ),
)
def test_others_stay(reason, forward) -> None:
    model = net(
        forward, f=head(), three=nn.Conv2d(64, 4, 3, padding=1), one=head(64),
        strided=nn.Conv2d(64, 4, 1, stride=2), padded=nn.Conv2d(64, 4, 1, padding=1),
        groups2=head(128, groups=2), back=nn.ConvTranspose2d(64, 4, 1), wide=head(2, 64),
        tall=head(64),
    )  # fmt: skip
    before = left(trace(model, big()))
    after, declined = run(DEFER, model, big())
    assert left(after) == before
    assert [d.reason for d in declined if reason and reason in d.reason] or reason is None
    for conv in after.graph.nodes:
        if conv.op == "call_function" and "conv" in conv.name:
            assert "folded" not in str(conv.args[1]), "it was rewritten"


def test_sums_in_float16_stay_and_single_products_do_not() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = head(), head(64)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.f(
                torch.cat([up(x), up(x.tanh(), mode="nearest", align_corners=None)], 1)
            ), self.g(up(x.sin())) + (up(x[:, :1].cos()) + up(x[:, 1:2].exp()))

    with torch.no_grad():
        gm = trace(Halves().half(), torch.randn(2, 64, BIG, BIG).half())
        result = DEFER.run(gm)
    assert len(result.applied) == 1
    assert "float16" in result.declined[0].reason


def test_excluded_resizes_stay() -> None:
    class Up(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return up(x)

    model = net(lambda s, x: s.f(s.up(x)), f=head(64), up=Up())
    with torch.no_grad():
        gm = trace(model, big())
        PIPELINES["default"].run(gm, Context(exclude=("up",)))
    (resize,) = gm.graph.find_nodes(
        op="call_function", target=torch.ops.aten.upsample_bilinear2d.vec
    )
    assert "tanh" in resize.args[0].name


def test_the_product_merges_with_what_makes_the_part() -> None:
    model = net(
        lambda s, x: s.f(torch.cat([up(s.a(x)), F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2)], 1)),
        f=head(), a=head(64, 64),
    )  # fmt: skip
    after, _ = run(PIPELINES["default"].passes, model, big())
    assert left(after)["conv"] == 2
