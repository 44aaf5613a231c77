"""The door for edits: what it refuses, what it rolls back, and what a failure costs."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import fx, nn

import refold
from refold.errors import Declined
from refold.graph import constants, nodes
from refold.graph.aliasing import storage
from refold.passes.batch_norm.fold_batch_norm import FoldBatchNorm
from refold.passes.branches.fold_branches import FoldBranches, _BranchFolder
from refold.passes.branches.merge_parallel_layers import MergeParallelLayers
from refold.passes.experts import join as join_experts
from refold.passes.experts.average_experts import AverageExperts
from refold.passes.prepare.clean_up import CleanUp
from refold.passes.prepare.defer_expands import DeferExpands
from refold.passes.prepare.fold_constants import FoldConstants
from refold.passes.scale_shift.absorb_scale_shift import AbsorbScaleShift
from refold.passes.scale_shift.push.pusher import Pusher
from refold.rewrite.edit import Edit, Editor, GraphSnapshot, difference
from refold.rewrite.result import Decline, Pass
from tests.models.experts import FFN, WIDTH, RandomPartition
from tests.tracing import find, ops, trace

aten = torch.ops.aten
T = torch.randn(2, 4, 3, 5)
T2 = torch.randn(2, 3, 4)


class Fn(nn.Module):
    """A formula over the modules and buffers given."""

    def __init__(self, formula, **held) -> None:
        super().__init__()
        self.formula = formula
        for name, value in held.items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x):
        return self.formula(self, x)


def state(gm: fx.GraphModule) -> tuple[object, ...]:
    """All that a rollback has to bring back."""
    held = [
        (n.name, str(n.target), str(n.args), str(n.kwargs), [u.name for u in n.users], {**n.meta})
        for n in gm.graph.nodes
    ]
    return str(gm.graph), held, sorted(gm.state_dict()), sorted(dict(gm.named_buffers()))


def refusal(
    gm: fx.GraphModule, old: str, make: Callable[[Edit, fx.Node], fx.Node]
) -> tuple[str, bool]:
    """Why ``make``'s node may not stand for ``old``; and whether all is as it was."""
    before, node = state(gm), find(gm, old)

    def attempt() -> None:
        with Editor(gm, "test").edit() as edit:
            with edit.before(node):
                edit.constant("spare", torch.ones(3))
                new = make(edit, node)
            edit.stamp(node.args[0], [node])
            edit.replace(node, new)

    with pytest.raises(Declined) as caught:
        attempt()
    return str(caught.value), state(gm) == before


RELU: Callable[..., object] = lambda s, x: torch.relu(x.abs()) + 1


@pytest.mark.parametrize(
    ("formula", "old", "make", "words"),
    [
        (RELU, "relu", lambda e, n: e.call(aten.amax.default, (n.args[0], [1]), sources=[n]),
         "shape would be"),
        (RELU, "relu", lambda e, n: e.call(aten.gt.Scalar, (n.args[0], 0), sources=[n]),
         "would be torch.bool"),
        (RELU, "relu",
         lambda e, n: e.call(aten.to.device, (n.args[0], "meta", torch.float32), sources=[n]),
         "would be on meta"),
        (RELU, "relu", lambda e, n: next(iter(n.users)), "comes after what reads it"),
        (RELU, "relu", lambda e, n: n, "cannot stand"),
        (lambda s, x: x * 1.0, "mul", lambda e, n: n.args[0], "storage of the input x"),
        (lambda s, x: (x * 1.0).transpose(1, 2), "mul", lambda e, n: n.args[0],
         "storage of the input x"),
        (lambda s, x: (x + 2, (s.c * 1.0)), "mul", lambda e, n: n.args[0],
         "storage of the constant c"),
        (lambda s, x: (lambda r: (r, r * 1.0))(torch.relu(x)), "mul", lambda e, n: n.args[0],
         "two outputs"),
        (lambda s, x: torch.relu(x[:, :1].expand(-1, 4, -1, -1) + 0.0), "relu",
         lambda e, n: e.call(aten.expand.default, (
             e.call(aten.amax.default, (n.args[0], [1], True), sources=[n]), [-1, 4, -1, -1],
         ), sources=[n]), "strides of an output"),
        (lambda s, x: torch.relu(x).contiguous() * 1, "mul",
         lambda e, n: e.call(aten.permute.default, (e.call(aten.clone.default, (e.call(
             aten.permute.default, (n.args[0], [0, 2, 3, 1]), sources=[n]),), {
                 "memory_format": torch.contiguous_format}, sources=[n]), [0, 3, 1, 2]),
             sources=[n]), "strides of an output"),
        (lambda s, x: torch.as_strided(torch.relu(x), (2, 2), (1, 1)) + 1, "relu",
         lambda e, n: e.call(aten.expand.default, (
             e.call(aten.amax.default, (n.args[0], [1], True), sources=[n]), [-1, 4, -1, -1],
         ), sources=[n]), "depends on the strides"),
    ],
    ids=[
        "shape", "dtype", "device", "order", "itself", "input", "view-of-input", "constant",
        "two-outputs", "zero-strides", "permuted-strides", "stride-reader",
    ],
)  # fmt: skip
def test_what_the_door_refuses_leaves_the_graph_as_it_was(formula, old, make, words) -> None:
    gm = trace(Fn(formula, c=torch.ones(3)), T)
    reason, unchanged = refusal(gm, old, make)
    assert words in reason
    assert unchanged


