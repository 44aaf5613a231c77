"""A model that seeds its own random numbers is refused: a trace would lose the seed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from refold.errors import FrontendError
from refold.frontends.export import trace


class Draws(nn.Module):
    def __init__(self, draw: Callable[[], Tensor]) -> None:
        super().__init__()
        self.draw = draw
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.draw())


def seeded() -> Tensor:
    torch.manual_seed(3)
    return torch.rand(4, 4)


def seeded_in_place() -> Tensor:
    torch.manual_seed(3)
    return torch.empty(4, 4).uniform_(-1, 1)


def generator() -> Tensor:
    return torch.rand(4, 4, generator=torch.Generator().manual_seed(3))


def generator_in_place() -> Tensor:
    return torch.empty(4, 4).normal_(generator=torch.Generator().manual_seed(3))


def forked() -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return torch.rand(4, 4)


X = torch.ones(2, 4)


@pytest.mark.parametrize("draw", [seeded, seeded_in_place, generator, generator_in_place, forked])
def test_a_seed_in_forward_is_refused(draw: Callable[[], Tensor]) -> None:
    with pytest.raises(FrontendError) as caught:
        trace(Draws(draw).eval(), (X,))
    message = str(caught.value)
    assert "Draws seeds the random numbers that it draws in forward" in message
    assert "test_seeded_draws.py:" in message
    assert "register_buffer" in message


def test_draws_without_a_seed_are_traced() -> None:
    program = trace(Draws(lambda: torch.rand(4, 4)).eval(), (X,))
    assert any("rand" in str(n.target) for n in program.graph_module.graph.nodes)


def test_seeded_draws_that_cancel_are_traced() -> None:
    """Where the drawn order does not matter, the trace gives the model's numbers too."""

    def permuted() -> Tensor:
        torch.manual_seed(3)
        order = torch.randperm(4)
        return torch.arange(4.0)[order][order.argsort()]

    trace(Draws(permuted).eval(), (X,))


def test_the_callers_generator_and_state_stay_as_they_are() -> None:
    class Writes(Draws):
        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) + self.calls

    model = Writes(lambda: torch.rand(4, 4)).eval()
    state = torch.get_rng_state()
    trace(model, (X,))
    assert torch.equal(torch.get_rng_state(), state)
    assert float(model.calls) == 0
