from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from torch import fx, nn

from refold.calibrate import layers as dense_layers
from refold.calibrate.layers import Layer
from refold.calibrate.lockstep import divergence
from refold.errors import UsageError
from refold.passes.shift_add import widths as module
from refold.passes.shift_add.codes import WIDTHS, Code, Coder
from refold.passes.shift_add.widths import budget_of, choose_widths
from tests.tracing import trace

WIDTH, GROUP = 32, 16


@pytest.fixture(autouse=True)
def seeded() -> None:
    pytest.importorskip("scipy")
    torch.manual_seed(0)


def coder(limit: float = math.inf) -> Coder:
    return Coder(GROUP, "uniform", rounds=5, damping=0.01, jobs=1, limit=limit)


def network(depth: int = 3) -> nn.Sequential:
    layers = [m for _ in range(depth) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*layers).double().eval()


def traced(model: nn.Module, x: torch.Tensor) -> tuple[fx.GraphModule, list[Layer]]:
    gm = trace(model, x)
    return gm, [n for n in map(dense_layers.linear, gm.graph.nodes) if isinstance(n, Layer)]


def loss_of(model: nn.Sequential, codes: list[Code], x: torch.Tensor) -> float:
    """How far the model's outputs are off with the weights that the codes stand for."""
    coded = deepcopy(model)
    for at, code in enumerate(codes):
        coded[2 * at].weight.data = code.dense(WIDTH, torch.float64)
    with torch.no_grad():
        return divergence([[model(x)]], [[coded(x)]], [False]).loss


def test_the_first_layers_are_one_bit_wider_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are, where no other allocation is found."""
    model, x = network(), torch.randn(64, WIDTH, dtype=torch.float64)
    gm, layers = traced(model, x)
    monkeypatch.setattr(module, "_ROUNDS", 0)
    for average, widths in ((3.0, [2, 2, 2]), (3.7, [3, 3, 2]), (4.4, [4, 3, 3]), (9.0, [4, 4, 4])):
        found = choose_widths(gm, layers, [((x,), {})], coder(), average)
        assert [code.bits for code in found.codes.values()] == widths
    with pytest.raises(UsageError, match="too few"):
        choose_widths(gm, layers, [((x,), {})], coder(), 2.9)


@pytest.mark.slow
def test_losses_are_measured_around_an_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), torch.randn(64, WIDTH, dtype=torch.float64)
    gm, layers = traced(model, x)
    calls, seen = [((x,), {})], []

    def allocate(table, budget):
        seen.append((table, budget))
        return [3, 2, 2]  # the first allocation: the search ends

    monkeypatch.setattr(module, "allocate_bits", allocate)
    choose_widths(gm, layers, calls, coder(), 3.4)
    ((table, budget),) = seen
    assert budget == int(3.4 * 3 * WIDTH**2 / 8)
    point = dict(zip(layers, (3, 2, 2), strict=True))
    codes = list(coder().code(gm, point, calls).codes.values())
    whole = loss_of(model, codes, x)
    assert whole > 0
    for at, layer in enumerate(layers):
        assert table[at].keys() == set(WIDTHS)
        for width, choice in table[at].items():
            own = coder().code(gm, {**point, layer: width}, calls).codes[layer]
            expected = loss_of(model, [*codes[:at], own, *codes[at + 1 :]], x) - whole
            assert choice.loss == pytest.approx(expected, rel=1e-6, abs=1e-12)
            assert choice.bytes == own.bytes == coder().bytes(layer, width)
        assert table[at][point[layer]].loss == 0.0
        assert table[at][4].loss < table[at][2].loss


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_is_never_worse_than_the_first_allocation(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = network(4), torch.randn(64, WIDTH, dtype=torch.float64)
    for layer in model[::2]:
        layer.weight.data *= 4 ** torch.rand(())
    gm, layers = traced(model, x)
    calls, average = [((x,), {})], 3.6
    first = coder().code(gm, dict(zip(layers, (3, 3, 2, 2), strict=True)), calls).codes
    found = choose_widths(gm, layers, calls, coder(), average).codes
    assert sum(code.bytes for code in found.values()) <= budget_of(layers, average)
    before, after = (loss_of(model, list(codes.values()), x) for codes in (first, found))
    assert after <= before


def test_an_allocation_that_costs_more_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), torch.randn(64, WIDTH, dtype=torch.float64)
    gm, layers = traced(model, x)
    monkeypatch.setattr(module, "allocate_bits", lambda table, budget: [2, 2, 2])
    found = choose_widths(gm, layers, [((x,), {})], coder(), 3.4)
    assert [code.bits for code in found.codes.values()] == [3, 2, 2]


def test_layers_past_the_limit_are_named_and_cost_no_budget() -> None:
    model, x = network(), torch.randn(64, WIDTH, dtype=torch.float64)
    model[0].weight.data = torch.distributions.StudentT(1.0).sample((WIDTH, WIDTH)).double()
    gm, layers = traced(model, x)
    for calls in ([], [((x,), {})]):
        free = choose_widths(gm, layers, calls, coder(), 9.0).codes
        errors = [code.error for code in free.values()]
        limit = (errors[0] + max(errors[1:])) / 2
        assert errors[0] > limit
        found = choose_widths(gm, layers, calls, coder(limit), 4.0)
        assert list(found.codes) == layers[1:]
        assert list(found.too_far) == layers[:1]
        assert sum(code.bytes for code in found.codes.values()) <= budget_of(layers[1:], 4.0)
