from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from refold.graph import printer
from refold.passes.batch_norm.fold_batch_norm import FoldBatchNorm
from refold.passes.scale_shift.absorb_scale_shift import AbsorbScaleShift
from tests import golden
from tests.examples import examples, few
from tests.folding import Net, image, left, run
from tests.tracing import trace


def conv(i: int = 4, o: int = 4, k: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, **options)


def mixed(*shape: int) -> torch.Tensor:
    t = torch.randn(*shape)
    t.view(-1)[0] = -abs(t.view(-1)[0]) - 0.1
    return t


def positive(*shape: int) -> torch.Tensor:
    return torch.rand(*shape) + 0.5


def test_golden() -> None:
    net = Net(
        lambda s, x: F.relu(s.l(x) * s.g + s.h), l=nn.Linear(4, 5), g=mixed(5), h=mixed(5)
    )  # fmt: skip
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    before = printer.render(trace(net, x, dynamic=True))
    after, _ = run(AbsorbScaleShift(), net, x)
    golden.check("absorb_scale_shift", f"{before}\n---\n{printer.render(after)}")


SPELLINGS = {
    "g*x": lambda g, x: g * x,
    "x*g": lambda g, x: x * g,
    "x/g": lambda g, x: x / g,
    "x+h": lambda g, x: x + g,
    "h+x": lambda g, x: g + x,
    "x-h": lambda g, x: x - g,
    "h-x": lambda g, x: g - x,
    "-x": lambda g, x: -x,
    "x*2": lambda g, x: x * 2.0,
    "1-x": lambda g, x: 1.0 - x,
    "x/4": lambda g, x: x / 4,
    "add alpha": lambda g, x: torch.add(x, g, alpha=-3),
    "add alpha constant first": lambda g, x: torch.add(g, x, alpha=-3),
    "sub alpha": lambda g, x: torch.sub(x, g, alpha=2),
    "rsub": lambda g, x: torch.rsub(x, g),
    "addcmul": lambda g, x: torch.addcmul(g, x, g, value=0.5),
    "addcmul constants": lambda g, x: torch.addcmul(x, g, g, value=0.5),
}


@given(
    names=st.lists(st.sampled_from(sorted(SPELLINGS)), min_size=1, max_size=4),
    shape=st.sampled_from(((4, 1, 1), (1, 4, 1, 1), (1,), ())),
    bias=st.booleans(),
)
@examples(50)
def test_every_spelling_in_any_chain(names, shape, bias) -> None:
    def forward(s, x):
        y = s.c(x)
        for name in names:
            y = SPELLINGS[name](s.g, y)
        return y

    # Like folding.EXACT, but negative scales must survive too: the constant has a negative entry.
    net = Net(forward, c=conv(bias=bias), g=mixed(*shape) if shape else torch.tensor(-0.7))
    gm, _ = run(AbsorbScaleShift(), net, image())
    if "addcmul" in names and not shape:
        return  # a 0-dimensional constant as addcmul's base is read as a number
    assert left(gm) == {"conv": 1}, (names, gm.graph)


@pytest.mark.parametrize(
    ("forward", "parts"),
    few(
        [
            (lambda s, x: F.relu(s.c(x)) * s.g, {"c": conv(), "g": positive(4, 1, 1)}),
            (lambda s, x: F.leaky_relu(s.c(x), 0.2) * s.g, {"c": conv(), "g": positive(4, 1, 1)}),
            (
                lambda s, x: F.max_pool2d(s.c(x), 2) * s.g + s.g,
                {"c": conv(), "g": positive(4, 1, 1)},
            ),
            (lambda s, x: s.c(x).mean((2, 3)) * s.g, {"c": conv(), "g": mixed(4)}),
            (lambda s, x: s.c(x).permute(0, 2, 3, 1) * s.g, {"c": conv(), "g": mixed(4)}),
            (
                lambda s, x: s.c(x).flatten(2).transpose(1, 2) * s.g + s.g,
                {"c": conv(), "g": mixed(4)},
            ),
            (lambda s, x: s.n(x) * s.g + s.h, {"n": nn.LayerNorm(6), "g": mixed(6), "h": mixed(6)}),
            (lambda s, x: s.n(x) * s.g, {"n": nn.RMSNorm(6), "g": mixed(6)}),
            (lambda s, x: s.n(x) * s.g + s.g, {"n": nn.GroupNorm(2, 4), "g": mixed(4, 1, 1)}),
            (
                lambda s, x: s.n(x) * s.g + s.g,
                {"n": nn.LayerNorm(6, elementwise_affine=False), "g": mixed(6)},
            ),
            (
                lambda s, x: s.c(x) + s.d(x).tanh() * s.g,
                {"c": conv(), "d": conv(), "g": mixed(4, 1, 1)},
            ),
            (
                lambda s, x: torch.cat([s.c(x), s.d(x)], 1) * s.g,
                {"c": conv(), "d": conv(), "g": mixed(8, 1, 1)},
            ),
            (
                lambda s, x: (s.c(x) - s.d(x)) * s.g + s.h,
                {"c": conv(), "d": conv(), "g": mixed(4, 1, 1), "h": mixed(4, 1, 1)},
            ),
            (lambda s, x: torch.sigmoid(s.c(x).chunk(2, 1)[1] * 3.0), {"c": conv()}),
        ],
        7,
    ),
)
def test_absorbs(forward, parts) -> None:
    net = Net(forward, **parts)
    gm, _ = run(AbsorbScaleShift(), net, image())
    found = left(gm)
    lone = "tanh" in found
    assert {k: v for k, v in found.items() if k in ("mul", "div", "add")} == (
        {"mul": 1, "add": 1} if lone else {}
    )


