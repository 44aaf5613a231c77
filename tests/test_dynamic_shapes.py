"""Batch, height and width dynamic, through every target that keeps them so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

import refold
from tests.compare import SINGLE, relative_error
from tests.examples import few
from tests.small_nets import seeded

SIZES = ((2, 8, 10), (1, 8, 10), (3, 9, 12), (5, 32, 16), (2, 10, 8), (4, 5, 5))


class Branches(nn.Module):
    """Parallel convolutions with norms, a strided one, and a size that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.narrow = nn.Conv2d(3, 4, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.down = nn.Conv2d(4, 4, 3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norms[0](self.wide(x)) + self.norms[1](self.narrow(x)))
        return F.interpolate(self.down(y), scale_factor=2.0) * (x.shape[2] + 2 * x.shape[3])


def shapes() -> dict[str, dict[int, Dim]]:
    return {"x": {0: Dim("batch"), 2: Dim("height", min=4), 3: Dim("width", min=4)}}


@pytest.mark.parametrize(
    "target",
    few(["torch", "onnx", "ort", "inductor", "aoti"], 1),
)
def test_every_size(target: str) -> None:
    model = seeded(Branches())
    compiled = refold.compile_for_inference(
        model, torch.randn(2, 3, 8, 10), target=target, dynamic_shapes=shapes()
    )
    assert compiled.report.after.census["conv"] == 2
    assert "batch-norm" not in compiled.report.after.census
    for batch, height, width in SIZES:
        x = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            expected = model(x)
            assert relative_error(compiled(x), expected) <= SINGLE


@pytest.mark.slow
def test_onnx_keeps_the_names(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    compiled = refold.compile_for_inference(
        seeded(Branches()), torch.randn(2, 3, 8, 10), target="onnx", dynamic_shapes=shapes()
    )
    graph = onnx.load(str(compiled.save(tmp_path / "net.onnx"))).graph
    sizes = [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ["batch", 3, "height", "width"]
