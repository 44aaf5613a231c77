"""Guards: what a trace took for granted about sizes is kept, checked, and probed for being true."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

import refold
from refold.errors import UsageError
from refold.frontends.export import trace
from refold.graph.guards import Guard, Guards, evaluate, names_in
from tests.examples import few

AUTO = Dim.AUTO


class Formula(nn.Module):
    """``forward(x) = formula(self, x)`` with a layer of its own."""

    def __init__(self, formula: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.formula = formula
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self, x)


class FormulaOfTwo(Formula):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.formula(self, x, y)


def like(*sizes: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(sizes))
    return torch.randn(*sizes, generator=generator)


def agree(compiled: Any, model: nn.Module, *inputs: Tensor) -> None:
    got, expected = compiled(*inputs), model(*inputs)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected)


# Each takes a branch by a size: (formula, dynamic sizes, example, sizes that agree, that break).
BRANCHES = {
    "equal": (
        lambda s, x: s.layer(x) + 1 if x.shape[0] == 3 else s.layer(x),
        {0: AUTO}, (2, 6), [(1, 6), (2, 6), (4, 6)], [(3, 6)],
    ),
    "unequal": (
        lambda s, x: s.layer(x) if x.shape[0] != 5 else s.layer(x) * 2,
        {0: AUTO}, (2, 6), [(1, 6), (4, 6), (6, 6)], [(5, 6)],
    ),
    "less": (
        lambda s, x: s.layer(x) if x.shape[0] < 5 else s.layer(x) * 2,
        {0: AUTO}, (2, 6), [(1, 6), (4, 6)], [(5, 6), (9, 6)],
    ),
    "greater": (
        lambda s, x: s.layer(x) if x.shape[0] > 5 else s.layer(x) * 2,
        {0: AUTO}, (8, 6), [(6, 6), (9, 6)], [(5, 6), (1, 6)],
    ),
    "at most": (
        lambda s, x: s.layer(x) if x.shape[0] <= 5 else s.layer(x) * 2,
        {0: AUTO}, (2, 6), [(5, 6)], [(6, 6)],
    ),
    "at least": (
        lambda s, x: s.layer(x) if x.shape[0] >= 5 else s.layer(x) * 2,
        {0: AUTO}, (8, 6), [(5, 6), (6, 6)], [(4, 6)],
    ),
    "even": (
        lambda s, x: s.layer(x) * 2 if x.shape[0] % 2 else s.layer(x),
        {0: AUTO}, (2, 6), [(4, 6), (6, 6)], [(1, 6), (3, 6), (5, 6)],
    ),
    "odd": (
        lambda s, x: s.layer(x) * 2 if x.shape[0] % 2 else s.layer(x),
        {0: AUTO}, (3, 6), [(5, 6), (1, 6)], [(2, 6), (4, 6)],
    ),
    "a third": (
        lambda s, x: s.layer(x) if x.shape[1] % 3 == 0 else s.layer(x) * 2,
        {1: AUTO}, (2, 6, 6), [(2, 9, 6), (2, 3, 6)], [(2, 7, 6), (2, 4, 6)],
    ),
    "two sizes equal": (
        lambda s, x: s.layer(x) * (2 if x.shape[0] == x.shape[1] else 1),
        {0: AUTO, 1: AUTO}, (2, 5, 6), [(3, 4, 6), (2, 1, 6)], [(4, 4, 6), (1, 1, 6)],
    ),
    "one size less": (
        lambda s, x: s.layer(x) * (2 if x.shape[0] < x.shape[1] else 1),
        {0: AUTO, 1: AUTO}, (2, 5, 6), [(3, 4, 6)], [(4, 4, 6), (5, 4, 6)],
    ),
    "product": (
        lambda s, x: s.layer(x) * (2 if x.shape[0] * x.shape[1] > 20 else 1),
        {0: AUTO, 1: AUTO}, (2, 5, 6), [(4, 5, 6), (1, 20, 6)], [(3, 7, 6), (21, 1, 6)],
    ),
    "number of elements": (
        lambda s, x: s.layer(x) * (2 if x.numel() > 100 else 1),
        {0: AUTO, 1: AUTO}, (2, 5, 6), [(2, 8, 6)], [(3, 6, 6)],
    ),
    "sum": (
        lambda s, x: s.layer(x) * (2 if x.shape[0] + x.shape[1] == 6 else 1),
        {0: AUTO, 1: AUTO}, (2, 5, 6), [(2, 3, 6)], [(2, 4, 6), (3, 3, 6)],
    ),
    "largest": (
        lambda s, x: s.layer(x) * (2 if max(x.shape[0], x.shape[1]) > 9 else 1),
        {0: AUTO, 1: AUTO}, (2, 5, 6), [(9, 9, 6)], [(10, 2, 6), (2, 10, 6)],
    ),
    "smallest": (
        lambda s, x: s.layer(x) * (2 if min(x.shape[0], x.shape[1]) > 3 else 1),
        {0: AUTO, 1: AUTO}, (2, 5, 6), [(3, 9, 6)], [(4, 4, 6)],
    ),
    "halved": (
        lambda s, x: s.layer(x) * (2 if x.shape[1] // 2 == 4 else 1),
        {1: AUTO}, (2, 6, 6), [(2, 7, 6), (2, 10, 6)], [(2, 8, 6), (2, 9, 6)],
    ),
    "one": (
        lambda s, x: s.layer(x) * (2 if x.shape[1] == 1 else 1),
        {1: AUTO}, (2, 6, 6), [(2, 2, 6)], [(2, 1, 6)],
    ),
    "more than one": (
        lambda s, x: s.layer(x).mean(1) if x.shape[1] > 1 else s.layer(x)[:, 0] * 2,
        {1: AUTO}, (2, 6, 6), [(2, 2, 6)], [(2, 1, 6)],
    ),
    "a range": (
        lambda s, x: s.layer(x) if 3 < x.shape[0] < 8 else s.layer(x) * 2,
        {0: AUTO}, (5, 6), [(4, 6), (7, 6)], [(3, 6), (8, 6)],
    ),
    "small difference": (
        lambda s, x: s.layer(x) + (0.003 if x.shape[0] == 3 else 0),
        {0: AUTO}, (2, 6), [(4, 6)], [(3, 6)],
    ),
    "large values alone": (
        lambda s, x: s.layer(x).clamp(max=6) if x.shape[0] == 3 else s.layer(x),
        {0: AUTO}, (2, 6), [(4, 6)], [(3, 6)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", few(BRANCHES, 11))
def test_sizes_of_another_branch_are_refused(kind: str) -> None:
    formula, dynamic, example, good, bad = BRANCHES[kind]
    model = Formula(formula).eval()
    compiled = refold.compile_for_inference(model, like(*example), dynamic_shapes=(dynamic,))
    for sizes in (example, *good):
        agree(compiled, model, like(*sizes))
    for sizes in bad:
        with pytest.raises(UsageError, match="the trace does not hold for inputs of shape"):
            compiled(like(*sizes))


@pytest.mark.parametrize(
    ("formula", "good"),
    [
        (lambda s, x: s.layer(x) * 2 if x.shape[0] % 2 else s.layer(x) + s.layer(x), [3, 1]),
        (lambda s, x: s.layer(x) if x.shape[0] == 3 else s.layer(x).clone(), [3]),
        (lambda s, x: s.layer(x) if x.shape[0] < 5 else F.linear(x, s.layer.weight, s.layer.bias),
         [5, 9]),
        (lambda s, x: s.layer(x) if x.shape[0] > 1 else s.layer(x[0])[None], [1]),
        (lambda s, x: torch.cat([s.layer(r) for r in x.split(4)]) if x.shape[0] > 4 else s.layer(x),
         [5, 8]),
    ],
    ids=["parity", "a copy", "another spelling", "one row", "chunks"],
)  # fmt: skip
def test_a_branch_that_makes_no_difference_refuses_nothing(
    formula: Callable[..., Tensor], good: list[int]
) -> None:
    model = Formula(formula).eval()
    compiled = refold.compile_for_inference(model, like(2, 6))
    for batch in (1, 2, *good):
        agree(compiled, model, like(batch, 6))
    assert compiled.report.specialised == ()


def test_the_error_names_the_guard_and_the_line() -> None:
    class Inner(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image + 1 if image.shape[0] == 3 else image * 2  # this line

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, image: Tensor) -> Tensor:
            return self.inner(image).relu()

    compiled = refold.compile_for_inference(Outer().eval(), like(2, 6))
    line = Inner.forward.__code__.co_firstlineno + 1
    with pytest.raises(UsageError) as raised:
        compiled(like(3, 6))
    assert "image.shape[0] != 3" in str(raised.value)
    assert f"{__file__}:{line} in forward" in str(raised.value)
    assert "another path" in str(raised.value)


def test_a_guard_is_said_with_the_names_of_dims() -> None:
    model = Formula(lambda s, x: s.layer(x) * (2 if x.shape[0] == x.shape[1] else 1)).eval()
    rows, columns = Dim("rows", max=64), Dim("columns", max=64)
    compiled = refold.compile_for_inference(
        model, like(2, 5, 6), dynamic_shapes={"x": {0: rows, 1: columns}}
    )
    with pytest.raises(UsageError, match=r"columns != rows|rows != columns"):
        compiled(like(4, 4, 6))


def test_a_guard_between_two_inputs() -> None:
    def formula(s: Formula, x: Tensor, y: Tensor) -> Tensor:
        return s.layer(x).sum(0) + s.layer(y).sum(0) * (2 if x.shape[0] == y.shape[0] else 1)

    model = FormulaOfTwo(formula).eval()
    shapes = ({0: AUTO}, {0: AUTO})
    compiled = refold.compile_for_inference(model, (like(2, 6), like(5, 6)), dynamic_shapes=shapes)
    agree(compiled, model, like(3, 6), like(4, 6))
    with pytest.raises(UsageError, match=r"x.shape\[0\]"):
        compiled(like(4, 6), like(4, 6))


def test_one_row_is_asked_where_the_other_guards_admit_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            alike = 1 if x.shape[0] == y.shape[0] else 0
            return self.layer(x) * y.shape[0] + alike

    model = Net().eval()
    compiled = refold.compile_for_inference(
        model, (like(2, 6), like(3, 6)), dynamic_shapes=({0: AUTO}, {0: AUTO})
    )
    for first, second in ((1, 3), (3, 1), (5, 2)):
        agree(compiled, model, like(first, 6), like(second, 6))
    for size in (1, 2, 4):
        with pytest.raises(UsageError, match="!="):
            compiled(like(size, 6), like(size, 6))


def test_a_guard_on_nested_inputs() -> None:
    class Nested(nn.Module):
        def forward(self, pair: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
            first, rest = pair
            return first * (2 if rest["mask"].shape[0] == 3 else 1) + rest["mask"].sum()

    model = Nested()
    compiled = refold.compile_for_inference(
        model,
        ((like(2, 6), {"mask": like(5)}),),
        dynamic_shapes=(({0: AUTO}, {"mask": {0: AUTO}}),),
    )
    agree(compiled, model, (like(3, 6), {"mask": like(4)}))
    with pytest.raises(UsageError, match=r"pair\[1\]\['mask'\].shape\[0\] != 3"):
        compiled((like(3, 6), {"mask": like(3)}))


def test_a_size_that_follows_another_is_checked() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.cat([x, x]) + y

    model = Doubled()
    shapes = ({0: AUTO}, {0: AUTO})
    compiled = refold.compile_for_inference(model, (like(2, 6), like(4, 6)), dynamic_shapes=shapes)
    agree(compiled, model, like(3, 6), like(6, 6))
    with pytest.raises(UsageError, match=r"dimension 0 of 'y' must be .*\(6\), as traced, got 5"):
        compiled(like(3, 6), like(5, 6))


def test_a_size_that_only_an_expression_tells() -> None:
    model = Formula(lambda s, x: s.layer(x[::2] + x[1::2])).eval()
    shapes = ({0: 2 * Dim("half", max=32)},)
    compiled = refold.compile_for_inference(model, like(4, 6), dynamic_shapes=shapes)
    for rows in (2, 6, 8):
        agree(compiled, model, like(rows, 6))
    with pytest.raises(UsageError, match="as traced, got 5"):
        compiled(like(5, 6))


@pytest.mark.slow
def test_windows_of_an_image_of_any_size() -> None:
    def windows(s: Formula, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = x.view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1)
        return x.reshape(-1, 16, c) * 2

    model = Formula(windows).eval()
    shapes = ({0: AUTO, 2: AUTO, 3: AUTO},)
    compiled = refold.compile_for_inference(model, like(2, 3, 8, 16), dynamic_shapes=shapes)
    for sizes in ((1, 3, 8, 8), (2, 3, 4, 4), (1, 3, 12, 4)):
        agree(compiled, model, like(*sizes))
    with pytest.raises(UsageError):
        compiled(like(1, 3, 6, 8))


def test_guards_of_an_exported_program_and_of_its_file() -> None:
    model = Formula(BRANCHES["equal"][0]).eval()
    program = torch.export.export(model, (like(2, 6),), dynamic_shapes=({0: AUTO},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for given in (program, torch.export.load(file)):
        compiled = refold.compile_for_inference(given)
        agree(compiled, model, like(4, 6))
        with pytest.raises(UsageError, match=r"x.shape\[0\] != 3"):
            compiled(like(3, 6))


@pytest.mark.parametrize("kind", ["equal", "even", "less"])
def test_verification_draws_inputs_that_the_guards_admit(kind: str) -> None:
    formula, dynamic, example, _, bad = BRANCHES[kind]
    program = trace(Formula(formula).eval(), (like(*example),), dynamic_shapes=(dynamic,))
    symbol = program.inputs[0].sizes[0]
    assert isinstance(symbol, str)
    assert program.admits({symbol: example[0]})
    assert not any(program.admits({symbol: sizes[0]}) for sizes in bad)
    compiled = refold.compile_for_inference(Formula(formula).eval(), like(*example))
    assert compiled.report.numerics["inputs"] >= 4


def test_a_model_that_raises_at_one_row_is_refused_there() -> None:
    model = Formula(lambda s, x: s.layer(x)[1:] - s.layer(x)[1]).eval()
    compiled = refold.compile_for_inference(model, like(3, 6))
    agree(compiled, model, like(2, 6))
    with pytest.raises(UsageError, match=r"x.shape\[0\] >= 2.*the model raises IndexError"):
        compiled(like(1, 6))


def test_an_empty_batch_is_as_in_eager_or_refused() -> None:
    model = Formula(lambda s, x: s.layer(x) * 2).eval()
    agree(refold.compile_for_inference(model, like(3, 6)), model, like(0, 6))
    model = Formula(lambda s, x: s.layer(x) if x.shape[0] else x.new_ones(1, 6)).eval()
    compiled = refold.compile_for_inference(model, like(3, 6))
    agree(compiled, model, like(1, 6))
    with pytest.raises(UsageError, match=r"x.shape\[0\] >= 1"):
        compiled(like(0, 6))


def test_a_network_without_branches_has_no_guards() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten()).eval()
    program = trace(model, (torch.randn(2, 3, 4, 4),))
    assert program.guards.conditions == ()


def test_expressions() -> None:
    assert names_in("max(s0, 2*s1) // 3 != math.trunc(0.5*torch.sym_float(s2))") == (
        "s0", "s1", "s2",
    )  # fmt: skip
    assert evaluate("max(s0, 2*s1) == 8", {"s0": 3, "s1": 4})
    assert not evaluate("s0 % (s1 // 4) == 0", {"s0": 3, "s1": 2})  # a division by zero
    guards = Guards((Guard("s0 != 3", "x"), Guard("s0 < s1", "y")))
    assert guards.admits({"s0": 2, "s1": 3})
    assert guards.broken({"s0": 3, "s1": 2}) == Guard("s0 != 3", "x")
    assert guards.broken({"s0": 4, "s1": 2}) == Guard("s0 < s1", "y")
    assert Guards((Guard("s0 >= 2", ""),)).least("s0") == 2
    assert guards.least("s0") == 1
