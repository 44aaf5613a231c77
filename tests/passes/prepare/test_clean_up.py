from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from refold.graph import aliasing, printer
from refold.passes.prepare.clean_up import CleanUp
from refold.rewrite.pipeline import Pipeline
from tests import golden
from tests.examples import examples, few
from tests.tracing import find, ops, trace

T = torch.randn(2, 4, 6, 6)


class Weighted(nn.Module):
    """A function of an input and a constant."""

    def __init__(self, function, constant: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("constant", constant)
        self.function = function

    def forward(self, v):
        return self.function(v, self.constant)


def clean(model, *inputs, dynamic: bool = False):
    """Cleans and checks: bit-equal numbers, nothing new shared; a second run changes nothing."""
    graph = trace(model, *inputs, dynamic=dynamic)
    expected = graph(*(i.clone() for i in inputs))
    shared = sharing(graph, inputs)
    result = Pipeline("test", (CleanUp(), CleanUp())).run(graph, debug=True)
    assert_equal(graph(*(i.clone() for i in inputs)), expected)
    assert sharing(graph, inputs) <= shared
    assert not result.runs[1].result.modified
    return graph, result.runs[0].result


def assert_equal(actual, expected) -> None:
    actual, expected = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.stride() == b.stride()
        assert torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


def sharing(graph, inputs) -> set[tuple[str, str]]:
    """What really shares storage, by running the graph."""
    given_inputs = [i.clone() for i in inputs]
    named = {f"output {i}": o for i, o in enumerate(pytree.tree_leaves(graph(*given_inputs)))}
    named |= {f"input {i}": v for i, v in enumerate(given_inputs)}
    named |= {f"state {i}": v for i, v in enumerate(graph.state_dict().values())}
    return {
        (a, "state" if b.startswith("state") else b)
        for (a, x), (b, y) in combinations(named.items(), 2)
        if a.startswith("output")
        and x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    }


def after(model, *inputs, **options):
    return ops(clean(model, *(inputs or (T,)), **options)[0])


def relu2(function):
    """Puts a function between two calls, so that no output and no input is concerned."""
    return lambda v, *rest: torch.sigmoid(function(torch.relu(v), *rest))


KEPT = {"relu": 1, "sigmoid": 1}


@pytest.mark.parametrize(
    "function",
    [
        lambda v: F.dropout(v, 0.3, training=False),
        lambda v: F.dropout2d(v, 0.3, training=False),
        lambda v: F.alpha_dropout(v, 0.3, training=False),
        lambda v: torch.ops.aten.alias(v),
        lambda v: v.detach(),
        lambda v: v.clone(),
        lambda v: v + 0,
        lambda v: 0.0 + v,
        lambda v: torch.add(v, 0, alpha=3),
        lambda v: v - 0,
        lambda v: v * 1,
        lambda v: 1.0 * v,
        lambda v: v / 1,
        lambda v: v.neg().neg(),
        lambda v: F.leaky_relu(v, 1.0),
        lambda v: v.to(torch.float32),
        lambda v: torch.ops.aten._to_copy(v, dtype=torch.float32),
        lambda v: v.type_as(torch.relu(v)),
        lambda v: v.reshape(2, 4, 6, 6),
        lambda v: v.view(2, 2, -1).view(2, 4, 6, 6),
        lambda v: v.flatten(1).unflatten(1, (4, 6, 6)),
        lambda v: v.unsqueeze(0).squeeze(0),
        lambda v: v.transpose(1, 2).transpose(1, 2),
        lambda v: v.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
        lambda v: v.permute(0, 2, 3, 1).transpose(-1, 1).transpose(2, 3),
        lambda v: v[:, :],
        lambda v: torch.ops.aten.slice(v, 1, 0, 99),
        lambda v: v.expand(2, 4, 6, 6),
        lambda v: v.repeat(1, 1, 1, 1),
        lambda v: F.pad(v, (0, 0, 0, 0)),
        lambda v: torch.cat([v], 1),
        lambda v: torch.relu(v),
    ],
)
def test_no_ops_go(function) -> None:
    assert after(relu2(function)) == KEPT


@pytest.mark.parametrize(
    ("function", "constant"),
    [
        (lambda v, c: v + c, torch.zeros(4, 1, 1)),
        (lambda v, c: c + v, torch.zeros(1, 4, 6, 6)),
        (lambda v, c: v - c, torch.zeros(())),
        (lambda v, c: v * c, torch.ones(4, 1, 1)),
        (lambda v, c: c * v, torch.ones(6)),
        (lambda v, c: v / c, torch.ones(4, 1, 1)),
        (F.prelu, torch.ones(4)),
    ],
)
def test_constants_of_zeros_and_ones_go(function, constant) -> None:
    graph, _ = clean(Weighted(relu2(function), constant), T)
    assert ops(graph) == KEPT
    assert not dict(graph.named_buffers())  # swept


@pytest.mark.parametrize(
    "function",
    [
        lambda v: v + 1e-30,
        lambda v: v * 0,
        lambda v: 0 * v,
        lambda v: 0 - v,
        lambda v: 2 / v,
        lambda v: torch.div(v, 1, rounding_mode="floor"),
        lambda v: F.leaky_relu(v, 0.99),
        lambda v: torch.sub(v, v, alpha=0),
        lambda v: torch.ops.aten.slice(v, 1, 1, 99),
        lambda v: v.flip(1),
        lambda v: F.pad(v, (1, -1, 0, 0)),
        lambda v: F.pad(v, (1, 1, 0, 0)),
        lambda v: F.threshold(v, 0.5, 2),
        lambda v: v.to(torch.float64),
        lambda v: torch.cat([v, v], 1),
        lambda v: v.roll(1, 1),
        lambda v: F.dropout(v, 0.3, training=True) * 0,
    ],
)
def test_what_computes_something_stays(function) -> None:
    graph = trace(relu2(function), T)
    before = ops(graph)
    CleanUp().run(graph)
    assert ops(graph) == before


@pytest.mark.parametrize(
    ("function", "constant"),
    [
        (lambda v, c: v + c, torch.tensor([0.0, 0.0, 0.0, 1.0]).view(4, 1, 1)),
        (lambda v, c: v * c, torch.tensor([1.0, 1.0, 1.0, 2.0]).view(4, 1, 1)),
        (lambda v, c: v * c, torch.full((4, 1, 1), float("nan"))),
        (lambda v, c: c - v, torch.zeros(4, 1, 1)),
        (lambda v, c: c / v, torch.ones(4, 1, 1)),
        (F.prelu, torch.tensor([1.0, 1.0, 1.0, 0.5])),
    ],
)
def test_other_constants_stay(function, constant) -> None:
    graph, result = clean(Weighted(relu2(function), constant), T)
    assert sum(ops(graph).values()) == 3
    assert not result.applied


@pytest.mark.parametrize(
    ("function", "constant", "reason"),
    [
        (lambda v, c: v + c, torch.zeros(3, 2, 4, 6, 6), "shape"),
        (lambda v, c: v * c, torch.ones(4, 1, 1, dtype=torch.float64), "float64"),
    ],
)
def test_no_ops_that_change_shape_or_dtype_are_declined(function, constant, reason) -> None:
    graph, result = clean(Weighted(relu2(function), constant), T)
    assert sum(ops(graph).values()) == 3
    assert reason in result.declined[0].reason


@pytest.mark.parametrize(
    "function",
    [
        lambda v: v * v.mean((2, 3), keepdim=True).expand_as(v),
        lambda v: v.mean((2, 3), keepdim=True).expand(-1, -1, 6, 6) / v,
        lambda v: torch.sub(v, v.mean(1, keepdim=True).broadcast_to(2, 4, 6, 6), alpha=2),
        lambda v: torch.add(v.mean((0, 1)).expand(2, 4, 6, 6), v, alpha=-3),
        lambda v: v * v.mean().expand(2, 4, 6, 6),
    ],
)
def test_expansions_that_the_reader_makes_go(function) -> None:
    found = after(function)
    assert found["mean"] == 1
    assert len(found) == 2


@pytest.mark.parametrize(
    "function",
    [
        lambda v: v.mean((2, 3), keepdim=True).expand_as(v) * v.mean(1, keepdim=True),
        lambda v: torch.relu(v.mean((2, 3), keepdim=True).expand_as(v)),
        lambda v: v * v.mean().expand(2, 4, 6, 6).to(torch.float64),
        lambda v: v.float() * v.double().mean().expand(2, 4, 6, 6),  # alone it would not promote
        lambda v: (lambda e: e * e)(v.mean((2, 3), keepdim=True).expand_as(v)),
        lambda v: v.mean(1, keepdim=True).expand_as(v) * v.new_ones(1),
    ],
)
def test_other_expansions_stay(function) -> None:
    found = after(function)
    assert found.get("expand", 0) + found.get("expand_as", 0) == 1


def test_integers_plus_a_float_zero_change_their_dtype() -> None:
    integers = torch.arange(6).view(2, 3)
    graph, result = clean(lambda v: torch.abs(torch.abs(v) + 0.0), integers)
    assert ops(graph) == {"abs": 2, "add": 1}
    assert "float32, not" in result.declined[0].reason or "int64" in result.declined[0].reason


def test_nan_and_infinity_pass() -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    assert after(lambda v: torch.tanh(torch.tanh(v) * 1 + 0), special) == {"tanh": 2}


def test_a_written_buffer_is_no_constant() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(4, 1, 1))

        def forward(self, v):
            out = torch.relu(v) + self.count
            self.count.add_(1)
            return torch.sigmoid(out), self.count + 0.0

    graph = trace(Counter(), T)
    Pipeline("test", (CleanUp(),)).run(graph)
    assert ops(graph)["add"] == 2
    assert ops(graph)["add_"] == 1
    assert torch.equal(graph(T)[1], torch.ones(4, 1, 1))
    assert torch.equal(graph(T)[1], torch.full((4, 1, 1), 2.0))


