"""Sizes that constants decide: they fold like any constant, and what they are checked with goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import refold
from refold.frontends.export import trace
from refold.graph.ops import census
from refold.passes.prepare.decided_sizes import decide_sizes
from refold.rewrite.edit import Edit, Editor
from refold.rewrite.result import Decline, PassResult
from tests.compare import EXACT, call, relative_error
from tests.examples import few
from tests.tracing import find

MASK = torch.tensor([True, False] * 4)
COUNTS = torch.tensor([2, 3, 1, 2])


class _Net(nn.Module):
    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.function = forward
        self.linear = nn.Linear(8, 8)
        self.v = nn.Parameter(torch.randn(8, 8))
        self.short = nn.Parameter(torch.randn(4))
        self.register_buffer("mask", MASK.clone())
        self.register_buffer("counts", COUNTS.clone())
        self.requires_grad_(False).double().eval()

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


# What is computed, and the calls that are left.
FOLDED: dict[str, tuple[Callable[..., Any], dict[str, int]]] = {
    "a sum": (lambda s, x: x + s.v[s.mask].sum(0), {"add": 1}),
    "rows behind others": (lambda s, x: torch.cat([x, s.v[s.mask]]), {"layout": 1}),
    "a product": (lambda s, x: x @ s.v[s.mask].t(), {"matmul": 1}),
    "a weight": (lambda s, x: F.linear(x, s.v[s.v[:, 0] > 0]).relu(), {"linear": 1, "relu": 1}),
    "positions": (
        lambda s, x: x[:, torch.nonzero(s.mask).squeeze(1)] * 2, {"index": 1, "mul": 1},
    ),
    "repeated": (lambda s, x: x * torch.repeat_interleave(s.short, s.counts), {"mul": 1}),
    "picked": (
        lambda s, x: x[:, :4] * torch.masked_select(s.v[0], s.mask), {"layout": 1, "mul": 1},
    ),
    "unique": (lambda s, x: x + torch.unique(s.counts).double().sum(), {"add": 1}),
    "reshaped": (lambda s, x: x + s.v[s.mask].reshape(-1).view(2, -1).sum(), {"add": 1}),
    "the number alone": (lambda s, x: x * s.v[s.mask].shape[0], {"mul": 1}),
    "a number computed from it": (lambda s, x: x * (2 * s.v[s.mask].shape[0] + 1), {"mul": 1}),
    "a mask of both axes": (lambda s, x: x + s.v[s.v > 0].sum(), {"add": 1}),
    "two masks": (lambda s, x: x + s.v[s.mask].sum(0) * s.v[~s.mask].mean(), {"add": 1}),
    "where": (lambda s, x: x + s.v[torch.where(s.mask)[0]].sum(0), {"add": 1}),
    "an integer read off": (lambda s, x: x * s.counts[1].item(), {"mul": 1}),
    "a float read off": (lambda s, x: x * s.short[1].item() + 1.0, {"mul": 1, "add": 1}),
    "nothing picked": (lambda s, x: x + s.v[s.v[:, 0] > 100].sum(0), {"add": 1}),
    "columns of the data": (lambda s, x: s.linear(x)[:, s.mask] + 1.0, {"linear": 1, "index": 1}),
    "a scale through columns": (
        lambda s, x: s.linear(x)[:, s.mask] * s.short, {"linear": 1, "index": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", few(FOLDED, 10))
def test_folds_what_constants_decide(name: str) -> None:
    forward, wanted = FOLDED[name]
    net = _Net(forward)
    x = torch.randn(5, 8, dtype=torch.float64)
    done = refold.compile_for_inference(deepcopy(net), (x,))
    assert str(done.report)
    for batch in (1, 3, 5):
        x = torch.randn(batch, 8, dtype=torch.float64)
        assert relative_error(call(done, (x,)), call(net, (x,))) <= EXACT
    assert dict(census(done.graph_module.graph)) == wanted


def test_what_depends_on_data_stays() -> None:
    net = _Net(lambda s, x: s.linear(x[x[:, 0] > 0]) + s.v[s.mask].sum(0))
    done = refold.compile_for_inference(deepcopy(net), torch.randn(5, 8, dtype=torch.float64))
    for _ in range(3):
        x = torch.randn(5, 8, dtype=torch.float64)
        assert relative_error(call(done, (x,)), call(net, (x,))) <= EXACT
    left = census(done.graph_module.graph)
    assert left["index"] == 1, "the rows of the data are picked in each call, those of v are not"


def test_a_mask_that_the_model_writes_decides_nothing() -> None:
    def forward(s: Any, x: torch.Tensor) -> torch.Tensor:
        y = x + s.v[s.mask].sum(0)
        s.mask.copy_(s.mask.roll(1) & s.mask)
        return y

    net = _Net(forward)
    x = torch.randn(5, 8, dtype=torch.float64)
    done = refold.compile_for_inference(deepcopy(net), (x,))
    for _ in range(3):
        assert relative_error(call(done, (x,)), call(net, (x,))) <= EXACT


def test_what_the_user_excludes_is_not_looked_at() -> None:
    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = _Net(lambda s, x: x + s.v[s.mask].sum(0))

        def forward(self, x: torch.Tensor) -> Any:
            return self.rows(x) * 2.0

    net, x = Picked().eval(), torch.randn(5, 8, dtype=torch.float64)
    done = refold.compile_for_inference(deepcopy(net), (x,), exclude=["rows"])
    assert relative_error(call(done, (x,)), call(net, (x,))) <= EXACT
    assert census(done.graph_module.graph)["index"] == 1


def test_an_excluded_reader_still_reads_the_call() -> None:
    class Scale(nn.Module):
        def forward(self, x: torch.Tensor, n: int) -> torch.Tensor:
            return x * n

    net, x = _Net(lambda s, x: s.scale(x, s.v[s.mask].shape[0]) + 1.0), torch.randn(5, 8).double()
    net.scale = Scale()
    done = refold.compile_for_inference(deepcopy(net), (x,), exclude=["scale"])
    assert relative_error(call(done, (x,)), call(net, (x,))) <= EXACT
    mul = find(done.graph_module, "mul")
    assert isinstance(mul.args[1], torch.fx.Node)
    done = refold.compile_for_inference(deepcopy(net), (x,))
    assert find(done.graph_module, "mul").args[1] == 4


@pytest.mark.parametrize("name", ["a sum", "columns of the data", "a number computed from it"])
def test_a_failure_decides_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, failures: list[Decline]
) -> None:
    learn = Edit.learn

    def failing(self: Edit, values: Mapping[torch.fx.Node, Any]) -> None:
        learn(self, values)
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(Edit, "learn", failing)
    net, x = _Net(FOLDED[name][0]), torch.randn(5, 8, dtype=torch.float64)
    gm = trace(net, (x,), {}).graph_module
    before = str(gm.graph)
    result = PassResult()
    assert decide_sizes(Editor(gm, "test", result)) is None
    assert str(gm.graph) == before
    assert [d.reason for d in result.declined] == ["internal error: ZeroDivisionError: planted"]
    done = refold.compile_for_inference(deepcopy(net), (x,))
    assert relative_error(call(done, (x,)), call(net, (x,))) <= EXACT
    assert failures
    failures.clear()
