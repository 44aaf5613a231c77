"""Arguments of a wrong type are said at the door, before anything is traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import refold
from refold.errors import FrontendError, RefoldError, UsageError

X = torch.randn(2, 3)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": None}, "target is None"),
        ({"target": 5}, "target is 5"),
        ({"target": []}, r"target is \[\]"),
        ({"target": ""}, "unknown target ''"),
        ({"target": b"torch"}, "target is b'torch'"),
        ({"target": nn.Module}, "target is <class"),
        ({"pipeline": []}, r"pipeline is \[\]"),
        ({"pipeline": ()}, r"pipeline is \(\)"),
        ({"pipeline": None}, "pipeline is None"),
        ({"pipeline": ""}, "pipeline '' cannot be read"),
        ({"pipeline": 5}, "pipeline is 5"),
        ({"pipeline": ["default"]}, r"pipeline is \['default'\]"),
        ({"max_growth": "much"}, "max_growth is 'much'"),
        ({"max_growth": float("nan")}, "max_growth is nan"),
        ({"exclude": 5}, "exclude is 5"),
        ({"exclude": None}, "exclude is None"),
        ({"expect": []}, r"expect is \[\]"),
        ({"bind": 5}, "bind is 5"),
        ({"bind": "x"}, "bind is 'x'"),
        ({"bind": []}, r"bind is \[\]"),
        ({"bind": {1: X}}, "bind is {1: "),
        ({"progress": 5}, "progress is 5"),
        ({"trust": "no"}, "trust is 'no'"),
        ({"verify": None}, "verify is None"),
        ({"recipe": []}, r"recipe is \[\]"),
        ({"consume": "false"}, "consume is 'false'"),
        ({"copy_weights": X}, "copy_weights is tensor"),
        ({"target": "onnx", "opset": None}, "opset got None"),
        ({"target": "ort", "threads": 10**30}, "threads must be 0"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        refold.compile_for_inference(_Net(), (X,), **settings)


@pytest.mark.parametrize("given", [1, 0, True, False])
def test_numbers_of_one_bit_are_truth_values(given: Any) -> None:
    assert refold.compile_for_inference(_Net(), (X,), verify=given)(X).shape == (2, 4)


@pytest.mark.parametrize(
    "inputs",
    [(), [], {}, 5, "x", X.numpy(), (X.numpy(),), ((X,),), (None,), {X}, {1: X}, {"y": X}, X[0, 0],
     torch.Tensor, object(), (X.to("meta"),), (X.to_sparse(),)],
    ids=lambda given: type(given).__name__,
)  # fmt: skip
def test_example_inputs(inputs: Any) -> None:
    with pytest.raises(RefoldError):
        refold.compile_for_inference(_Net(), inputs)
    with pytest.raises(RefoldError):
        refold.explain(_Net(), inputs)


def test_example_inputs_that_only_a_run_refuses() -> None:
    """A trace knows shapes, not that this product wants one dtype."""
    with pytest.raises(FrontendError, match="the model raises on the example inputs"):
        refold.compile_for_inference(_Net(), (X.long(),))


@pytest.mark.parametrize(
    "shapes", [5, "N", ("a",), ({9: torch.export.Dim.AUTO},), ({"a": torch.export.Dim.AUTO},)]
)
def test_dynamic_shapes(shapes: Any) -> None:
    with pytest.raises(RefoldError):
        refold.compile_for_inference(_Net(), (X,), dynamic_shapes=shapes)


@pytest.mark.parametrize("model", [None, "", b"x", 5, {}, _Net, "/", lambda x: x])
def test_models(model: Any) -> None:
    with pytest.raises(RefoldError):
        refold.compile_for_inference(model, (X,))


@pytest.mark.parametrize("passes", [None, 5, "default", [1], ["default"], [nn.ReLU]])
def test_passes(passes: Any) -> None:
    with pytest.raises(UsageError):
        refold.Pipeline("mine", passes)


def test_no_passes_are_a_pipeline() -> None:
    model = _Net().eval()
    compiled = refold.compile_for_inference(model, (X,), pipeline=refold.Pipeline("none", ()))
    torch.testing.assert_close(compiled(X), model(X), rtol=0, atol=0)


def test_settings_of_explain_and_fold() -> None:
    with pytest.raises(UsageError, match="bind is 5"):
        refold.explain(_Net(), (X,), bind=5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="trust is 'no'"):
        refold.explain(_Net(), (X,), trust="no")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="takes a target"):
        refold.fold(_Net(), (X,), target="onnx")


def test_calls_with_sparse_tensors() -> None:
    compiled = refold.compile_for_inference(_Net(), (X,))
    with pytest.raises(UsageError, match="expected a dense tensor"):
        compiled(X.to_sparse())
