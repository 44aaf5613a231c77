from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import refold
from refold.algebra.lazy import Lazy
from refold.errors import RefoldError, UsageError, VerifierError
from refold.frontends import export
from refold.graph import constants, nodes, subgraphs
from refold.graph.ops import census
from refold.passes import PIPELINES
from refold.passes.branches.merge_parallel_layers import MergeParallelLayers
from refold.passes.prepare.clean_up import CleanUp
from refold.passes.prepare.fold_constants import FoldConstants
from refold.rewrite.context import Context
from refold.rewrite.pipeline import Pipeline
from refold.rewrite.result import Decline, PassResult
from refold.rewrite.rule import rule_from_functions
from tests.tracing import find, ops, trace

T = torch.randn(2, 4, 3, 3)


@dataclass(frozen=True)
class Nothing:
    name: str
    exactness: str = "exact"

    def run(self, gm, context):
        return PassResult()


@dataclass(frozen=True)
class Doing:
    """A pass that does what it is told."""

    do: object
    name: str = "doing"
    exactness: str = "exact"
    modified: bool = True

    def run(self, gm, context):
        self.do(gm)
        return PassResult(self.modified)


def named(*names: str) -> Pipeline:
    return Pipeline("test", tuple(Nothing(n) for n in names))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.ReLU(), nn.ReLU()) for _ in range(2)])

    def forward(self, v):
        for block in self.blocks:
            v = torch.sigmoid(block(v))
        return v


def test_pipelines_are_edited_by_name() -> None:
    pipeline = named("a", "b", "a", "c")
    new = Nothing("new")
    assert pipeline.with_(new).names == ("a", "b", "a", "c", "new")
    assert pipeline.with_(new, before="a").names == ("new", "a", "b", "a", "c")
    assert pipeline.with_(new, after="a").names == ("a", "b", "a", "new", "c")
    assert pipeline.without("a").names == ("b", "c")
    assert pipeline.only("a", "c").names == ("a", "a", "c")
    assert pipeline.names == ("a", "b", "a", "c")


def test_what_closes_a_pipeline_stays_behind_what_is_added() -> None:
    closed = named("a").with_(MergeParallelLayers())
    assert closed.with_(Nothing("new")).names == ("a", "new", "merge-parallel-layers")
    assert closed.with_(Nothing("new"), after="merge-parallel-layers").names[-1] == "new"
    assert closed.without("a").with_(Nothing("new")).names == ("new", "merge-parallel-layers")


@dataclass(frozen=True)
class Hears:
    """A pass that keeps what it is told."""

    heard: list[Context]
    name: str = "hears"
    exactness: str = "exact"

    def run(self, gm, context):
        self.heard.append(context)
        return PassResult()


def test_every_pass_hears_the_policies() -> None:
    heard: list[Context] = []
    said = Context(growth=7.0, exclude=("blocks.0",), complex=False)
    Pipeline("test", (Hears(heard), Nothing("n"), Hears(heard))).run(trace(Blocks(), T), said)
    assert heard == [said, said]


def test_a_growth_that_is_said_goes_before_a_pass_own() -> None:
    assert Context().growth_or(1.25) == 1.25
    assert Context(growth=7.0).growth_or(1.25) == 7.0
    for factor in (0.9, float("nan")):
        with pytest.raises(UsageError, match="max_growth"):
            Context(growth=factor)


def test_a_pass_that_takes_no_policies_is_told_how_to() -> None:
    class Old(Nothing):
        def run(self, gm):
            return PassResult()

    with pytest.raises(UsageError, match=r"run\(self, gm, context\)"):
        Pipeline("test", (Old("old"),))


def test_unknown_names_suggest_the_nearest() -> None:
    pipeline = Pipeline("test", (CleanUp(),))
    for edit in (
        lambda: pipeline.without("clean-upp"),
        lambda: pipeline.only("clean-upp"),
        lambda: pipeline.with_(Nothing("n"), before="clean-upp"),
        lambda: pipeline.with_(Nothing("n"), after="clean-upp"),
    ):
        with pytest.raises(UsageError, match="did you mean 'clean-up'"):
            edit()
    with pytest.raises(UsageError, match="not both"):
        pipeline.with_(Nothing("n"), before="clean-up", after="clean-up")


