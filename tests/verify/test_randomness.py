"""Random numbers and memory that nothing has written; what is always overwritten is neither."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import refold
from refold.frontends.export import trace
from refold.graph.ops import op_name
from refold.verify.randomness import draws, first_draw
from tests.folding import Net


def in_slices(s: Net, x: Tensor) -> Tensor:
    y = s.c(x)
    out = torch.empty(x.shape[0], 8, y.shape[2], y.shape[3])
    out[:, :4] = y
    out[:, 4:] = -y
    return out


def copied(s: Net, x: Tensor) -> Tensor:
    y = s.c(x)
    return torch.empty_like(y).copy_(y)


def row_by_row(s: Net, x: Tensor) -> Tensor:
    y = s.c(x)
    out = y.new_empty(y.shape)
    for i in range(4):
        out[:, i] = y[:, 3 - i]
    return out


def at_indices(s: Net, x: Tensor) -> Tensor:
    y = s.c(x)
    out = torch.empty(4, y.shape[0], y.shape[2], y.shape[3])
    out[torch.tensor([2, 0, 1, 3])] = y.transpose(0, 1)
    return out


def filled(s: Net, x: Tensor) -> Tensor:
    return s.c(x) + torch.empty(4, 6, 6).fill_(2.0)


def nothing(s: Net, x: Tensor) -> Tensor:
    return torch.cat([s.c(x), torch.empty([x.shape[0], 0, 6, 6])], 1)


@pytest.mark.parametrize("function", [in_slices, copied, row_by_row, at_indices, filled, nothing])
def test_what_is_always_overwritten_is_compared(function: Callable) -> None:
    torch.manual_seed(0)
    net = Net(function, c=nn.Conv2d(3, 4, 3))
    report = refold.compile_for_inference(net.float(), torch.randn(2, 3, 8, 8)).report
    assert report.numerics["inputs"] >= 4


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda s, x: s.c(x) + torch.empty(4, 6, 6).normal_(), "random numbers"),
        (lambda s, x: s.c(x) + torch.rand(4, 6, 6), "random numbers"),
    ],
)
def test_what_is_not_is_said(function: Callable, says: str) -> None:
    net = Net(function, c=nn.Conv2d(3, 4, 3))
    report = refold.compile_for_inference(net.float(), torch.randn(2, 3, 8, 8)).report
    assert report.numerics["inputs"] == 0
    assert says in report.numerics["summary"]


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: s.c(x) + torch.empty(4, 6, 6, dtype=torch.int8),
        lambda s, x: s.c(x) + torch.cat([torch.empty(3, 6, 6, dtype=torch.int8), s.one]),
    ],
)
def test_memory_that_is_read_as_it_was_found_is_named(function: Callable) -> None:
    net = Net(function, c=nn.Conv2d(3, 4, 3), one=torch.ones(1, 6, 6))
    program = trace(net.float(), (torch.randn(2, 3, 8, 8),))
    found = first_draw(program.graph_module, program.example)
    assert found is not None
    assert op_name(found) == "empty"
    assert draws(program.graph_module)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_result_without_a_finite_number_is_said(value: float) -> None:
    net = Net(lambda s, x: s.l(x) * value * s.l(x).abs().sign().abs(), l=nn.Linear(4, 4))
    report = refold.compile_for_inference(net.float(), torch.randn(2, 4)).report
    assert report.numerics["inputs"] == 0
    assert "nothing could be compared" in report.numerics["summary"]
