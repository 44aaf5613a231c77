"""Bounds on blocks of positions hold for every size, and are tight where masks need them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from refold.graph import constants
from refold.graph.nodes import is_tensor
from refold.passes.prepare.index_bounds import IndexBounds
from tests.tracing import trace

FIRST, REST = (0.0, 5.0), (6.0, math.inf)  # six rows, and those after them
HIDDEN, SHOWN = (0.0, 0.0), (1.0, 1.0)
MASKS = {
    "columns": (lambda i, n: (i < 6).expand(n, n), (SHOWN, HIDDEN)),
    "up to": (lambda i, n: (i <= 5).expand(n, n), (SHOWN, HIDDEN)),
    "from": (lambda i, n: (i >= 6).expand(n, n), (HIDDEN, SHOWN)),
    "after": (lambda i, n: (i > 5).expand(n, n), (HIDDEN, SHOWN)),
    "not": (lambda i, n: ~(i >= 6).expand(n, n), (SHOWN, HIDDEN)),
    "or itself": (lambda i, n: (i < 6) | (i.unsqueeze(1) == i), (SHOWN, HIDDEN)),
    "and another": (lambda i, n: (i < 6) & (i.unsqueeze(1) != i), ((0.0, 1.0), HIDDEN)),
    "causal": (lambda i, n: i.unsqueeze(1) >= i, ((0.0, 1.0), HIDDEN)),
    "anticausal": (lambda i, n: i.unsqueeze(1) < i, ((0.0, 1.0), SHOWN)),
    "shifted": (lambda i, n: (torch.arange(2, n + 2) < 8).expand(n, n), (SHOWN, HIDDEN)),
    "one too many": (lambda i, n: (i < 7).expand(n, n), (SHOWN, (0.0, 1.0))),
    "from the end": (lambda i, n: (i < n - 2).expand(n, n), ((0.0, 1.0), (0.0, 1.0))),
    "computed": (lambda i, n: (i * 2 < 12).expand(n, n), ((0.0, 1.0), (0.0, 1.0))),
    "steps": (lambda i, n: (torch.arange(0, 2 * n, 2) < 6).expand(n, n), ((0.0, 1.0),) * 2),
}


def masks(function):
    """The mask's graph over a symbolic number of rows, and its last node."""
    gm = trace(
        lambda x: function(torch.arange(x.shape[0]), x.shape[0]), torch.randn(9), dynamic=True
    )
    (result,) = gm.graph.output_node().args[0]
    return gm, result


@pytest.mark.parametrize("name", MASKS)
def test_blocks_of_a_mask(name: str) -> None:
    function, expected = MASKS[name]
    gm, mask = masks(function)
    bounds = IndexBounds(constants.constant_nodes(gm.graph))
    assert tuple(bounds.of(mask, [FIRST, columns]) for columns in (FIRST, REST)) == expected


OPERATORS = ["lt", "le", "gt", "ge", "eq", "ne"]


@settings(max_examples=15, deadline=None)
@given(
    names=st.lists(st.sampled_from(OPERATORS), min_size=2, max_size=2),
    limits=st.lists(st.integers(0, 9), min_size=2, max_size=2),
    join=st.sampled_from(["logical_and", "logical_or", "bitwise_and", "bitwise_or"]),
    negated=st.booleans(),
    edges=st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 8)),
)
def test_every_value_lies_between_its_bounds(names, limits, join, negated, edges) -> None:
    def function(i, n):
        left = getattr(torch, names[0])(i.unsqueeze(1), i)
        right = getattr(torch, names[1])(i, limits[0]) | (i == limits[1])
        mask = getattr(torch, join)(left, right)
        return torch.logical_not(mask) if negated else mask

    gm, _ = masks(function)
    first, second, column = sorted(edges[:2])[0], sorted(edges[:2])[1], edges[2]
    bounds = IndexBounds(constants.constant_nodes(gm.graph))
    for node in gm.graph.nodes:
        if not is_tensor(node) or node.op == "placeholder":
            continue
        block = [(float(first), float(second)), (float(column), math.inf)]
        low, high = bounds.of(node, block[2 - node.meta["val"].dim() :])
        for rows in (9, 14):
            found = _value(gm, node, rows).double()
            if found.dim() == 2 and found.shape[0] > 1:
                found = found[first : second + 1]
            found = found[..., column:] if found.shape[-1] > 1 else found
            assert low <= float(found.min())
            assert float(found.max()) <= high


def _value(gm, node, rows: int) -> torch.Tensor:
    values: list[torch.Tensor] = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if n is node:
                values.append(result)
            return result

    Watch(gm).run(torch.randn(rows))
    return values[0]


def test_constants_are_looked_at() -> None:
    class Stored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            hidden = torch.zeros(8, 8).masked_fill(torch.arange(8) >= 6, -torch.inf)
            self.register_buffer("mask", hidden)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.mask

    gm = trace(Stored(), torch.randn(8, 8))
    (mask,) = gm.graph.find_nodes(op="get_attr")
    bounds = IndexBounds(constants.constant_nodes(gm.graph))
    assert bounds.of(mask, [FIRST, FIRST]) == (0.0, 0.0)
    assert bounds.of(mask, [FIRST, (6.0, 7.0)]) == (-math.inf, -math.inf)
    assert bounds.of(mask, [FIRST, (5.0, math.inf)]) == (-math.inf, 0.0)
