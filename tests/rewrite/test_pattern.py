from __future__ import annotations

import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from refold.errors import Declined, RefoldError
from refold.graph import constants
from refold.rewrite.pattern import (
    Attr,
    Call,
    Const,
    Many,
    Pattern,
    Sum,
    Var,
    maybe,
    root_targets,
)
from tests.tracing import find, trace

aten = torch.ops.aten
x, y = Var("x"), Var("y")
T = torch.ones(2, 4, 3, 3)


class Affine(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.randn(4, 1, 1))
        self.h = nn.Parameter(torch.randn(4, 1, 1))
        self.function = function

    def forward(self, value):
        return self.function(value, self.g, self.h)


def matches(pattern: Pattern, graph_module, name: str | None = None):
    root = find(graph_module, name) if name else graph_module.graph.output_node().args[0][0]
    return list(pattern.matches(root, constants.constant_nodes(graph_module.graph)))


@pytest.mark.parametrize(
    "function",
    [
        lambda v, g, h: v * g + h,
        lambda v, g, h: g * v + h,
        lambda v, g, h: h + v * g,
        lambda v, g, h: h + g * v,
    ],
)
def test_operands_of_add_and_mul_commute(function) -> None:
    pattern = Call(aten.add, Call(aten.mul, x, Const("g")), Const("h"))
    (match,) = matches(pattern, trace(Affine(function), T))
    assert match["x"].op == "placeholder"
    assert (match["g"].target, match["h"].target) == ("function_g", "function_h") or (
        match["g"].target,
        match["h"].target,
    ) == ("g", "h")
    assert [n.name for n in match.nodes] == ["add", "mul"]


def test_operands_of_sub_and_div_keep_their_places() -> None:
    pattern = Call((aten.sub, aten.div), x, Const("c"))
    assert matches(pattern, trace(lambda v: v - 2.0, T))
    assert not matches(pattern, trace(Affine(lambda v, g, h: g / v), T))
    assert not matches(Call(aten.sub, x, Const("c")), trace(lambda v: 2.0 - v, T))


def test_an_unmentioned_alpha_does_not_match() -> None:
    scaled = trace(lambda a, b: torch.add(a, b, alpha=2), T, T)
    assert not matches(Call(aten.add, x, y), scaled)
    assert matches(Call(aten.add, x, y, alpha=2), scaled)
    assert matches(Call(aten.add, x, y, alpha=Attr("alpha")), scaled)[0]["alpha"] == 2
    assert matches(Call(aten.add, x, y, ...), scaled)
    assert matches(Call(aten.add, x, y, alpha=1), trace(lambda a, b: a + b, T, T))


def test_operands_with_alpha_do_not_commute() -> None:
    graph = trace(Affine(lambda v, g, h: torch.add(g, v, alpha=2)), T)
    assert not matches(Call(aten.add, x, Const("c"), alpha=2), trace(
        Affine(lambda v, g, h: torch.add(torch.relu(g), v, alpha=2) * v), T
    ), "add")  # fmt: skip
    assert matches(Call(aten.add, Const("c"), x, alpha=2), graph)


def test_explicit_defaults_equal_omitted_ones() -> None:
    pattern = Call(aten.conv2d, x, Var("w"), Var("b"))
    weight, bias = torch.ones(4, 4, 1, 1), torch.ones(4)
    plain = trace(lambda v, w, b: F.conv2d(v, w, b, stride=(1, 1), groups=1), T, weight, bias)
    strided = trace(lambda v, w, b: F.conv2d(v, w, b, stride=2), T, weight, bias)
    assert matches(pattern, plain)
    assert not matches(pattern, strided)
    assert matches(Call(aten.conv2d, x, Var("w"), Var("b"), stride=[2, 2]), strided)


def test_an_inner_call_with_another_user_does_not_match() -> None:
    pattern = Call(aten.relu, Call(aten.neg, x))
    graph = trace(lambda v: (torch.relu(-v), -v), T)
    assert matches(pattern, graph)
    tapped = trace(lambda v: (lambda n: (torch.relu(n), n + 1))(-v), T)
    assert not matches(pattern, tapped)
    assert matches(Call(aten.relu, Call(aten.neg, x).shared()), tapped)
    assert matches(Call(aten.relu, Call(aten.neg, x).users(2)), tapped)
    assert not matches(Call(aten.relu, Call(aten.neg, x).users(1)), tapped)


def test_users_inside_the_match_are_no_obstacle() -> None:
    inner = Call(aten.neg, x).named("n")
    silu = Call(aten.mul, inner, Call(aten.sigmoid, inner))
    graph = trace(lambda v: (lambda n: n * torch.sigmoid(n))(-v), T)
    (match, *_) = matches(silu, graph)
    assert match["n"].name == "neg"


def test_the_same_name_is_the_same_node() -> None:
    pattern = Call(aten.mul, x, Call(aten.sigmoid, x))
    assert matches(pattern, trace(lambda a, b: a * torch.sigmoid(a), T, T))
    assert matches(pattern, trace(lambda a, b: torch.sigmoid(a) * a, T, T))
    assert not matches(pattern, trace(lambda a, b: a * torch.sigmoid(b), T, T))


