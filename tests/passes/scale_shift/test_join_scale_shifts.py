from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from refold.graph import printer
from refold.passes import PIPELINES
from refold.passes.scale_shift.join_scale_shifts import JoinScaleShifts
from refold.rewrite.context import Context
from tests import golden
from tests.examples import examples, few
from tests.folding import Net, image, left, run
from tests.tracing import trace

JOIN = JoinScaleShifts()
G = torch.tensor([1.5, -0.5, 0.0, 2.0], dtype=torch.float64).view(4, 1, 1)
H = torch.tensor([0.5, 0.25, -1.0, 0.0], dtype=torch.float64).view(1, 4, 1, 1)


def net(forward, **parts) -> Net:
    return Net(lambda s, x: F.relu(forward(s, torch.tanh(x))), **parts)


def test_golden() -> None:
    model = net(lambda s, x: s.n(x) + x * G, n=nn.BatchNorm2d(4))
    before = printer.render(trace(model, image(), dynamic=True))
    after, _ = run(JOIN, model, image())
    golden.check("join_scale_shifts", f"{before}\n---\n{printer.render(after)}")


@pytest.mark.parametrize(
    ("forward", "calls"),
    few(
        [
            (lambda s, x: s.n(x) + x, {"mul": 1, "add": 1}),
            (lambda s, x: x - s.n(x), {"mul": 1, "add": 1}),
            (lambda s, x: x * G + H - x, {"mul": 1, "add": 1}),
            (lambda s, x: torch.sub(x, x * G, alpha=2), {"mul": 1}),
            (lambda s, x: (x + H) - (x * G - H), {"add": 1, "mul": 1}),
            (lambda s, x: s.n(x) + s.m(x), {"mul": 1, "add": 1}),
            (lambda s, x: s.m(s.n(x)) + x / 3, {"mul": 1, "add": 1}),
            (lambda s, x: s.d(x) - x, {"mul": 1, "add": 1}),
            (lambda s, x: x + x * 0.5 + x * G, {"mul": 1}),
            (lambda s, x: x.neg() + 2 * x, {}),
        ],
        5,
    ),
)
def test_a_sum_of_scale_shifts_is_one(forward, calls) -> None:
    model = net(
        forward, n=nn.BatchNorm2d(4), m=nn.BatchNorm2d(4), d=nn.Conv2d(4, 4, 1, groups=4)
    )  # fmt: skip
    after, _ = run(JOIN, model, image())
    assert left(after) == {"tanh": 1, "relu": 1, **calls}


@pytest.mark.parametrize(
    ("forward", "calls"),
    few(
        [
            (lambda s, x: (x + H) * G + H, {"mul": 1, "add": 1}),
            (lambda s, x: H - (x + 1), {"sub": 1}),
            (lambda s, x: 3 - (2 - x), {"add": 1}),
            (lambda s, x: -((x + 1) * -1 - 1), {"add": 1}),
            (lambda s, x: (x * G + H) / 2 - H, {"mul": 1, "add": 1}),
            (lambda s, x: torch.addcmul(H, (x - 1) * 2, G), {"mul": 1, "add": 1}),
            (lambda s, x: ((x + 1) * 2 - 2) / 2, {}),
        ],
        4,
    ),
)
def test_a_chain_of_scale_shifts_is_a_product_and_a_sum(forward, calls) -> None:
    after, _ = run(JOIN, net(forward), image())
    assert left(after) == {"tanh": 1, "relu": 1, **calls}
    assert not JOIN.run(after).applied


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: (x + H) * G,  # two calls either way
        lambda s, x: (x + torch.arange(6.0, dtype=torch.float64)) * G + 1,  # two different axes
        lambda s, x: (lambda y: y * G + H + y.sum())(x + 1),
        lambda s, x: (x + 1) * float("inf") + 1,
    ],
)
def test_other_chains_stay(forward) -> None:
    gm = trace(net(forward), image())
    before = left(gm)
    JOIN.run(gm)
    assert left(gm) == before


