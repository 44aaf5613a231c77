from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from refold.errors import Declined, UsageError
from refold.graph import nodes, provenance
from refold.rewrite.pattern import Call, Const, Var
from refold.rewrite.result import Decline, Pass
from refold.rewrite.rule import RewriteRule, rule_from_functions
from tests.tracing import find, ops, trace

aten = torch.ops.aten
x = Var("x")
T = torch.randn(2, 4, 3, 3)


class Hardswish(RewriteRule):
    name = "hardswish"
    pattern = Call(aten.div, Call(aten.mul, x, Call(aten.relu6, Call(aten.add, x, 3))), 6)

    def rewrite(self, match, build):
        return build(aten.hardswish, match["x"])


def test_a_rule_by_class_rewrites_and_keeps_the_numbers() -> None:
    graph = trace(lambda v: (v * F.relu6(v + 3)) / 6, T)
    expected = graph(T)
    result = Hardswish().run(graph)
    graph.recompile()
    assert ops(graph) == {"hardswish": 1}
    torch.testing.assert_close(graph(T), expected)
    (record,) = result.applied
    assert sorted(record.kinds) == ["add", "div", "mul", "relu6"]
    assert record.added == (find(graph, "hardswish").name,)
    assert result.modified


def test_a_rule_is_a_pass() -> None:
    assert isinstance(Hardswish(), Pass)


def test_provenance_joins_the_matched_nodes() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Sigmoid())
    rule = rule_from_functions(
        "swap", lambda v: torch.sigmoid(torch.relu(v)), lambda v: torch.clamp_min(v, 0).sigmoid()
    )
    graph = trace(model, T)
    rule.run(graph)
    origin = provenance.of(find(graph, "sigmoid"))
    assert origin == {"nodes": ["relu", "sigmoid"], "modules": ["0", "1"], "rules": ["swap"]}


class Activation(nn.Module):
    def forward(self, v):
        return (v * F.relu6(v + 3)) / 6


def test_a_check_declines_with_its_reason() -> None:
    class Never(Hardswish):
        def check(self, match):
            return "not today"

    graph = trace(Activation(), T)
    result = Never().run(graph)
    assert not result.modified
    assert [(d.rule, d.node, d.reason) for d in result.declined] == [
        ("hardswish", "div", "not today")
    ]
    assert result.declined[0].source.split(":")[0].endswith("test_rule.py")


def test_a_check_may_return_a_full_record() -> None:
    class Never(Hardswish):
        def check(self, match):
            return Decline(self.name, match.root.name, "no", hint="try later")

    graph = trace(lambda v: (v * F.relu6(v + 3)) / 6, T)
    assert Never().run(graph).declined[0].hint == "try later"


@pytest.mark.parametrize(
    ("replacement", "reason"),
    [
        (lambda b, v: b(aten.sum, v, [0]), "shape"),
        (lambda b, v: b(aten.to, v, torch.float64), "float64"),
        (lambda b, v: b(aten.chunk, v, 2), "values"),
        (lambda b, v: None, "did not return a node"),
    ],
)
def test_a_careless_rewrite_is_rolled_back(replacement, reason) -> None:
    class Careless(RewriteRule):
        name = "careless"
        pattern = Call(aten.relu, x)

        def rewrite(self, match, build):
            build.constant("unused", torch.ones(3))
            return replacement(build, match["x"])

    graph = trace(lambda v: torch.relu(v) + 1, T)
    before = [n.name for n in graph.graph.nodes]
    result = Careless().run(graph)
    assert not result.modified
    assert not result.applied
    assert reason in result.declined[0].reason
    assert [n.name for n in graph.graph.nodes] == before


def test_a_rewrite_may_decline_late() -> None:
    class Late(RewriteRule):
        name = "late"
        pattern = Call(aten.relu, x)

        def rewrite(self, match, build):
            build(aten.neg, match["x"])
            raise Declined("on second thoughts, no")

    graph = trace(lambda v: torch.relu(v) + 1, T)
    result = Late().run(graph)
    assert ops(graph) == {"relu": 1, "add": 1}
    assert result.declined[0].reason == "on second thoughts, no"


def test_an_error_in_a_rule_costs_its_rewrite_and_names_the_place(failures) -> None:
    class Broken(RewriteRule):
        name = "broken"
        pattern = Call(aten.relu, x)

        def rewrite(self, match, build):
            return match["missing"]

    graph = trace(lambda v: torch.relu(v) + 1, T)
    (record,) = Broken().run(graph).declined
    assert (record.rule, record.node, record.failed) == ("broken", "relu", True)
    assert "KeyError" in record.reason
    assert ".py:" in record.source
    assert ops(graph) == {"relu": 1, "add": 1}
    assert failures == [record]
    failures.clear()