def test_the_shift_goes_into_the_term_that_can_take_it() -> None:
    net = Net(
        lambda s, x: torch.add(s.n(x), s.l(x), alpha=-2.0) * s.g + s.h,
        n=nn.RMSNorm(6), l=nn.Linear(6, 6), g=mixed(6), h=mixed(6),
    )  # fmt: skip
    gm, _ = run(AbsorbScaleShift(), net, image())
    assert left(gm) == {"rms-norm": 1, "linear": 1, "add": 1}


def test_one_part_of_a_split_scales_its_rows_alone() -> None:
    def forward(s, x):
        q, k, v = s.qkv(x).reshape(x.shape[0], 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return F.softmax((q * 0.5) @ k.transpose(-2, -1), -1) @ v

    net = Net(forward, qkv=nn.Linear(8, 24))
    gm, _ = run(AbsorbScaleShift(), net, torch.randn(2, 5, 8, dtype=torch.float64))
    assert "mul" not in left(gm)


POOL = nn.AvgPool2d(3, 1, 1, count_include_pad=False)


@pytest.mark.parametrize(
    ("forward", "scale"),
    [
        (lambda s, y: s.pool(y) - y, mixed(4, 1, 1)),
        (lambda s, y: torch.add(F.max_pool2d(y, 3, 1, 1), y, alpha=-0.5), positive(4, 1, 1)),
        (lambda s, y: torch.cat([y, F.relu(y)], 1), positive(1)),
        (
            lambda s, y: s.pool(s.pool(y) - y) + y,
            mixed(4, 1, 1),
        ),
    ],
    ids=["pool minus identity", "max pool", "cat", "nested"],
)
def test_a_tensor_takes_what_all_of_its_readers_want(forward, scale) -> None:
    function = lambda s, x: forward(s, s.n(x)) * s.g + x.mean()
    net = Net(function, n=nn.GroupNorm(1, 4), g=scale, pool=POOL)
    gm, _ = run(AbsorbScaleShift(), net, image())
    assert "mul" not in left(gm)


@pytest.mark.parametrize(
    ("forward", "scale"),
    [
        (lambda s, y: (s.pool(y) - y) * s.g + y, mixed(4, 1, 1)),
        (lambda s, y: (s.pool(y) - y.sigmoid()) * s.g, mixed(4, 1, 1)),
        (lambda s, y: (s.pool(y) * y) * s.g, mixed(4, 1, 1)),
        (lambda s, y: (F.relu(y) - y) * s.g, mixed(4, 1, 1)),
        (lambda s, y: (s.pool(y) - y) + s.g, mixed(4, 1, 1)),
        (lambda s, y: torch.cat([y, s.pool(y)], 1) * s.g, mixed(8, 1, 1)),
    ],
    ids=["read later", "not linear", "product", "negative", "shift", "two factors"],
)
def test_a_tensor_keeps_what_its_readers_do_not_agree_on(forward, scale) -> None:
    """Checked for numbers; a scale that only one of the two takes would be wrong."""
    net = Net(lambda s, x: forward(s, s.n(x)), n=nn.GroupNorm(1, 4), g=scale, pool=POOL)
    gm, _ = run(AbsorbScaleShift(), net, image())
    assert {"mul", "add"} & set(left(gm))


def test_a_depthwise_pointwise_layer_is_a_scale_and_shift() -> None:
    net = Net(lambda s, x: s.c(s.n(x)), n=nn.GroupNorm(1, 4), c=conv(k=1, groups=4))
    gm, _ = run(AbsorbScaleShift(), net, image())
    assert left(gm) == {"group-norm": 1}


def test_through_class_token_and_position_embedding() -> None:
    """SSF after cat(cls, x) + pos: the scale goes to every part, the shift to the embedding."""

    def forward(s, x):
        y = s.c(x).flatten(2).transpose(1, 2)
        y = torch.cat([s.cls.expand(x.shape[0], -1, -1), y], 1) + s.pos
        return s.n(y * s.g + s.h)

    net = Net(
        forward, c=conv(4, 8), cls=mixed(1, 1, 8), pos=mixed(1, 21, 8), g=mixed(8), h=mixed(8),
        n=nn.LayerNorm(8),
    )  # fmt: skip
    gm, _ = run(AbsorbScaleShift(), net, image())
    found = left(gm)
    assert "mul" not in found
    assert found["add"] == 1


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        (lambda s, x: x * (F.relu6(x) / 6), {"relu6": 1, "mul": 1}),
        (lambda s, x: (F.relu6(x) * s.g) * x, {"relu6": 1, "mul": 1}),
        (lambda s, x: F.relu6(x[:, :, :1]) * s.g * x, {"relu6": 1, "mul": 1}),
        (lambda s, x: (F.relu6(x.mean(0)) * s.g) * x, {"mean": 1, "relu6": 1, "mul": 1}),
        (lambda s, x: F.relu6(x) * s.g / x.cosh(), {"relu6": 1, "cosh": 1, "div": 1}),
        (lambda s, x: F.relu6(x) * s.g * x.tanh() * s.g, {"relu6": 1, "tanh": 1, "mul": 1}),
    ],
)
def test_the_scale_of_a_factor_is_that_of_the_product(forward, found) -> None:
    net = Net(lambda s, x: s.c(forward(s, x)), c=conv(padding=1), g=mixed(4, 1, 1))
    gm, _ = run(AbsorbScaleShift(), net, image())
    assert left(gm) == found | {"conv": 1}


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: (x.tanh() + s.g) + x,
        lambda s, x: x - (x.tanh() + s.g),
        lambda s, x: torch.sub(x, s.g + x.tanh(), alpha=-0.3),
    ],
)
def test_the_shift_of_a_term_is_that_of_the_sum(forward) -> None:
    net = Net(lambda s, x: s.c(forward(s, x)), c=conv(k=1), g=mixed(4, 1, 1))
    gm, _ = run(AbsorbScaleShift(), net, image())
    found = left(gm)
    assert found.pop("add", 0) + found.pop("sub", 0) == 1
    assert found == {"tanh": 1, "conv": 1}


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: s.c(x.cosh() / (x.exp() * s.g)),
        lambda s, x: s.c((F.relu6(x) + s.g) * x),
        lambda s, x: s.c((F.relu6(x) * s.g) + x),
        lambda s, x: (lambda y: s.c(y * y))(F.relu6(x) * s.g),
        lambda s, x: (lambda y: s.c(y * F.relu(y)))(F.relu6(x) * 2.0),
        lambda s, x: F.silu((F.relu6(x) * s.g) * x),
    ],
)
def test_what_does_not_distribute_keeps_its_scale_and_shift(forward) -> None:
    net = Net(forward, c=conv(k=1), g=positive(4, 1, 1))
    before = left(trace(net, image(), dynamic=True))
    gm, _ = run(AbsorbScaleShift(), net, image())
    assert left(gm) == before