def test_what_the_graph_writes_is_not_read_later() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x):
            before = self.count * 1.0
            self.count.add_(1)
            return x.sum() + before

    reason, unchanged = refusal(trace(Counter(), T), "mul", lambda e, n: n.args[0])
    assert "writes" in reason
    assert unchanged


def test_what_stands_for_a_call_behind_a_write_reads_nothing_before_it() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("past", torch.ones(3))

        def forward(self, x):
            first = torch.relu(self.past)
            self.past.add_(1)
            return first, torch.relu(self.past) * x.sum()

    gm = trace(Writes(), T)
    early, late = (n for n in gm.graph.nodes if n.name.startswith("relu"))
    before = state(gm)

    def attempt(*, made: bool) -> None:
        with Editor(gm, "test").edit() as edit:
            new = early
            if made:
                with edit.before(early):
                    new = edit.call(aten.relu.default, early.args, sources=[late])
            edit.replace(late, new)

    for made in (True, False):
        with pytest.raises(Declined, match="storage that the graph writes"):
            attempt(made=made)
        assert state(gm) == before


def test_in_place_changes_are_checked_where_they_take_effect() -> None:
    gm = trace(Fn(lambda s, x: torch.relu(x.sum(1)) + x.sum(2).sum(), c=torch.ones(3)), T)
    before, relu = state(gm), find(gm, "relu")
    with pytest.raises(Declined, match="shape would be"), Editor(gm, "test").edit() as edit:
        edit.set(relu, args=(next(iter(relu.args[0].all_input_nodes)),))
    assert state(gm) == before
    with pytest.raises(Declined, match="whose shape would change"), Editor(gm, "x").edit() as edit:
        edit.set(relu, value=relu.meta["val"].new_empty(7))
    assert state(gm) == before
    with Editor(gm, "test").edit() as edit:
        edit.set(relu, target=aten.abs.default)
    assert ops(gm)["abs"] == 1


def test_what_is_learned_of_a_value_is_no_other_value() -> None:
    net = Fn(lambda s, x: torch.relu(x[x[:, 0] > 0]).sum(1))
    gm = trace(net, torch.randn(5, 3))
    before, relu, total = state(gm), find(gm, "relu"), find(gm, "sum")
    value = relu.meta["val"]
    for wrong, words in (
        (value.new_empty(4, 2), "shape would be"),
        (value.new_empty(4), "shape would be"),
        (value.new_empty((4, 3), dtype=torch.int64), "would be torch.int64"),
        (4, "would be int"),
    ):
        with pytest.raises(Declined, match=words), Editor(gm, "test").edit() as edit:
            edit.learn({relu: wrong})
        assert state(gm) == before
    with Editor(gm, "test").edit() as edit:
        edit.learn({relu: value.new_empty(4, 3), total: value.new_empty(4)})
    assert (*nodes.shape(relu), *nodes.shape(total)) == (4, 3, 4)


def test_excluded_nodes_are_not_edited() -> None:
    gm = trace(Fn(RELU), T)
    relu = find(gm, "relu")
    relu.meta["refold_pinned"] = True
    for change in (
        lambda e: e.set(relu, target=aten.abs.default),
        lambda e: e.replace(relu, relu.args[0]),
    ):
        with pytest.raises(Declined, match="excluded"), Editor(gm, "test").edit() as edit:
            change(edit)


