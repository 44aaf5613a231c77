from __future__ import annotations

import pytest
import torch

from refold.graph import aliasing
from tests.tracing import find, trace

T = torch.randn(2, 4, 3, 3)


def test_roots_are_found_through_views() -> None:
    graph = trace(lambda v: torch.chunk(torch.relu(v).view(2, -1).unsqueeze(0), 2, 2)[0] * 2, T)
    getitem = next(n for n in graph.graph.nodes if n.name == "getitem")
    assert aliasing.roots(getitem) == {find(graph, "relu")}
    assert aliasing.roots(find(graph, "mul")) == {find(graph, "mul")}


def test_eval_dropout_passes_its_input() -> None:
    graph = trace(lambda v: torch.dropout(v, 0.5, False), T)
    assert [n.op for n in aliasing.roots(find(graph, "dropout"))] == ["placeholder"]


@pytest.mark.parametrize(
    ("user", "settled"),
    [
        (lambda v: torch.nn.functional.linear(v, torch.ones(5, 4)) * 2, True),
        (lambda v: v.reshape(2, -1) * 2, True),
        (lambda v: v.view(2, -1) * 2, False),
        (lambda v: torch.relu(v), False),
        (lambda v: torch.relu(v).sum((1, 2, 3)), True),
        (lambda v: v.as_strided((2, 3), (1, 2)) * 2, False),
    ],
)
def test_strides_settle_or_not(user, settled) -> None:
    graph = trace(lambda v: (lambda t: user(t.clone(memory_format=torch.contiguous_format)))(
        torch.abs(v).transpose(1, 3).transpose(2, 3)
    ), torch.randn(2, 3, 4, 3))  # fmt: skip
    reason = aliasing.unsettled_strides(find(graph, "clone"), find(graph, "transpose"))
    assert (reason is None) is settled


def test_strides_settle_with_what_else_is_replaced() -> None:
    def forward(v):
        turned = torch.abs(v).transpose(0, 1)
        one, other = (turned.clone(memory_format=torch.contiguous_format) for _ in range(2))
        return (one + other).view(-1) * 2

    graph = trace(forward, torch.randn(3, 4))
    turned = find(graph, "transpose")
    one, other = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)
    assert aliasing.unsettled_strides(other, turned) is None, "the first decides"
    reason = aliasing.unsettled_strides(other, turned, {one: turned.meta["val"]})
    assert reason is not None
    assert "view" in reason
