"""The unfolded error is that of the module that was given, not of its trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from refold.errors import VerificationError
from refold.frontends.export import trace
from refold.verify import compare
from refold.verify.given import Given
from refold.verify.references import references
from tests.folding import Net


def test_a_trace_that_is_less_exact_than_the_module_is_refused() -> None:
    """What a frontend's rewrite costs is refold's own error."""
    torch.manual_seed(0)
    x = torch.randn(2, 64)
    exact = Net(lambda s, x: x / 3)
    program = trace(Net(lambda s, x: (x + 4096) / 3 - 4096 / 3), (x,))
    trace_alone = references(program.graph_module, program)
    assert compare.verify(program.graph_module, program.graph_module, trace_alone).passed
    given = references(program.graph_module, program, module=lambda: exact)
    assert torch.equal(given.own[0], x / 3)
    with pytest.raises(VerificationError):
        compare.verify(program.graph_module, program.graph_module, given)


def test_runs_work_on_a_state_of_their_own() -> None:
    net = Net(lambda s, x: (s.n.add_(1), x + s.n)[1])
    net.register_buffer("n", torch.zeros(4))
    x = torch.zeros(2, 4)
    program = trace(net, (x,))
    for make in (program.module, None):
        given = Given(program.graph_module, make)
        assert given.has_state
        calls = [((x,), {}), ((x,), {})]
        assert [float(y[0, 0]) for y in given.run(calls, x)] == [1, 2]
        assert [float(y[0, 0]) for y in given.run(calls, x)] == [1, 2]
    assert float(net.n[0]) == 0


def test_a_module_that_returns_something_else_than_its_trace_steps_back() -> None:
    program = trace(nn.Linear(4, 4), (torch.randn(2, 4),))
    given = Given(program.graph_module, lambda: nn.Linear(4, 3))
    call = program.example
    (result,) = given.run([call], torch.zeros(2, 4))
    assert result.shape == (2, 4)