@pytest.mark.parametrize(
    ("model", "reason"),
    few(
        [
            (lambda v: v + 0, "storage of the input"),
            (lambda v: v.clone(), None),
            (lambda v: (v * 1).transpose(1, 2), "storage of the input"),
            (lambda v: (lambda r: (r, r * 1))(torch.relu(v)), "two outputs"),
            (lambda v: (lambda r: (r, torch.relu(r)))(torch.relu(v)), "two outputs"),
            (lambda v: (lambda r: (r[:, :2], (r + 0)[:, 2:]))(torch.relu(v)), "two outputs"),
            (lambda v: torch.cat([v]), "storage of the input"),
        ],
        4,
    ),
)
def test_outputs_do_not_come_to_share_storage(model, reason) -> None:
    graph = trace(model, T)
    before = ops(graph)
    graph, result = clean(model, T)
    assert ops(graph) == before
    if reason is not None:
        assert any(reason in d.reason for d in result.declined)


def test_outputs_that_shared_storage_may_go_on_to() -> None:
    graph, _ = clean(lambda v: (lambda r: (r, r.detach().view(2, 4, 6, 6)))(torch.relu(v)), T)
    assert ops(graph) == {"relu": 1}


def test_strides_of_outputs_stay() -> None:
    model = lambda v: torch.relu(v).transpose(1, 2).contiguous()
    assert after(model) == {"relu": 1, "transpose": 1, "contiguous": 1}
    model = lambda v: torch.relu(torch.relu(v).transpose(1, 2).contiguous().abs())
    assert after(model)["contiguous"] == 1