def test_an_error_rolls_back_and_so_does_an_interrupt() -> None:
    gm = trace(Fn(RELU), T)
    before, relu = state(gm), find(gm, "relu")

    def break_off(error: BaseException) -> None:
        with Editor(gm, "test").edit() as edit:
            with edit.before(relu):
                new = edit.call(aten.abs.default, (relu.args[0],), sources=[relu])
            edit.replace(relu, new)
            edit.remove([relu])
            raise error

    for error in (KeyError("half-way"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            break_off(error)
        assert state(gm) == before


# --- outputs: memory and strides ------------------------------------------------------------------


def layout_of(values: object, x: torch.Tensor) -> list[object]:
    """Strides of all outputs, and which of them and the input share storage."""
    leaves = [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, torch.Tensor)]
    stores = [storage(v) for v in (x, *leaves)]
    return [[v.stride() for v in leaves], [stores.index(s) for s in stores]]


def rows(x: torch.Tensor) -> torch.Tensor:
    """A copy that is written out, also where it changes nothing."""
    return x.clone(memory_format=torch.contiguous_format)


LINEAR: dict[str, nn.Module] = {"l": nn.Linear(4, 4)}


@pytest.mark.parametrize(
    "formula",
    [
        lambda s, x: s.l(x).unsqueeze(1).expand(-1, 3, -1) * s.g,
        lambda s, x: s.l(x).unsqueeze(1).broadcast_to(2, 3, 4) * s.g,
        lambda s, x: s.l(x).unsqueeze(1).repeat(1, 3, 1) * s.g,
        lambda s, x: s.l(x).unsqueeze(1).expand(-1, 3, -1) + s.g,
        lambda s, x: (s.l(x), x * 1 + 0),
        lambda s, x: (s.l(x), x - 0.5 + 0.5),
        lambda s, x: (s.l(x), (x / 2) * 2),
        lambda s, x: (s.l(x), (x - 0.5) / 0.25 * 0.25 + 0.5),
        lambda s, x: {"a": [s.l(x), (x * 4) / 4], "b": (x.neg().neg(),)},
        lambda s, x: (s.l(x).t() * 2.0, s.l(x).t()),
        lambda s, x: s.l(x).t().contiguous() * 1.0,
        lambda s, x: s.l(x).t().contiguous().relu().contiguous().sigmoid(),
        lambda s, x: rows(rows(s.l(x).t()).relu()).sigmoid(),
        lambda s, x: (s.l(x) * s.g, s.l(x) * s.g),
        lambda s, x: (lambda y: (y, y[:, 1:], y[:, 1:] * 1.0))(s.l(x)),
        lambda s, x: (x[:1], x[:1] * 1.0, s.l(x)),
        lambda s, x: (lambda q: (x + (q - x), q))(s.l(x)),
        lambda s, x: (lambda q: q[:1] + x - x)(s.l(x)),
        lambda s, x: s.l(x).chunk(2, 1)[1] * 3.0,
        lambda s, x: [part * 3.0 for part in s.l(x).chunk(2, 1)],
    ],
)
def test_outputs_keep_strides_and_memory(formula) -> None:
    net = Fn(formula, g=torch.rand(4) + 0.5, **LINEAR).eval()
    x = torch.randn(2, 4)
    done = refold.compile_for_inference(copy.deepcopy(net), x)
    with torch.no_grad():
        want, got = net(x), done(x)
    torch.testing.assert_close(got, want)
    (strides, shared), (got_strides, got_shared) = layout_of(want, x), layout_of(got, x)
    assert got_strides == strides
    assert all(b in (a, i) for i, (a, b) in enumerate(zip(shared, got_shared, strict=True)))


def test_a_stretched_sum_whose_rest_is_smaller_stays() -> None:
    net = Fn(lambda s, x: torch.sigmoid(s.l(x)[:1] + x - x), **LINEAR)
    gm = trace(net, torch.randn(2, 4))
    assert gm(torch.ones(2, 4)).shape == (2, 4)
    FoldBranches().run(gm)
    gm.recompile()
    assert gm(torch.ones(2, 4)).shape == (2, 4)


# --- what the model writes is no constant ---------------------------------------------------------


@pytest.mark.parametrize(
    "formula",
    [
        lambda s, x: (x * s.scale)[:, s.index],
        lambda s, x: (x * s.scale).index_select(1, s.index),
        lambda s, x: s.conv(x)[:, s.index],
        lambda s, x: s.conv(x).index_select(1, s.index) * s.scale,
        lambda s, x: torch.gather(x, 1, s.index.view(1, 4, 1, 1).expand_as(x)) * s.scale,
    ],
)
def test_an_index_that_the_model_writes_is_no_constant(formula) -> None:
    class Rotating(Fn):
        def forward(self, x):
            y = self.conv(self.formula(self, x))
            self.index.copy_(self.index.roll(1))
            return y

    net = Rotating(
        formula, conv=nn.Conv2d(4, 4, 1), index=torch.tensor([1, 2, 3, 0]),
        scale=torch.rand(4, 1, 1) + 0.5,
    ).eval()  # fmt: skip
    done = refold.compile_for_inference(copy.deepcopy(net), T)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(done(T), net(T))


# --- failures -------------------------------------------------------------------------------------


def conv_and_norm(count: int = 3) -> nn.Module:
    layers = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(count)]
    net = nn.Sequential(*layers).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return net


