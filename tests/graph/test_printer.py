from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from refold.graph import printer, provenance
from tests import golden
from tests.tracing import find, trace

T = torch.randn(2, 4, 6, 6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, v):
        y = self.stem(v) * self.scale
        a, b = torch.chunk(y, 2, dim=1)
        z = torch.cat(
            [a, F.conv2d(b, self.stem[0].weight)[:, :4].mean((2, 3), keepdim=True) + a], 1
        )
        return {"z": z.to(torch.float64), "y": [y, z.reshape(z.shape[0], -1)]}


def test_golden() -> None:
    graph = trace(Net(), T, dynamic=True)
    provenance.derive(find(graph, "mul"), [find(graph, "batch_norm")], "some-rule")
    golden.check("printer", printer.render(graph))


def test_it_is_stable() -> None:
    one, two = (printer.render(trace(Net(), T, dynamic=True)) for _ in range(2))
    assert one == two
    assert "s0" in one


def test_excerpts_mark_the_line() -> None:
    graph = trace(lambda v: torch.sigmoid(torch.relu(v)) * 2, T)
    text = printer.excerpt(graph, find(graph, "relu"), context=1)
    assert [line[:2] for line in text.splitlines()] == ["  ", "> ", "  "]
    constant = trace(nn.Linear(6, 6), T)
    weight = next(n for n in constant.graph.nodes if n.op == "get_attr")
    assert "> %linear" in printer.excerpt(constant, weight)
