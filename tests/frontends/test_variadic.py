"""``forward(*args, **kwargs)``: a dynamic batch, sizes as users give them, calls as they like."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import refold
from refold.errors import UsageError
from refold.frontends.export import trace

ROWS = Dim("rows", max=9)


class Positional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, *x: Tensor) -> Tensor:
        return self.layer(x[0]) + x[1]


class Both(Positional):
    def forward(self, *args: Tensor, **more: Tensor) -> Tensor:
        return self.layer(args[0]) + more["y"]


class Named(Positional):
    def forward(self, x: Tensor, scale: float = 2.0, **more: Tensor) -> Tensor:
        return self.layer(x) * scale + more["y"]


class Wrapper(nn.Module):
    """As adapters wrap a model: whatever comes is passed on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Named()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(*args, **kwargs)


def rows(count: int) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(count))


def compiled(model: nn.Module, args: Any, kwargs: Any, **settings: Any) -> refold.CompiledModel:
    lazy = refold.compile_for_inference(model.eval(), **settings)
    lazy.compile(args, kwargs)
    return lazy


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("model", "names"),
    [(Positional, ("x", "x")), (Both, ("x", "y")), (Named, ("x", "y")), (Wrapper, ("x", "y"))],
)
def test_the_batch_is_dynamic(model: type[nn.Module], names: tuple[str, str], batch: int) -> None:
    net = model().eval()

    def call(count: int) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        return (rows(count),) * names.count("x"), {"y": rows(count)} if "y" in names else {}

    args, kwargs = call(batch)
    program = trace(net, args, kwargs)
    assert [s.batch for s in program.inputs] == [0, 0]
    assert program.specialised == ()
    done = compiled(net, args, kwargs)
    for count in (1, 2, 5):
        args, kwargs = call(count)
        torch.testing.assert_close(done(*args, **kwargs), net(*args, **kwargs))


@pytest.mark.parametrize(
    "shapes",
    [
        ({0: ROWS}, {0: ROWS}),
        (({0: ROWS}, {0: ROWS}),),
        {"x": ({0: ROWS}, {0: ROWS})},
        ((ROWS, None), (ROWS, None)),
    ],
    ids=["an input each", "nested", "by name", "tuples"],
)
def test_sizes_of_positional_inputs(shapes: Any) -> None:
    model = Positional().eval()
    done = compiled(model, (rows(2), rows(2)), {}, dynamic_shapes=shapes)
    torch.testing.assert_close(done(rows(5), rows(5)), model(rows(5), rows(5)))
    with pytest.raises(UsageError, match=r"from \d to 9, as traced, got 10"):
        done(rows(10), rows(10))


@pytest.mark.parametrize(
    "shapes",
    [
        ({0: ROWS}, {0: ROWS}),
        (({0: ROWS},), {"y": {0: ROWS}}),
        {"args": ({0: ROWS},), "more": {"y": {0: ROWS}}},
        {"args": ({0: ROWS},), "y": {0: ROWS}},
    ],
    ids=["an input each", "nested", "by name", "by keyword"],
)
def test_sizes_of_keyword_inputs(shapes: Any) -> None:
    model = Both().eval()
    done = compiled(model, (rows(2),), {"y": rows(2)}, dynamic_shapes=shapes)
    torch.testing.assert_close(done(rows(5), y=rows(5)), model(rows(5), y=rows(5)))
    with pytest.raises(UsageError, match=r"from \d to 9, as traced, got 10"):
        done(rows(10), y=rows(10))


def test_calls_by_any_spelling() -> None:
    model = Named().eval()
    done = compiled(model, (rows(2),), {"y": rows(2)})
    expected = model(rows(5), y=rows(5))
    torch.testing.assert_close(done(x=rows(5), y=rows(5)), expected)
    torch.testing.assert_close(done(rows(5), 2.0, y=rows(5)), expected)
    with pytest.raises(UsageError, match="'scale' was not given"):
        done(rows(5), 3.0, y=rows(5))
    with pytest.raises(UsageError, match="traced with 1 positional input and keywords y"):
        done(rows(5), y=rows(5), z=rows(5))
    with pytest.raises(UsageError, match="traced with 1 positional input and keywords y"):
        done(rows(5))


def test_a_guard_on_a_variadic_input() -> None:
    class Branches(Positional):
        def forward(self, *x: Tensor) -> Tensor:
            return self.layer(x[0]) + x[1] * (2 if x[1].shape[0] == 3 else 1)

    model = Branches().eval()
    done = compiled(model, (rows(2), rows(2)), {})
    torch.testing.assert_close(done(rows(4), rows(4)), model(rows(4), rows(4)))
    with pytest.raises(UsageError, match="the trace does not hold"):
        done(rows(3), rows(3))
