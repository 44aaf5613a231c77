from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from refold.graph import printer
from refold.passes import PIPELINES
from refold.passes.prepare.drop_zero_channels import DropZeroChannels
from refold.rewrite.context import Context
from tests import golden
from tests.examples import examples, few
from tests.folding import Net, image, run
from tests.tracing import trace

DROP = DropZeroChannels()


def kill(layer: nn.Module, channels: list[int], axis: int = 0) -> nn.Module:
    """Zeroes rows (or columns) of a layer's weight; biases stay."""
    layer.weight.data.index_fill_(axis, torch.tensor(channels), 0.0)
    return layer


DEAD = [0, 3, 5, 6, 9]  # of twelve: five dead leave seven, which is two blocks of four


def conv(i: int, o: int, k: int = 1, **options) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, **options)


def widths(gm: fx.GraphModule) -> list[tuple[int, int]]:
    """(outputs, inputs per group) of each layer, in order."""
    names = ("conv1d", "conv2d", "conv3d", "linear")
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target._schema.name[6:] in names:
            found.append(tuple(node.args[1].meta["val"].shape[:2]))
    return found


def net(forward, **parts) -> Net:
    return Net(lambda s, x: torch.tanh(forward(s, x)), **parts)


def test_golden() -> None:
    model = net(lambda s, x: s.b(F.gelu(s.a(x))), a=kill(conv(4, 12), DEAD), b=conv(12, 4))
    before = printer.render(trace(model, image(), dynamic=True))
    after, _ = run(DROP, model, image())
    golden.check("drop_zero_channels", f"{before}\n---\n{printer.render(after)}")


SMALL, FULL = [(8, 4), (4, 8)], [(12, 4), (4, 12)]
BETWEEN = {
    "gelu": (lambda s, x: F.gelu(x), SMALL),
    "relu then silu": (lambda s, x: F.silu(F.relu(x)), SMALL),
    "norm": (lambda s, x: F.hardswish(s.n(x)), SMALL),
    "scale and shift": (lambda s, x: s.g * x + s.h, SMALL),
    "number": (lambda s, x: 2 * x.sigmoid() - 1, SMALL),
    "depthwise": (lambda s, x: s.d(x.relu()), SMALL),
    "average pool": (lambda s, x: F.avg_pool2d(F.gelu(x), 2), SMALL),
    "max pool": (lambda s, x: F.max_pool2d(F.gelu(x), 3, 2, 1), SMALL),
    "padded average that divides by its own": (
        lambda s, x: F.avg_pool2d(F.gelu(x), 3, 2, 1, count_include_pad=False), SMALL,
    ),
    "resize": (lambda s, x: F.interpolate(F.gelu(x), scale_factor=2, mode="bicubic"), SMALL),
    "gate": (lambda s, x: x * x.mean((2, 3), keepdim=True).sigmoid(), SMALL),
    "gate that varies": (lambda s, x: x.relu() * s.one(x.exp()), FULL),
    "positions": (lambda s, x: x + s.p, FULL),
    "replicated border": (lambda s, x: F.pad(F.gelu(x), (1,) * 4, mode="replicate"), SMALL),
    # constants that meet a border of zeros
    "padded average": (lambda s, x: F.avg_pool2d(F.sigmoid(x), 3, 1, 1), FULL),
    "zero pad": (lambda s, x: F.pad(F.sigmoid(x), (1, 1)), FULL),
    # what mixes channels, or is not known
    "layer norm": (lambda s, x: F.layer_norm(x, x.shape[1:]), FULL),
    "softmax": (lambda s, x: x.softmax(1), FULL),
    "sum": (lambda s, x: x - x.sum(1, keepdim=True), FULL),
    "mean of channels": (lambda s, x: x - x.mean(1, keepdim=True), FULL),
    "cumulated": (lambda s, x: x.cumsum(1), FULL),
    "shuffle": (lambda s, x: F.channel_shuffle(x, 3), FULL),
}  # fmt: skip

# read in full, but not constant
VARYING = ("positions", "padded average", "zero pad", "gate that varies")


@pytest.mark.parametrize("name", few(BETWEEN, 11))
def test_between_two_layers(name) -> None:
    between, expected = BETWEEN[name]
    model = net(
        lambda s, x: s.b(between(s, s.a(x))),
        a=kill(conv(4, 12), DEAD), b=conv(12, 4), n=nn.BatchNorm2d(12),
        g=torch.randn(12, 1, 1), h=torch.randn(1, 12, 1, 1), d=conv(12, 12, 3, groups=12),
        one=conv(12, 1), p=torch.randn(12, 7, 6),
    )  # fmt: skip
    after, declined = run(DROP, model, image())
    assert [w for w in widths(after) if 1 not in w] == expected
    assert declined or expected != FULL or name in VARYING


def test_a_norm_whose_scale_is_zero() -> None:
    model = net(lambda s, x: s.b(s.n(s.a(x)).relu()), a=conv(4, 12), b=conv(12, 4, 3),
                n=nn.BatchNorm2d(12))  # fmt: skip
    model.n.weight.data[DEAD] = 0.0
    assert widths(run(DROP, model, image())[0]) == SMALL