def test_copies_before_what_ignores_strides_go() -> None:
    shuffle = lambda v: (
        torch.relu(v).view(2, 2, 2, 6, 6).transpose(1, 2).contiguous().view(2, 4, 6, 6)
    )
    assert after(lambda v: shuffle(v) * 2) == {"relu": 1, "reshape": 2, "transpose": 1, "mul": 1}
    linear = lambda v, w: F.linear(torch.relu(v).permute(0, 2, 3, 1).contiguous(), w)
    # whole numbers: their sums are the same in any order that a kernel may take
    weighted = Weighted(linear, torch.randint(-4, 5, (3, 4)).float())
    assert after(weighted, (4 * T).round()) == {"relu": 1, "permute": 1, "linear": 1}


def test_copies_before_what_reads_strides_stay() -> None:
    model = lambda v: torch.relu(v).transpose(2, 3).clone(
        memory_format=torch.contiguous_format
    ).as_strided((2, 3), (1, 2)) * 2  # fmt: skip
    assert after(model)["clone"] == 1


def test_layout_chains_merge() -> None:
    assert after(lambda v: torch.relu(v).reshape(2, 8, 18).reshape(2, -1) * 2)["reshape"] == 1
    assert after(lambda v: torch.relu(v).flatten(1).unsqueeze(1) * 2, dynamic=True)["reshape"] == 1
    assert after(lambda v: torch.relu(v).view(v.shape[0], 8, 18).view(v.shape[0], -1) * 2,
                 dynamic=True)["reshape"] == 1  # fmt: skip
    assert after(lambda v: torch.relu(v).permute(1, 0, 2, 3).transpose(2, 3) * 2)["permute"] == 1
    tapped = after(
        lambda v: (lambda r: (r * 2, r.reshape(2, -1) * 3))(torch.relu(v).view(2, 8, -1))
    )
    assert tapped["reshape"] == 2


