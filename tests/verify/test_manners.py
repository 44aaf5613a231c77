"""What a caller sees who writes into results and calls again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from refold.errors import VerificationError
from refold.frontends.export import trace
from refold.verify import compare
from refold.verify.manners import MannersError
from refold.verify.references import references
from tests.examples import few
from tests.folding import Net


def verdict(model: Callable, candidate: Callable, **parts: object) -> None:
    net = Net(lambda s, x: model(s, x), **parts)
    program = trace(net, (torch.randn(2, 4),))
    known = references(program.graph_module, program, module=program.module)
    compare.verify(program.graph_module, candidate, known)


def remembers() -> Callable[[Tensor], Tensor]:
    kept: list[Tensor] = []

    def candidate(x: Tensor) -> Tensor:
        if not kept or kept[0].shape != x.shape:
            kept[:] = [x * 2]
        else:
            kept[0] = kept[0] if bool((kept[0] == 77).all()) else x * 2
        return kept[0]

    return candidate


def doubles_in_place(x: Tensor) -> Tensor:
    result = x * 2
    x.zero_()
    return result


@pytest.mark.parametrize(
    ("model", "candidate", "says"),
    [
        (lambda s, x: (x * 2, x * 2), lambda x: (y := x * 2, y), "output 0 and output 1 share"),
        (lambda s, x: (x * 2, (x * 2)[0]), lambda x: (y := x * 2, y[0]), "share memory"),
        (lambda s, x: x + 0, lambda x: x, "output 0 and input 0 share"),
        (lambda s, x: x * 0 + 1, lambda x: torch.ones(1, 1).expand(x.shape), "cannot be written"),
        (lambda s, x: x * 2, doubles_in_place, "input 0 is written"),
        (lambda s, x: x * 2, remembers(), "second call"),
    ],
)
def test_what_the_original_does_not_do_is_refused(
    model: Callable, candidate: Callable, says: str
) -> None:
    with pytest.raises(MannersError, match=says):
        verdict(model, candidate)


@pytest.mark.parametrize(
    ("model", "candidate"),
    [
        (lambda s, x: (y := x * 2, y[0]), lambda x: (y := x * 2, y[0])),
        (lambda s, x: (y := x * 2, y[0]), lambda x: (x * 2, (x * 2)[0])),  # less is no harm
        (lambda s, x: x, lambda x: x),
        (lambda s, x: (x * 2)[:, :1].expand(2, 4), lambda x: (x * 2)[:, :1].expand(2, 4)),
    ],
)
def test_what_the_original_does_passes(model: Callable, candidate: Callable) -> None:
    verdict(model, candidate)


def counts(s: Net, x: Tensor) -> Tensor:
    s.n.add_(1)
    return x + s.n


def hands_out(s: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    s.n.add_(x.sum())
    return x * 2, s.n


@pytest.mark.parametrize("model", [counts, hands_out])
def test_a_state_lives_on(model: Callable) -> None:
    net = Net(lambda s, x: model(s, x))
    net.register_buffer("n", torch.zeros(4))
    program = trace(net, (torch.randn(2, 4),))
    gm = program.graph_module
    known = references(gm, program, module=program.module)
    assert known.manners is not None
    assert known.manners.later is not None
    assert compare.verify(gm, gm, known).passed
    assert not net.n.any()  # the module's own state is as it was

    stuck = trace(net, (torch.randn(2, 4),)).graph_module
    for node in list(stuck.graph.nodes):  # the state is no longer written
        if node.op == "call_function" and "copy_" in str(node.target):
            node.replace_all_uses_with(node.args[1])
            stuck.graph.erase_node(node)
    stuck.recompile()
    with pytest.raises(VerificationError, match="second call"):
        compare.verify(gm, stuck, known)


def delays(s: Net, x: Tensor) -> Tensor:
    late = s.n[0] + x
    s.n.copy_(torch.cat([s.n[1:], x.tanh().mean(0, keepdim=True)]))
    return late


def hardly_counts(s: Net, x: Tensor) -> Tensor:
    result = x + s.n[0] * 1e-2
    s.n.copy_(x.tanh()[: len(s.n)])
    return result


def never_returns(s: Net, x: Tensor) -> Tensor:
    s.n.add_(x.tanh().sum(0))
    return x * 2


@pytest.mark.parametrize("model", few([delays, hardly_counts, never_returns], 1))
@pytest.mark.parametrize("rows", [2, 3])
def test_a_state_that_shows_later_is_compared(model: Callable, rows: int) -> None:
    net = Net(lambda s, x: model(s, x))
    net.register_buffer("n", torch.zeros(rows, 4))
    program = trace(net, (torch.randn(4, 4),))
    gm = program.graph_module
    known = references(gm, program, module=program.module)
    assert compare.verify(gm, gm, known).passed
    wrong = trace(net, (torch.randn(4, 4),)).graph_module
    for node in wrong.graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default):
        node.target = torch.ops.aten.sin.default
    wrong.recompile()
    with pytest.raises(MannersError, match="the state n is not the original's"):
        compare.verify(gm, wrong, known)
