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
    _same_value,
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


NEG, RELU = Call(aten.neg, x), Call(aten.relu, Call(aten.neg, y))


@pytest.mark.parametrize(
    ("pattern", "depth", "targets"),
    [
        (x, 0, None),
        (Const("c"), 0, None),
        (NEG, 1, {aten.neg}),
        (RELU, 2, {aten.relu}),
        (Call((aten.add, aten.sub), x, RELU), 3, {aten.add, aten.sub}),
        (Call(aten.add, NEG, RELU, alpha=x), 3, {aten.add}),
        (Call(aten.add, x, y, alpha=NEG), 2, {aten.add}),
        (RELU.named("r"), 2, {aten.relu}),
        (RELU.where(lambda n: True), 2, {aten.relu}),
        (NEG | RELU, 2, {aten.neg, aten.relu}),
        (RELU | NEG, 2, {aten.neg, aten.relu}),
        (NEG | x, 1, None),
        (maybe(Call(aten.relu, NEG)), 2, {aten.relu, aten.neg}),
        (Call(aten.cat, [x, RELU, NEG], 1), 3, {aten.cat}),
        (Call(aten.cat, [Many("a", RELU), x], 1), 3, {aten.cat}),
        (Call(aten.cat, [Many("a")], 1), 1, {aten.cat}),
        (Sum(NEG, Many("rest")), 2, {aten.add.Tensor}),
        (Sum(x, Many("rest", RELU)), 3, {aten.add.Tensor}),
        (Sum(x, y), 1, {aten.add.Tensor}),
    ],
)
def test_how_deep_a_pattern_looks_and_where_it_starts(pattern, depth, targets) -> None:
    """A rewrite below may make it match: nodes so many calls above are looked at again."""
    assert pattern.depth() == depth
    assert pattern.targets() == targets


def test_lists_match_element_by_element_around_the_one_that_takes_many() -> None:
    graph = trace(lambda a, b, c: torch.cat([-a, b, c, torch.relu(a)], 1), T, T, T)

    def found(*elements):
        return [
            {name: len(v) if isinstance(v, tuple) else v.name for name, v in m.bindings.items()}
            for m in matches(Call(aten.cat, list(elements), 1), graph)
        ]

    last = Call(aten.relu, Var("l"))
    assert found(Call(aten.neg, x), Many("m"), last) == [{"x": "args_0", "l": "args_0", "m": 2}]
    assert found(Many("m"), y, last) == [{"y": "args_2", "l": "args_0", "m": 2}]
    assert found(Call(aten.neg, x), y, Var("z"), last, Many("m"))[0]["m"] == 0
    assert len(found(x, y, Var("z"), last)) == 1
    assert not found(x, y, Var("z"))
    assert not found(x, y, Var("z"), last, Var("v"))
    assert not found(x, y, Var("z"), last, Var("v"), Many("m"))
    assert not found(Many("m"), last, x)
    assert not matches(Call(aten.neg, [x]), trace(lambda v: -v, T))


def test_numbers_of_users_are_counted_inside_and_outside() -> None:
    graph = trace(lambda v: (lambda n: (torch.relu(n), n * 2))(-v), T)
    for count, fits in ((1, False), (2, True), (3, False)):
        assert bool(matches(Call(aten.relu, NEG.users(count)), graph)) is fits
    assert not matches(Call(aten.relu, NEG), graph)
    assert matches(Call(aten.relu, NEG.shared()), graph)
    assert not NEG.shared()._exclusive
    assert NEG._exclusive  # it is a pattern of its own


def test_arguments_by_name_and_those_that_nobody_mentioned() -> None:
    graph = trace(lambda v: torch.add(v, v.relu(), alpha=2), T)
    assert matches(Call(aten.add, x, Call(aten.relu, x), alpha=2), graph)
    assert matches(Call(aten.add, x, other=Call(aten.relu, x), alpha=2), graph)
    assert matches(Call(aten.add, x, ...), graph)
    assert matches(Call(aten.add, ..., alpha=2), graph)
    assert not matches(Call(aten.add, x, y, alpha=3), graph)
    assert not matches(Call(aten.add, x, y), graph)
    assert not matches(Call(aten.add, x, y, other=y, alpha=2), graph)  # told twice
    assert not matches(Call(aten.add, x, y, alpha=2, beta=1), graph)  # not of this operator
    assert not matches(Call(aten.add, x, ..., beta=1), graph)
    assert not matches(Call(aten.add, x, y, 2, 3), graph)
    chunk = trace(lambda v: torch.chunk(v, 2, 1)[1], T)
    part = Call(aten.chunk, x, 2, 1).shared()
    assert not matches(Call(operator.getitem, part), chunk)
    assert not matches(Call(operator.getitem, part, 0), chunk)
    assert not matches(Call(operator.getitem, part, index=1), chunk)