def test_a_chain_of_two_unknown_sizes_stays() -> None:
    def model(v):
        return torch.relu(v).unsqueeze(0).flatten(2) * 2

    batch, height = (
        torch.export.Dim("batch", min=2, max=64),
        torch.export.Dim("height", min=3, max=64),
    )

    class Model(nn.Module):
        def forward(self, v):
            return model(v).unsqueeze(0)

    program = torch.export.export(Model(), (T,), dynamic_shapes=({0: batch, 2: height},))
    graph = program.module(check_guards=False)
    expected = graph(T)
    Pipeline("test", (CleanUp(),)).run(graph, debug=True)
    assert torch.equal(graph(T), expected)
    other = torch.randn(3, 4, 5, 6)
    assert torch.equal(graph(other), Model()(other))


def stored(v, value, *index):
    """A copy of ``v`` with a value stored into a slice, as functionalised code writes it."""
    return torch.slice_scatter(v, value, *index)


@pytest.mark.parametrize(
    ("index", "slices"),
    [((1, 0, 2), 1), ((1, 1, 3), 2), ((1, 2, 100), 1), ((1, -3, -1), 2), ((1, 0, 4), 0)],
)
def test_a_stored_slice_is_a_concatenation(index, slices) -> None:
    def model(v):
        y = torch.relu(v)
        return stored(y, torch.tanh(y[:, slice(*index[1:])]), *index) * 2

    found = after(model, dynamic=True)
    assert found["slice_scatter"] == 0
    reads = 0 if index == (1, 0, 4) else 1
    assert found["slice"] == slices + reads
    assert found["cat"] == (1 if slices else 0)


@pytest.mark.parametrize(
    "function",
    [
        lambda v: stored(v, torch.tanh(v[:, ::2]), 1, 0, 4, 2),
        lambda v: stored(v, torch.zeros(2, 2, 6, 6), 1, 0, 2),
        lambda v: stored(v.double(), torch.tanh(v[:, :2]), 1, 0, 2),
        lambda v: stored(v, torch.tanh(v[:1]), 0, 0, 1),
    ],
    ids=["step", "constant", "dtype", "batch"],
)
def test_other_stores_stay(function) -> None:
    assert after(lambda v: function(torch.relu(v)) * 2, dynamic=True)["slice_scatter"] == 1


def test_a_stored_slice_that_is_returned_stays() -> None:
    model = lambda v: stored(torch.relu(v), torch.tanh(v[:, :2]), 1, 0, 2)
    assert after(model)["slice_scatter"] == 1


def test_common_subexpressions_merge() -> None:
    assert after(lambda v: torch.relu(v) + torch.relu(v) * 2) == {"relu": 1, "mul": 1, "add": 1}
    deep = lambda v: torch.tanh(torch.abs(v)) * 2 + torch.tanh(torch.abs(v)) * 3
    assert after(deep) == {"abs": 1, "tanh": 1, "mul": 2, "add": 1}
    defaults = lambda v: F.softmax(v, 1) + torch.ops.aten.softmax.int(v, 1, None)
    assert after(defaults)["softmax"] == 1


def test_different_calls_do_not_merge() -> None:
    assert after(lambda v: (v * 2) + (v * 2.5))["mul"] == 2
    assert after(lambda v: torch.clamp(v, min=1) + torch.clamp(v, max=1))["clamp"] == 2
    integers = torch.arange(6)
    both = lambda v: (v * 2).float() + v * 2.0
    assert after(both, integers)["mul"] == 2
    assert after(lambda v: torch.copysign(v, 0.0) + torch.copysign(v, -0.0))["copysign"] == 2
    noise = trace(lambda v: torch.rand_like(v) - torch.rand_like(v), T)
    CleanUp().run(noise)
    assert ops(noise)["rand_like"] == 2


