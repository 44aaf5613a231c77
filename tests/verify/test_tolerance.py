"""Each call and each slice of an output is judged by its own scale, and no tolerance hides all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import refold
from refold.errors import VerificationError
from refold.verify.tolerance import Leaf, _Part, ceiling, collect, tolerance

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


# --- the rule itself, in numbers ------------------------------------------------------------------


def part(scale: list[float], distance: list[float], own: list[float]) -> _Part:
    return _Part(0, *(torch.tensor(v, dtype=torch.float64) for v in (scale, distance, own)))


@pytest.mark.parametrize(
    ("scale", "distance", "own", "whole", "allowed", "expected"),
    [
        # of four slices the one of zeros has no scale, and the middle of the others is 4
        ([4, 1, 0, 100], [1, 2, 3, 50], [4, 2, 1, 25], 100, 0, (0.75, 1.0, 2)),
        ([4, 1, 0, 100], [1, 2, 1, 50], [0, 0, 0, 25], 100, 0, (0.5, 0.25, 1)),
        ([4, 1], [0, 2], [0, 0], 100, 0, (2.0, 0.0, 1)),  # of two the smaller
        ([0, 0], [1, 2], [1, 0], 8, 0, (0.25, 0.125, 1)),  # of none: the whole output's
        ([8, 8], [1, 2], [0, 0], 8, 0.125, (0.25, 0.0, 1)),  # what is allowed is no error
        ([8, 8], [1, 2], [0, 0], 8, 0.25, (0.0, 0.0, 0)),
    ],
)
def test_the_worst_slice_by_its_own_scale(scale, distance, own, whole, allowed, expected) -> None:
    assert part(scale, distance, own).relative(float(whole), allowed) == expected


def test_a_verdict_says_which_call_and_which_slice() -> None:
    exact = torch.full((3, 2), 8.0).double()
    own, got = off(exact, 1, 0, by=1e-3), off(exact, 1, 0, by=-0.5)
    leaf = judged((exact, exact, exact), (got, own, exact))
    assert leaf.worst_call == 1
    assert leaf.place == " at index 0 of axis 1"  # as far off as the whole, and it says more
    assert (leaf.error, leaf.scale) == (0.0625, 8.0)
    assert leaf.own_error == pytest.approx(1.25e-4)
    assert leaf.tolerance == pytest.approx(5e-4)
    small = exact.clone()
    small[:, 1] = 2.0
    leaf = judged((off(small, 2, 1, by=0.5), small, small))
    assert (leaf.error, leaf.scale, leaf.place) == (0.25, 2.0, " at index 1 of axis 1")
    empty = Leaf(0, "x", torch.float32)
    empty.settle()
    assert (empty.tolerance, empty.is_void, empty.is_blind) == (0.0, False, False)


def test_a_call_of_zeros_is_judged_by_the_scale_of_the_others() -> None:
    zero, ones = torch.zeros(2, 2).double(), torch.ones(2, 2).double()
    leaf = judged((zero + 1e-3, zero, zero), (10 * ones, 10 * ones, 10 * ones))
    assert (leaf.worst_call, leaf.error, leaf.scale) == (0, 1e-4, 10.0)
    assert judged((zero + 1e-3, zero, zero)).error == 1e-3  # of no scale at all: one


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_a_lucky_call_has_the_usual_bound_and_a_poor_one_its_own(order) -> None:
    """Own errors of 0, 1e-3 and 2e-3: the middle is what the original usually costs."""
    exact = torch.ones(1).double()

    def worst(call: int, by: float) -> float:
        calls = [(exact, exact + own, exact) for own in (0.0, 1e-3, 2e-3)]
        calls[call] = (exact + by, *calls[call][1:])
        leaf = judged(*(calls[i] for i in order))
        return leaf.error / leaf.tolerance

    for call, limit in ((0, 4e-3), (1, 4e-3), (2, 8e-3)):
        assert worst(call, 0.99 * limit) < 1 < worst(call, 1.01 * limit)


def test_the_usual_error_loosens_no_call_past_the_ceiling() -> None:
    exact = torch.ones(1).double()
    poor = [(exact, exact + 0.009, exact)] * 3
    for by, fine in ((0.0359, True), (0.0361, False)):
        leaf = judged((exact + by, exact, exact), *poor)
        assert (leaf.error <= leaf.tolerance) is fine
    blind = [(exact, exact + 0.5, exact)] * 3
    for by, fine in ((0.0399, True), (0.0401, False)):
        leaf = judged((exact + by, exact, exact), *blind)
        assert leaf.blind == [1, 2, 3]
        assert not leaf.is_blind
        assert (leaf.error <= leaf.tolerance) is fine


def test_what_an_approximation_is_allowed_is_a_bound_of_the_whole() -> None:
    exact = torch.ones(1).double()
    for by, fine in ((0.099, True), (0.101, False)):
        leaf = judged((exact + by, exact, exact), allowed=0.1)
        assert (leaf.error <= leaf.tolerance) is fine
    leaf = judged((exact + 0.3, exact + 0.005, exact), allowed=0.01)
    assert leaf.tolerance == pytest.approx(0.02)


def test_another_run_of_the_original_widens_what_is_its_own() -> None:
    exact = torch.ones(2, 2).double()
    leaves: dict[int, Leaf] = {}
    for _ in range(2):
        collect(leaves, exact, exact, exact, CALL)
    leaf = leaves[0]
    leaf.widen(1, off(exact, 1, 0, by=-2e-3), exact)
    leaf.widen(1, off(exact, 1, 0, by=1e-3), exact)  # the further of both
    leaf.widen(1, off(exact, 0, 0, by=float("inf")), exact)
    leaf.widen(1, exact[:1], exact)  # of another size: no measure
    leaf.widen(7, exact + 1, exact)  # of a call that was not measured
    assert sorted(leaf.parts) == [0, 1]
    assert [float(p.own.max()) for p in leaf.parts[0]] == [0.0] * 3
    assert [p.own.tolist() for p in leaf.parts[1]] == [
        pytest.approx([2e-3]), pytest.approx([0.0, 2e-3]), pytest.approx([2e-3, 0.0]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        (0.125, 0.0, True), (0.126, 0.0, False), (0.4, 0.1, True), (0.41, 0.1, False),
        (0.5, 0.125, True), (0.5, 0.126, None), (1.0, 1.0, None),
    ],
)  # fmt: skip
def test_how_many_elements_may_be_far_off_in_a_blind_call(ours, theirs, verdict) -> None:
    leaf = Leaf(0, "x", torch.float32, shares={3: (ours, theirs)})
    assert leaf.few_apart(3) is verdict
    assert leaf.few_apart(0) is None


def test_shares_are_counted_in_blind_calls_alone() -> None:
    exact = torch.ones(4, 2).double()
    own, got = off(exact, 0, 0, by=0.5), off(off(exact, 0, 0, by=0.5), 1, 1, by=-0.1)
    assert judged((got, own, exact)).shares == {0: (0.25, 0.125)}
    assert judged((got, exact, exact)).shares == {}
    near = exact + 0.5e-12  # within rounding of float64
    assert judged((near, own, exact)).shares == {0: (0.0, 0.125)}


# --- what is collected ----------------------------------------------------------------------------


def gathered(got: object, own: object, exact: object) -> dict[int, Leaf]:
    leaves: dict[int, Leaf] = {}
    collect(leaves, got, own, exact, CALL)
    return leaves


def test_outputs_are_named_and_numbers_beside_them_are_compared() -> None:
    x = torch.ones(2)
    assert gathered(x, x, x.double())[0].name == "the output"
    leaves = gathered((x, 3, x), (x, 3, x), (x.double(), 3, x.double()))
    assert [(i, leaf.name, leaf.count) for i, leaf in leaves.items()] == [
        (0, "output 0", 1), (2, "output 2", 1),
    ]  # fmt: skip
    for got, own, words in (
        ((x, 4), (x, 3), "output 1 is 4, the original's is 3"),
        ((x, x), (x, 3), "output 1 is tensor"),
        ((x, 3), (x, x), r"output 1 is a int, the original's is float32\[2\]"),
        ((x, x[:1]), (x, x), r"output 1 is float32\[1\]"),
        ((x, x.half()), (x, x), r"output 1 is float16\[2\]"),
        ([x], (x,), "structure"),
    ):
        with pytest.raises(VerificationError, match=words):
            gathered(got, own, own)


def test_integers_that_differ_are_kept_with_their_call() -> None:
    a, b = torch.tensor([1, 2]), torch.tensor([1, 3])
    leaves = gathered(a, a, a)
    collect(leaves, b, a, a, CALL)
    assert [(at, got.tolist()) for at, got, *_ in leaves[0].differing] == [(1, [1, 3])]
    assert leaves[0].count == 2
    assert not leaves[0].compares


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_is_compared_by_its_place_alone(value: float) -> None:
    exact = torch.ones(2, 2).double()
    spiked = off(exact, 0, 1, by=value)
    leaf = judged((off(spiked, 1, 1, by=0.5), spiked, spiked))
    assert (leaf.error, leaf.own_error) == (0.5, 0.0)
    assert not leaf.is_void
    assert judged((exact, spiked, exact)).error == 0.0  # the original's own overflow, avoided
    assert judged((spiked, spiked, exact)).error == 0.0  # or not
    for got in (exact, off(exact, 0, 1, by=-value if value == value else 1e300 * 1e300)):
        with pytest.raises(VerificationError, match="1 of 4 elements"):
            judged((got, spiked, spiked))
    everywhere = torch.full((2,), value).double()
    leaf = judged((everywhere, everywhere, everywhere))
    assert leaf.is_void
    assert leaf.parts == {}


def test_numbers_without_axes_and_without_elements() -> None:
    one = torch.tensor(2.0).double()
    assert [p.axis for p in judged((one, one, one)).parts[0]] == [None]
    assert [p.axis for p in judged((one.view(1),) * 3).parts[0]] == [None]
    assert [p.axis for p in judged((one.expand(2),) * 3).parts[0]] == [None, 0]
    assert [p.axis for p in judged((one.view(1, 1),) * 3).parts[0]] == [None, 0, 1]
    assert judged((one + 1, one, one)).error == 0.5
    none = torch.zeros(0, 3).double()
    leaf = judged((none, none, none))
    assert (leaf.parts, leaf.is_void, leaf.count) == ({}, False, 1)


def test_complex_numbers_are_compared_by_their_distance() -> None:
    exact = torch.tensor([3 + 4j, 3 + 4j])
    leaf = judged((off(exact, 0, by=0.5j), exact, exact))
    assert leaf.error == pytest.approx(0.1)
    assert tolerance(0.0, torch.complex64) == tolerance(0.0, torch.float32)
    assert tolerance(0.0, torch.complex128) == 1e-12
