"""Quantisers of activations keep their meaning in ONNX, where the exporter changes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.ao.quantization.fx import _decomposed  # registers the quantised operators

import refold
from refold.errors import BackendError
from refold.frontends.export import trace

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
assert _decomposed is not None
ops = torch.ops.quantized_decomposed
FP8 = torch.float8_e4m3fn


class Through(nn.Module):
    """Values through a quantiser, as numbers again."""

    def __init__(self, low: int, high: int, dtype: torch.dtype, zero: int = 0) -> None:
        super().__init__()
        self.given = 0.25, zero, low, high, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *self.given), *self.given)


def kinds(compiled: Any) -> list[str]:
    return [n.op_type for n in compiled._done.artifact.content.model.graph]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "clipped"),
    [
        ((-128, 127, torch.int8), False),
        ((-127, 127, torch.int8), True),
        ((-8, 7, torch.int8), True),
        ((0, 127, torch.uint8, 60), True),
        ((0, 255, torch.uint8, 200), False),
        ((-32768, 32767, torch.int16), False),
    ],
)
def test_limits_are_kept(given: Any, clipped: bool) -> None:
    model = Through(*given)
    compiled = refold.compile_for_inference(model, torch.randn(2, 9), target="ort", opset=21)
    assert kinds(compiled).count("Clip") == clipped
    # Far past every limit, and on both sides of each, where nothing is a tie.
    steps = torch.cat([torch.arange(-400.0, 400), torch.tensor([-1e9, 1e9])]) + 0.3
    x = (steps * 0.25)[:, None].expand(-1, 9)
    assert torch.equal(compiled(x), model(x))


@pytest.mark.slow
def test_float8_is_rounded_twice_as_pytorch_does() -> None:
    model = Through(-448, 448, FP8)
    compiled = refold.compile_for_inference(model, torch.randn(2, 9) * 9, target="ort")
    x = torch.linspace(-200, 200, 9000).reshape(-1, 9)
    assert torch.equal(compiled(x), model(x))
    assert not torch.equal(model(x), (x / 0.25).clamp(-448, 448).to(FP8).float() * 0.25)


@pytest.mark.slow
def test_half_precision_input() -> None:
    model = Through(-128, 127, torch.int8)
    compiled = refold.compile_for_inference(model, torch.randn(2, 9).half(), target="ort")
    x = torch.randn(2, 9).half() * 9
    assert torch.equal(compiled(x), model(x))


class Computed(nn.Module):
    """The scale is that of the values at hand."""

    def __init__(self, high: int) -> None:
        super().__init__()
        self.high = high

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale, zero = x.abs().max() / 100, torch.zeros((), dtype=torch.int64)
        q = ops.quantize_per_tensor(x, scale, zero, -128, self.high, torch.int8)
        return q.float() * scale


def test_computed_scale() -> None:
    with pytest.raises(BackendError, match=r"-128 to 100 with a scale that is computed"):
        refold.compile_for_inference(Computed(100), torch.randn(2, 9), target="onnx")


def test_the_graph_at_hand_stays_as_it_is() -> None:
    from refold.backends.onnx.export import lower

    program = trace(Through(-8, 7, torch.int8), (torch.randn(2, 9),), {})
    before = str(program.graph_module.graph)
    lower(program, program.graph_module, 20)
    assert str(program.graph_module.graph) == before