@pytest.mark.parametrize("dead", [False, True])
def test_a_padded_reader_takes_no_constant_but_zero(dead) -> None:
    a = kill(conv(4, 12), DEAD)
    if dead:
        a.bias.data[DEAD] = -1.0  # which the relu takes to zero
    else:
        a.bias.data[DEAD] = 1.0
    model = net(lambda s, x: s.b(s.a(x).relu()), a=a, b=conv(12, 4, 3, padding=1))
    assert widths(run(DROP, model, image())[0]) == (SMALL if dead else FULL)


@pytest.mark.parametrize("padding", [0, 1, "same"])
def test_a_padded_depthwise_reader(padding) -> None:
    model = net(
        lambda s, x: s.b(s.d(s.a(x))), a=kill(conv(4, 12), DEAD), b=conv(12, 4),
        d=conv(12, 12, 2 if padding == "same" else 3, padding=padding, groups=12),
    )  # fmt: skip
    expected = SMALL if padding == 0 else FULL
    assert [w for w in widths(run(DROP, model, image())[0]) if w[1] != 1] == expected


def test_channels_that_nothing_reads() -> None:
    model = net(
        lambda s, x: s.b(s.d(s.a(x)).relu()), a=conv(4, 12),
        b=kill(conv(12, 4, 3, padding=1), DEAD, 1), d=conv(12, 12, 3, padding=1, groups=12),
    )  # fmt: skip
    assert widths(run(DROP, model, image())[0]) == [(8, 4), (8, 1), (4, 8)]


def test_every_reader_counts() -> None:
    def forward(s, x):
        y = s.a(x).relu()
        return s.b(y) + s.c(y)

    model = net(forward, a=conv(4, 12), b=kill(conv(12, 4), DEAD, 1), c=conv(12, 4))
    assert widths(run(DROP, model, image())[0]) == [(12, 4), (4, 12), (4, 12)]
    kill(model.c, [*DEAD, 1], 1)
    assert widths(run(DROP, model, image())[0]) == [(8, 4), (4, 8), (4, 8)]


def test_it_repeats_backwards_and_forwards() -> None:
    one = kill(conv(12, 12), DEAD)
    one.bias.data[DEAD] = 0.0
    model = net(lambda s, x: s.c(s.b(s.a(x).relu()).relu()), a=conv(4, 12), b=one, c=conv(12, 4))
    model.b.weight.data[:, [1, 2, 4, 7]] = 0.0
    model.b.weight.data[[1, 2]] = 0.0
    model.b.weight.data[1, 0] = model.b.weight.data[2, 11] = 0.5
    kill(model.a, [0, 11, 5])
    assert widths(run(DROP, model, image())[0]) == [(8, 4), (8, 8), (4, 8)]


def test_a_residual_stream_shrinks_together() -> None:
    def forward(s, x):
        y = s.a(x)
        y = y + s.c(s.b(y).relu())
        return s.d(y.relu())

    stem, last = kill(conv(4, 12), DEAD), kill(conv(8, 12), DEAD)
    model = net(forward, a=stem, b=conv(12, 8, 3, padding=1), c=last, d=conv(12, 4))
    stem.bias.data[DEAD] = 0.0
    assert widths(run(DROP, model, image())[0]) == [(8, 4), (8, 8), (8, 8), (4, 8)]
    stem.bias.data[DEAD] = 1.0  # which the padded reader sees end at its border
    assert widths(run(DROP, model, image())[0])[0] == (12, 4)


@pytest.mark.parametrize("both", [False, True])
def test_a_sum_is_constant_where_both_terms_are(both) -> None:
    second = conv(4, 12)
    model = net(lambda s, x: s.b(s.a(x) - s.c(x.relu())), a=kill(conv(4, 12), DEAD),
                c=kill(second, DEAD) if both else second, b=conv(12, 4))  # fmt: skip
    expected = [(8, 4), (8, 4), (4, 8)] if both else [(12, 4), (12, 4), (4, 12)]
    assert widths(run(DROP, model, image())[0]) == expected


def test_a_gated_block_of_linears() -> None:
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    up = kill(nn.Linear(6, 12, bias=False), DEAD)
    model = net(lambda s, x: s.down(F.silu(s.gate(x)) * s.up(x)), up=up, gate=nn.Linear(6, 12),
                down=nn.Linear(12, 6))  # fmt: skip
    assert widths(run(DROP, model, x)[0]) == [(8, 6), (8, 6), (6, 8)]


def test_squeeze_and_excitation_and_a_head() -> None:
    def forward(s, x):
        y = s.a(x).relu()
        y = y * s.e(s.r(F.adaptive_avg_pool2d(y, 1)).relu()).sigmoid()
        return s.head(F.adaptive_avg_pool2d(y, 1).flatten(1))

    model = net(forward, a=kill(conv(4, 12, 3), DEAD), r=conv(12, 4), e=conv(4, 12),
                head=nn.Linear(12, 3))  # fmt: skip
    model.a.bias.data[DEAD] = -1.0
    assert widths(run(DROP, model, image())[0]) == [(8, 4), (4, 8), (8, 4), (3, 8)]