def test_values_that_are_bound_twice_are_the_same_value() -> None:
    graph = trace(lambda v: torch.clamp(v, 2, 2) + v.clamp(1, 3), T)
    same = Call(aten.clamp, x, Attr("n"), Attr("n"))
    assert matches(same, graph, "clamp") == []
    assert matches(Call(aten.add, same, y), graph)
    twice = trace(lambda v: v.neg() + v.neg(), T)
    assert not matches(Call(aten.add, NEG.named("n"), NEG.named("n")), twice)
    once = trace(lambda v: (lambda n: n + n)(v.neg()), T)
    (first, *_) = matches(Call(aten.add, NEG.named("n"), NEG.named("n")), once)
    assert first["n"] is find(once, "neg")
    assert first.get("n") is first["n"]
    assert (first.get("m"), first.get("m", 3)) == (None, 3)


def test_attributes_are_what_is_no_tensor() -> None:
    graph = trace(lambda v: torch.cat([v, v], 1), T)
    assert matches(Call(aten.cat, Var("list"), Attr("axis")), graph) == []
    assert matches(Call(aten.cat, Attr("list"), 1), graph) == []
    picked = trace(lambda v, i: v[:, i], torch.randn(2, 3), torch.tensor([0, 2]))
    assert matches(Call(aten.index, x, Attr("list")), picked) == []
    turned = trace(lambda v: v.permute(0, 2, 3, 1), T)
    (match,) = matches(Call(aten.permute, x, Attr("order")), turned)
    assert match["order"] == [0, 2, 3, 1]
    assert not matches(Call(aten.permute, x, [0, 2, 1, 3]), turned)
    assert not matches(Call(aten.mul, x, Const("c")), trace(lambda v: v * v.relu(), T))


def test_a_number_that_is_bound_is_a_tensor_too() -> None:
    (match,) = matches(Call(aten.mul, x, Const("c")), trace(lambda v: v * 2.5, T))
    assert match.tensor("c").item() == 2.5


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (1, 1.0, True), (1, True, False), (False, 0, False), (True, True, True), ("a", "a", True),
        ("a", "b", False), ("1", 1, False), (1, "1", False), ([1, 2], (1, 2), True),
        ([1, 2], [1], False), ([1, 2], [1, 3], False), ([1, True], [1, 1], False),
        (None, None, True), (None, 0, False), ([1], 1, False),
        (torch.contiguous_format, 0, True), (0, torch.contiguous_format, True),
        (torch.channels_last, 0, False), (torch.channels_last, torch.channels_last, True),
        (torch.channels_last, torch.contiguous_format, False),
    ],
)  # fmt: skip
def test_which_arguments_are_the_same(a, b, same) -> None:
    assert _same_value(a, b) is same


def test_sums_of_another_dtype_and_excluded_ones_are_terms() -> None:
    terms = Sum(Many("terms"))
    widened = trace(lambda a, b: a + (b.half() + b.half()), T, T)
    assert len(matches(terms, widened)[0]["terms"]) == 2
    graph = trace(lambda a, b: a + (b + a) + b, T, T)
    assert [n.name for n in matches(terms, graph)[0]["terms"]] == [
        "args_0", "args_1", "args_0", "args_1",
    ]  # fmt: skip
    next(n for n in graph.graph.nodes if n.name == "add").meta["refold_pinned"] = True
    assert len(matches(terms, graph)[0]["terms"]) == 3
    assert not matches(Sum(x, y, x), graph)
    find(graph, "add").meta["refold_pinned"] = True
    assert not matches(terms, graph)
    assert not matches(Sum(x, y), trace(lambda a, b: torch.add(a, b, alpha=2), T, T))


def test_a_sum_of_more_terms_than_there_are_is_none() -> None:
    graph = trace(lambda a, b: a + b, T, T)
    assert not matches(Sum(x, y, Var("z")), graph)
    assert not matches(Sum(x, y, Var("z"), Many("rest")), graph)
    assert matches(Sum(x, y, Many("rest")), graph)[0]["rest"] == ()
    assert matches(Sum(x, y), graph)
