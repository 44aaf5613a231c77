"""Quantised graphs as TensorRT reads them: quantisers next to their layers, in one precision."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import refold
from refold.backends.tensorrt import artifact, check, ops
from refold.backends.tensorrt import verify as judge
from refold.backends.tensorrt.target import TensorRTOptions, TensorRTTarget
from refold.frontends.export import trace
from tests.backends.quantised_nets import FP8, Float8Net, Int8Net
from tests.small_nets import seeded

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
TARGET = TensorRTTarget()


def example() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


def saved(model: nn.Module, folder: Any, norms: int, **options: Any) -> Path:
    """The verified artifact of a folded model."""
    expect = {"batch-norm": norms} if norms else None
    done = refold.compile_for_inference(
        model, example(), target="trt", build=False, expect=expect, **options
    )
    assert done.report.artifact_numerics["passed"]
    return done.save(folder / "net.trt")


def nodes(path: Any) -> list[Any]:
    model = onnx.load(path / artifact.MODEL)
    onnx.checker.check_model(model, full_check=True)
    return list(model.graph.node)


def rejections(path: Any, version: str = "10.3") -> Any:
    return check.preflight(path / artifact.MODEL, ops.Version.parse(version), None).rejections


def beside(path: Any, operator: str) -> set[str]:
    """What the layers of an operator read."""
    found = nodes(path)
    makers = {out: n.op_type for n in found for out in n.output}
    layers = [n for n in found if n.op_type == operator]
    assert layers
    return {makers.get(name, "") for layer in layers for name in layer.input[:2]}


def test_int8(tmp_path: Any) -> None:
    path = saved(seeded(Int8Net()), tmp_path, 2)
    assert Counter(n.op_type for n in nodes(path)) == {
        "QuantizeLinear": 3, "DequantizeLinear": 5, "Conv": 2, "Relu": 2, "Add": 1,
        "ReduceMean": 1, "Gemm": 1,
    }  # fmt: skip
    assert beside(path, "Conv") == {"DequantizeLinear"}
    assert not rejections(path)
    stored = {i.data_type for i in onnx.load(path / artifact.MODEL).graph.initializer if i.dims}
    assert onnx.TensorProto.INT8 in stored
    assert judge.verify_onnx(path).passed


@pytest.mark.slow
def test_int8_among_half_precision(tmp_path: Any) -> None:
    """Nothing between a layer and its quantisers, and one dtype around each layer."""
    path = saved(seeded(Int8Net(scale=0.02)), tmp_path, 2, precision="fp16")
    kinds = Counter(n.op_type for n in nodes(path))
    # One for the result. The first quantiser reads the input as it is.
    assert kinds["Cast"] == 1
    assert beside(path, "Conv") == {"DequantizeLinear"}
    assert not rejections(path)
    assert judge.verify_onnx(path).passed


@pytest.mark.slow
def test_scales_that_half_precision_lacks_stay() -> None:
    """Rounded to subnormal numbers they would be off by percents."""
    made = lowered(seeded(Int8Net(scale=1e-5)), example(), precision="fp16")
    weights = [n for n in made.content.onnx.model.graph if n.op_type == "DequantizeLinear"]
    dtypes = {n.inputs[0].name: n.inputs[1].dtype.name for n in weights}
    assert dtypes["a"] == dtypes["b"] == "FLOAT"
    assert set(dtypes.values()) == {"FLOAT", "FLOAT16"}
    assert any("2 quantisers keep their scale in float32" in note for note in made.notes)


@pytest.mark.slow
def test_zero_point_is_rejected_with_its_fix(tmp_path: Any) -> None:
    path = saved(seeded(Int8Net(zero=120)), tmp_path, 2)
    found = rejections(path)
    assert {r.operator for r in found} == {"QuantizeLinear", "DequantizeLinear"}
    assert {r.fix for r in found} == {
        "quantise symmetrically, to int8 or float8_e4m3fn with zero point 0"
    }
    assert all(r.source.startswith("quantised_nets.py:") for r in found)


def lowered(model: nn.Module, x: torch.Tensor, **options: Any) -> Any:
    """What the target makes of a model as it is."""
    program = trace(model.eval(), (x,), {})
    return TARGET.lower(program, program.graph_module, TensorRTOptions(build=False, **options))


def run(made: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = TARGET.load(made, TensorRTOptions(build=False))(x)
    return result


def operators(made: Any) -> list[str]:
    return [n.op_type for n in made.content.onnx.model.graph]


@pytest.mark.slow
def test_float8(tmp_path: Any) -> None:
    path = saved(seeded(Float8Net()), tmp_path, 0)
    kinds = Counter(n.op_type for n in nodes(path))
    # One scale for all channels is all that PyTorch has for float8: the norm stays.
    assert kinds == {
        "QuantizeLinear": 1, "DequantizeLinear": 2, "Conv": 1, "BatchNormalization": 1,
    }  # fmt: skip
    assert beside(path, "Conv") == {"DequantizeLinear"}
    assert not rejections(path)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [None, "fp16"])
def test_float8_values(precision: str | None) -> None:
    model = seeded(Float8Net())
    made = lowered(model, example(), precision=precision)
    assert "Clip" not in operators(made)
    assert "Mul" not in operators(made)
    x = example() * 20  # past the range of float8, which ends at 22.4
    scale = float(model(x).detach().abs().max())
    tolerance = {None: 1e-6, "fp16": 4e-3}[precision]
    assert float((run(made, x) - model(x)).detach().abs().max()) < tolerance * scale


@pytest.mark.slow
def test_a_narrower_clamp_is_another_function() -> None:
    model = seeded(Float8Net(bound=100.0))
    made = lowered(model, example())
    assert "QuantizeLinear" not in operators(made)
    x = example() * 20
    torch.testing.assert_close(run(made, x), model(x), rtol=1e-5, atol=1e-4)


class Cast(nn.Module):
    """Without a clamp, PyTorch makes NaN of what float8 does not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(FP8).to(torch.float32)


@pytest.mark.slow
def test_a_cast_that_may_overflow_is_no_quantiser(tmp_path: Any) -> None:
    made = lowered(Cast(), example())
    assert "QuantizeLinear" not in operators(made)
    TARGET.save(made, tmp_path, "net.trt")
    (rejection, *_) = rejections(tmp_path / "net.trt")
    assert "does not take FP8" in rejection.reason
    assert "clamp to -448 to 448 before it" in rejection.fix


class Shared(nn.Module):
    """The dequantised value is read as it is, too."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x.clamp(-448, 448).to(FP8).to(torch.float32)
        return y * 0.5, y.relu()


@pytest.mark.slow
def test_a_scale_of_one_of_two_readers_stays() -> None:
    made = lowered(Shared(), example())
    assert sorted(operators(made)) == ["DequantizeLinear", "Mul", "QuantizeLinear", "Relu"]
    x = example() * 100
    for got, expected in zip(run(made, x), Shared()(x), strict=True):
        assert torch.equal(got, expected)


class Wider(nn.Module):
    """A factor that gives the product more dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((1, 1, 1, 1, 1), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-448, 448).to(FP8).to(torch.float32) * self.scale


@pytest.mark.slow
def test_a_factor_that_changes_the_shape_stays() -> None:
    made = lowered(Wider(), example())
    assert operators(made).count("Mul") == 1
    assert run(made, example()).shape == (1, 2, 3, 8, 8)