def test_views_of_pooled_tensors() -> None:
    for view in (
        lambda y: y.view(-1, 12), lambda y: y.view(y.shape[0], 12), lambda y: y.mean((2, 3)),
        lambda y: y.reshape(y.shape[0], -1),
    ):  # fmt: skip
        model = net(
            lambda s, x, view=view: s.head(view(F.adaptive_avg_pool2d(s.a(x), 1))),
            a=kill(conv(4, 12, 3), DEAD), head=nn.Linear(12, 3),
        )  # fmt: skip
        assert widths(run(DROP, model, image())[0]) == [(8, 4), (3, 8)]


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: (lambda y: (s.b(y), y))(s.a(x)),  # an output
        lambda s, x: s.g(s.a(x)),  # groups
        lambda s, x: s.t(s.a(x)),  # a transposed convolution
        lambda s, x: s.b(torch.cat([s.a(x)[:, :6], s.a(x)[:, 6:]], 1)),
        lambda s, x: s.b(s.a(x).transpose(2, 3)),
        lambda s, x: s.w(s.a(x)),  # reads another axis
        lambda s, x: s.b(s.a(x).log()),  # the constant may not be finite
    ],
)
def test_others_stay(forward) -> None:
    a = kill(conv(4, 12), DEAD)
    a.bias.data[DEAD] = 0.0
    model = Net(forward, a=a, b=conv(12, 4), g=conv(12, 4, groups=2),
                t=nn.ConvTranspose2d(12, 4, 2), w=nn.Linear(6, 12))  # fmt: skip
    gm = trace(model, image())
    before = widths(gm)
    result = DROP.run(gm)
    assert widths(gm) == before
    assert result.declined or "log" in forward.__code__.co_names


def test_fewer_than_a_block_or_an_eighth_stay() -> None:
    for count, dead, left in ((12, [1, 2, 3], 12), (12, [1, 2, 3, 4], 8), (3, [0, 1], 3),
                              (9, [1], 9), (9, [1, 2], 8), (8, list(range(8)), 4)):  # fmt: skip
        model = net(lambda s, x: s.b(s.a(x)), a=kill(conv(4, count), dead), b=conv(count, 4))
        assert widths(run(DROP, model, image())[0]) == [(left, 4), (4, left)]


def test_excluded_layers_stay() -> None:
    model = net(lambda s, x: s.b(s.a(x).relu()), a=kill(conv(4, 12), DEAD), b=conv(12, 4))
    for name in ("a", "b"):
        gm = trace(model, image())
        with torch.no_grad():
            PIPELINES["default"].run(gm, Context(exclude=(name,)))
        assert widths(gm) == FULL


def test_half_precision_stays() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = kill(conv(4, 12), DEAD), conv(12, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).relu()).relu()

    with torch.no_grad():
        gm = trace(Halves().half(), torch.randn(2, 4, 3, 3).half())
        assert not DROP.run(gm).modified


@st.composite
def stacks(draw: st.DrawFn):
    kind = st.sampled_from(("conv", "depth", "norm", "relu", "gelu", "pool", "add", "gate"))
    seed = draw(st.integers(0, 10_000))
    return draw(st.lists(kind, min_size=2, max_size=6)), seed, draw(st.sampled_from((0, 1)))


@given(stacks())
@examples(15)
def test_any_stack(drawn) -> None:
    kinds, seed, padding = drawn
    torch.manual_seed(seed)
    layers = nn.ModuleList([kill(conv(4, 12), DEAD)])
    for kind in kinds:
        dead = torch.randperm(12)[:6].tolist()
        layers.append({
            "conv": lambda dead=dead: kill(conv(12, 12, 3, padding=1), dead, seed % 2),
            "depth": lambda dead=dead: kill(conv(12, 12, 3, padding=padding, groups=12), dead),
            "norm": lambda: nn.BatchNorm2d(12), "gate": lambda: conv(12, 12),
        }.get(kind, nn.Identity)())  # fmt: skip
    layers.append(kill(conv(12, 4, 3, padding=padding), torch.randperm(12)[:4].tolist(), 1))

    def forward(s, x):
        x = y = s.layers[0](x)
        for kind, layer in zip(kinds, s.layers[1:], strict=False):
            if kind in ("conv", "depth", "norm"):
                y = layer(y)
            elif kind in ("relu", "gelu"):
                y = getattr(F, kind)(y)
            elif kind == "pool":
                y = F.avg_pool2d(y, 3, 1, 1, count_include_pad=padding == 1)
            elif kind == "gate":
                y = y * layer(y).sigmoid()
            elif y.shape == x.shape:
                y = y + x
        return s.layers[-1](y)

    model = net(forward, layers=layers)
    for norm in (m for m in layers if isinstance(m, nn.BatchNorm2d)):
        norm.weight.data[torch.randperm(12)[:5]] = 0.0
    run(DROP, model, image(4, 16, 15))
