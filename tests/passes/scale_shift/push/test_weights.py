"""Folded weights: biases that cancel, and what overflows half precision."""

from __future__ import annotations

import math

import pytest
import torch

from refold.algebra.lazy import Lazy
from refold.passes.scale_shift.push.weights import overflows, shifted


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_bias_takes_scale_and_shift_and_none_without_a_shift_stays_none() -> None:
    scale, shift = t(2, -1, 0), t(1, 0, 3)
    moved = shifted(Lazy.of(t(5, 6, 7)), scale, shift)
    assert moved is not None
    assert moved.get().tolist() == [11, -6, 3]
    alone = shifted(None, scale, shift)
    assert alone is not None
    assert alone.get().tolist() == [1, 0, 3]
    alone.get().zero_()
    assert shift.tolist() == [1, 0, 3]  # the factor is others', too
    assert shifted(None, scale, t(0, 0, 0)) is None
    kept = shifted(Lazy.of(t(5, 6, 7)), scale, t(0, 0, 0))
    assert kept is not None
    assert kept.get().tolist() == [10, -6, 0]


@pytest.mark.parametrize("large", [1.0, 1e6, 1e-6])
def test_what_cancels_to_the_rounding_of_float64_is_zero(large: float) -> None:
    """And what is left beyond it is a bias, however small it is in the model's own dtype."""
    off = t(0, 1e-15, -1e-15, 1e-12, -1e-12) * large
    moved = shifted(
        Lazy.of(torch.full((5,), large / 3, dtype=torch.float64)), t(3, 3, 3, 3, 3), off - large
    )
    assert moved is not None
    found = moved.get()
    assert found[:3].tolist() == [0, 0, 0]
    assert torch.allclose(found[3:], off[3:], rtol=1e-3, atol=0)


def test_a_bias_that_a_shift_of_one_cancels_is_zero_and_a_small_one_without_a_shift_stays() -> None:
    moved = shifted(Lazy.of(t(-1 + 2**-52, 2**-52)), t(1, 1), t(1, 0))
    assert moved is not None
    assert moved.get().tolist() == [0, 2**-52]


def test_the_largest_number_of_half_precision_fits() -> None:
    assert not overflows(Lazy.of(t(65504, -65504)))
    assert overflows(Lazy.of(t(1, 65505)))
    assert overflows(Lazy.of(t(-65505, 1)))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([math.inf], True),
        ([-math.inf], True),
        ([math.nan, 1.0], False),
        ([math.nan, 1e6], True),
        ([-1e6, math.nan], True),
        ([], False),
    ],
)
def test_what_is_not_finite_and_what_stands_beside_it(values: list[float], found: bool) -> None:
    assert overflows(Lazy.of(t(*values))) is found