def test_a_product_in_half_precision_does_not_grow() -> None:
    net = Net(lambda s, x: s.c(x * (F.relu6(x) / 6)), c=conv(k=1)).half()
    graph = trace(net, image().half(), dynamic=True)
    before, result = left(graph), AbsorbScaleShift().run(graph)
    assert left(graph) == before
    assert any("overflow float16" in d.reason for d in result.declined)


@pytest.mark.parametrize(
    ("forward", "parts", "reason"),
    [
        (lambda s, x: F.relu(s.c(x)) * s.g, {"c": conv(), "g": mixed(4, 1, 1)}, "negative or zero"),
        (lambda s, x: F.relu(s.c(x)) * 0.0, {"c": conv()}, "negative or zero"),
        (
            lambda s, x: F.relu(s.c(x)) + s.g,
            {"c": conv(), "g": positive(4, 1, 1)},
            "shift does not pass",
        ),
        (lambda s, x: F.relu6(s.c(x)) * s.g, {"c": conv(), "g": positive(4, 1, 1)}, "not linear"),
        (lambda s, x: F.silu(s.c(x)) * s.g, {"c": conv(), "g": positive(4, 1, 1)}, "not linear"),
        (lambda s, x: s.c(x) * s.g, {"c": conv(), "g": mixed(4)}, "another axis"),
        (lambda s, x: s.n(x) + s.g, {"n": nn.RMSNorm(6), "g": mixed(6)}, "no bias"),
        (
            lambda s, x: (lambda y: (y * s.g, y.tanh()))(s.c(x)),
            {"c": conv(), "g": mixed(4, 1, 1)},
            "other users",
        ),
        (
            lambda s, x: F.pad(s.c(x), (1, 1, 1, 1)) + s.g,
            {"c": conv(), "g": mixed(4, 1, 1)},
            "zero padding",
        ),
        (
            lambda s, x: s.c(x).mean((2, 3), keepdim=True).expand(-1, -1, 5, 4) * s.g,
            {"c": conv(), "g": mixed(1, 1, 5, 4)},
            "two different factors",
        ),
        (lambda s, x: F.gelu(x) * s.g, {"g": mixed(4, 1, 1)}, "not linear"),
        (lambda s, x: torch.div(s.c(x), 2.0, rounding_mode="floor"), {"c": conv()}, "rounds"),
    ],
)
def test_declines(forward, parts, reason) -> None:
    # 6 x 6 outputs of 4 channels would hide nothing; width equals channels here on purpose.
    gm, declined = run(AbsorbScaleShift(), Net(forward, **parts), image(4, 7, 6))
    assert any(re.search(reason, d.reason) for d in declined), (declined, gm.graph)


