"""In-place programs become functional and mean the same; what does nothing goes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from refold.frontends.functionalise import functional_module
from refold.graph.constants import is_mutation
from tests.examples import examples


class Does(nn.Module):
    """A module of one function of itself and x."""

    def __init__(self, function: Callable, **buffers: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor):
        return self.function(self, x)


def functional(model: nn.Module, x: Tensor, *, dynamic: bool = True) -> tuple[fx.GraphModule, bool]:
    shapes = ({0: torch.export.Dim.AUTO},) if dynamic else None
    with torch.no_grad():
        program = torch.export.export(
            model.eval(), (x.clone(),), dynamic_shapes=shapes, strict=False
        )
        gm, redone = functional_module(program)
    gm.graph.lint()
    return gm, redone


def names(gm: fx.GraphModule) -> list[str]:
    return [
        getattr(n.target, "_schema", n.target).name.removeprefix("aten::")
        for n in gm.graph.nodes
        if n.op == "call_function" and hasattr(n.target, "_schema")
    ]


def check(function: Callable, *, local: bool, **buffers: Tensor) -> fx.GraphModule:
    model = Does(function, **buffers)
    x = torch.randn(2, 4, 6)
    gm, redone = functional(model, x)
    assert redone is not local
    assert not [n for n in gm.graph.nodes if is_mutation(n)]
    for batch in (2, 3):
        x = torch.randn(batch, 4, 6)
        kept = x.clone()
        got = gm(x)
        assert torch.equal(x, kept)
        torch.testing.assert_close(got, model(x.clone()), rtol=0, atol=0)
    return gm


def slice_assign(s: Does, x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1] = 0.5
    y[:, :, 2:4] = x[:, :, :2]
    y[:, 3, 1:3].mul_(3.0)
    return y


def generator(s: Does, x: Tensor) -> Tensor:
    w = torch.zeros(4, 6)
    w[:, 0] = s.a
    w[1:3] += 1
    w[torch.tensor([0, 2]), torch.tensor([1, 3])] = 7.0
    return x * w


LOCAL = {
    "chain": lambda s, x: F.relu((x + 1).mul_(2).add_(x).sub_(0.5), inplace=True),
    "used after by its old name": lambda s, x: (lambda y: (y.relu_(), y * 2)[1])(x - 1),
    "scalar": lambda s, x: (x * 1).clamp_(-0.5, 0.5).fill_(3.0) + x,
    "zero": lambda s, x: (x * 1).zero_() + x,
    "view, then written": lambda s, x: (x * 2).reshape(-1, 24).relu_(),
    "masked": lambda s, x: (x * 1).masked_fill_(x > 0, -1.0),
    "dropout between": lambda s, x: F.dropout(x * 2, 0.5, False).add_(1),
    "dropout in place": lambda s, x: F.dropout(x * 2, 0.5, False, inplace=True).add_(1),
    "integers": lambda s, x: (x > 0).long().mul_(3).add_(1),
    "copy": lambda s, x: (x * 0).copy_(x[:, :1]),
    "copy with a cast": lambda s, x: (x.double() * 0).copy_(x),
    "wider operand": lambda s, x: (x * 1).add_(x.double()),
    "slice assignment": slice_assign,
    "comparison": lambda s, x: (x * 1).gt_(0),
    "lifted constant": lambda s, x: x + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).mul_(2),
}
WHOLE = {
    "another view lives": lambda s, x: (lambda y: (y[:, 1], y.reshape(-1).mul_(2), y))(x * 2)[0],
    "split": lambda s, x: (lambda y: (y.chunk(2, 1)[0].add_(1), y)[1])(x * 2),
    "transposed view": lambda s, x: (lambda y: (y.transpose(1, 2).add_(1), y)[1])(x * 2),
    "two names": lambda s, x: (lambda y: (lambda v: (y.add_(1), v)[1])(y.view(-1)))(x * 2),
    "identity dropout alias": lambda s, x: (
        lambda y: (lambda d: (d.add_(1), y.reshape(-1) * 2)[1])(F.dropout(y[:, :2], 0.5, False))
    )(x * 2),
    "identity dropout is an output": lambda s, x: (
        lambda y: (lambda d: (y[:, 0].add_(1), y.chunk(2, 1)[0].add_(1), d)[2])(
            F.dropout(y, 0.5, False)
        )
    )(x * 2),
}  # fmt: skip


@pytest.mark.parametrize("name", LOCAL)
def test_local(name: str) -> None:
    check(LOCAL[name], local=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_whole_program(name: str) -> None:
    check(WHOLE[name], local=False)


def test_generator_of_a_weight() -> None:
    check(generator, local=True, a=torch.randn(4))


def test_input_that_is_written_is_copied_back() -> None:
    model = Does(lambda s, x: x.add_(1) * 2)
    x = torch.randn(2, 4, 6)
    gm, redone = functional(model, x)
    assert redone
    ours, theirs = x.clone(), x.clone()
    torch.testing.assert_close(gm(ours), model(theirs))
    torch.testing.assert_close(ours, theirs)


def test_state_stays_an_explicit_copy() -> None:
    model = Does(lambda s, x: (s.n.add_(1), x + s.n)[1], n=torch.zeros(6))
    gm, redone = functional(model, torch.randn(2, 4, 6))
    assert redone
    assert [n.target for n in gm.graph.nodes if is_mutation(n)] == [torch.ops.aten.copy_.default]


def test_batch_norm_that_updates_its_statistics() -> None:
    model = Does(
        lambda s, x: F.batch_norm(x, s.m, s.v, training=True), m=torch.zeros(4), v=torch.ones(4)
    )
    gm, redone = functional(model, torch.randn(2, 4, 6))
    assert redone
    assert sum(map(is_mutation, gm.graph.nodes)) == 2


def test_no_ops_go_and_view_is_reshape() -> None:
    def function(s: Does, x: Tensor) -> Tensor:
        y = F.dropout(x.contiguous(), 0.5, False).to(torch.float32).detach().clone() + 1
        return torch.sigmoid(y.view(-1, 24).contiguous())

    gm, _ = functional(Does(function), torch.randn(2, 4, 6))
    assert [n for n in names(gm) if n != "sym_size"] == ["add", "reshape", "sigmoid"]


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: (x.clone(), x),
        lambda s, x: (x.clone().reshape(-1), x + 1),
        lambda s, x: (lambda y: (y, y.clone()))(x + 1),
        lambda s, x: (lambda y: (y, F.dropout(y, 0.5, False).clone().flatten()))(x + 1),
        lambda s, x: s.b.clone(),
        lambda s, x: (s.b.clone()[:2], x * s.b.clone()),
        lambda s, x: (lambda y: (y.add_(1), torch.empty_like(y).copy_(y)))(x * 2),
        lambda s, x: (torch.tensor([1.0, 2.0]), x),
    ],
)
def test_outputs_share_storage_only_as_the_model_does(function: Callable) -> None:
    ours, theirs = _shared(function)
    assert ours <= theirs


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: (lambda h: (s.b.copy_(h), h)[1])(x.sum((0, 1))),
        lambda s, x: (lambda h: (s.b.copy_(h), h, F.dropout(h, 0.5, False))[1:])(x.sum((0, 1))),
        lambda s, x: (lambda h: (x.copy_(h), h)[1])(x * 2),
        lambda s, x: (s.b.copy_(x[0, 0]), x)[1],
        lambda s, x: (lambda h: (s.b.copy_(h), h))(x.sum((0, 1))),
        lambda s, x: (s.b.copy_(x.sum((0, 1))), s.b)[1],
        lambda s, x: F.dropout(s.b.add_(1), 0.5, False),
        lambda s, x: x.mul_(2),
    ],
)
def test_what_is_written_into_state_is_returned_apart_where_the_model_does(function) -> None:
    """``self.h.copy_(h); return h``: the next call must not overwrite what this one gave."""
    ours, theirs = _shared(function)
    assert ours == theirs


def _shared(function: Callable) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Which outputs, inputs and buffers share storage, of a trace and of the model."""
    model = Does(function, b=torch.randn(6))
    x = torch.randn(2, 4, 6)
    gm, _ = functional(model, x)

    def sharing(run: Callable) -> list[tuple[int, int]]:
        given = x.clone()
        out = run(given)
        out = list(out) if isinstance(out, tuple) else [out]
        tensors = [*out, given, *dict(model.named_buffers()).values()]
        return [
            (i, j)
            for i in range(len(tensors))
            for j in range(i)
            if _storage(tensors[i]) == _storage(tensors[j])
        ]

    return set(sharing(gm)), set(sharing(model))


