"""Each call and each slice of an output is judged by its own scale, and no tolerance hides all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import refold
from refold.errors import VerificationError
from refold.verify.tolerance import Leaf, ceiling, collect, tolerance

CALL = ((), {})


def judged(*calls: tuple[Tensor, Tensor, Tensor], allowed: float = 0.0) -> Leaf:
    """The verdict on calls, each what a candidate, the original and float64 return."""
    leaves: dict[int, Leaf] = {}
    for got, own, exact in calls:
        collect(leaves, got, own, exact, CALL)
    leaves[0].settle(allowed)
    return leaves[0]


def off(exact: Tensor, *index: int, by: float) -> Tensor:
    wrong = exact.clone()
    wrong[index] += by
    return wrong


@pytest.mark.parametrize(("shape", "axis"), [((2, 8), 0), ((3, 4, 5, 5), 1), ((1, 6, 4), 2)])
def test_a_large_slice_hides_nothing_in_the_others(shape: tuple[int, ...], axis: int) -> None:
    exact = torch.rand(shape, generator=torch.Generator().manual_seed(0)).double() + 0.5
    exact.select(axis, 0).mul_(1e5)
    last = [size - 1 for size in shape]
    worst = judged((off(exact, *last, by=0.3), exact, exact))
    assert worst.error / worst.tolerance > 1e3
    assert "axis" in worst.place
    fine = judged((exact.float(), exact.float(), exact))
    assert fine.error <= fine.tolerance


def test_a_large_call_hides_nothing_in_the_others() -> None:
    small = torch.ones(2, 3).double()
    worst = judged((1e6 * small, 1e6 * small, 1e6 * small), (small + 1e-3, small, small))
    assert worst.error / worst.tolerance > 100
    assert worst.worst_call == 1


def test_a_badly_conditioned_call_loosens_no_other() -> None:
    exact = torch.ones(2, 3).double()
    fine = [(exact, exact, exact)] * 2
    poor = (exact + 1e-3, exact + 1e-3, exact)
    assert judged(poor, *fine).error <= judged(poor, *fine).tolerance
    worst = judged(poor, *fine, (exact + 1e-3, exact, exact))
    assert worst.error > worst.tolerance
    assert worst.worst_call == 3


def test_an_element_near_zero_is_judged_by_what_lies_beside_it() -> None:
    exact = torch.linspace(-1, 1, 9).double()
    exact[4] = 1e-9
    own = exact.float()
    noisy = own + 1e-7
    verdict = judged((noisy, own, exact))
    assert verdict.error <= verdict.tolerance


def test_past_the_ceiling_a_call_is_blind_but_not_lawless() -> None:
    exact = torch.ones(4, 4).double()
    own = exact + 0.5
    assert judged((exact + 0.6, own, exact)).blind == [0]
    assert judged((exact + 0.6, own, exact)).is_blind
    assert not judged((exact + 0.6, own, exact), (exact, exact, exact)).is_blind
    worst = judged((exact + 3.0, own, exact))
    assert worst.error > worst.tolerance


def test_ceilings_follow_the_dtype() -> None:
    assert ceiling(torch.float32) == ceiling(torch.float64) == 1e-2
    for dtype in (torch.float16, torch.bfloat16):
        assert tolerance(0.0, dtype) < ceiling(dtype) <= 0.125


def test_what_an_approximation_may_cost_is_relative_to_the_whole() -> None:
    exact = torch.tensor([[100.0, 100.0], [1.0, 1.0]]).double()
    verdict = judged((exact + 0.5, exact, exact), allowed=1e-2)
    assert verdict.error <= verdict.tolerance
    assert judged((exact + 2, exact, exact), allowed=1e-2).error > 1e-2


def test_other_places_of_nan_are_refused() -> None:
    exact = torch.ones(2, 2).double()
    with pytest.raises(VerificationError, match="NaN or infinite"):
        judged((off(exact, 0, 0, by=float("nan")), exact, exact))


def test_bits_of_floats_are_compared_with_the_models_own() -> None:
    """In float64 a view as 32-bit integers has twice the elements: that is no reference."""

    class Bits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.l(x).view(torch.int32).float()

    net, x = Bits().eval(), torch.randn(3, 4)
    torch.testing.assert_close(refold.compile_for_inference(net, x)(x), net(x))