def attention(s, x, **options):
    return F.scaled_dot_product_attention(s.q(x), s.k(x), s.v(x), **options)


def pooled(x, **options):
    return F.avg_pool2d(x, 3, 1, **options)


HEADS = {"q": nn.Linear(6, 6), "k": nn.Linear(6, 6), "v": nn.Linear(6, 6)}


@pytest.mark.parametrize(
    ("forward", "parts"),
    [
        (lambda s, x: pooled(s.c(x)) * s.g + s.h, {"g": mixed(4, 1, 1)}),
        (lambda s, x: pooled(s.c(x), padding=1) * s.g, {"g": mixed(4, 1, 1)}),
        (lambda s, x: pooled(s.c(x), divisor_override=5) * s.g, {"g": mixed(4, 1, 1)}),
        (lambda s, x: F.adaptive_avg_pool2d(s.c(x), 2) * s.g + s.h, {"g": mixed(4, 1, 1)}),
        (lambda s, x: F.interpolate(s.c(x), scale_factor=2, mode="bilinear") * s.g + s.h,
         {"g": mixed(4, 1, 1)}),
        (lambda s, x: F.interpolate(s.c(x), scale_factor=2, mode="nearest") * s.g + s.h,
         {"g": mixed(4, 1, 1)}),
        (lambda s, x: s.c(x).mean((2, 3), keepdim=True) * s.g + s.h, {"g": mixed(4, 1, 1)}),
        (lambda s, x: s.c(x).mean((-1, 2)) * s.g.flatten() + s.h.flatten(), {"g": mixed(4, 1, 1)}),
        (lambda s, x: s.c(x).mean(3) * s.g, {"g": mixed(4, 1)}),
        (lambda s, x: F.pad(s.c(x), (1, 0, 2, 0)) * s.g, {"g": mixed(4, 1, 1)}),
        (lambda s, x: F.max_pool2d(s.c(x), 2, return_indices=True)[0] * s.g + s.h,
         {"g": positive(4, 1, 1)}),
        (lambda s, x: (s.c(x) @ s.d(x).transpose(2, 3)) * s.g, {"g": mixed(4, 1, 1)}),
        (lambda s, x: (s.c(x) @ s.d(x).transpose(2, 3)) * 0.5, {}),
        (lambda s, x: (s.c(x)[:1] @ s.d(x)[:, :1].transpose(2, 3)) * s.g,
         {"g": mixed(1, 4, 1, 1)}),
        (lambda s, x: (x @ s.w) * s.g, {"w": torch.randn(4, 6, 3), "g": mixed(3)}),
        (lambda s, x: (x @ s.w) * s.g, {"w": torch.randn(4, 6, 3), "g": mixed(4, 1, 3)}),
        (lambda s, x: (s.w @ x) * s.g, {"w": torch.randn(4, 3, 7), "g": mixed(3, 1)}),
        (lambda s, x: (x * s.g) @ s.w, {"w": torch.randn(4, 6, 3), "g": mixed(6)}),
        (lambda s, x: s.w @ (x * s.g), {"w": torch.randn(4, 3, 7), "g": mixed(7, 1)}),
        (lambda s, x: ((x * s.g) @ s.w).transpose(1, 2).flatten(2) @ s.z,
         {"w": torch.randn(4, 6, 3), "g": mixed(4, 1, 1), "z": torch.randn(12, 5)}),
        (lambda s, x: (s.q(x) @ s.k(x).transpose(2, 3)) @ s.v(x) * s.g, {"g": mixed(6)}),
        (lambda s, x: attention(s, x) * s.g, {"g": mixed(6)}),
        (lambda s, x: attention(s, x) * -0.5, {}),
        (lambda s, x: s.c(x).sum(3) * s.g, {"g": mixed(4, 1)}),
        (lambda s, x: s.c(x).sum((2, 3), keepdim=True) * s.g, {"g": mixed(4, 1, 1)}),
        (lambda s, x: s.c(x).amax((2, 3)) * s.g - s.k.bias[:4], {"g": positive(4)}),
        (lambda s, x: s.c(x).amin((1, 2, 3)) * 2, {}),
        (lambda s, x: s.k((x * s.g).sum(2)), {"g": mixed(6)}),
        (lambda s, x: s.k((x * s.g + 1).amax(2)), {"g": positive(6)}),
    ],
)  # fmt: skip
def test_what_a_scale_and_shift_crosses(forward, parts) -> None:
    net = Net(forward, c=conv(), d=conv(), h=mixed(4, 1, 1), **HEADS, **parts)
    gm, declined = run(AbsorbScaleShift(), net, image(4, 7, 6))
    assert not {"mul", "add"} & left(gm).keys(), (declined, gm.graph)