def test_strided_reads_keep_their_copy() -> None:
    def function(s: Does, x: Tensor) -> Tensor:
        return torch.as_strided(x.transpose(1, 2).contiguous(), (2, 6), (6, 1))

    model = Does(function)
    x = torch.randn(2, 4, 6)
    gm, _ = functional(model, x, dynamic=False)
    torch.testing.assert_close(gm(x), model(x))


def test_provenance_starts_here() -> None:
    gm, _ = functional(Does(lambda s, x: (x + 1).relu_()), torch.randn(2, 4, 6))
    assert not [n for n in gm.graph.nodes if (n.meta.get("custom") or {}).get("refold")]


def test_in_place_inside_a_subgraph() -> None:
    def function(s: Does, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = (x + 1).mul_(2)
        return y.add_(1)

    model = Does(function)
    x = torch.randn(2, 4, 6)
    gm, _ = functional(model, x)
    torch.testing.assert_close(gm(x), model(x))


# --- any program ----------------------------------------------------------------------------------

STEPS: list[Callable[[list[Tensor], int, int], Tensor]] = [
    lambda v, i, j: v[i] + 1,
    lambda v, i, j: v[i].add_(0.5),
    lambda v, i, j: v[i].mul_(v[j]) if v[i].shape == v[j].shape else v[i].mul_(2),
    lambda v, i, j: v[i].relu_(),
    lambda v, i, j: v[i].reshape(-1, 4),
    lambda v, i, j: v[i].view(v[i].shape),
    lambda v, i, j: v[i][:, 1:],
    lambda v, i, j: v[i][:, :1].fill_(0.25),
    lambda v, i, j: v[i].select(1, 0),
    lambda v, i, j: F.dropout(v[i], 0.5, False),
    lambda v, i, j: v[i].clone(),
    lambda v, i, j: v[i].contiguous(),
    lambda v, i, j: v[i].copy_(v[j]) if v[i].shape == v[j].shape else v[i].zero_(),
    lambda v, i, j: v[i].transpose(0, 1),
    lambda v, i, j: v[i].chunk(2, 1)[0].sub_(0.125),
]
PROGRAM = st.lists(
    st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 7), st.integers(0, 7)),
    min_size=1,
    max_size=7,
)


