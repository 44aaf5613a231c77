"""Float64 evaluation: constants keep their steps, the oracle sees through casts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from refold.frontends.export import trace
from refold.graph.constants import constant_nodes
from refold.graph.evaluate import Oracle, discontinuous, evaluate_constants

EXACT = 1e-14  # a few units of float64 relative to values near 1


class Weight(nn.Module):
    """x times what a function makes of a parameter."""

    def __init__(self, function: Callable[[Tensor], Tensor], w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return x * self.function(self.w)


class Does(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(*x)


def frontier(gm: fx.GraphModule) -> fx.Node:
    constant = constant_nodes(gm.graph)
    product = next(n for n in reversed(gm.graph.nodes) if n.op == "call_function")
    return next(a for a in product.all_input_nodes if a in constant)


def constant(function: Callable[[Tensor], Tensor], w: Tensor, *, rounded: bool = True) -> Tensor:
    gm = trace(Weight(function, w), (torch.randn(2, *w.shape[1:]),)).graph_module
    node = frontier(gm)
    return evaluate_constants([node], rounded=rounded)[node]


def standardised(w: Tensor) -> Tensor:
    return (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1e-5)


def test_continuous_functions_are_evaluated_in_float64() -> None:
    w = torch.randn(1, 64) + 100
    got = constant(standardised, w, rounded=False)
    assert got.dtype == torch.float64
    assert (got - standardised(w.double())).abs().max() < EXACT * 100
    assert (standardised(w) - got).abs().max() > 1e-7  # float32 really is worse
    rounded = constant(standardised, w)
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, standardised(w.double()).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_rounded_once(dtype: torch.dtype) -> None:
    w = torch.randn(1, 64).to(dtype)
    got = constant(lambda v: v.exp() / 3 * 7, w)
    assert got.dtype == dtype
    assert torch.equal(got, (w.double().exp() / 3 * 7).to(dtype))


def test_upstream_of_a_step_is_the_models_own_dtype() -> None:
    scale = 0.1
    k = torch.arange(-2000, 2000).float()
    w = ((k + 0.5) * scale).reshape(1, -1)  # every value sits at a rounding edge

    def quantised(v: Tensor) -> Tensor:
        return torch.round(v / scale) * scale

    got = constant(quantised, w)
    assert torch.equal((got / scale).round(), (quantised(w) / scale).round())
    moved = (torch.round(w.double() / scale) != torch.round(w / scale)).sum()
    assert moved > 0  # float64 would have moved some


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "sign": lambda w: torch.sign(w - w.mean()) * w.abs().mean(),
    "mask": lambda w: w * (w.abs() > w.abs().mean()),
    "integer cast": lambda w: (w * 7).to(torch.int8).float(),
    "floor division": lambda w: torch.div(w, 0.1, rounding_mode="floor"),
    "topk": lambda w: torch.zeros_like(w).scatter(1, w.abs().topk(3, 1).indices, 1.0),
    "argmax": lambda w: F.one_hot(w.argmax(1), w.shape[1]).float(),
    "bucketize": lambda w: torch.bucketize(w, torch.tensor([-1.0, 0.0, 1.0])).float(),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_bit_exact(name: str) -> None:
    w = torch.randn(1, 64)
    got, own = constant(STEPS[name], w), STEPS[name](w)
    zeros = (got == 0) == (own == 0)
    assert zeros.all()
    torch.testing.assert_close(got, own, rtol=2e-7, atol=0)


def test_discontinuity_of_nodes() -> None:
    def function(w: Tensor) -> Tensor:
        top = w.max(1).values
        return w.relu().clamp(0, 1) * top.unsqueeze(1) + torch.round(w)

    gm = trace(Weight(function, torch.randn(1, 8)), (torch.randn(2, 8),)).graph_module
    steps = [n.name for n in gm.graph.nodes if discontinuous(n)]
    assert steps == ["round_1"]


def test_moves_give_views_of_the_parameter() -> None:
    model = Weight(lambda w: w.t()[:3].unsqueeze(0), torch.randn(4, 5))
    gm = trace(model, (torch.randn(2, 3, 4),)).graph_module
    node = frontier(gm)
    value = evaluate_constants([node])[node]
    assert value.untyped_storage().data_ptr() == model.w.untyped_storage().data_ptr()


# --- the oracle -----------------------------------------------------------------------------------

CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "baked cast": (lambda x: (x.to(torch.float32) / 3).float(), lambda x: x / 3),
    "half in the middle": (lambda x: (x.half() / 3).float(), lambda x: x / 3),
    "factory": (
        lambda x: x + torch.arange(0, 0.6, 0.1) + torch.full((6,), 0.1) + torch.linspace(0, 1, 6),
        lambda x: (
            x
            + torch.arange(0, 0.6, 0.1, dtype=torch.float64)
            + torch.full((6,), 0.1, dtype=torch.float64)
            + torch.linspace(0, 1, 6, dtype=torch.float64)
        ),
    ),
    "dtype argument": (
        lambda x: x.softmax(-1, dtype=torch.float32) + x.sum(-1, True, dtype=torch.float32),
        lambda x: x.softmax(-1) + x.sum(-1, True),
    ),
    "integers that become floats": (
        lambda x: x * (torch.arange(1, 7) / 7) + torch.arange(6).sqrt(),
        lambda x: (
            x * (torch.arange(1, 7, dtype=torch.float64) / 7)
            + torch.arange(6, dtype=torch.float64).sqrt()
        ),
    ),
    "where of scalars": (
        lambda x: x + torch.where(x > 0, 0.1, 0.3),
        lambda x: x + torch.where(x > 0, torch.tensor(0.1).double() * 0 + 0.1, 0.3),
    ),
    "python literal": (lambda x: x * 0.1 + 1 / 3, lambda x: x * 0.1 + 1 / 3),
    "complex": (lambda x: torch.fft.rfft(x).abs(), lambda x: torch.fft.rfft(x).abs()),
    "new full": (
        lambda x: x + x.new_full((6,), 0.1) + torch.zeros_like(x, dtype=torch.float32),
        lambda x: x + 0.1,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_oracle(name: str) -> None:
    function, exact = CASES[name]
    x = torch.randn(2, 6)
    gm = trace(Does(function), (x,)).graph_module
    got, expected = Oracle(gm)(x), exact(x.double())
    assert got.dtype == torch.float64
    assert (got - expected).abs().max() <= EXACT * max(1.0, float(expected.abs().max()))


@pytest.mark.slow
def test_oracle_sees_through_autocast_and_cond() -> None:
    fc = nn.Linear(4, 4)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = fc

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.fc(x)
            return torch.cond(x.sum() > 0, lambda v: v / 3, lambda v: v / 7, (y.float(),))

    gm = trace(Model(), (torch.randn(2, 4),)).graph_module
    for sign, by in ((1.0, 3), (-1.0, 7)):
        x = sign * torch.rand(2, 4)
        expected = F.linear(x.double(), fc.weight.double(), fc.bias.double()) / by
        assert (Oracle(gm)(x) - expected).abs().max() < EXACT


def test_oracle_keeps_structure_and_integers() -> None:
    def function(x: Tensor, index: Tensor) -> dict[str, Tensor]:
        return {"rows": x[index], "at": x.argmax(1)}

    x, index = torch.randn(4, 6), torch.tensor([2, 0, 0, 1])
    got = Oracle(trace(Does(function), (x, index)).graph_module)(x, index)
    assert torch.equal(got["rows"], x.double()[index])
    assert torch.equal(got["at"], x.argmax(1))
    assert got["at"].dtype == torch.int64


def test_oracle_does_not_write_state() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("n", torch.zeros(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.n += 1
            return x + self.n

    gm = trace(Counts(), (torch.zeros(2, 4),)).graph_module
    oracle = Oracle(gm)
    assert float(oracle(torch.zeros(2, 4))[0, 0]) == 1
    assert float(oracle(torch.zeros(2, 4))[0, 0]) == 1


def test_oracle_watches_every_node() -> None:
    x = torch.randn(2, 4)
    gm = trace(Does(lambda x: (x + 1).relu() * 2), (x,)).graph_module
    seen: list[str] = []
    Oracle(gm).run((x,), watch=lambda node, value: seen.append(node.name))
    assert seen == [n.name for n in gm.graph.nodes if n.op != "output"]
