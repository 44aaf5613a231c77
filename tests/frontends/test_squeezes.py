"""``squeeze()`` of a dynamic batch: at batch 1 the result has the rank that eager gives it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refold
from refold.errors import Declined, UsageError
from refold.frontends.export import trace
from refold.frontends.functionalise import settle_squeezes
from refold.rewrite.edit import Editor
from tests.examples import few
from tests.folding import Net


class Formula(nn.Module):
    def __init__(self, formula: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.formula = formula
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.layer, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self, self.norm(self.conv(x)))


ENDS = {
    "mean": lambda s, x: x.mean((2, 3)).squeeze(),
    "kept mean": lambda s, x: x.mean((2, 3), keepdim=True).squeeze(),
    "first": lambda s, x: x.squeeze(0),
    "listed": lambda s, x: x.mean((2, 3), keepdim=True).squeeze((0, 2, 3)),
    "flattened": lambda s, x: x.flatten(1).squeeze(),
    "viewed": lambda s, x: x.reshape(x.size(0), -1).squeeze(),
    "channel": lambda s, x: x[:, 0].squeeze(),
    "topk": lambda s, x: torch.squeeze(x.mean((2, 3)).topk(1, 1).values) * 2,
    "layer": lambda s, x: s.layer(x.mean((2, 3)).squeeze()),
    "layers": lambda s, x: s.last(s.layer(x.mean((2, 3), keepdim=True).squeeze())),
    "normalised": lambda s, x: x.mean((2, 3)).squeeze().softmax(-1),
    "summed": lambda s, x: x.mean((2, 3)).squeeze().mean(0) * 2,
    "transposed": lambda s, x: x.mean((2, 3)).squeeze().t(),
    "rank put back": lambda s, x: s.layer(x.mean((2, 3)).squeeze().view(-1, 4)),
    "joined": lambda s, x: torch.cat([x.mean((2, 3)).squeeze(), x.amax((2, 3)).squeeze()], -1) * 2,
    "added": lambda s, x: s.layer(x.mean((2, 3)).squeeze()) + s.layer(x.amax((2, 3)).squeeze()),
}


def image(batch: int) -> Tensor:
    return torch.randn(batch, 4, 5, 5, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("end", few(ENDS, 8))
def test_ranks_are_those_of_eager(end: str) -> None:
    model = Formula(ENDS[end])
    compiled = refold.compile_for_inference(model, image(2))
    assert compiled.report.after.census.get("batch-norm", 0) == 0
    for batch in (1, 2, 3):
        got, expected = compiled(image(batch)), model(image(batch))
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_an_example_of_one_row() -> None:
    model = Formula(ENDS["mean"])
    compiled = refold.compile_for_inference(model, image(1))
    for batch in (1, 2):
        torch.testing.assert_close(compiled(image(batch)), model(image(batch)))


@pytest.mark.parametrize(
    "formula",
    [
        lambda s, x: x.mean((2, 3)).squeeze().softmax(1),
        lambda s, x: torch.cat([x.mean((2, 3)).squeeze(), x.amax((2, 3)).squeeze()], 1),
    ],
)
def test_one_row_is_refused_where_the_model_fails_on_it(formula: Callable[..., Tensor]) -> None:
    model = Formula(formula)
    compiled = refold.compile_for_inference(model, image(2))
    torch.testing.assert_close(compiled(image(3)), model(image(3)), rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match=r"x.shape\[0\] >= 2"):
        compiled(image(1))


@pytest.mark.parametrize(
    "formula",
    [
        lambda s, x: (x.mean((2, 3)).squeeze() * torch.arange(1.0, 5) - 3) / 2,
        lambda s, x: (x.amax((2, 3)).squeeze() * 2 + 1) * 3 - 4,
    ],
)
def test_one_row_is_refused_where_constants_have_the_rank_of_the_trace(
    formula: Callable[..., Tensor],
) -> None:
    model = Formula(formula)
    for verify in (True, False):
        compiled = refold.compile_for_inference(model, image(2), verify=verify)
        torch.testing.assert_close(compiled(image(3)), model(image(3)), rtol=1e-4, atol=1e-4)
        with pytest.raises(UsageError, match=r"x.shape\[0\] != 1, at .*one rank"):
            compiled(image(1))


def test_fixed_sizes_are_squeezed_as_ever() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3), keepdim=True).squeeze() * 2

    compiled = refold.compile_for_inference(Net(), image(2), dynamic_shapes=({},))
    targets = {str(n.target) for n in compiled.graph_module.graph.nodes}
    assert "aten.squeeze_copy.dims" not in targets
    torch.testing.assert_close(compiled(image(2)), Net()(image(2)))


def test_a_size_that_is_two_or_more_is_not_squeezed() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.squeeze()

    batch = torch.export.Dim("batch", min=2)
    example = (torch.randn(4, 3, 1),)
    program = torch.export.export(Net(), example, dynamic_shapes=({0: batch},))
    gm = program.module(check_guards=False)
    assert isinstance(gm, torch.fx.GraphModule)
    symbol = str(next(iter(program.range_constraints)))
    settle_squeezes(gm, {symbol: 2})
    calls = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert [(str(n.target), n.args[1]) for n in calls] == [("aten.squeeze.dims", [2])]


@pytest.mark.slow
@pytest.mark.parametrize("target", few(["ort", "inductor"], 1))
def test_targets_of_one_rank_refuse_one_row(target: str) -> None:
    model = Formula(ENDS["kept mean"])
    compiled = refold.compile_for_inference(model, image(2), target=target)
    torch.testing.assert_close(compiled(image(3)), model(image(3)), rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match=r"x.shape\[0\] != 1, at .*one rank"):
        compiled(image(1))


# A squeeze behind a layer, and what says later which shape the result has: at size 1 it is needed.
RESTORED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "expand_as": lambda s, x: s.l(x).squeeze().expand_as(x),
    "expand_as, summed": lambda s, x: s.l(x).squeeze().expand_as(x).sum(1),
    "expand": lambda s, x: s.l(x).squeeze(0).expand(x.shape),
    "repeat": lambda s, x: s.l(x).squeeze().repeat(1, 1, 1),
    "another axis, reshaped": lambda s, x: s.l(x).squeeze()[None].reshape(x.shape),
    "one part": lambda s, x: torch.cat([s.l(x).squeeze(0)]).reshape(x.shape),
    "a pad of nothing": lambda s, x: F.pad(s.l(x).squeeze(0), (0, 0)).view(x.shape),
    "two halves": lambda s, x: torch.stack([s.l(x).squeeze()] * 2, -1).sum(-1).reshape(-1, 4),
    "two transposes": lambda s, x: s.l(x).squeeze().transpose(-1, -2).transpose(0, 1) + 0,
    "a view in between": lambda s, x: s.m(s.l(x).squeeze().unsqueeze(0).view(-1, 4)),
}


@pytest.mark.parametrize("verify", few([True, False], 1))
@pytest.mark.parametrize("name", RESTORED)
def test_what_restores_a_squeezed_shape_stays(name: str, verify: bool) -> None:
    torch.manual_seed(0)
    model = Net(RESTORED[name], l=nn.Linear(4, 4), m=nn.Linear(4, 2)).float().eval()
    compiled = refold.compile_for_inference(model, torch.randn(2, 4, 4), verify=verify)
    assert not compiled.report.specialised
    for batch in (1, 2, 3):
        x = torch.randn(batch, 4, 4)
        got, expected = compiled(x), model(x)
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected)


SECOND: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "cat": lambda s, x: torch.cat([s.l(x).squeeze(1)]).view(x.shape),
    "reshape": lambda s, x: s.l(x).squeeze(1)[None].reshape(x.shape),
    "broadcast": lambda s, x: (s.l(x).squeeze(1).unsqueeze(0).view(x.shape)
                               - s.l(x).mean(1, keepdim=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", SECOND)
def test_another_size_may_be_one_too(name: str) -> None:
    torch.manual_seed(0)
    model = Net(SECOND[name], l=nn.Linear(4, 4)).float().eval()
    dynamic = torch.export.Dim.DYNAMIC
    compiled = refold.compile_for_inference(
        model, torch.randn(2, 6, 4), dynamic_shapes=({0: dynamic, 1: dynamic},)
    )
    for sizes in ((2, 1), (2, 6), (1, 1), (3, 5), (1, 5)):
        x = torch.randn(*sizes, 4)
        got, expected = compiled(x), model(x)
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected)


def test_a_fold_that_keeps_the_rank_is_taken_behind_a_squeeze() -> None:
    model = Formula(lambda s, x: s.last(s.layer(x.mean((2, 3)).squeeze()) * 2))
    compiled = refold.compile_for_inference(model, image(2))
    assert compiled.report.after.census["linear"] == 1
    for batch in (1, 3):
        x = image(batch)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def _read_before(reader: Callable[[Net, Tensor], Tensor]) -> None:
    """Lets what reads a squeeze read what is squeezed, which has the same shape in the trace."""
    net = Net(reader, l=nn.Linear(4, 4)).float().eval()
    gm = trace(net, (torch.randn(2, 4, 4),)).graph_module
    (squeezed,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.squeeze_copy.dims)
    (user,) = squeezed.users
    with Editor(gm, "test").edit() as edit:
        edit.set_operand(user, squeezed, squeezed.all_input_nodes[0])


def test_the_door_keeps_the_rank_of_a_call_that_is_changed_in_place() -> None:
    with pytest.raises(Declined, match="drops a dimension where its size is 1"):
        _read_before(lambda s, x: s.l(x).squeeze(0).sigmoid())


def test_a_call_that_states_its_rank_may_read_what_is_not_squeezed() -> None:
    _read_before(lambda s, x: s.l(x).squeeze(0).repeat(2, 1, 1) + 1)


@pytest.mark.parametrize("dims", [0, -1, (0,)])
def test_a_number_is_squeezed(dims: object) -> None:
    class Number(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.squeeze(dims) * 2  # type: ignore[arg-type]

    x = torch.tensor(3.0)
    assert torch.equal(refold.compile_for_inference(Number(), (x,))(x), torch.tensor(6.0))