def test_a_chain_in_float16_stays() -> None:
    model = net(lambda s, x: (x + 40000) * 2 - 3).half()
    gm = trace(model, image().half())
    JOIN.run(gm)
    assert left(gm) == {"tanh": 1, "relu": 1, "add": 1, "mul": 1, "sub": 1}


@st.composite
def chains(draw: st.DrawFn):
    steps = st.lists(st.sampled_from(("norm", "scale", "shift", "neg", "half")), max_size=3)
    return draw(steps), draw(steps), draw(st.sampled_from((1, -1, 0.5)))


@given(chains())
@examples(40)
def test_any_two_chains(drawn) -> None:
    first, second, alpha = drawn
    norm = nn.BatchNorm2d(4)
    step = {
        "norm": lambda v: norm(v), "scale": lambda v: G * v, "shift": lambda v: v + H,
        "neg": torch.neg, "half": lambda v: v / 2,
    }  # fmt: skip

    def forward(s, x):
        a, b = x, x
        for name in first:
            a = step[name](a)
        for name in second:
            b = step[name](b)
        return torch.add(a, b, alpha=alpha)

    model = net(forward, norm=norm)
    after, _ = run(JOIN, model, image())
    calls = sum(left(after).values()) - 2
    assert calls <= (2 if first or second else 1)


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: s.n(x) + x * torch.sigmoid(x),
        lambda s, x: s.n(x) + s.n(x.relu()),
        lambda s, x: (lambda y: y + x + y.sum())(x * G),  # the scaled tensor has other readers
        lambda s, x: x * torch.arange(6.0, dtype=torch.float64) + x * G,  # two different axes
        lambda s, x: x * float("inf") + x,
        lambda s, x: x * torch.ones(2, 1, 1, 1, dtype=torch.float64).cumsum(0) + x.flip(0),
    ],
)
def test_other_sums_stay(forward) -> None:
    model = net(forward, n=nn.BatchNorm2d(4))
    with torch.no_grad():
        gm = trace(model, image())
        before = left(gm)
        JOIN.run(gm)
        assert left(gm) == before


def test_one_norm_added_to_itself() -> None:
    after, _ = run(JOIN, net(lambda s, x: (lambda y: y + y)(s.n(x)), n=nn.BatchNorm2d(4)), image())
    assert left(after) == {"tanh": 1, "relu": 1, "mul": 1, "add": 1}


def test_a_plain_sum_stays() -> None:
    after, _ = run(JOIN, net(lambda s, x: x + x), image())
    assert left(after) == {"tanh": 1, "relu": 1, "add": 1}


def test_what_would_overflow_float16_stays() -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x * 60000 + x * 60000)

    with torch.no_grad():
        gm = trace(Halves(), torch.randn(2, 4, 3, 3).half())
        before = left(gm)
        JOIN.run(gm)
        assert left(gm) == before


def test_excluded_layers_stay() -> None:
    model = net(lambda s, x: s.n(x) + x, n=nn.BatchNorm2d(4))
    with torch.no_grad():
        gm = trace(model, image())
        PIPELINES["default"].run(gm, Context(exclude=("n",)))
        assert left(gm)["batch-norm"] == 1


def test_the_joined_norm_goes_into_the_linear_that_reads_it() -> None:
    class RepBN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alpha = nn.Parameter(torch.rand(1))
            self.norm = nn.BatchNorm1d(6)
            self.head = nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.transpose(1, 2)
            y = self.norm(y) + self.alpha * y
            return self.head(y.transpose(1, 2))

    with torch.no_grad():
        model = Net(lambda s, x: s.r(torch.tanh(x)), r=RepBN())
        x = torch.randn(2, 7, 6, dtype=torch.float64)
        gm = trace(model, x)
        PIPELINES["default"].run(gm)
        assert left(gm) == {"tanh": 1, "linear": 1}
        assert torch.allclose(gm(x), model(x), rtol=0, atol=1e-12)
