"""Tensors of an unusual kind at the door: they work, or are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refold
from refold.errors import FrontendError


class Holds(nn.Module):
    """``forward(x) = formula(self, x)``; holds a tensor as buffer, parameter or attribute."""

    def __init__(self, formula: Callable[..., Any], held: Any = None, *, plain: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.formula = formula
        self.layer = nn.Linear(4, 4)
        if isinstance(held, nn.Parameter) or plain:
            self.held = held
        else:
            self.register_buffer("held", held)

    def forward(self, x: Tensor) -> Any:
        return self.formula(self, x)


class Marked(torch.Tensor):
    """A subclass that behaves like its base."""


def unit() -> Tensor:
    return torch.eye(5)


def rows() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def without_values() -> nn.Parameter:
    return nn.Parameter(torch.empty(4, device="meta"))


PRODUCT = lambda s, x: torch.sparse.mm(s.held, s.layer(x))

REFUSED = {
    "COO buffer": (lambda: Holds(PRODUCT, unit().to_sparse()), rows, "'held' is sparse"),
    "CSR buffer": (lambda: Holds(PRODUCT, unit().to_sparse_csr()), rows, "'held' is sparse"),
    "COO operator": (
        lambda: Holds(lambda s, x: s.held @ s.layer(x), unit().to_sparse()),
        rows, "'held' is sparse",
    ),
    "COO parameter": (
        lambda: Holds(PRODUCT, nn.Parameter(unit().to_sparse())), rows, "'held' is sparse",
    ),
    "COO attribute": (
        lambda: Holds(PRODUCT, unit().to_sparse(), plain=True), rows, "'held' is sparse",
    ),
    "COO made dense": (
        lambda: Holds(lambda s, x: s.held.to_dense() @ s.layer(x), unit().to_sparse()),
        rows, "'held' is sparse",
    ),
    "made sparse": (
        lambda: Holds(lambda s, x: s.layer(x).to_sparse().to_dense()),
        rows, r"to_sparse at .*\.py:\d+.* is sparse",
    ),
    "sparse input": (
        lambda: Holds(lambda s, x: torch.sparse.mm(x, s.layer.weight)),
        lambda: rows().to_sparse(), "input 0 is sparse",
    ),
    "nested input": (
        lambda: Holds(lambda s, x: s.layer(x)),
        lambda: torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)]),
        "input 0 is nested",
    ),
    "meta parameter": (
        lambda: Holds(lambda s, x: s.layer(x) * s.held, without_values()),
        rows, "'held' is on the meta device",
    ),
    "meta module": (lambda: nn.Linear(4, 4, device="meta"), rows, "'weight' is on the meta device"),
    "meta input": (
        lambda: Holds(lambda s, x: s.layer(x)), lambda: rows().to("meta"),
        "input 0 is on the meta device",
    ),
    "quantised buffer": (
        lambda: Holds(
            lambda s, x: s.layer(x) + s.held.dequantize(),
            torch.quantize_per_tensor(rows(), 0.1, 0, torch.qint8),
        ),
        rows, "'held' is quantised",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_is_refused_by_name(kind: str) -> None:
    model, example, message = REFUSED[kind]
    with pytest.raises(FrontendError, match=message) as raised:
        refold.compile_for_inference(model().eval(), example())
    assert "fix:" in str(raised.value)


RIGHT = {
    "unread sparse buffer": (lambda s, x: s.layer(x), unit().to_sparse(), rows),
    "unread meta parameter": (
        lambda s, x: s.layer(x), without_values(), rows,
    ),
    "complex buffer": (
        lambda s, x: (torch.fft.fft(s.layer(x)) * s.held).real,
        torch.tensor([1j, 2.0, 1 - 1j, 3.0]), rows,
    ),
    "conjugated buffer": (
        lambda s, x: (s.layer(x) * s.held).imag, torch.tensor([1j, 2.0, 1 - 1j, 3.0]).conj(), rows,
    ),
    "empty parameter": (
        lambda s, x: s.layer(x) + s.held.sum(), nn.Parameter(torch.empty(0, 4)), rows,
    ),
    "subclass buffer": (lambda s, x: s.layer(x) + s.held, torch.ones(4).as_subclass(Marked), rows),
    "float8 buffer": (
        lambda s, x: F.linear(s.layer(x), s.held.float()),
        torch.eye(4).to(torch.float8_e4m3fn), rows,
    ),
    "float8 input": (
        lambda s, x: s.layer(x.float()), None, lambda: rows().to(torch.float8_e4m3fn),
    ),
    "uint8 input": (
        lambda s, x: s.layer(x.float() / 255), None,
        lambda: torch.arange(20, dtype=torch.uint8).reshape(5, 4),
    ),
    "bool input": (lambda s, x: s.layer(x.float()), None, lambda: rows() > 0),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", RIGHT)
def test_is_right(kind: str) -> None:
    formula, held, example = RIGHT[kind]
    model = Holds(formula, held).eval()
    compiled = refold.compile_for_inference(model, example())
    torch.testing.assert_close(compiled(example()), model(example()))


def normalised(s: Holds, x: Tensor) -> Tensor:
    weight = s.layer.weight.data
    return F.linear(x, weight / weight.norm(dim=1, keepdim=True))


def reflected(s: Holds, x: Tensor) -> Tensor:
    v = s.held.data[None]
    return s.layer(x @ (torch.eye(4) - 2 * v.t() @ v / (v * v).sum()))


@pytest.mark.parametrize(
    "formula",
    [
        lambda s, x: F.linear(x, s.layer.weight.data, s.layer.bias),
        lambda s, x: F.linear(x, s.layer.weight.data.clone() * 2, s.layer.bias.data),
        lambda s, x: F.linear(x, s.layer.weight.detach() * 2, s.layer.bias),
        lambda s, x: F.linear(x, nn.Parameter(s.layer.weight.data * 2), s.layer.bias),
        lambda s, x: s.layer(x.data) + x.data,
        lambda s, x: s.layer(x) * s.held.data,
        normalised,
        reflected,
    ],
    ids=["weight", "copied", "detached", "parameter", "input", "buffer", "normalised", "reflected"],
)
def test_data_of_a_tensor_is_the_tensor(formula: Callable[..., Tensor]) -> None:
    model = Holds(formula, torch.tensor([1.0, 2.0, -1.0, 0.5])).eval()
    compiled = refold.compile_for_inference(model, rows())
    for x in (rows(), rows()[:3], rows()[:1]):
        torch.testing.assert_close(compiled(x), model(x))