def test_only_passes_make_a_pipeline() -> None:
    with pytest.raises(UsageError, match="parentheses"):
        Pipeline("test", (CleanUp,))
    with pytest.raises(UsageError, match="exactness"):
        Pipeline("test", (Nothing("n", "roughly"),))


def test_a_run_records_time_and_census() -> None:
    graph = trace(Blocks(), T)
    seen: list[str] = []
    result = Pipeline("test", (CleanUp(), Nothing("nothing"))).run(graph, progress=seen.append)
    assert seen == ["clean-up", "nothing"]
    first, second = result.runs
    assert (first.before["relu"], first.after["relu"]) == (4, 2)
    assert (second.before, second.result.modified) == (first.after, False)
    assert first.seconds > 0
    assert result.modified
    assert graph(T).shape == T.shape  # recompiled


def test_excluded_modules_are_not_touched() -> None:
    graph = trace(Blocks(), T)
    Pipeline("test", (CleanUp(),)).run(graph, Context(exclude=("blocks.0",)))
    assert ops(graph)["relu"] == 3
    assert sum(nodes.pinned(n) for n in graph.graph.nodes) == 2
    graph = trace(Blocks(), T)
    Pipeline("test", (CleanUp(),)).run(graph, Context(exclude=("blocks.*.1",)))
    assert ops(graph)["relu"] == 4


def test_a_glob_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"'block\.0'.*did you mean 'blocks.0'"):
        Pipeline("test", (CleanUp(),)).run(trace(Blocks(), T), Context(exclude=("block.0",)))


def test_an_invalid_graph_is_blamed_on_the_pass() -> None:
    def drop_value(gm):
        del find(gm, "relu").meta["val"]

    with pytest.raises(VerifierError, match="after pass 'doing': %relu"):
        Pipeline("test", (Doing(drop_value),)).run(trace(Blocks(), T), debug=True)


def test_a_pass_that_fails_is_undone_and_recorded(failures) -> None:
    def drop_value(gm):
        del find(gm, "relu").meta["val"]

    def break_off(gm):
        FoldConstants().run(gm)
        relu = find(gm, "relu")
        relu.replace_all_uses_with(relu.args[0])
        gm.graph.erase_node(relu)
        gm.added = torch.ones(3)
        raise KeyError("half-way")

    def share(gm):
        gm.graph.output_node().args = (next(iter(gm.graph.nodes)),)

    for do, words in (
        (drop_value, "after pass 'doing': %relu"),
        (break_off, "KeyError: 'half-way'"),
        (share, "structure"),
    ):
        graph = trace(Blocks(), T)
        before, expected = str(graph.graph), graph(T)
        result = Pipeline("test", (Doing(do), CleanUp())).run(graph)
        (record,) = failures
        failures.clear()
        assert result.runs[0].result.declined == [record]
        assert words in record.reason
        assert not result.runs[0].result.modified
        assert ops(graph)["relu"] == 2, "the passes after it run"
        torch.testing.assert_close(graph(T), expected)
        assert not hasattr(graph, "added")
        undone = trace(Blocks(), T)
        Pipeline("test", (Doing(do),)).run(undone)
        failures.clear()
        assert str(undone.graph) == before