def test_merging_makes_no_outputs_share() -> None:
    model = lambda v: (torch.relu(v), torch.relu(v))
    assert after(model) == {"relu": 2}
    views = lambda v: (torch.relu(v)[:, :2], torch.relu(v)[:, 2:])
    assert after(views)["relu"] == 2
    result = CleanUp().run(trace(model, T))
    assert "two outputs would share the storage of relu" in [d.reason for d in result.declined]
    one_output = lambda v: (torch.relu(v), torch.relu(v) * 2)
    assert after(one_output) == {"relu": 1, "mul": 1}


def test_reads_around_a_write_do_not_merge() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(6))

        def forward(self, v):
            first = torch.exp(self.count)
            self.count.add_(1)
            return v * first + torch.exp(self.count)

    graph = trace(Counter(), T)
    count = next(n for n in graph.graph.nodes if n.op == "get_attr")
    find(graph, "exp").args = (count,)  # reads the buffer again, after the write
    ran = Pipeline("test", (CleanUp(),)).run(graph).runs[0].result
    assert ops(graph)["exp"] == 2
    assert [d.reason for d in ran.declined] == ["it reads storage that the graph writes"]


def test_dead_code_goes_and_is_recorded() -> None:
    graph = trace(lambda v: torch.relu(v), T)
    with graph.graph.inserting_before(graph.graph.output_node()):
        dead = graph.graph.call_function(torch.ops.aten.sigmoid.default, (find(graph, "relu"),))
        dead.meta["val"] = find(graph, "relu").meta["val"]
    result = CleanUp().run(graph)
    assert ops(graph) == {"relu": 1}
    assert result.applied[0].kinds == ("sigmoid",)


def test_pinned_nodes_stay() -> None:
    graph = trace(lambda v: torch.sigmoid(torch.relu(v) + 0) * torch.abs(v) * torch.abs(v), T)
    for node in graph.graph.nodes:
        node.meta["refold_pinned"] = True
    before = ops(graph)
    assert not CleanUp().run(graph).modified
    assert ops(graph) == before


def test_dropout_in_training_stays() -> None:
    class Noisy(nn.Module):
        def forward(self, v):
            return F.dropout(torch.relu(v), 0.5, training=True) + 1

    graph = trace(Noisy(), T)
    CleanUp().run(graph)
    assert ops(graph)["dropout"] == 1


def test_records_are_one_a_kind() -> None:
    _, result = clean(lambda v: (torch.relu(v) + 0) * 1 + (torch.relu(v) + 0) * 1, T)
    assert sorted(a.rule for a in result.applied) == [
        "clean-up/add-zero", "clean-up/common-subexpression", "clean-up/mul-one",
    ]  # fmt: skip
    (adds,) = [a for a in result.applied if a.rule == "clean-up/add-zero"]
    assert adds.kinds == ("add", "add")


def test_golden() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, padding=1)
            self.drop = nn.Dropout(0.1)
            self.one = nn.Parameter(torch.ones(8, 1, 1))

        def forward(self, v):
            y = self.drop(self.conv(v)) * self.one + 0
            y = (
                y.view(v.shape[0], 2, 4, 6, 6)
                .transpose(1, 2)
                .contiguous()
                .view(v.shape[0], 8, 6, 6)
            )
            y = torch.relu(torch.relu(y.neg().neg()))
            return torch.sigmoid(y[:, :]), torch.sigmoid(y) * 2, y.to(torch.float32).flatten(1)

    graph = trace(Net(), T, dynamic=True)
    before = printer.render(graph)
    CleanUp().run(graph)
    golden.check("clean_up", f"before\n{before}\nafter\n{printer.render(graph)}")


STEPS = {
    "relu": torch.relu,
    "abs": torch.abs,
    "plus zero": lambda v: v + 0,
    "times one": lambda v: 1 * v,
    "times two": lambda v: v * 2,
    "negate": torch.neg,
    "clone": torch.clone,
    "contiguous": lambda v: v.contiguous(),
    "detach": lambda v: v.detach(),
    "dropout": lambda v: F.dropout(v, 0.5, training=False),
    "same dtype": lambda v: v.to(v.dtype),
    "transpose": lambda v: v.transpose(1, -1),
    "flip axes": lambda v: v.permute(0, *range(v.dim() - 1, 0, -1)),
    "flatten": lambda v: v.flatten(1),
    "split last": lambda v: v.unflatten(-1, (-1, 2)) if v.shape[-1] % 2 == 0 else v,
    "reshape": lambda v: v.reshape(v.shape[0], 2, -1),
    "unsqueeze": lambda v: v.unsqueeze(1),
    "squeeze": lambda v: v.squeeze(1),
    "all of it": lambda v: v[:, :],
    "half": lambda v: torch.chunk(v, 2, 1)[0],
    "one part": lambda v: torch.cat([v], 1),
    "two parts": lambda v: torch.cat([v, v], 1),
    "no padding": lambda v: F.pad(v, (0, 0)),
    "expand": lambda v: v.expand(*v.shape),
}