@pytest.mark.parametrize(
    ("forward", "parts", "reason"),
    [
        (lambda s, x: pooled(s.c(x), padding=1) + s.h, {}, "averages zero padding in"),
        (lambda s, x: pooled(s.c(x), divisor_override=5) + s.h, {}, "divides by another number"),
        (lambda s, x: pooled(s.c(x)) * s.g, {"g": mixed(1, 1, 4)}, ""),
        (lambda s, x: F.max_pool2d(s.c(x), 2) * s.g, {"g": positive(1, 3, 1)}, ""),
        (lambda s, x: F.max_pool2d(s.c(x), 2) * s.g, {"g": mixed(4, 1, 1)}, "negative or zero"),
        (lambda s, x: sum(F.max_pool2d(s.c(x), 2, return_indices=True)) * s.g,
         {"g": positive(4, 1, 1)}, ""),
        (lambda s, x: F.adaptive_avg_pool2d(s.c(x), 2) * s.g, {"g": mixed(2, 1)}, ""),
        (lambda s, x: F.interpolate(s.c(x), scale_factor=2, mode="bilinear") * s.g,
         {"g": mixed(1, 14, 1)}, ""),
        (lambda s, x: s.c(x).mean(2, keepdim=True) * s.g, {"g": mixed(6)}, ""),
        (lambda s, x: F.pad(s.c(x), (1, 1), value=2.0) * s.g, {"g": mixed(4, 1, 1)}, "pads with 2"),
        (lambda s, x: F.pad(s.c(x), (1, 1, 0, 0), mode="reflect") * s.g, {"g": mixed(8)}, ""),
        (lambda s, x: F.pad(s.c(x), (1, 1)) * s.g, {"g": mixed(8)}, ""),
        (lambda s, x: s.n(x) * s.g, {"n": nn.LayerNorm(6), "g": mixed(4, 1, 1)},
         "another axis than layer-norm's weight"),
        (lambda s, x: torch.cat([s.c(x), s.d(x).float()], 1) * s.g, {"g": mixed(8, 1, 1)},
         "promotes a dtype"),
        (lambda s, x: (s.c(x) @ s.d(x).transpose(2, 3)) * s.g, {"g": mixed(7, 7)}, "both axes"),
        (lambda s, x: attention(s, x) * s.g, {"g": mixed(7, 1)}, "along the queries"),
        (lambda s, x: F.scaled_dot_product_attention(s.q(x), s.k(x), s.v(x)[:, :1].expand(
            -1, 4, -1, -1)) * s.g, {"g": mixed(4, 1, 1)}, ""),
        (lambda s, x: attention(s, x) + s.g, {"g": mixed(6)}, ""),
        (lambda s, x: s.c(x).sum(3) + s.g, {"g": mixed(4, 1)}, "adds up the shift"),
        (lambda s, x: s.c(x).amax(3) * s.g, {"g": mixed(4, 1)}, "zero scale does not pass"),
        (lambda s, x: s.k((x * s.g).sum(1)), {"g": mixed(4, 1, 1)}, ""),
        (lambda s, x: s.k((x * s.g).amax(1)), {"g": positive(4, 1, 1)}, ""),
        (lambda s, x: s.c(x).sum() * 2, {}, ""),
    ],
)  # fmt: skip
def test_what_a_scale_and_shift_does_not_cross(forward, parts, reason) -> None:
    """The numbers hold where it stops half-way, too; sizes of axes differ here."""
    net = Net(forward, c=nn.Conv2d(4, 4, 3, padding=1), d=nn.Conv2d(4, 4, 3, padding=1),
              h=mixed(4, 1, 1), **HEADS, **parts)  # fmt: skip
    gm, declined = run(AbsorbScaleShift(), net, image(4, 7, 6))
    assert {"mul", "add"} & left(gm).keys(), gm.graph
    assert any(re.search(reason, d.reason) for d in declined), (declined, gm.graph)