def fail_at(monkeypatch, kind: type, method: str, name: str, *, after: bool) -> None:
    """Lets a method fail where it comes upon the node of a name."""
    original = getattr(kind, method)

    def failing(self, first, *rest):
        node = getattr(first, "node", first)
        if not after and node.name == name:
            raise ZeroDivisionError("planted")
        out = original(self, first, *rest)
        if after and node.name == name:
            raise ZeroDivisionError("planted")
        return out

    monkeypatch.setattr(kind, method, failing)


@pytest.mark.parametrize("method", ["_push", "_commit"])
def test_a_failure_costs_the_one_rewrite(
    method: str, monkeypatch: pytest.MonkeyPatch, failures: list[Decline]
) -> None:
    fail_at(monkeypatch, Pusher, method, "batch_norm_1", after=False)
    net = conv_and_norm()
    gm = trace(net, T)
    result = FoldBatchNorm().run(gm)
    assert ops(gm)["batch_norm"] == 1
    (record,) = failures
    failures.clear()
    assert record in result.declined
    assert (record.node, record.failed) == ("batch_norm_1", True)
    constants.materialise_all(gm)
    gm.recompile()
    torch.testing.assert_close(gm(T), net(T), rtol=1e-4, atol=1e-4)


def test_a_failure_leaves_no_compilation_and_is_said(
    monkeypatch: pytest.MonkeyPatch, failures: list[Decline]
) -> None:
    fail_at(monkeypatch, _BranchFolder, "_visit", "conv2d_1", after=False)
    monkeypatch.setattr("refold.stages.dead_parameters", lambda gm: 1 / 0)
    net = conv_and_norm()
    done = refold.compile_for_inference(net, T)
    torch.testing.assert_close(done(T), net(T), rtol=1e-4, atol=1e-4)
    failed = [d for d in done.report.declined if d.failed]
    assert {d.rule for d in failed} == {"fold-branches", "dead-parameters"}
    assert "internal error: ZeroDivisionError: planted" in str(done.report)
    assert failures
    failures.clear()


def linears(*names: str) -> dict[str, nn.Module]:
    return {name: nn.Linear(4, 4) for name in names}


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        ("refold.frontends.bind.records", "bound-inputs"),
        ("refold.frontends.bind.generator", "bound-inputs"),
        ("refold.stages.axis_collisions", "axis-collisions"),
    ],
)
def test_what_the_report_tells_costs_no_compilation(
    function: str, rule: str, monkeypatch: pytest.MonkeyPatch, failures: list[Decline]
) -> None:
    class Scaled(nn.Module):
        def forward(self, x, scale):
            return x * (scale * 2)

    monkeypatch.setattr(function, lambda *_: 1 / 0)
    scale = torch.randn(5)
    done = refold.compile_for_inference(Scaled(), T, bind={"scale": scale})
    torch.testing.assert_close(done(T), Scaled()(T, scale))
    assert [d.rule for d in done.report.declined if d.failed] == [rule]
    assert [d.rule for d in failures] == [rule]
    failures.clear()


def test_an_expectation_that_fails_leaves_the_reference_as_it_was(
    monkeypatch: pytest.MonkeyPatch, failures: list[Decline]
) -> None:
    experts = [FFN() for _ in range(2)]
    experts[1].load_state_dict(experts[0].state_dict())
    net, x = RandomPartition(experts).eval(), torch.randn(2, 6, WIDTH)
    notes = refold.compile_for_inference(net, x).report.notes
    assert any("the mean of the experts" in note for note in notes)
    emit = join_experts.emit

    def failing(*args, **options):
        emit(*args, **options)
        raise ZeroDivisionError("planted")

    with monkeypatch.context() as planted:
        planted.setattr(join_experts, "emit", failing)
        gm = trace(net, x)
        before = state(gm)
        with pytest.raises(ZeroDivisionError):
            join_experts.state_expectation(gm)
        assert state(gm) == before
    monkeypatch.setattr("refold.stages.state_expectation", lambda gm: 1 / 0)
    done = refold.compile_for_inference(net, x)
    torch.testing.assert_close(done(x), experts[0](x))
    assert [d.rule for d in done.report.declined if d.failed] == ["expectation"]
    assert failures
    failures.clear()


