"""Identities of numbers: what goes, what becomes one call, and what only looks like it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from refold.passes.prepare.clean_up import CleanUp
from tests.passes.prepare.test_clean_up import T, Weighted, assert_equal, clean
from tests.tracing import find, ops, trace


def framed(function):
    """Puts a function between two calls that no identity knows."""
    return lambda v, *rest: torch.sigmoid(function(torch.sin(v), *rest))


def left(function, *inputs, constant=None, **options) -> Counter[str]:
    """Calls of a function that are left; numbers are compared bit for bit."""
    made = framed(function)
    graph, _ = clean(
        made if constant is None else Weighted(made, constant), *(inputs or (T,)), **options
    )
    return ops(graph) - Counter(sin=1, sigmoid=1)


def resized(v, **how):
    return F.interpolate(v, **how)


@pytest.mark.parametrize(
    "function",
    [
        lambda v: v**1,
        lambda v: torch.pow(v, 1.0),
        lambda v: v + torch.zeros_like(v),
        lambda v: torch.zeros_like(v) + v,
        lambda v: v - torch.zeros_like(v.exp()),
        lambda v: v * torch.ones_like(v),
        lambda v: v / torch.full_like(v, 1),
        lambda v: v + torch.zeros(v.shape[0], 4, 6, 6),
        lambda v: v + v.new_zeros(6),
        lambda v: resized(v, size=(6, 6)),
        lambda v: resized(v, scale_factor=1.0),
        lambda v: resized(v, scale_factor=1, mode="nearest-exact"),
        lambda v: resized(v, size=(6, 6), mode="bilinear"),
        lambda v: resized(v, size=(6, 6), mode="bilinear", align_corners=True),
        lambda v: resized(v, size=(6, 6), mode="bicubic"),
    ],
)
def test_what_changes_nothing_goes(function) -> None:
    assert not left(function)
    assert not left(function, dynamic=True)


@pytest.mark.parametrize(
    ("function", "constant"),
    [
        (torch.pow, torch.ones(())),
        (lambda v, c: torch.where(c, v, v.exp()), torch.ones(4, 1, 1).bool()),
        (lambda v, c: torch.where(c, v.exp(), v), torch.zeros(1).bool()),
    ],
)
def test_constants_that_change_nothing_go(function, constant) -> None:
    assert not left(function, constant=constant)


@pytest.mark.parametrize(
    ("function", "constant"),
    [
        (lambda v, c: (v > 0) & c, torch.ones(4, 1, 1).bool()),
        (lambda v, c: c & (v > 0), torch.ones(1).bool()),
        (lambda v, c: torch.logical_and(v > 0, c), torch.ones(1).bool()),
        (lambda v, c: (v > 0) | c, torch.zeros(1).bool()),
        (lambda v, c: torch.logical_or(v > 0, c), torch.zeros(1).bool()),
    ],
)
def test_truth_values_that_change_nothing_go(function, constant) -> None:
    assert left(function, constant=constant) == {"gt": 1}


@pytest.mark.parametrize(
    ("function", "constant"),
    [
        (torch.pow, torch.full((), 1.5)),
        (lambda v, c: (v > 0) & c, torch.tensor([True, False, True, True]).view(4, 1, 1)),
        (lambda v, c: (v > 0) | c, torch.ones(1).bool()),
        (lambda v, c: (v * 9).long() & c, torch.ones(1).long()),  # of integers, their last bit
        (lambda v, c: torch.where(c, v, v.exp()), torch.arange(6) > 2),
        (lambda v, c: torch.where(c, v[:, :1], v.exp()), torch.ones(4, 1, 1).bool()),
    ],
)  # fmt: skip
def test_constants_that_change_something_stay(function, constant) -> None:
    made = Weighted(framed(function), constant)
    assert ops(clean(made, T)[0]) == ops(trace(made, T))


@pytest.mark.parametrize(
    "function",
    [
        lambda v: v + torch.zeros_like(v.double()),
        lambda v: v[:, :1] + torch.zeros_like(v),
        lambda v: torch.zeros_like(v) + v.transpose(2, 3),  # whose strides the sum may have
        lambda v: resized(v, scale_factor=1.05),
        lambda v: resized(v, size=(6, 12)),
        lambda v: torch.round(torch.floor(v * 9), decimals=-1),
        lambda v: torch.round(torch.floor(v * 9) / 2),
        lambda v: F.pad(F.pad(v, (1, 1), value=1.0), (0, 0, 1, 1)),
        lambda v: F.pad(F.pad(v, (1, 1)), (-2, 0)),
        lambda v: F.pad(F.pad(v, (1, 1, 0, 0), mode="reflect"), (1, 1)),
    ],
)
def test_what_only_looks_like_nothing_stays(function) -> None:
    made = framed(function)
    graph = trace(made, T)
    before, expected = ops(graph), graph(T)
    CleanUp().run(graph)
    graph.recompile()
    assert ops(graph) == before
    assert_equal(graph(T), expected)


@pytest.mark.parametrize("first", [torch.floor, torch.ceil, torch.round, torch.trunc])
@pytest.mark.parametrize("second", [torch.floor, torch.ceil, torch.round, torch.trunc])
def test_a_rounding_of_whole_numbers_goes(first, second) -> None:
    assert left(lambda v: second(first(v * 9))) == {"mul": 1, first.__name__: 1}


def bounded(low, high):
    return lambda v: torch.clamp(v, low, high)


@pytest.mark.parametrize(
    ("functions", "expected", "bounds"),
    [
        ((bounded(-0.5, 0.5), F.relu), "clamp", (0.0, 0.5)),
        ((F.relu, bounded(-0.5, 0.5)), "clamp", (0.0, 0.5)),
        ((F.relu, bounded(None, 6)), "relu6", ()),
        ((bounded(-0.5, 0.5), bounded(-0.2, 0.7)), "clamp", (-0.2, 0.5)),
        ((bounded(-0.5, -0.2), bounded(0.1, 0.7)), "clamp", (0.1, 0.1)),
        ((bounded(0.3, 0.7), bounded(-0.5, 0.1)), "clamp", (0.1, 0.1)),
        ((bounded(-0.5, 0.5), bounded(-0.7, 0.7)), "clamp", (-0.5, 0.5)),
        ((F.hardtanh, F.relu6), "clamp", (0.0, 1.0)),
        ((bounded(-0.5, None), bounded(None, 0.2)), "clamp", (-0.5, 0.2)),
        ((bounded(-0.5, None), bounded(0, None)), "relu", ()),
    ],
)
def test_bounds_of_bounds_are_one(functions, expected, bounds) -> None:
    graph, _ = clean(framed(lambda v: functions[1](functions[0](v))), T)
    call = find(graph, expected)
    assert tuple(call.args[1:]) == bounds
    assert sum(ops(graph).values()) == 3


def test_a_bound_that_does_nothing_goes_although_the_first_has_other_readers() -> None:
    double = lambda v: (u := torch.clamp(v, -0.5, 0.5)) * F.hardtanh(u)
    assert left(double) == {"clamp": 1, "mul": 1}


def test_a_bound_of_one_with_other_readers_stays() -> None:
    both = lambda v: (u := torch.clamp(v, -0.5, 0.5)) * torch.clamp(u, -0.2, 0.7)
    graph, result = clean(framed(both), T)
    assert find(graph, "clamp").args[1:] == (-0.2, 0.7)
    assert not result.applied


def test_bounds_pass_nan() -> None:
    bad = T.clone()
    bad[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    graph, _ = clean(lambda v: torch.exp(F.relu(torch.clamp(v.neg(), -0.5, 0.5))), bad)
    assert ops(graph) == {"neg": 1, "clamp": 1, "exp": 1}


def test_the_larger_of_a_number_and_the_smaller_of_another_is_a_bound() -> None:
    class Limited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("low", torch.tensor(-0.5))
            self.register_buffer("high", torch.tensor([0.25]))

        def forward(self, v):
            return torch.exp(torch.minimum(self.high, torch.maximum(v.sin(), self.low)))

    graph, _ = clean(Limited(), T)
    assert ops(graph) == {"sin": 1, "clamp": 1, "exp": 1}
    assert find(graph, "clamp").args[1:] == (-0.5, 0.25)


def test_bounds_the_wrong_way_round_stay() -> None:
    assert left(lambda v: F.relu(torch.clamp(v, 0.5, -0.5))) == {"relu": 1, "clamp": 1}


def test_a_negated_condition_changes_the_sides() -> None:
    assert left(lambda v: torch.where(~(v > 0), v, v.exp())) == {"gt": 1, "exp": 1, "where": 1}
    integers = lambda v: torch.where(torch.logical_not((v * 9).long()), v, v.exp())
    assert left(integers)["logical_not"] == 1  # ~ of a number, which is no condition


def test_what_only_gave_its_shape_is_not_computed() -> None:
    graph = trace(_Idle(nn.Conv2d(4, 4, 1)), T)
    assert ops(graph)["conv2d"] == 1
    CleanUp().run(graph)
    assert ops(graph) == {"sin": 1, "exp": 1}


class _Idle(nn.Module):
    """Its layer only gives a shape."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, v):
        u = v.sin()
        return torch.exp(u + torch.zeros_like(self.layer(u)))


def test_a_filled_tensor_is_the_number_that_its_type_holds() -> None:
    graph, _ = clean(framed(lambda v: v * torch.full_like(v, 0.1)), T)
    call = find(graph, "mul")
    assert call.args[1] == float(torch.tensor(0.1)) != 0.1
    half = clean(framed(lambda v: v + torch.full_like(v, 0.1)), T.half())[0]
    assert find(half, "add").args[1] == float(torch.tensor(0.1).half())


def test_a_filled_tensor_that_is_written_stays() -> None:
    def written(v):
        u = torch.zeros_like(v)
        u[:, 0] = 1
        return torch.exp(v.sin() + u)

    assert ops(clean(written, T)[0])["zeros_like"] == 1


def test_a_sign_before_a_sum_goes_where_nothing_follows() -> None:
    graph = trace(framed(lambda v: v.exp() + v.neg() - v.cos().neg()), T)
    expected = graph(T)
    CleanUp().run(graph)
    assert ops(graph)["neg"] == 2  # it may go into a layer yet
    CleanUp(last=True).run(graph)
    graph.recompile()
    assert_equal(graph(T), expected)
    assert "neg" not in ops(graph)