def test_a_rewrite_that_reads_what_it_replaces_is_declined() -> None:
    class Selfish(RewriteRule):
        name = "selfish"
        pattern = Call(aten.relu, x)

        def rewrite(self, match, build):
            return build(aten.neg, match.root)

    result = Selfish().run(trace(lambda v: torch.relu(v) + 1, T))
    assert "reads the node that it replaces" in result.declined[0].reason


def test_a_rewrite_that_would_break_a_view_is_declined() -> None:
    class Transposed(RewriteRule):
        name = "transposed"
        pattern = Call(aten.relu, x)

        def rewrite(self, match, build):
            turned = build(aten.transpose, match["x"], 2, 3)
            copied = build(aten.clone, turned, memory_format=torch.contiguous_format)
            return build(aten.transpose, copied, 2, 3)

    graph = trace(lambda v: torch.relu(v).view(2, -1) + 1, T)
    result = Transposed().run(graph)
    assert "view does not accept other strides" in result.declined[0].reason


def test_a_rule_by_example_with_constants() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g = nn.Parameter(torch.randn(4, 1, 1))
            self.h = nn.Parameter(torch.randn(4, 1, 1))

        def forward(self, v):
            return (self.h + v) * self.g

    def before(v, *, g, h):
        return (v + h) * g

    def after(v, *, g, h):
        return torch.addcmul(h * g, v, g)

    rule = rule_from_functions("scale-then-shift", before, after, exactness="reassociates")
    graph = trace(Model(), T)
    expected = graph(T)
    assert rule.run(graph).modified
    graph.recompile()
    assert ops(graph) == {"mul": 1, "addcmul": 1}
    torch.testing.assert_close(graph(T), expected)
    varying = trace(lambda v, g: (v + 1.0) * g, T, T)
    assert not rule.run(varying).modified


def test_a_rule_by_example_reads_a_value_twice() -> None:
    rule = rule_from_functions(
        "silu", lambda v: (lambda n: n * torch.sigmoid(n))(-v), lambda v: F.silu(-v)
    )
    graph = trace(lambda v: (lambda n: n * torch.sigmoid(n))(-v), T)
    assert rule.run(graph).modified
    assert ops(graph) == {"neg": 1, "silu": 1}
    assert not rule.run(trace(lambda v, w: (-v) * torch.sigmoid(-w), T, T)).modified


def test_a_rule_by_example_with_a_check_and_examples() -> None:
    rule = rule_from_functions(
        "no-bias",
        lambda v, *, w, b: F.linear(v, w, b),
        lambda v, *, w, b: F.linear(v, w) + b,
        lambda match: None if nodes.shape(match["w"])[0] > 3 else "too small",
        examples={"w": torch.ones(5, 4), "b": torch.ones(5)},
    )
    small, large = trace(nn.Linear(3, 2), T), trace(nn.Linear(3, 8), T)
    assert rule.run(small).declined[0].reason == "too small"
    assert rule.run(large).modified


def test_rules_by_example_say_what_is_wrong() -> None:
    with pytest.raises(UsageError, match="does not use 'w'"):
        rule_from_functions("r", lambda v, w: -v, lambda v: v)
    with pytest.raises(UsageError, match=r"takes \['w'\]"):
        rule_from_functions("r", lambda v: -v, lambda v, w: v)
    with pytest.raises(UsageError, match="returns a parameter"):
        rule_from_functions("r", lambda v: v, lambda v: v)
    with pytest.raises(UsageError, match="examples="):
        rule_from_functions("r", lambda v, w: F.conv1d(v, w), lambda v: v)
    with pytest.raises(UsageError, match="lambda"):
        rule_from_functions("r", torch.relu, lambda v: v)
    with pytest.raises(UsageError, match="one tensor"):
        rule_from_functions("r", lambda v: (v, -v), lambda v: v)
    with pytest.raises(UsageError, match="made inside"):
        rule_from_functions("r", lambda v: v + torch.tensor([1.0, 2.0, 3.0, 4.0]), lambda v: v)


def test_numbers_bind_as_constants() -> None:
    class Fold(RewriteRule):
        name = "fold"
        pattern = Call(aten.mul, Call(aten.mul, x, Const("a")), Const("b"))

        def rewrite(self, match, build):
            return build(aten.mul, match["x"], match["a"] * match["b"])

    graph = trace(lambda v: v * 2 * 3, T)
    Fold().run(graph)
    assert find(graph, "mul").args[1] == 6
