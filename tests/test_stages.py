"""The stages of a compilation: values that go one way, and what the report says of operators."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import refold
from refold.errors import BackendError
from refold.frontends.export import trace
from refold.passes import PIPELINES
from refold.rewrite.context import Context
from refold.stages import Clock, fold_program
from tests.tracing import ops


@torch.library.custom_op("stages::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Norm(nn.Module):
    def __init__(self, *, strange: int = 0) -> None:
        super().__init__()
        self.conv, self.norm, self.strange = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), strange
        self.norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        for _ in range(self.strange):
            y = torch.ops.stages.twice(y)
        return self.norm(y)


X = torch.randn(2, 3, 6, 6)


def test_a_program_is_a_value() -> None:
    """Passes work on a copy: what was traced is what results are compared with."""
    program = trace(Norm().eval(), (X,), {})
    before, code = ops(program.graph_module), program.graph_module.code
    expected = program.graph_module(X)
    folded = fold_program(program, PIPELINES["default"], Context(), Clock())
    assert ops(folded.graph_module) == {"conv2d": 1}
    assert ops(program.graph_module) == before
    assert program.graph_module.code == code
    assert torch.equal(program.graph_module(X), expected)
    with pytest.raises(dataclasses.FrozenInstanceError):
        program.graph_module = folded.graph_module  # type: ignore[misc]


def test_stages_are_said_and_timed() -> None:
    said: list[str] = []
    done = refold.compile_for_inference(Norm().eval(), X, progress=said.append)
    assert said == ["trace", "reference", "fold", "verify", "lower"]
    assert list(done.report.timings) == said


def test_unknown_operators_are_named() -> None:
    report = refold.compile_for_inference(Norm(strange=2).eval(), X).report
    assert report.unknown == {"twice": 2}
    assert report.to_dict()["unknown"] == {"twice": 2}
    assert "operator twice x 2: nothing is folded through it" in str(report)
    assert any("nothing is known of how twice" in d.reason for d in report.declined)
    assert not any("not linear" in d.reason for d in report.declined)
    assert type(report).from_json(report.to_json()).unknown == {"twice": 2}


def test_known_operators_are_not_named() -> None:
    report = refold.compile_for_inference(Norm().eval(), X).report
    assert report.unknown == {}
    assert "unknown" not in str(report)


class Spectrum(nn.Module):
    def __init__(self, take: bool, give: bool) -> None:
        super().__init__()
        self.take, self.give = take, give

    def forward(self, x: Tensor) -> Tensor:
        y = (x if self.take else torch.complex(x, x)) * 2
        return y if self.give else torch.view_as_real(y)


@pytest.mark.parametrize(("take", "give"), [(True, False), (False, True)])
def test_a_target_without_complex_numbers_takes_and_gives_none(take: bool, give: bool) -> None:
    """ONNX's exporter writes them as pairs: a caller would get another dtype and another rank."""
    pytest.importorskip("onnxruntime")
    x = torch.randn(2, 4, dtype=torch.complex64 if take else torch.float32)
    with pytest.raises(BackendError, match=r"ort has no complex numbers, and .* is complex64"):
        refold.compile_for_inference(Spectrum(take, give), (x,), target="ort", verify=False)
    compiled = refold.compile_for_inference(Spectrum(take, give), (x,))
    assert torch.equal(compiled(x), Spectrum(take, give)(x))
