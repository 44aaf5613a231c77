"""What is pushed, in numbers: how a scale and shift look to a layer, a pad, an operand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refold.errors import Declined
from refold.passes.scale_shift.push.factor import Factor, aligned, narrow, preimage
from tests.folding import Net
from tests.tracing import trace


def t(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def channels(*values: float) -> Tensor:
    return t(*values).reshape(1, -1, 1)


ONE, NONE = channels(1), channels(0)


@pytest.mark.parametrize(
    ("factor", "shifts", "identity", "positive", "axes"),
    [
        (Factor(ONE, NONE), False, True, True, set()),
        (Factor(channels(1, 1), NONE), False, True, True, {1}),
        (Factor(channels(1, 2), NONE), False, False, True, {1}),
        (Factor(ONE, channels(0, 3)), True, False, True, {1}),
        (Factor(channels(2, 0), NONE), False, False, False, {1}),
        (Factor(channels(2, -1), NONE), False, False, False, {1}),
        (Factor(t(1, 2).reshape(2, 1), t(0, 1, 0).reshape(1, 3)), True, False, True, {0, 1}),
    ],
)
def test_what_a_factor_does(factor, shifts, identity, positive, axes) -> None:
    assert factor.shifts is shifts
    assert factor.is_identity is identity
    assert factor.is_positive is positive
    assert factor.varies() == axes


def test_two_factors_are_equal_in_rank_scale_and_shift() -> None:
    one = Factor(channels(1, 2), channels(3, 4))
    assert one.equals(Factor(channels(1, 2), channels(3, 4)))
    assert not one.equals(Factor(channels(1, 3), channels(3, 4)))
    assert not one.equals(Factor(channels(1, 2), channels(3, 5)))
    assert not one.equals(Factor(channels(1, 2)[None], channels(3, 4)[None]))


def test_behind_a_pad_of_its_axis_a_factor_is_one_where_the_pad_wrote() -> None:
    factor = Factor(channels(2, 3), channels(5))
    assert factor.padded({}) is factor
    wide = factor.padded({1: (1, 2)})
    assert wide.scale.flatten().tolist() == [1, 2, 3, 1, 1]
    assert wide.shift.flatten().tolist() == [0, 5, 5, 0, 0]
    assert wide.scale.shape == wide.shift.shape == (1, 5, 1)
    cut = factor.padded({1: (-1, 1)})
    assert cut.scale.flatten().tolist() == [3, 1]
    assert cut.shift.flatten().tolist() == [5, 0]
    both = Factor(t(2, 3).reshape(2, 1), t(1, 2, 3).reshape(1, 3)).padded({0: (0, 1), 1: (1, 0)})
    assert both.scale.tolist() == [[1, 2, 2, 2], [1, 3, 3, 3], [1, 1, 1, 1]]
    assert both.shift.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 0, 0, 0]]
    # an axis on which it is one value, and which the pad leaves alone, stays one value
    rows = Factor(t(2, 3).reshape(2, 1), t(7).reshape(1, 1)).padded({0: (1, 0)})
    assert (rows.scale.tolist(), rows.shift.tolist()) == ([[1], [2], [3]], [[0], [7], [7]])


@pytest.mark.parametrize("axis", [1, -2])
def test_a_layer_reads_it_as_vectors_of_its_channels(axis: int) -> None:
    scale, shift = Factor(channels(2, 3), channels(5)).vectors(axis, 2)
    assert (scale.tolist(), shift.tolist()) == ([2, 3], [5, 5])
    scale, shift = Factor(channels(2), channels(5, 6, 7)).vectors(axis, 3)
    assert (scale.tolist(), shift.tolist()) == ([2, 2, 2], [5, 6, 7])
    with pytest.raises(Declined, match="another length than the channels"):
        Factor(channels(2, 3), channels(5)).vectors(axis, 4)
    with pytest.raises(Declined, match="another length than the channels"):
        Factor(channels(2), channels(5, 6)).vectors(axis, 4)
    with pytest.raises(Declined, match="another axis than the channels"):
        Factor(channels(2, 3), channels(5)).vectors(2, 2)
    with pytest.raises(Declined, match="another axis than the channels"):
        Factor(channels(2), t(1, 2).reshape(1, 1, 2)).vectors(axis, 2)


def test_a_part_of_an_axis_of_one_value_is_that_value() -> None:
    assert narrow(channels(2, 3, 4), 1, 1, 2).flatten().tolist() == [3, 4]
    assert narrow(channels(2), 1, 1, 2).flatten().tolist() == [2]


@pytest.mark.parametrize(
    ("shape", "scale", "expected"),
    [
        ((2, 3, 4), t(1, 2, 3).reshape(1, 3, 1), (1, 3, 1)),
        ((3, 4), t(1, 2, 3).reshape(1, 3, 1), (3, 1)),
        ((4,), t(1, 2, 3, 4).reshape(1, 1, 4), (4,)),
        ((4,), t(2).reshape(1, 1, 1), (1,)),
        ((1, 4), t(2).reshape(1, 1, 1), (1, 1)),
        ((2, 1, 4), t(1, 2, 3).reshape(1, 3, 1), None),
        ((1, 4), t(1, 2, 3).reshape(1, 3, 1), None),
        ((4,), t(1, 2, 3).reshape(1, 3, 1), None),
        ((3, 4), t(1, 2).reshape(2, 1, 1), None),
    ],
)
def test_one_operand_of_a_product_takes_what_it_has_axes_for(shape, scale, expected) -> None:
    gm = trace(Net(lambda s, x: x * 2), torch.randn(*shape, dtype=torch.float64))
    operand = next(n for n in gm.graph.nodes if n.op == "placeholder")
    factor = Factor(scale, torch.zeros_like(scale))
    if expected is None:
        with pytest.raises(Declined, match="an axis that this factor broadcasts"):
            aligned(factor, operand)
        return
    found = aligned(factor, operand)
    assert found.scale.shape == found.shift.shape == expected
    assert found.scale.flatten().tolist() == scale.flatten().tolist()


@pytest.mark.parametrize(
    ("factor", "value", "expected"),
    [
        (Factor(channels(2), channels(6)), 0.0, -3.0),
        (Factor(channels(2), channels(6)), 8.0, 1.0),
        (Factor(channels(2, 4), channels(6, 12)), 0.0, -3.0),
        (Factor(channels(2, 4), channels(6, 12)), 1.0, None),
        (Factor(channels(2, 4), channels(6)), 0.0, None),
        (Factor(channels(2, 0), channels(6, 0)), 0.0, None),
        (Factor(channels(0), NONE), 0.0, None),
        (Factor(channels(3, 7), channels(0.3, 0.7)), 0.0, -0.1),  # to the rounding of float64
        (Factor(channels(1, 1), channels(1, 1 + 1e-14)), 0.0, None),
        (Factor(channels(1, 1), channels(1, 1 + 1e-15)), 0.0, -1.0),
    ],
)
def test_the_one_number_that_becomes_a_value_in_every_channel(factor, value, expected) -> None:
    found = preimage(factor, value)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-15))