# a pass, a model that it changes in one edit, and its input
CHANGED: dict[str, tuple[Pass, Callable[[], nn.Module], torch.Tensor]] = {
    "average-experts": (
        AverageExperts(mode="concat"),
        lambda: Fn(
            lambda s, x: (s.q(s.p(x).relu()) + s.v(s.u(x).relu())) / 2,
            **linears("p", "q", "u", "v"),
        ),
        T2,
    ),
    "clean-up": (CleanUp(), lambda: Fn(lambda s, x: torch.sin(x) * torch.sin(x)), T2),
    "defer-expands": (
        DeferExpands(),
        lambda: Fn(
            lambda s, x: s.p(s.c.expand(x.shape[0], -1, -1)) @ x.transpose(1, 2),
            c=torch.randn(1, 3, 4),
            **linears("p"),
        ),
        T2,
    ),
    "fold-constants": (FoldConstants(), lambda: Fn(lambda s, x: x + s.c * 2, c=torch.ones(4)), T2),
    "merge-parallel-layers": (
        MergeParallelLayers(),
        lambda: Fn(lambda s, x: s.p(x).tanh() * s.q(x).sigmoid(), **linears("p", "q")),
        T2,
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_failure_inside_an_edit_of_a_pass_leaves_the_graph_as_it_was(
    name: str, monkeypatch: pytest.MonkeyPatch, failures: list[Decline]
) -> None:
    made, build, x = CHANGED[name]
    net = build().eval()
    assert made.run(trace(net, x)).applied
    gm = trace(net, x)
    before, replace = state(gm), Edit.replace

    def failing(self: Edit, *args: fx.Node, **options: Mapping[fx.Node, fx.Node]) -> None:
        replace(self, *args, **options)
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(Edit, "replace", failing)
    result = made.run(gm)
    assert (result.modified, result.applied) == (False, [])
    assert state(gm) == before
    gm.recompile()
    torch.testing.assert_close(gm(x), net(x))
    assert [d.reason for d in result.declined if d.failed] == [
        "internal error: ZeroDivisionError: planted"
    ]
    assert [d for d in result.declined if d.failed] == failures
    failures.clear()


# --- what an edit does, call by call --------------------------------------------------------------


def editing(gm: fx.GraphModule, change: Callable[[Edit], object]) -> Edit:
    """Makes one edit, and returns it once it took effect."""
    with Editor(gm, "test").edit() as edit:
        change(edit)
    gm.graph.lint()
    return edit


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (T, T, None),
        (T, T.clone(), None),
        (T, [T, T], "2 values instead of 1"),
        ([T, T], T, "1 values instead of 2"),
        (T, 3, "would be int, not Tensor"),
        (3, T, "would be Tensor, not int"),
        (3, 4, "would be 4, not 3"),
        (3, 3, None),
        (T, T.double(), "would be torch.float64, not torch.float32"),
        (T, T.to("meta"), "would be on meta, not cpu"),
        (T, T[:1], r"would be \[1, 4, 3, 5\], not \[2, 4, 3, 5\]"),
        ([T, T], [T, T.double()], "would be torch.float64"),
        ([T, 3, T], [T.clone(), 3, T[:1]], "would be "),
        ([T, 3, T], [T.clone(), 3, T.clone()], None),
    ],
)
def test_how_a_value_differs_from_what_it_replaces(old, new, words) -> None:
    reason = difference(old, new)
    assert (reason is None) == (words is None)
    if words is not None:
        assert re.search(words, reason)


def test_arguments_are_set_by_their_place_in_the_schema() -> None:
    """Those between have their defaults, and what was given by name keeps its value."""
    gm = trace(Fn(lambda s, x: s.c(x), c=nn.Conv2d(4, 4, 1, stride=2)), T)
    call = find(gm, "conv2d")
    weight = call.args[1]
    editing(gm, lambda e: e.set_arguments(call, {5: [1, 1], 6: 1}))
    assert call.args == (given(gm), weight, call.args[2], [2, 2], [0, 0], [1, 1], 1)
    call.args, call.kwargs = call.args[:3], {"stride": [2, 2], "groups": 1}
    editing(gm, lambda e: e.set_arguments(call, {4: [0, 0]}))
    assert call.args[3:] == ([2, 2], [0, 0])
    assert call.kwargs == {"groups": 1}
    before = call.args
    editing(gm, lambda e: e.set_arguments(call, {3: [2, 2]}))
    assert call.args == before


def given(gm: fx.GraphModule) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.op == "placeholder")