EINSUMS = {  # equation, scale of the result, whether an operand takes it
    "scores": ("bhid,bhjd->bhij", (), True),
    "scores, heads": ("bhid,bhjd->bhij", (2, 1, 1), True),
    "context": ("bhij,bhjd->bhid", (3,), True),
    "outer": ("bhid,bhje->bhdije", (2, 1, 1, 1, 3), True),
    "outer, both": ("bhid,bhje->bhdije", (3, 1, 1, 3), False),
    "turned": ("bhid,bhjd->bjhi", (2, 1), True),
}


@pytest.mark.parametrize("name", EINSUMS)
def test_an_operand_of_an_einsum_takes_the_scale(name) -> None:
    equation, shape, passes = EINSUMS[name]

    def forward(s, x):
        q, k = (layer(x).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (s.q, s.k))
        q = (q @ q.mT).softmax(-1) if equation.startswith("bhij") else q
        return torch.sigmoid(torch.einsum(equation, q, k) * s.g)

    net = Net(forward, q=nn.Linear(6, 6), k=nn.Linear(6, 6), g=mixed(*shape or (1,)))
    gm, declined = run(AbsorbScaleShift(), net, torch.randn(2, 4, 6, dtype=torch.float64))
    assert ("mul" in left(gm)) is not passes, gm.graph
    assert passes or any("axes of the scale" in d.reason for d in declined)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda s, y: torch.einsum("bid,bjd->bij", y, y) * 3.0, "reads linear twice"),
        (lambda s, y: torch.einsum("bid,bjd->bij", y, y.tanh()) + 3.0, "not linear"),
        (lambda s, y: torch.einsum("...id,...jd->...ij", y, y.tanh()) * 3.0, "name its axes"),
        (lambda s, y: torch.einsum("bii->bi", y @ y.mT) * 3.0, "name its axes"),
        # An operand of one row, which the product broadcasts, cannot hold a scale for each row.
        (
            lambda s, y: torch.einsum("bid,bid->bid", y.sum(1, True), y.tanh()) * s.g,
            "axes of the scale|not linear",
        ),
    ],
    ids=["square", "shift", "ellipsis", "diagonal", "broadcast"],
)
def test_einsums_that_take_no_scale(forward, reason) -> None:
    net = Net(lambda s, x: forward(s, s.q(x)).sigmoid(), q=nn.Linear(6, 6), g=mixed(4, 1))
    gm, declined = run(AbsorbScaleShift(), net, torch.randn(2, 4, 6, dtype=torch.float64))
    assert {"mul", "add"} & set(left(gm))
    assert any(re.search(reason, d.reason) for d in declined), declined


def test_a_scale_along_two_axes_is_turned_as_the_operand_of_the_einsum_is() -> None:
    net = Net(lambda s, x: (torch.einsum("bd,dij->bji", x.tanh(), s.c) * s.g).sigmoid(),
              c=mixed(4, 3, 3), g=mixed(3, 3))  # fmt: skip
    gm, _ = run(AbsorbScaleShift(), net, torch.randn(2, 4, dtype=torch.float64))
    assert "mul" not in left(gm)


def test_a_constant_that_is_read_twice_takes_no_factor() -> None:
    """Each place would want its own."""
    net = Net(
        lambda s, x: torch.cat([s.c.expand_as(x), s.l(x), s.c.expand_as(x)], 1) * s.g,
        l=nn.Linear(4, 4), c=mixed(1, 4), g=mixed(12),
    )  # fmt: skip
    run(AbsorbScaleShift(), net, torch.randn(2, 4, dtype=torch.float64))
    net = Net(lambda s, x: torch.cat([s.c, s.l(x), s.c], 1) * s.g,
              l=nn.Linear(4, 4), c=mixed(2, 4), g=mixed(12))  # fmt: skip
    gm, declined = run(
        AbsorbScaleShift(), net, torch.randn(2, 4, dtype=torch.float64), dynamic=False
    )
    assert "mul" in left(gm)
    assert any("twice" in d.reason for d in declined), declined