@settings(
    examples(40),
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    steps=st.lists(
        st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 3), st.booleans()),
        min_size=1, max_size=9,
    ),
    dynamic=st.booleans(),
)  # fmt: skip
def test_any_chain_keeps_its_numbers_strides_and_sharing(sizes, steps, dynamic) -> None:
    def model(v):
        values, outputs = [v], []
        for name, back, is_output in steps:
            values.append(STEPS[name](values[-1 - back % len(values)]))
            if is_output:
                outputs.append(values[-1])
        return (*outputs, values[-1])

    example = torch.randn(2, 2 * sizes[0], 2, 2 * sizes[1])
    graph, _ = clean(model, example, dynamic=dynamic)
    assert not aliasing.reads_strides(graph.graph)
    if dynamic:
        other = torch.randn(3, *example.shape[1:])
        assert_equal(graph(other.clone()), model(other))


NORMS = {
    "group": lambda v: F.group_norm(v, 2),
    "group, behind a function": lambda v: F.group_norm(v.abs() + 1, 2),
    "group, behind a convolution": lambda v: F.group_norm(
        F.conv2d(v, torch.ones(4, 1, 1, 1), groups=4), 2
    ),
    "group, behind layouts": lambda v: F.group_norm(v.flip(1)[:, :, 1:], 2),
    "statistics of the batch": lambda v: F.batch_norm(v, None, None, training=True),
    "of several axes": lambda v: v / torch.linalg.vector_norm(v, dim=(2, 3), keepdim=True),
}
FORMATS = {
    "contiguous": lambda v: v.contiguous(),
    "clone": lambda v: v.clone(memory_format=torch.contiguous_format),
    "to": lambda v: v.to(memory_format=torch.contiguous_format),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("format", "turned"),
    # Nothing is left in the trace of a copy that makes a contiguous tensor contiguous.
    [(f, turned) for f in FORMATS for turned in (True, False) if turned or f != "contiguous"],
)
def test_a_copy_that_chooses_the_kernel_of_a_norm_stays(norm, format, turned) -> None:
    """Channels last, group norm loses half of its digits; the caller may hand in either."""
    model = lambda v: NORMS[norm](FORMATS[format](v.permute(0, 3, 1, 2) if turned else v)) * 2
    shape = (2, 6, 6, 4) if turned else (2, 4, 6, 6)
    x = 20 + 0.1 * torch.randn(shape)
    graph, _ = clean(model, x)
    for probe in (x, 20 + 0.1 * torch.randn(shape).contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(graph(probe), model(probe), rtol=1e-5, atol=1e-5)
    assert ops(graph)[format] == 1


def test_copies_before_other_calls_go_in_a_graph_with_a_norm() -> None:
    def forward(v):
        y = F.group_norm(v, 2)
        y = F.linear(y.permute(0, 2, 3, 1).contiguous(), torch.ones(3, 4))
        return F.layer_norm(y.transpose(1, 2).contiguous(), [3]) * 2

    assert "contiguous" not in after(forward, 20 + T)


def test_a_copy_is_not_merged_away_in_front_of_a_norm() -> None:
    """``reshape(contiguous(permute(x)))`` is a view of the permutation where none is a copy."""
    model = lambda v: F.group_norm(
        v.view(2, 4, 6, 6).permute(0, 3, 1, 2).contiguous().view(2, 3, 2, 4, 6).flatten(1, 2), 2
    ) * 2  # fmt: skip
    x = 20 + 0.1 * torch.randn(2, 144)
    graph, _ = clean(model, x)
    exact = model(x.double())
    own, got = ((f(x).double() - exact).abs().max() for f in (model, graph))
    assert got <= own