def test_one_reader_reads_another_value_and_the_others_do_not() -> None:
    gm = trace(Fn(lambda s, x: torch.relu(x.abs()) + torch.sigmoid(x.abs())), T)
    relu = find(gm, "relu")
    first = relu.args[0]
    editing(gm, lambda e: e.set_operand(relu, first, given(gm)))
    assert relu.args == (given(gm),)
    assert relu not in first.users
    torch.testing.assert_close(run_of(gm, T), torch.relu(T) + torch.sigmoid(T.abs()))


def run_of(gm: fx.GraphModule, x: torch.Tensor) -> torch.Tensor:
    gm.recompile()
    return gm(x)


def test_what_is_removed_goes_where_nothing_reads_it_any_more() -> None:
    gm = trace(Fn(RELU), T)
    relu, absolute = find(gm, "relu"), find(gm, "abs")
    edit = editing(gm, lambda e: e.remove([absolute]))  # relu reads it
    assert edit.gone == []
    edit = editing(gm, lambda e: (e.replace(relu, absolute), e.remove([absolute, relu])))
    assert edit.gone == [relu]
    record = edit.record("why")
    assert (record.removed, record.added, record.detail) == (("relu",), (), "why")
    assert record.kinds == ("relu",)


def test_dead_calls_go_from_the_last_to_the_first_and_the_record_has_their_order() -> None:
    gm = trace(Fn(lambda s, x: torch.relu(x.abs().neg() * s.c) + 1, c=torch.ones(3, 1)), T)
    relu, kept = find(gm, "relu"), find(gm, "add")

    def change(e: Edit) -> None:
        with e.before(relu):
            spare = e.call(aten.sin.default, (given(gm),), sources=[relu])
            new = e.call(aten.exp.default, (given(gm),), sources=[relu])
        e.replace(relu, new)
        e.sweep([relu, spare])

    edit = editing(gm, change)
    assert edit.record().removed == ("abs_1", "neg", "mul", "relu")
    assert edit.record().added == ("exp_default",)
    assert [n.name for n in edit.survivors] == ["x"]
    assert [n.op for n in gm.graph.nodes if n.op == "get_attr" and not n.users] == []
    torch.testing.assert_close(run_of(gm, T), T.exp() + 1)
    assert kept.args[0].target is aten.exp.default


@pytest.mark.parametrize("how", ["kept", "pinned", "read"])
def test_a_sweep_stops_at_what_is_kept_excluded_or_read(how: str) -> None:
    gm = trace(Fn(lambda s, x: (torch.relu(x.abs().neg()), x.abs().sum() if s.read else x.sum()),
                  read=how == "read"), T)  # fmt: skip
    relu, negated = find(gm, "relu"), find(gm, "neg")
    absolute = negated.args[0]
    if how == "pinned":
        absolute.meta["refold_pinned"] = True

    def change(e: Edit) -> None:
        with e.before(relu):
            new = e.call(aten.exp.default, (given(gm),), sources=[relu])
        e.replace(relu, new)
        if how == "read":
            total = find(gm, "sum")
            e.set_operand(total, total.args[0], absolute)
        e.sweep([relu], kept=[absolute] if how == "kept" else ())

    edit = editing(gm, change)
    assert edit.gone[:2] == [relu, negated]
    assert edit.survivors[:1] == [absolute]
    assert not absolute._erased


def test_impure_calls_go_where_they_are_covered() -> None:
    for covered in (False, True):
        gm = trace(Fn(lambda s, x: torch.relu(x)), T)
        relu = find(gm, "relu")
        with gm.graph.inserting_before(relu):
            drawn = gm.graph.call_function(aten.rand_like.default, (given(gm),))
        drawn.meta["val"] = relu.meta["val"]
        assert drawn.is_impure()
        edit = editing(gm, lambda e, n=drawn, c=covered: e.sweep([n], covered=[n] if c else ()))
        assert (drawn in edit.gone) is covered
        assert (drawn in edit.survivors) is not covered


def test_numbers_that_are_learned_are_read_as_literals_but_by_excluded_calls() -> None:
    net = Fn(lambda s, x: (lambda n: (x * n, x + n))(torch.relu(x).sum().item()))
    gm = trace(net, torch.ones(2))
    number = next(n for n in gm.graph.nodes if n.name == "item")
    add = find(gm, "add")
    add.meta["refold_pinned"] = True
    with pytest.raises(Declined, match="would be"):
        editing(gm, lambda e: e.learn({number: torch.ones(())}))
    editing(gm, lambda e: e.learn({number: 2.0}))
    assert find(gm, "mul").args[1] == 2.0
    assert add.args[1] is number
    assert number.meta["val"] == 2.0