def test_a_promoting_constant_is_left_alone() -> None:
    """fp16 conv times an fp32 vector is an fp32 result: not an affine map of the conv."""
    layer = conv().half()
    net = Net(lambda s, x: s.c(x) * s.g, c=layer, g=mixed(4, 1, 1))
    net.c.half()
    net.g.data = net.g.data.float()
    with torch.no_grad():
        gm = trace(net, image().half())
        assert not AbsorbScaleShift().run(gm).modified


def test_two_outputs_never_come_to_share_storage() -> None:
    def forward(s, x):
        a, b = s.c(x).chunk(2, 1)
        return a * 2.0, b

    gm, _ = run(AbsorbScaleShift(), Net(forward, c=conv()), image())
    assert left(gm)["mul"] == 1


ROW = torch.zeros(2, 3, 4, dtype=torch.float64)  # the shape of what the pads below read
PADS = {
    "time shift": ((1, -1), 0.0, True),
    "shifted back": ((-1, 1), 0.0, True),
    "one longer": ((1, 0), 0.0, True),
    "one shorter": ((0, -1), 0.0, True),
    "both sides": ((2, 1), 0.0, True),
    "another constant": ((1, -1), 0.5, True),
    "the axis before": ((0, 0, 1, -1), 0.0, True),
    "both axes": ((1, -1, 1, 0), 0.0, True),
    "both axes, another constant": ((1, -1, 1, 0), 0.5, False),
    "a crop of both axes": ((-1, 0, 0, -1), 0.5, True),
}


@pytest.mark.parametrize("shift", few([False, True], 1))
@pytest.mark.parametrize("name", PADS)
def test_a_scale_behind_a_pad_of_its_axis_is_padded_too(name, shift) -> None:
    """What the pad writes is not scaled, and what it moves takes its own factor along."""
    amounts, value, folds = PADS[name]
    width = F.pad(ROW, amounts).shape[-1]

    def forward(s, x):
        x = x.tanh() * s.g
        return s.l(F.pad(x + s.h if shift else x, amounts, value=value))

    net = Net(forward, l=nn.Linear(width, 5), g=mixed(4), h=mixed(4))
    gm, declined = run(AbsorbScaleShift(), net, torch.randn_like(ROW))
    # a shift that the pad's own zeros do not take is another one in the rows that it adds
    folds = folds and not (shift and len(amounts) > 2 and max(amounts[2:]) > 0)
    assert left(gm).keys().isdisjoint({"mul", "add"}) is folds, declined


PADDED_CHANNELS = {
    "channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, -1)),
    "channels, cut": lambda x: F.pad(x, (0, 0, 0, 0, -1, 1)),
    "all": lambda x: F.pad(x, (1, -1, 0, 0, 2, -2)),
    "rolled": lambda x: x.roll(1, 1),
    "flipped": lambda x: x.flip(1),
    "every other, twice": lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1),
    "moved by a slice": lambda x: torch.cat([x[:, 1:], x[:, :1]], 1),
    "picked": lambda x: x.index_select(1, torch.tensor([3, 3, 0, 1])),
}


@pytest.mark.parametrize("name", few(PADDED_CHANNELS, 4))
@pytest.mark.parametrize("kind", ["scale", "norm"])
def test_what_moves_channels_moves_their_scales(name, kind) -> None:
    """As many channels come out as go in: their count says nothing of which they are."""
    net = Net(
        lambda s, x: s.c(PADDED_CHANNELS[name](x.tanh() * s.g if kind == "scale" else s.b(x))),
        c=conv(), g=mixed(4, 1, 1), b=nn.BatchNorm2d(4),
    )  # fmt: skip
    run((AbsorbScaleShift(), FoldBatchNorm()), net, image())


PRODUCTS = {
    "matrix and vector": lambda s, x: (x @ s.w) * s.v,
    "matrix and vector, by rows": lambda s, x: (s.m @ x[0]) * s.v,
    "vector and matrix": lambda s, x: (s.w @ x) * s.v,
    "vector and vector": lambda s, x: (x[0] @ s.w) * 0.5,
    "vector and vector, made": lambda s, x: (s.l(x)[0] @ x[1]) * s.v[0],
    "stacked matrices and vector": lambda s, x: (torch.stack([x, x]) @ s.w) * s.v,
    "vector and stacked matrices": lambda s, x: (s.w @ torch.stack([x, x])) * s.v,
    "both of the data": lambda s, x: (s.l(x) @ s.l(x)[0]) * s.v,
    "a made matrix": lambda s, x: (s.l(x) @ x.amax(0)) * s.v,
    "a made matrix behind": lambda s, x: (x.amax(0) @ s.l(x)) * s.v,
    "one number": lambda s, x: (x @ s.w) * 0.5,
    "a scale of rows": lambda s, x: (x @ s.m) * s.v[:, None],
    "mv": lambda s, x: torch.mv(x, s.w) * s.v,
    "dot": lambda s, x: torch.dot(x[0], s.w) * s.v,
    "outer": lambda s, x: torch.outer(x[0], s.w) * s.v,
    "inner": lambda s, x: torch.inner(x, s.m) * s.v,
    "tensordot": lambda s, x: torch.tensordot(x, s.m, ([0], [0])) * s.v,
    "einsum of a vector": lambda s, x: torch.einsum("ij,j->i", x, s.w) * s.v,
    "bilinear": lambda s, x: F.bilinear(x, x, s.t) * s.v,
}


