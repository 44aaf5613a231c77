from __future__ import annotations

import pytest
import torch
from torch import nn

from refold.errors import VerifierError
from refold.graph.verifier import signature, verify
from refold.rewrite.driver import apply_rules
from refold.rewrite.pattern import Call, Var
from refold.rewrite.rule import RewriteRule, rule_from_functions
from tests.tracing import ops, trace

aten = torch.ops.aten
x = Var("x")
T = torch.randn(2, 4, 3, 3)

double_neg = rule_from_functions("double-neg", lambda v: v.neg().neg(), lambda v: v)
relu_to_sigmoid = rule_from_functions("relu-to-sigmoid", lambda v: v.relu(), lambda v: v.sigmoid())
sigmoid_to_relu = rule_from_functions("sigmoid-to-relu", lambda v: v.sigmoid(), lambda v: v.relu())


def chain(function, count):
    def forward(value):
        for _ in range(count):
            value = function(value)
        return value * 2

    return forward


def test_rewrites_enable_rewrites() -> None:
    graph = trace(lambda v: torch.sigmoid(-torch.abs(v.neg().neg().neg())) + 1, T)
    assert len(double_neg.run(graph).applied) == 1
    graph = trace(chain(torch.neg, 100), T)
    result = double_neg.run(graph)
    assert len(result.applied) == 50
    assert ops(graph) == {"mul": 1}


def test_loops_are_reported_with_the_rules_that_loop() -> None:
    graph = trace(lambda v: torch.relu(v) + 1, T)
    with pytest.raises(VerifierError, match="relu-to-sigmoid, sigmoid-to-relu"):
        apply_rules(graph, (relu_to_sigmoid, sigmoid_to_relu, double_neg))


def test_a_rule_that_grows_for_ever_is_reported() -> None:
    grow = rule_from_functions("grow", lambda v: torch.relu(v), lambda v: torch.relu(torch.abs(v)))
    with pytest.raises(VerifierError, match="loop without end: grow"):
        grow.run(trace(lambda v: torch.relu(v) + 1, T))


def test_cost_grows_with_matches_not_with_nodes_times_rules() -> None:
    looked: list[str] = []

    class Counting(RewriteRule):
        name = "counting"
        pattern = Call(aten.neg, x).where(lambda node: looked.append(node.name) or True)

        def rewrite(self, match, build):
            return build(aten.abs, match["x"])

    graph = trace(lambda v: -chain(torch.sigmoid, 200)(v), T)
    Counting().run(graph)
    assert looked == ["neg"]


def test_only_the_neighbourhood_of_a_rewrite_is_looked_at_again() -> None:
    checks: list[str] = []

    class Watch(RewriteRule):
        name = "watch"
        pattern = Call(aten.sigmoid, Call(aten.sigmoid, x).shared())

        def check(self, match):
            checks.append(match.root.name)
            return "never"

    graph = trace(lambda v: chain(torch.sigmoid, 100)(v.neg().neg()), T)
    apply_rules(graph, (Watch(), double_neg))
    assert len(checks) < 110


def test_a_decline_is_recorded_once_for_each_rule_and_node() -> None:
    class Never(RewriteRule):
        name = "never"
        pattern = Call(aten.sigmoid, x)

        def check(self, match):
            return "never"

    graph = trace(lambda v: torch.sigmoid(v.neg().neg().neg().neg()) + 1, T)
    result = apply_rules(graph, (Never(), double_neg))
    assert [d.rule for d in result.declined] == ["never"]


def test_losing_a_user_makes_a_match_possible() -> None:
    class Second(RewriteRule):
        name = "second"
        pattern = Call(aten.maximum, x, Var("y"))

        def rewrite(self, match, build):
            return match["y"]

    # The negation has two users until the other rule takes one of them away.
    graph = trace(lambda v, w: (lambda n: torch.relu(n) + torch.maximum(n, w))(-v), T, T)
    inner = rule_from_functions("inner", lambda v: torch.relu(-v), lambda v: -v.clamp_max(0))
    result = apply_rules(graph, (Second(), inner))
    assert [r.rule for r in result.applied] == ["second", "inner"]


def test_outputs_do_not_come_to_share_storage() -> None:
    same = rule_from_functions("plus-zero", lambda v: v + 0.0, lambda v: v)
    to_input = trace(lambda v: v + 0.0, T)
    assert "input" in same.run(to_input).declined[0].reason
    two = trace(lambda v: (lambda r: (r, r + 0.0))(torch.relu(v)), T)
    assert "two outputs" in same.run(two).declined[0].reason
    viewed = trace(lambda v: (v + 0.0).transpose(1, 2), T)
    assert "input" in same.run(viewed).declined[0].reason
    fine = trace(lambda v: torch.relu(v) + 0.0, T)
    assert same.run(fine).modified


def test_outputs_do_not_come_to_share_storage_with_a_parameter() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.ones(3))

        def forward(self, v):
            return v * 2, self.p + 0.0

    same = rule_from_functions("plus-zero", lambda v: v + 0.0, lambda v: v)
    assert "constant" in same.run(trace(Model(), T)).declined[0].reason


def test_what_reads_written_storage_stays() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(3))

        def forward(self, v):
            before = self.count + 0.0
            self.count.add_(1)
            return v * 2 + before

    same = rule_from_functions("plus-zero", lambda v: v + 0.0, lambda v: v)
    graph = trace(Counter(), torch.ones(3))
    contract = signature(graph)
    result = same.run(graph)
    assert "writes" in result.declined[0].reason
    verify(graph, contract)


def test_dynamic_sizes_are_compared_by_proof() -> None:
    to_abs = rule_from_functions("to-abs", lambda v: v.relu(), lambda v: v.abs())
    graph = trace(lambda v: torch.relu(v) + 1, T, dynamic=True)
    assert to_abs.run(graph).modified

    class Fixed(RewriteRule):
        name = "fixed"
        pattern = Call(aten.relu, x)

        def rewrite(self, match, build):
            return build(aten.zeros, [2, 4, 3, 3])

    graph = trace(lambda v: torch.relu(v) + 1, T, dynamic=True)
    assert "shape" in Fixed().run(graph).declined[0].reason


def test_the_first_rule_that_applies_is_the_only_one() -> None:
    to_tanh = rule_from_functions("relu-to-tanh", lambda v: v.relu(), lambda v: v.tanh())
    graph = trace(lambda v: torch.relu(v) * 2, T)
    result = apply_rules(graph, (relu_to_sigmoid, to_tanh))
    assert [record.rule for record in result.applied] == ["relu-to-sigmoid"]
    assert result.declined == []
    assert result.modified
    assert ops(graph) == {"sigmoid": 1, "mul": 1}


def test_a_node_that_waits_is_not_queued_again() -> None:
    """Both rewrites below it would have it looked at, and so does the first walk."""
    looked: list[str] = []

    class Counting(RewriteRule):
        name = "counting"
        pattern = Call(aten.mul, x, 3.0).where(lambda node: looked.append(node.name) or True)

        def check(self, match):
            return "only looking"

        def rewrite(self, match, build):
            raise AssertionError

    graph = trace(lambda v, w: (v.neg().neg() + w.neg().neg()) * 3.0, T, T)
    result = apply_rules(graph, (double_neg, Counting()))
    assert len(result.applied) == 2
    assert looked == ["mul"]
    assert [d.rule for d in result.declined] == ["counting"]