def test_an_edit_that_ended_is_not_undone_and_none_ends_twice() -> None:
    gm = trace(Fn(RELU), T)
    editor = Editor(gm, "test")
    with editor.edit() as edit:
        edit.replace(find(gm, "relu"), find(gm, "abs"))
    after = state(gm)
    edit.roll_back()
    assert state(gm) == after
    with editor.edit() as edit:
        edit.set(find(gm, "abs"), target=aten.neg.default)
        edit.roll_back()
    assert state(gm) == after  # nothing is checked, nor removed, behind a rollback


def test_what_is_made_and_changed_before_it_takes_effect_is_no_change_of_the_original() -> None:
    gm = trace(Fn(RELU), T)
    relu, before = find(gm, "relu"), state(trace(Fn(RELU), T))
    assert state(gm)[0] == before[0]

    def change(e: Edit) -> None:
        with e.before(relu):
            new = e.call(aten.neg.default, (given(gm),), sources=[relu], like=relu)
            last = e.call(aten.exp.default, (new,), sources=[relu])
        e.set(new, target=aten.abs.default, value=relu.meta["val"])
        e.stamp(new, [relu], value=None)
        e.replace(relu, last)
        assert [n.target for n in e.made] == [aten.abs.default, aten.exp.default]
        raise KeyError

    kept = state(gm)
    with pytest.raises(KeyError):
        editing(gm, change)
    assert state(gm) == kept


@pytest.mark.parametrize(
    ("args", "kwargs", "reads_alike"),
    [
        (lambda x, w, b: (x, w, b), {}, True),
        (lambda x, w, b: (x, w), {}, True),  # a bias less
        (lambda x, w, b: (x, w, None, [1, 1]), {}, True),  # literals compare by value
        (lambda x, w, b: (x, w, None, [2, 2]), {}, False),
        (lambda x, w, b: (x, w, None), {"groups": 1}, True),
    ],
)
def test_a_call_that_reads_alike_gives_what_it_gave(args, kwargs, reads_alike) -> None:
    """What it gives is asked of the operator only where it reads something of another kind."""
    gm = trace(Fn(lambda s, x: s.c(x), c=nn.Conv2d(4, 4, 1, bias=False)), T)
    call = find(gm, "conv2d")
    x, w = call.args[:2]
    with gm.graph.inserting_before(call):
        b = constants.add(gm, "b", torch.zeros(4), w.meta["val"])
    if reads_alike:
        editing(gm, lambda e: e.set(call, args=args(x, w, b), kwargs=kwargs))
        assert call.args == args(x, w, b)
    else:
        with pytest.raises(Declined, match="shape would be"):
            editing(gm, lambda e: e.set(call, args=args(x, w, b), kwargs=kwargs))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda e, c, x, w, b: e.set(c, args=(x, e.constant("w", torch.zeros(4, 4, 2, 1), w))),
        lambda e, c, x, w, b: e.set(c, args=(x, e.constant("w", torch.zeros(5, 4, 1, 1), w))),
        lambda e, c, x, w, b: e.set(c, args=(w, w)),
        lambda e, c, x, w, b: e.set(c, args=(x, w, b, [2, 2])),
        lambda e, c, x, w, b: e.set(c, kwargs={"stride": [2, 2]}),
        lambda e, c, x, w, b: e.set(c, target=aten.conv2d.padding, args=(x, w, b, [2, 2], "valid")),
    ],
)
def test_a_call_that_reads_something_else_must_give_what_it_gave(wrong) -> None:
    gm = trace(Fn(lambda s, x: s.c(x) * 2, c=nn.Conv2d(4, 4, 1)), T)
    before, call = state(gm), find(gm, "conv2d")

    def change(e: Edit) -> None:
        with e.before(call):
            wrong(e, call, *call.args[:3])

    with pytest.raises(Declined, match="shape would be"):
        editing(gm, change)
    assert state(gm) == before