@pytest.mark.parametrize("name", few(PRODUCTS, 10))
def test_products_with_a_vector(name) -> None:
    """The result of ``A @ v`` has the rows of ``A``: its last axis is not one of ``v``."""
    net = Net(lambda s, x: PRODUCTS[name](s, x[0]), l=nn.Linear(4, 4),
              w=mixed(4), v=mixed(4), m=mixed(4, 4), t=mixed(4, 4, 4))  # fmt: skip
    run(AbsorbScaleShift(), net, torch.randn(2, 4, 4, dtype=torch.float64), dynamic=False)


def test_a_scale_goes_into_the_matrix_that_a_vector_is_multiplied_with() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    for forward in (
        lambda s, x: (s.l(x) @ x.amax((0, 1))) * s.g,
        lambda s, x: (x.amax((0, 2)) @ s.l(x)) * s.h,
        lambda s, x: (x @ s.w) * 0.5,
    ):
        net = Net(
            forward, l=nn.Linear(4, 4, bias=False), g=torch.tensor(0.3), h=mixed(4), w=mixed(4)
        )
        gm, declined = run(AbsorbScaleShift(), net, x)
        assert "mul" not in left(gm), declined


EXPANDED = {
    "depthwise": lambda s, x: F.conv2d(x, s.k.expand(4, 1, 3, 3), None, 1, 1, 1, 4),
    "dense": lambda s, x: F.conv2d(x, s.k.expand(4, 4, 3, 3)),
    "transposed": lambda s, x: F.conv_transpose2d(x, s.k.expand(4, 4, 3, 3)),
    "transposed, depthwise": lambda s, x: F.conv_transpose2d(x, s.k.expand(4, 1, 3, 3), groups=4),
    "its bias": lambda s, x: F.conv2d(x, s.w, s.o.expand(4)),
    "linear": lambda s, x: F.linear(x, s.r.expand(6, 6), s.o.expand(6)),
    "matmul": lambda s, x: x @ s.r.expand(6, 6),
    "a norm": lambda s, x: F.batch_norm(x, s.o.expand(4), s.p.expand(4), s.o.expand(4)),
    "a group norm": lambda s, x: F.group_norm(x, 2, s.o.expand(4), s.o.expand(4)),
    "a layer norm": lambda s, x: F.layer_norm(x, [6], s.o.expand(6), s.o.expand(6)),
    "an embedding": lambda s, x: F.embedding(x.sign().long() + 1, s.o.expand(3, 6)),
    "a view": lambda s, x: F.conv2d(x, s.w.transpose(0, 1)),
}


@pytest.mark.parametrize("name", few(EXPANDED, 4))
@pytest.mark.parametrize("after", [False, True])
def test_expanded_weights_have_the_shape_that_they_are_expanded_to(name, after) -> None:
    def forward(s, x):
        if after:
            return EXPANDED[name](s, x) * s.g
        return EXPANDED[name](s, x * s.g)

    net = Net(
        forward, k=mixed(1, 1, 3, 3), w=mixed(4, 4, 3, 3), o=mixed(1), r=mixed(1, 6),
        p=positive(1), g=torch.tensor(-0.7),
    )  # fmt: skip
    gm, declined = run((AbsorbScaleShift(), FoldBatchNorm()), net, image(4, 6, 6))
    assert "mul" not in left(gm) or name == "an embedding" or "norm" in name, declined


def test_an_expanded_weight_is_not_written_out_past_the_growth() -> None:
    net = Net(lambda s, x: F.conv2d(x, s.k.expand(512, 1, 7, 7), None, 1, 3, 1, 512) * 0.5,
              k=mixed(1, 1, 7, 7))  # fmt: skip
    gm, declined = run(AbsorbScaleShift(), net, image(512, 4, 4))
    assert left(gm) == {"conv": 1, "mul": 1}
    assert any("repeats what it stores" in d.reason for d in declined)