def test_alternatives_optional_parts_and_none() -> None:
    pattern = Call(aten.neg, maybe(Call(aten.relu, x)))
    assert matches(pattern, trace(lambda v: -torch.relu(v), T))[0]["x"].op == "placeholder"
    assert matches(pattern, trace(lambda v: -torch.sigmoid(v), T))[0]["x"].name == "sigmoid"
    either = Call(aten.relu, x) | Call(aten.sigmoid, x)
    assert matches(either, trace(lambda v: torch.sigmoid(v), T))
    assert root_targets([either]) == {aten.relu, aten.sigmoid}
    linear = Call(aten.linear, x, Const("w"), Const("b") | None)
    assert matches(linear, trace(nn.Linear(3, 3), T))[0].get("b") is not None
    assert matches(linear, trace(nn.Linear(3, 3, bias=False), T))[0].get("b") is None


def test_constants_are_parameters_numbers_and_what_depends_on_them_alone() -> None:
    pattern = Call(aten.mul, x, Const("c"))
    assert matches(pattern, trace(lambda v: v * 3, T))[0]["c"] == 3
    assert matches(pattern, trace(Affine(lambda v, g, h: v * (g + h)), T))
    assert not matches(pattern, trace(lambda a, b: a * b, T, T))


def test_literals_tell_numbers_from_booleans() -> None:
    assert matches(Call(aten.mul, x, 1), trace(lambda v: v * 1.0, T))
    assert not matches(Call(aten.mul, x, True), trace(lambda v: v * 1, T))
    assert not matches(
        Call(aten.dropout, x, Attr("p"), 0), trace(lambda v: F.dropout(v, 0.5, False), T)
    )


def test_predicates_and_lists() -> None:
    graph = trace(lambda a, b, c: torch.cat([torch.relu(a), b, c], 1), T, T, T)
    assert matches(Call(aten.cat, [Call(aten.relu, x), Many("rest")], 1), graph)[0]["rest"][1].name
    assert len(matches(Call(aten.cat, [Many("all")], ...), graph)[0]["all"]) == 3
    assert not matches(Call(aten.cat, [x, y], 1), graph)
    assert not matches(Call(aten.cat, [Many("all", Call(aten.relu, Var("e")))], 1), graph)
    positive = Call(aten.add, x, Const("c").where(lambda c: c > 0))
    assert matches(positive, trace(lambda v: v + 1, T))
    assert not matches(positive, trace(lambda v: v + (-1), T))


def test_elements_of_many_are_covered_by_the_match() -> None:
    graph = trace(lambda a, b: torch.cat([torch.relu(a), torch.relu(b)], 1), T, T)
    (match,) = matches(Call(aten.cat, [Many("parts", Call(aten.relu, Var("e")))], 1), graph)
    assert len(match.nodes) == 3
    tapped = trace(lambda a: (lambda r: (torch.cat([r, r], 1), r * 2))(torch.relu(a)), T)
    assert not matches(Call(aten.cat, [Many("p", Call(aten.relu, Var("e")))], 1), tapped)


def test_sums_are_flattened() -> None:
    graph = trace(lambda a, b, c: (a + (torch.relu(b) + c)) + -a, T, T, T)
    pattern = Sum(Call(aten.neg, x), Call(aten.relu, y), Many("rest"))
    match = matches(pattern, graph)[0]
    assert match["x"].name == "args_0"
    assert [n.name for n in match["rest"]] == ["args_0", "args_2"]
    assert len(match.nodes) == 5
    assert not matches(Sum(Call(aten.neg, x), Call(aten.relu, y)), graph)


def test_sums_stop_at_alpha_other_shapes_and_other_users() -> None:
    terms = Sum(Many("terms"))
    scaled = trace(lambda a, b: torch.add(a + b, a, alpha=2) + b, T, T)
    assert len(matches(terms, scaled)[0]["terms"]) == 2
    broadcast = trace(lambda a, b: a + (b[:1] + b[:1]), T, T)
    assert len(matches(terms, broadcast)[0]["terms"]) == 2
    shared = trace(lambda a, b: (lambda s: (s + a, s * 2))(a + b), T, T)
    assert len(matches(terms, shared)[0]["terms"]) == 2


def test_tuples_are_read_through_getitem() -> None:
    graph = trace(lambda v: torch.chunk(v, 2, 1)[1], T)
    pattern = Call(operator.getitem, Call(aten.chunk, x, 2, 1).shared(), Attr("index"))
    assert matches(pattern, graph)[0]["index"] == 1


def test_pinned_nodes_do_not_match() -> None:
    graph = trace(lambda v: torch.relu(-v), T)
    find(graph, "neg").meta["refold_pinned"] = True
    assert not matches(Call(aten.relu, Call(aten.neg, x)), graph)
    assert matches(Call(aten.relu, x), graph)


def test_tensor_of_a_constant_that_the_graph_computes_declines() -> None:
    graph = trace(Affine(lambda v, g, h: v * (g + h)), T)
    (match,) = matches(Call(aten.mul, x, Const("c")), graph)
    with pytest.raises(Declined, match="fold-constants"):
        match.tensor("c")


def test_a_pattern_without_an_operator_is_refused() -> None:
    with pytest.raises(RefoldError, match="operator at its root"):
        root_targets([Var("x")])
