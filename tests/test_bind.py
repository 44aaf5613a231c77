"""Inputs that are declared constant: gone from the signature, folded with all that they feed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refold
from refold.errors import FrontendError, UsageError
from refold.report.report import Report
from tests.randomise import randomise

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
CONDITION = torch.randn(1, 5, generator=torch.Generator().manual_seed(2))
# float32, a few layers deep, relative to outputs of order one
CLOSE = {"rtol": 0.0, "atol": 1e-4}


class Conditional(nn.Module):
    """A condition makes a convolution's weight (Cai et al., CAN: Condition-Aware Network, 2024)."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4 * 3 * 9))
        self.norm = nn.BatchNorm2d(4)

    def forward(
        self, x: Tensor, condition: Tensor, *, strength: float = 1.0, extra: Any = None
    ) -> Tensor:
        y = self.norm(F.conv2d(x, self.make(condition).view(4, 3, 3, 3), padding=1)) * strength
        if extra is not None:
            y = y + extra["shift"] + extra["more"][0]
        return y


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomise(Conditional(), (X, CONDITION)).eval()


def extra() -> dict[str, Any]:
    return {"shift": torch.ones(4, 1, 1), "more": [torch.full((1,), 0.5)]}


def placeholders(compiled: refold.CompiledModel) -> list[str]:
    return [str(n.target) for n in compiled.graph_module.graph.find_nodes(op="placeholder")]


def test_a_bound_input_vanishes_with_its_generator(model: nn.Module) -> None:
    compiled = refold.fold(model, (X,), bind={"condition": CONDITION})
    assert placeholders(compiled) == ["x"]
    assert compiled.report.after.census == {"conv": 1}
    assert [i.name for i in compiled.report.inputs] == ["x"]
    (bound,) = compiled.report.bound
    assert (bound.name, bound.shape, bound.dtype, bound.bytes) == (
        "condition", (1, 5), "float32", 20,
    )  # fmt: skip
    made = sum(p.numel() for p in model.make.parameters()) * 4
    assert any(f"({made} of {made} bytes)" in note for note in compiled.report.notes)
    assert "condition float32 [1, 5], no input any more" in compiled.report.render()
    assert Report.from_json(compiled.report.to_json()).bound == compiled.report.bound
    for batch in (1, 2, 3):
        x = torch.randn(batch, 3, 6, 6)
        assert torch.allclose(compiled(x), model(x, CONDITION), **CLOSE)
    with pytest.raises(UsageError, match="positional"):
        compiled(X, CONDITION)


def test_keywords_numbers_and_containers_can_be_bound(model: nn.Module) -> None:
    compiled = refold.fold(
        model, {"x": X}, bind={"condition": CONDITION, "strength": 2.0, "extra": extra()}
    )
    assert placeholders(compiled) == ["x"]
    assert [b.name for b in compiled.report.bound] == ["condition", "extra[0]", "extra[1]"]
    expected = model(X, CONDITION, strength=2.0, extra=extra())
    assert torch.allclose(compiled(x=X), expected, **CLOSE)


def test_a_key_of_a_dict_can_be_bound(model: nn.Module) -> None:
    rest = {"more": [torch.full((1,), 0.5)]}
    compiled = refold.fold(
        model,
        {"x": X, "condition": CONDITION, "extra": rest},
        bind={"extra.shift": torch.ones(4, 1, 1)},
    )
    assert len(placeholders(compiled)) == 3
    got = compiled(x=X, condition=CONDITION, extra=rest)
    assert torch.allclose(got, model(X, CONDITION, extra=extra()), **CLOSE)
    with pytest.raises(UsageError, match="only keys of dicts"):
        refold.fold(model, {"x": X, "condition": CONDITION, "extra": rest},
                    bind={"extra.more.0": torch.ones(1)})  # fmt: skip


def test_a_first_parameter_can_be_bound(model: nn.Module) -> None:
    compiled = refold.fold(model, (CONDITION,), bind={"x": X})
    assert torch.allclose(compiled(CONDITION), model(X, CONDITION), **CLOSE)


def test_compiled_at_the_first_call(model: nn.Module) -> None:
    compiled = refold.fold(model, bind={"condition": CONDITION})
    assert torch.allclose(compiled(X), model(X, CONDITION), **CLOSE)


def test_the_callers_objects_stay_as_they_are(model: nn.Module) -> None:
    condition = CONDITION.clone()
    keys = list(model.state_dict())
    compiled = refold.fold(model, (X,), bind={"condition": condition})
    expected = model(X, CONDITION)
    condition.zero_()
    assert list(model.state_dict()) == keys
    assert "forward" not in vars(model)
    assert torch.allclose(compiled(X), expected, **CLOSE)


def test_a_forward_that_writes_its_input_starts_anew_at_each_call() -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor, start: Tensor) -> Tensor:
            start.add_(1)
            return x + start

    compiled = refold.fold(Counts(), (X,), bind={"start": torch.zeros(1)})
    for _ in range(2):
        assert torch.equal(compiled(X), X + 1)
    program = torch.export.export(Counts(), (X, torch.zeros(1)), strict=False)
    compiled = refold.fold(program, bind={"start": torch.zeros(1)})
    for _ in range(2):
        assert torch.equal(compiled(X), X + 1)


def test_a_bound_value_of_one_row_broadcasts_over_a_dynamic_batch() -> None:
    class Added(nn.Module):
        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return torch.tanh(x) + shift.exp()

    x, shift = torch.randn(1, 4), torch.randn(1, 4)
    compiled = refold.fold(Added(), (x,), bind={"shift": shift})
    assert compiled.report.inputs[0].batch == 0
    three = torch.randn(3, 4)
    assert torch.allclose(compiled(three), Added()(three, shift))