def run_program(steps: list[tuple[int, int, int]], x: Tensor) -> tuple[Tensor, ...]:
    values = [x * 2, x - 1]
    for step, i, j in steps:
        try:
            values.append(STEPS[step](values, i % len(values), j % len(values)))
        except (RuntimeError, IndexError):  # a step that these shapes do not allow
            continue
    return tuple(v + 0 for v in values)


@examples(30)
@given(PROGRAM)
@example([(6, 0, 0), (0, 0, 0), (1, 0, 0), (4, 7, 0)])  # a reshape that copies, decomposed
@example([(1, 1, 0), (9, 1, 0), (1, 1, 0)])  # dropout of what was written, written again
@example([(0, 0, 0), (4, 0, 0), (1, 0, 0), (8, 3, 0), (13, 5, 0)])  # a caught error, decomposed
def test_any_program_means_the_same(steps: list[tuple[int, int, int]]) -> None:
    model = Does(lambda s, x: run_program(steps, x))
    x = torch.arange(24.0).reshape(2, 3, 4) / 10 - 1
    gm, _ = functional(model, x, dynamic=False)
    assert not [n for n in gm.graph.nodes if is_mutation(n)]
    torch.testing.assert_close(gm(x.clone()), model(x.clone()), rtol=0, atol=0)


def test_an_attention_that_nobody_reads_goes_and_a_draw_stays() -> None:
    def function(s: Does, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        F.scaled_dot_product_attention(heads, heads, heads)
        F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.5)
        return x.exp()

    gm, _ = functional(Does(function), torch.randn(2, 3, 4))
    kept = [n for n in gm.graph.nodes if "attention" in str(n.target)]
    assert [n.args[4] for n in kept] == [0.5]


@pytest.mark.slow
def test_vmap_becomes_plain_calls() -> None:
    """Traced as calls that open and close a level, which mean nothing one by one."""

    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(lambda row: self.linear(row.relu().mean(0)))(x)

    model = Mapped()
    gm, redone = functional(model, torch.randn(2, 4, 6))
    assert redone
    calls = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert all(isinstance(n.target, torch._ops.OpOverload) for n in calls)
    for batch in (1, 3):
        x = torch.randn(batch, 4, 6)
        torch.testing.assert_close(gm(x), model(x))