class Normed(nn.Module):
    """Convolutions and norms, also inside of the branches of a cond."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.yes, self.no = (
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(3)
        )
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)

    def forward(self, v):
        v = self.stem(v).relu()
        return torch.cond(v.sum() > 9, lambda t: self.yes(t), lambda t: self.no(t), (v,))


def test_one_run_of_a_pass_counts_a_graph_and_its_branches() -> None:
    gm = export.trace(Normed().eval(), (T,), {}).graph_module
    runs = [run for run in PIPELINES["default"].run(gm).runs if run.result.applied]
    (folded,) = (run for run in runs if run.before["batch-norm"])
    assert (folded.before["batch-norm"], folded.after["batch-norm"]) == (3, 0)
    assert len(folded.result.applied) == 3
    assert folded.seconds > 0


def fail_at(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Lets the constant of that number fail where it is computed."""
    evaluate, calls = Lazy.evaluate, iter(range(1, 1000))

    def failing(self: Lazy) -> torch.Tensor:
        if next(calls) == count:
            raise ZeroDivisionError("planted")
        return evaluate(self)

    monkeypatch.setattr(Lazy, "evaluate", failing)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 6])  # in a branch, in the other one, in the graph
def test_where_a_constant_cannot_be_computed_nothing_is_folded(
    count: int, monkeypatch: pytest.MonkeyPatch, failures: list[Decline]
) -> None:
    net = Normed().eval()
    fail_at(monkeypatch, count)
    gm = export.trace(net, (T,), {}).graph_module
    before = [census(graph.graph) for graph in subgraphs.walk(gm)]
    assert sum(before, Counter())["batch-norm"] == 3
    result = PIPELINES["default"].run(gm)
    assert [census(graph.graph) for graph in subgraphs.walk(gm)] == before
    assert not result.modified
    (record,) = failures
    failures.clear()
    assert result.runs[-1].result.declined == [record]
    assert record.reason == "internal error: ZeroDivisionError: planted"
    for x in (T, T + 3, T - 3):
        torch.testing.assert_close(gm(x), net(x), rtol=0, atol=0)


def test_without_the_weights_there_is_no_graph_to_go_back_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_at(monkeypatch, 6)
    with pytest.raises(RefoldError, match="planted") as caught:
        refold.compile_for_inference(Normed().eval(), T, consume=True)
    assert type(caught.value) is RefoldError
    assert "compile it without consume=True" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [False, True])
def test_an_unfolded_graph_is_compiled_and_said(
    recipe: bool, monkeypatch: pytest.MonkeyPatch, failures: list[Decline]
) -> None:
    fail_at(monkeypatch, 6)
    net, other = Normed().eval(), Normed().eval()
    done = refold.compile_for_inference(net, T, recipe=recipe)
    torch.testing.assert_close(done(T), net(T))
    assert done.report.before == done.report.after
    assert "internal error: ZeroDivisionError: planted" in str(done.report)
    assert failures
    failures.clear()
    if recipe:
        torch.testing.assert_close(done.refit(other.state_dict())(T), other(T))


def test_a_constant_that_failed_is_still_to_be_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = trace(lambda v: v * 2, T)
    with gm.graph.inserting_before(find(gm, "mul")):
        node = constants.add(gm, "three", Lazy.of(torch.full((1,), 3.0).double()), T)
    fail_at(monkeypatch, 1)
    with pytest.raises(ZeroDivisionError):
        constants.tensor(node)
    assert constants.tensor(node) == 3


def test_a_pass_that_hides_its_changes_is_caught() -> None:
    def swap(gm):
        find(gm, "relu").target = torch.ops.aten.abs.default

    with pytest.raises(VerifierError, match="changed nothing"):
        Pipeline("test", (Doing(swap, modified=False),)).run(trace(Blocks(), T), debug=True)


def test_debug_propagates_and_compares() -> None:
    graph = trace(Blocks(), T)
    calls = []

    def compare(before, after, name):
        torch.testing.assert_close(before(T), torch.fx.Interpreter(after).run(T))
        calls.append((name, ops(before)["relu"], ops(after)["relu"]))

    Pipeline("test", (CleanUp(), CleanUp())).run(graph, debug=True, compare=compare)
    assert calls == [("clean-up", 4, 2)]
    wrong = rule_from_functions("wrong", lambda v: v.sigmoid(), lambda v: v.tanh())
    with pytest.raises(AssertionError):
        Pipeline("test", (wrong,)).run(graph, debug=True, compare=compare)
