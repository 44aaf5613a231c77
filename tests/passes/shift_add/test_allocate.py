from __future__ import annotations

import itertools
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refold.errors import MissingDependencyError, UsageError
from refold.passes.shift_add.allocate import WidthCost, allocate_bits

WIDTHS = (2, 3, 4)


def layers(losses: list[float], sizes: list[int]) -> list[dict[int, WidthCost]]:
    """Layers whose loss falls fourfold with each bit."""
    return [
        {w: WidthCost(loss / 4**w, size * w + size // 8) for w in WIDTHS}
        for loss, size in zip(losses, sizes, strict=True)
    ]


def total(table: list[dict[int, WidthCost]], widths: tuple[int, ...], what: str) -> float:
    return sum(getattr(layer[w], what) for layer, w in zip(table, widths, strict=True))


@given(
    drawn=st.lists(st.tuples(st.floats(1e-6, 1e3), st.integers(8, 5000)), min_size=1, max_size=6),
    share=st.floats(0, 1.1),
)
@settings(max_examples=25, deadline=None)
def test_it_is_the_best_of_all_allocations(drawn, share: float) -> None:
    pytest.importorskip("scipy")
    table = layers([loss for loss, _ in drawn], [size for _, size in drawn])
    least, most = (total(table, (w,) * len(table), "bytes") for w in (2, 4))
    budget = int(least + share * (most - least))
    chosen = allocate_bits(table, budget)
    assert total(table, tuple(chosen), "bytes") <= budget
    every = itertools.product(WIDTHS, repeat=len(table))
    best = min(total(table, w, "loss") for w in every if total(table, w, "bytes") <= budget)
    assert total(table, tuple(chosen), "loss") <= best * (1 + 1e-6)


def test_more_budget_never_costs_more() -> None:
    pytest.importorskip("scipy")
    table = layers([3.0, 1.0, 10.0, 0.1, 5.0], [400, 100, 900, 50, 200])
    least, most = (int(total(table, (w,) * 5, "bytes")) for w in (2, 4))
    found = [
        total(table, tuple(allocate_bits(table, budget)), "loss")
        for budget in range(least, most + 1, 100)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]


def test_widths_that_are_missing_are_not_chosen() -> None:
    pytest.importorskip("scipy")
    table = [{3: WidthCost(1.0, 30)}, {2: WidthCost(1.0, 20), 4: WidthCost(0.1, 40)}]
    assert allocate_bits(table, 70) == [3, 4]
    assert allocate_bits(table, 69) == [3, 2]
    assert allocate_bits([], 0) == []


def test_layers_without_any_loss() -> None:
    pytest.importorskip("scipy")
    table = [{w: WidthCost(0.0, w) for w in WIDTHS}]
    assert allocate_bits(table, 4)[0] in WIDTHS


def test_losses_may_be_changes_for_the_better() -> None:
    pytest.importorskip("scipy")
    table = [
        {2: WidthCost(0.0, 20), 3: WidthCost(-low, 30), 4: WidthCost(-2 * low, 40)}
        for low in (1, 5)
    ]
    assert allocate_bits(table, 60) == [2, 4]
    assert allocate_bits(table, 70) == [3, 4]


def test_a_budget_below_the_smallest_widths() -> None:
    with pytest.raises(UsageError, match="smallest widths and their scales take 212"):
        allocate_bits(layers([1.0], [100]), 211)


def test_scipy_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingDependencyError, match=r"refold\[shiftadd\]"):
        allocate_bits(layers([1.0], [100]), 1000)