def test_a_bound_value_that_cannot_broadcast_fixes_the_batch_and_says_so() -> None:
    class Joined(nn.Module):
        def forward(self, x: Tensor, condition: Tensor) -> Tensor:
            return torch.cat([x, condition], 1)

    x, condition = torch.randn(1, 4), torch.randn(1, 2)
    compiled = refold.fold(Joined(), (x,), bind={"condition": condition})
    assert compiled.report.inputs[0].batch is None
    assert any("static at 1" in sentence for sentence in compiled.report.specialised)
    with pytest.raises(UsageError, match="dimension 0 is 1"):
        compiled(torch.randn(3, 4))


@pytest.mark.parametrize(
    ("bind", "error", "message"),
    [
        ({"conditon": CONDITION}, UsageError, "no input 'conditon'.*'condition'"),
        ({"condition": torch.randn(1, 4)}, FrontendError, "bound: condition.*RuntimeError"),
        ({"condition": CONDITION.double()}, FrontendError, "bound: condition.*RuntimeError"),
        ({"condition": object()}, UsageError, "'condition' is a object"),
    ],
)
def test_values_that_do_not_fit(model: nn.Module, bind: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        refold.fold(model, (X,), bind=bind)


def test_values_that_are_not_finite_are_noted(model: nn.Module) -> None:
    report = refold.explain(model, (X,), bind={"condition": CONDITION * float("nan")})
    assert any("condition has values that are not finite" in note for note in report.notes)
    assert [b.name for b in report.bound] == ["condition"]


def test_inputs_of_an_exported_program_can_be_bound(model: nn.Module) -> None:
    program = torch.export.export(model, (X, CONDITION), {"extra": extra()}, strict=False)
    compiled = refold.fold(program, bind={"condition": CONDITION})
    assert torch.allclose(compiled(X, extra=extra()), model(X, CONDITION, extra=extra()), **CLOSE)
    compiled = refold.fold(program, (X,), bind={"condition": CONDITION, "extra": extra()})
    assert placeholders(compiled) == ["x"]
    assert torch.allclose(compiled(X), model(X, CONDITION, extra=extra()), **CLOSE)
    for value, message in (
        (torch.randn(2, 5), r"float32 \[1, 5\].*float32 \[2, 5\]"),
        (CONDITION.double(), "float64"),
    ):
        with pytest.raises(UsageError, match=message):
            refold.fold(program, bind={"condition": value})
    with pytest.raises(UsageError, match="no input 'conditions'"):
        refold.fold(program, bind={"conditions": CONDITION})


def test_a_size_that_varies_cannot_be_bound_in_an_exported_program() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, by: Tensor) -> Tensor:
            return x * by

    batch = torch.export.Dim("batch", min=2)
    both = torch.randn(4, 3), torch.randn(4, 3)
    program = torch.export.export(
        Scaled(), both, dynamic_shapes={"x": {0: batch}, "by": {0: batch}}, strict=False
    )
    with pytest.raises(UsageError, match="a size that varies cannot be bound"):
        refold.fold(program, bind={"by": both[1]})


@pytest.mark.slow
def test_an_onnx_file_has_no_bound_input(model: nn.Module) -> None:
    pytest.importorskip("onnxruntime")
    compiled = refold.compile_for_inference(
        model, (X,), target="ort", bind={"condition": CONDITION}
    )
    graph = compiled._compilation.artifact.content.model.graph  # type: ignore[union-attr]
    assert [v.name for v in graph.inputs] == ["x"]
    assert torch.allclose(compiled(X), model(X, CONDITION), **CLOSE)


@pytest.mark.slow
def test_the_command_line_binds_files_and_numbers(
    tmp_path: Path, run: Any, model: nn.Module
) -> None:
    pytest.importorskip("onnxruntime")
    np.save(tmp_path / "condition.npy", CONDITION.numpy())
    program = torch.export.export(model, (X, CONDITION), strict=False)
    torch.export.save(program, tmp_path / "net.pt2")
    bound = f"condition={tmp_path / 'condition.npy'}"
    out = tmp_path / "net.onnx"
    code, shown, error = run("export", tmp_path / "net.pt2", "--bind", bound, "-o", out)
    assert code == 0, error
    assert "no input any more" in shown
    assert f"--bind {bound}" in shown
    code, _, error = run("verify", tmp_path / "net.pt2", out, "--bind", bound)
    assert code == 0, error
    for text, message in (
        ("condition", "NAME=VALUE"),
        ("condition=x.npy", "no such file"),
        ("condition=red", "no number"),
    ):
        code, _, error = run("explain", tmp_path / "net.pt2", "--bind", text)
        assert code == 2
        assert message in error


class Unread(nn.Module):
    def forward(self, x: Tensor, unread: Tensor) -> Tensor:
        return x * 2


@pytest.mark.parametrize("exported", [False, True])
def test_a_bound_input_that_the_model_does_not_read_is_recorded_and_named(exported: bool) -> None:
    x, value = torch.randn(2, 3), torch.randn(5)
    model: Any = Unread().eval()
    if exported:
        model = torch.export.export(model, (x, value))
    compiled = refold.compile_for_inference(model, (x,), bind={"unread": value})
    (bound,) = compiled.report.bound
    assert (bound.name, bound.shape, bound.bytes) == ("unread", (5,), 20)
    assert "the model does not read the bound input unread" in compiled.report.notes
    assert torch.equal(compiled(x), x * 2)