def test_a_snapshot_brings_back_nodes_arguments_and_tensors() -> None:
    net = Fn(lambda s, x: torch.relu(s.c(x).neg()) + s.g, c=nn.Conv2d(4, 4, 1), g=torch.ones(3, 1))
    gm = trace(net, T)
    before, expected = state(gm), gm(T)
    order = [*gm.graph.nodes]
    snapshot = GraphSnapshot(gm)
    relu, negated = find(gm, "relu"), find(gm, "neg")

    def change(e: Edit) -> None:
        with e.before(relu):
            data = e.constant("spare", torch.ones(3, 1))
            new = e.call(aten.mul.Tensor, (negated.args[0], data), sources=[relu])
        e.replace(relu, new)
        e.sweep([relu])

    editing(gm, change)
    gm.plain = torch.ones(2)
    find(gm, "conv2d").meta["said"] = True
    next(iter(gm.parameters())).data.mul_(1)
    for name in ("spare",):
        assert any(name in held for held in gm.state_dict()), sorted(gm.state_dict())
    snapshot.restore()
    gm.graph.lint()
    assert [*gm.graph.nodes] == order
    assert len(gm.graph.nodes) == len(order)
    assert state(gm) == before
    assert not hasattr(gm, "plain")
    assert [*gm.graph.find_nodes(op="call_function", target=aten.relu.default)] == [relu]
    torch.testing.assert_close(run_of(gm, T), expected)


TWICE: Callable[..., object] = lambda s, x: (lambda y: torch.relu(y).neg() + torch.sigmoid(y))(
    x.abs()
)


def test_readers_stand_in_the_order_in_which_they_stood() -> None:
    gm = trace(Fn(TWICE), T)
    before, relu, absolute = state(gm), find(gm, "relu"), find(gm, "abs")

    def change(e: Edit) -> None:
        e.set_operand(relu, absolute, given(gm))
        raise KeyError

    with pytest.raises(KeyError):
        editing(gm, change)
    assert [u.name for u in absolute.users] == ["relu", "sigmoid"]
    assert state(gm) == before


def test_what_stands_for_a_value_stands_before_all_that_read_it() -> None:
    gm = trace(Fn(TWICE), T)
    before, absolute, negated = state(gm), find(gm, "abs"), find(gm, "neg")

    def change(e: Edit) -> None:
        with e.before(negated):  # behind one of its readers, in front of the other
            new = e.call(aten.abs.default, (given(gm),), sources=[absolute])
        e.replace(absolute, new)

    with pytest.raises(Declined, match="comes after what reads it"):
        editing(gm, change)
    assert state(gm) == before


def test_what_stands_for_a_value_may_be_made_of_it() -> None:
    gm = trace(Fn(RELU), T)
    relu = find(gm, "relu")

    def change(e: Edit) -> None:
        with e.before(relu.next):
            half = e.call(aten.mul.Tensor, (relu, 0.5), sources=[relu])
            new = e.call(aten.add.Tensor, (half, relu), sources=[relu])
        e.replace(relu, new)

    editing(gm, change)
    assert len(relu.users) == 2
    torch.testing.assert_close(run_of(gm, T), T.abs() * 1.5 + 1)


# --- deep graphs ----------------------------------------------------------------------------------


def deep(step: Callable[..., torch.Tensor], count: int, **held) -> Fn:
    def formula(s, x):
        for i in range(count):
            x = step(s, x, i)
        return x

    return Fn(formula, **held)


def orthogonal(count: int) -> nn.ModuleList:
    layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(count)])
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    return layers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "left"),
    [
        (lambda n: nn.Sequential(*orthogonal(n)), 1),
        (lambda n: Fn(lambda s, x: sum((m(x) for m in s.l), x * 0.5), l=orthogonal(n)), 1),
        (lambda n: deep(lambda s, x, i: x + s.c, n, c=torch.randn(8)), 1),
        (lambda n: deep(lambda s, x, i: x + 0.01 * s.l[i](x), n, l=orthogonal(n)), 1),
        (lambda n: deep(lambda s, x, i: torch.cat([x, x.relu()], 1)[:, 2:10], n), None),
        (lambda n: Fn(lambda s, x: deep(lambda s, x, i: x.relu() + x.tanh(), n)(s.l(x)) * s.g,
                      l=nn.Linear(8, 8), g=torch.rand(8)), None),
        (lambda n: Fn(lambda s, x: deep(lambda s, x, i: x.relu(), n)(s.l(x).t()).t() * 3.0,
                      l=nn.Linear(8, 8)), None),
    ],
    ids=["linears", "sum", "shifts", "residuals", "cats", "activations", "path"],
)  # fmt: skip
def test_deep_graphs_fold_or_stay(net, left) -> None:
    made, x = net(400).eval(), torch.randn(3, 8)
    gm = trace(made, x)
    for pass_ in (AbsorbScaleShift(), FoldBranches(prefer="nodes"), AbsorbScaleShift()):
        pass_.run(gm)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    constants.materialise_all(gm)
    with torch.no_grad():
        torch.testing.assert_close(gm(x), made(x), rtol=1e-3, atol=1e-3)
    if left is not None:
        calls = [n for n in gm.graph.nodes if n.op == "call_function" and nodes.is_tensor(n)]
        assert len(calls) == left
