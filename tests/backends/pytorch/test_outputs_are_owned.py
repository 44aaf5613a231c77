"""What a compiled model returns may be written: it is nobody else's, now or in the next call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import refold
from tests.examples import few

HERE = ("torch", "inductor", "aoti", "ort", "openvino")


class Model(nn.Module):
    def __init__(self, formula: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.formula = formula
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.norm.running_mean.uniform_(-1, 1)
        self.register_buffer("table", torch.randn(4, 2))

    def forward(self, x: Tensor) -> Any:
        return self.formula(self, x)


def layers(s: Any, x: Tensor) -> Tensor:
    return s.norm(s.conv(x))


def constant(s: Any, x: Tensor) -> Any:
    return layers(s, x), torch.arange(8.0).view(4, 2) * 2


def constant_of_a_buffer(s: Any, x: Tensor) -> Any:
    return layers(s, x), s.table * 2, s.table.softmax(0)


def equal_constants(s: Any, x: Tensor) -> Any:
    return layers(s, x), s.table + 1, s.table + 1


def equal(s: Any, x: Tensor) -> Any:
    return layers(s, x) * 2, layers(s, x) * 2


def equal_to_an_input(s: Any, x: Tensor) -> Any:
    return layers(s, x), x.clone(), x * 1, x + 0, torch.cat([x])


def alone_and_equal_to_an_input(s: Any, x: Tensor) -> Tensor:
    return x * 1


def parts(s: Any, x: Tensor) -> Any:
    """The outputs of which another one is made could be parts of its memory."""
    a, b = layers(s, x), x.sin()
    return a, b, torch.cat([a, b], 1)


def a_view_of_another(s: Any, x: Tensor) -> Any:
    """These share memory in the original, and may share it here."""
    y = layers(s, x)
    return y, y.flatten(1), y[:, :2]


def with_numbers(s: Any, x: Tensor) -> Any:
    return {"y": layers(s, x), "n": 3, "none": None, "c": torch.ones(3)}


CASES = [
    constant, constant_of_a_buffer, equal_constants, equal, equal_to_an_input,
    alone_and_equal_to_an_input, parts, a_view_of_another, with_numbers,
]  # fmt: skip


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def _sharing(outputs: list[Tensor], x: Tensor) -> set[tuple[int, int]]:
    """Pairs of outputs, and of an output and the input (-1), that lie in one memory."""
    memory = [t.untyped_storage().data_ptr() for t in outputs]
    pairs = {(i, j) for j, b in enumerate(memory) for i, a in enumerate(memory[:j]) if a == b}
    return pairs | {(-1, i) for i, m in enumerate(memory) if m == x.untyped_storage().data_ptr()}


def owned(model: nn.Module, run: Callable[[Tensor], Any], x: Tensor) -> None:
    with torch.no_grad():
        expected = [t.clone() for t in _tensors(model(x))]
        allowed = _sharing(_tensors(model(x)), x)
    given = x.clone()
    for _ in range(3):
        got = _tensors(run(given))
        assert _sharing(got, given) <= allowed
        for output, value in zip(got, expected, strict=True):
            torch.testing.assert_close(output, value, rtol=1e-4, atol=1e-4)
        for output in got:
            output.mul_(100)  # raises where elements lie on top of each other
        assert torch.equal(given, x)


@pytest.mark.parametrize(
    ("case", "target"),
    [
        # compilers take seconds for each, exporters one
        pytest.param(c, t, marks=() if t == "torch" else pytest.mark.slow)
        for c in CASES
        for t in HERE
    ],
)
def test_outputs_are_owned(case: Callable[..., Any], target: str) -> None:
    torch.manual_seed(0)
    model, x = Model(case).eval().requires_grad_(False), torch.randn(2, 3, 4, 4)
    owned(model, refold.compile_for_inference(model, x, target=target), x)


@pytest.mark.parametrize(
    ("inner", "cases"),
    [
        pytest.param("inductor", CASES, marks=pytest.mark.slow),
        pytest.param("aot_eager", CASES, marks=pytest.mark.slow),
        ("eager", CASES),
    ],
)
@pytest.mark.parametrize("frozen", few([False, True], 1))
def test_outputs_of_the_torch_compile_backend_are_owned(
    frozen: bool, inner: str, cases: Sequence[Callable[..., Any]]
) -> None:
    for case in cases:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = Model(case).eval().requires_grad_(False), torch.randn(2, 3, 4, 4)
        compiled = torch.compile(model, backend=refold.backend(inner=inner, frozen=frozen))
        with torch.no_grad():
            owned(model, compiled, x)
