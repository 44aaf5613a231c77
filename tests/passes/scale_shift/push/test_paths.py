"""A path is planned as data before anything changes, and records say what it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, fx, nn

from refold.graph import constants, printer, provenance
from refold.passes.batch_norm.fold_batch_norm import FoldBatchNorm, scale_and_shift
from refold.passes.scale_shift.push.down import Downward
from refold.passes.scale_shift.push.factor import Factor
from refold.passes.scale_shift.push.plan import Draft
from refold.passes.scale_shift.push.region import LONGEST, Region
from refold.passes.scale_shift.push.up import Upward
from refold.rewrite.context import Context
from refold.rewrite.result import Pass, PassResult
from tests.compare import EXACT, relative_error
from tests.folding import Net, image
from tests.tracing import trace


def folded(chosen: Pass, net: nn.Module, x: Tensor) -> tuple[fx.GraphModule, PassResult]:
    """The graph after one pass alone, with the numbers of the module, and what the pass says."""
    gm = trace(net, x)
    result = chosen.run(gm)
    constants.materialise_all(gm)
    gm.recompile()
    assert relative_error(gm(x), net(x)) <= EXACT
    return gm, result


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3)


def norm() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(4)


def region(gm: fx.GraphModule, name: str) -> Region:
    node = next(n for n in gm.graph.nodes if n.name == name)
    record = scale_and_shift(node)
    assert record is not None
    factor = Factor(record.scale.get(), record.shift.get())
    return Region.of(
        gm.graph, record, factor, math.inf, Context().costs, border_maps=False, folded={}
    )


# --- plans ----------------------------------------------------------------------------------------


def test_a_plan_says_what_is_crossed_and_what_takes_it_in_their_order() -> None:
    net = Net(
        lambda s, x: s.b(torch.cat([s.c(x).transpose(2, 3), s.d(x).permute(0, 1, 3, 2)], 1)),
        c=conv(), d=conv(), b=nn.BatchNorm2d(8),
    )  # fmt: skip
    plan = Upward(region(trace(net, image()), "batch_norm")).plan()
    assert [(s.node.name, s.crosses) for s in plan.steps] == [
        ("cat", True),
        ("transpose", True), ("conv2d", False),
        ("permute", True), ("conv2d_1", False),
    ]  # fmt: skip
    assert [n.name for n in plan.takers] == ["conv2d", "conv2d_1"]
    assert len(plan.writes) == 2


def test_readers_that_take_a_norm_keep_their_value() -> None:
    net = Net(lambda s, x: s.c(s.b(torch.relu(x)).transpose(2, 3)), c=conv(), b=norm())
    plan = Downward(region(trace(net, image()), "batch_norm")).plan()
    assert [(s.node.name, s.crosses, s.keeps) for s in plan.steps] == [
        ("transpose", True, False), ("conv2d", False, True),
    ]  # fmt: skip


@pytest.mark.parametrize("direction", [Upward, Downward])
def test_planning_changes_nothing(direction: type[Upward | Downward]) -> None:
    net = Net(
        lambda s, x: s.d(s.b(s.c(x).transpose(2, 3)).transpose(2, 3)),
        c=conv(), b=norm(), d=conv(),
    )  # fmt: skip
    gm = trace(net, image())
    before, held = printer.render(gm), {n: t.clone() for n, t in gm.state_dict().items()}
    metas = {n: dict(n.meta) for n in gm.graph.nodes}
    plan = direction(region(gm, "batch_norm")).plan()
    assert plan.writes
    assert printer.render(gm) == before
    assert all(torch.equal(t, held[n]) for n, t in gm.state_dict().items())
    assert {n: dict(n.meta) for n in gm.graph.nodes} == metas


def test_a_draft_goes_back_with_all_it_holds() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first, second = graph.call_function(torch.relu, (x,)), graph.call_function(torch.abs, (x,))
    draft = Draft()
    draft.cross(first)
    mark = draft.mark()
    draft.take(second)
    draft.later(lambda edit: None)
    draft.spent += 7
    draft.shared[x, first] = Factor(torch.ones(1), torch.ones(1))
    draft.rewind(mark)
    draft.check_new(second)
    draft.take(second)
    plan = draft.done()
    assert [s.node for s in plan.steps] == [first, second]
    assert (plan.writes, plan.spent, draft.shared) == ((), 0, {})


def test_a_plan_that_is_given_up_spends_nothing() -> None:
    """The first norm would un-share the weight, and cannot; the second can, within the budget."""
    shared = nn.Conv2d(16, 16, 3)  # 18 kB in float64

    def forward(s: Net, x: Tensor) -> Tensor:
        halves = torch.cat([s.c(x), torch.sigmoid(s.d(x))], 1)
        return torch.sigmoid(s.b(halves)).mean() + s.n(s.c(x)).sigmoid()

    net = Net(forward, c=shared, d=nn.Conv2d(16, 16, 3), b=nn.BatchNorm2d(32), n=nn.BatchNorm2d(16))
    x = image(16)
    held = constants.stored_bytes(trace(net, x))
    once = 1.0 + 1.5 * shared.weight.numel() * 8 / held
    _, result = folded(FoldBatchNorm(max_growth=once), net, x)
    assert [a.path[0] for a in result.applied] == ["batch_norm_1"]
    assert [d.node for d in result.declined] == ["batch_norm"]


# --- records --------------------------------------------------------------------------------------


def test_the_record_has_the_path() -> None:
    net = Net(lambda s, x: s.b(s.c(x).permute(0, 1, 3, 2)[:, :, 1:]).sigmoid(), c=conv(), b=norm())
    _, result = folded(FoldBatchNorm(), net, image())
    (record,) = result.applied
    assert record.path == ("batch_norm", "slice_1", "permute", "conv2d")
    assert record.path_kinds == ("batch-norm", "slice", "permute", "conv")
    assert record.crossed == ("slice_1", "permute")
    assert record.detail == "batch-norm into conv, across 2 calls: slice, permute"


def test_what_crosses_nothing_says_no_more_than_before() -> None:
    _, result = folded(FoldBatchNorm(), Net(lambda s, x: s.b(s.c(x)), c=conv(), b=norm()), image())
    (record,) = result.applied
    assert record.path == ("batch_norm", "conv2d")
    assert (record.crossed, record.detail) == ((), "batch-norm into conv")


def test_a_constant_that_takes_a_scale_is_on_the_path() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        return s.b(torch.cat([s.c(x), s.table], 1)).sigmoid()

    net = Net(forward, c=conv(), b=nn.BatchNorm2d(8))
    net.register_buffer("table", torch.randn(2, 4, 5, 4, dtype=torch.float64))
    _, result = folded(FoldBatchNorm(), net, image())
    (record,) = result.applied
    assert record.path == ("batch_norm", "cat", "conv2d", "table")
    assert record.detail == "batch-norm into a constant, conv, across 1 call: cat"


def test_another_scale_shift_on_the_path_is_carried_off() -> None:
    net = Net(lambda s, x: s.b(s.a(s.c(x).transpose(2, 3))), c=conv(), a=norm(), b=norm())
    gm = trace(net, image())
    plan = Upward(region(gm, "batch_norm_1")).plan()
    assert [(s.node.name, s.goes) for s in plan.steps] == [
        ("batch_norm", True), ("transpose", False), ("conv2d", False),
    ]  # fmt: skip
    assert [n.name for n in plan.touched] == ["transpose", "conv2d"]


def test_what_lies_on_the_path_has_a_value_of_its_own() -> None:
    """The view before the norm gives what the norm did, the convolution what nothing did."""
    net = Net(lambda s, x: s.b(s.c(x).transpose(2, 3)).sigmoid(), c=conv(), b=norm())
    gm, _ = folded(FoldBatchNorm(), net, image())
    values = {n.name: provenance.value_of(n) for n in gm.graph.nodes}
    assert values["transpose"] == "batch_norm"
    assert values["conv2d"] == ""


_RELU = "a negative or zero scale does not pass relu"
_SIGMOID = "sigmoid is not linear in its input, so a scale and shift cannot cross it"


@pytest.mark.parametrize(
    ("forward", "upward", "downward"),
    [
        (
            lambda s, x: s.b(torch.relu(s.c(x)).transpose(2, 3)).sigmoid(),
            f"came as far as %transpose: {_RELU}", _SIGMOID,
        ),
        (
            lambda s, x: torch.sigmoid(s.b(torch.relu(s.c(x))).transpose(2, 3)),
            _RELU, f"came as far as %transpose: {_SIGMOID}",
        ),
        (
            lambda s, x: s.b(s.c(x) + torch.relu(x[:, :, 1:-1, 1:-1])).sigmoid(),
            f"came as far as %add: {_RELU}", _SIGMOID,
        ),
    ],
)  # fmt: skip
def test_a_declined_one_says_how_far_it_came(forward, upward: str, downward: str) -> None:
    _, result = folded(FoldBatchNorm(), Net(forward, c=conv(), b=norm()), image())
    (record,) = result.declined
    assert record.node == "batch_norm"
    assert record.reason == f"into its input: {upward}; into its users: {downward}"


def test_a_path_has_an_end() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        y = s.c(x)
        for _ in range(LONGEST + 1):
            y = y.transpose(2, 3)
        return s.b(y).sigmoid()

    _, result = folded(FoldBatchNorm(), Net(forward, c=conv(), b=norm()), image())
    (record,) = result.declined
    assert f"more than {LONGEST} calls away" in record.reason
    assert "came as far as %transpose" in record.reason
