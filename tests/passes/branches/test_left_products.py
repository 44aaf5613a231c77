"""Constant matrices multiplied from the left mix tokens, and merge like pointwise layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from refold.passes.branches.fold_branches import FoldBranches
from tests.examples import examples, few
from tests.folding import Net, left, run
from tests.tracing import trace

BRANCHES = FoldBranches()


def w(rows: int = 6, columns: int = 5) -> torch.Tensor:
    return torch.randn(rows, columns)


def tokens(*leading: int) -> torch.Tensor:
    return torch.randn(2, *leading, 5, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("forward", "parts"),
    [
        (lambda s, x: s.b @ (s.a @ x), {"a": w(), "b": w(7, 6)}),
        (lambda s, x: s.a @ x - s.b @ x, {"a": w(), "b": w()}),
        (lambda s, x: s.a @ x + x, {"a": w(5, 5)}),
        (lambda s, x: (s.a @ x) * s.g + s.h, {"a": w(), "g": w(6, 1), "h": w(6, 1)}),
        (lambda s, x: s.a @ (x * s.g), {"a": w(), "g": w(5, 1)}),
        (lambda s, x: s.a @ (x + s.h), {"a": w(), "h": w(5, 1)}),
        (lambda s, x: s.n(s.a @ x), {"a": w(), "n": nn.BatchNorm1d(6)}),
        (lambda s, x: s.c(x) + s.a @ x, {"a": w(), "c": nn.Conv1d(5, 6, 3, padding=1)}),
        (lambda s, x: s.b @ (s.a @ x + x), {"a": w(5, 5), "b": w()}),
    ],
)
def test_merges(forward, parts) -> None:
    gm, _ = run(BRANCHES, Net(forward, **parts), tokens())
    assert left(gm) == {"conv": 1}


@pytest.mark.parametrize(
    ("forward", "parts", "x"),
    few(
        [
            (lambda s, x: s.a @ x, {"a": w()}, tokens()),
            (lambda s, x: s.b @ (s.a @ x).relu(), {"a": w(), "b": w(7, 6)}, tokens()),
            # another axis
            (lambda s, x: (s.a @ x) * s.g, {"a": w(), "g": torch.randn(4)}, tokens()),
            (lambda s, x: s.l(s.a @ x), {"a": w(), "l": nn.Linear(4, 3)}, tokens()),
            (lambda s, x: s.n(s.a @ x), {"a": w(4, 5), "n": nn.LayerNorm(4)}, tokens()),
            (lambda s, x: s.b @ (s.a @ x).mT, {"a": w(), "b": w(7, 4)}, tokens()),
            # more axes before the tokens
            (lambda s, x: s.b @ (s.a @ x), {"a": w(), "b": w(7, 6)}, tokens(3)),
            # no constant
            (lambda s, x: s.a @ x + torch.softmax(x @ x.mT, -1) @ x, {"a": w(5, 5)}, tokens()),
            (lambda s, x: (s.a * x.mean()) @ x + s.a @ x, {"a": w()}, tokens()),
            (lambda s, x: s.a @ x + s.b @ x.tanh(), {"a": w(), "b": w()}, tokens()),
            (lambda s, x: (lambda y: (s.b @ y, y))(s.a @ x), {"a": w(), "b": w(7, 6)}, tokens()),
        ],
        6,
    ),
)
def test_stays(forward, parts, x) -> None:
    net = Net(forward, **parts)
    before = left(trace(net, x, dynamic=True))
    gm, _ = run(BRANCHES, net, x)
    assert left(gm) == before


def test_a_narrow_middle_stays() -> None:
    net = Net(lambda s, x: s.b @ (s.a @ x), a=w(2, 256), b=w(256, 2))
    gm, declined = run(BRANCHES, net, torch.randn(2, 256, 300, dtype=torch.float64))
    assert left(gm) == {"matmul": 2}
    assert any("cost table" in d.reason for d in declined)


@given(st.lists(st.sampled_from(("mix", "scale", "shift", "norm", "skip")), min_size=2, max_size=5))
@examples(25)
def test_any_chain(steps) -> None:
    net = Net(
        lambda s, x: x, a=w(5, 5), g=w(5, 1), h=w(5, 1), n=nn.BatchNorm1d(5)
    )  # fmt: skip

    def forward(s, x):
        for step in steps:
            if step == "mix":
                x = s.a @ x
            elif step == "scale":
                x = x * s.g
            elif step == "shift":
                x = s.h - x
            elif step == "norm":
                x = s.n(x)
            else:
                x = x + s.a @ x
        return x

    net.function = forward
    gm, _ = run(BRANCHES, net, tokens())
    if {"mix", "skip"} & set(steps):
        assert left(gm) == {"conv": 1}
