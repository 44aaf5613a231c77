"""A scale and shift before a sign or a comparison becomes its threshold."""

from __future__ import annotations

import operator
import re
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from refold.errors import Declined
from refold.graph import constants, printer
from refold.passes import PIPELINES
from refold.passes.batch_norm.fold_batch_norm import FoldBatchNorm
from refold.passes.scale_shift.absorb_scale_shift import AbsorbScaleShift
from refold.passes.scale_shift.push import thresholds
from refold.passes.scale_shift.push.factor import Factor
from refold.rewrite.context import Context
from tests import golden
from tests.examples import examples, few
from tests.folding import Net, image, left, run
from tests.tracing import trace

BOTH = (FoldBatchNorm(), AbsorbScaleShift())
POSITIVE = torch.tensor([0.5, 2.0, 1.5, 0.25]).view(4, 1, 1)
NEGATIVE = -POSITIVE
MIXED = torch.tensor([0.5, -2.0, 1.5, -0.25]).view(4, 1, 1)
ZERO = torch.tensor([0.5, 0.0, -1.5, 2.0]).view(4, 1, 1)
SHIFT = torch.tensor([0.5, 0.25, -1.0, 0.0]).view(4, 1, 1)


def conv(i: int = 4, o: int = 4, k: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, **options)


def norm(scale: torch.Tensor = MIXED) -> nn.BatchNorm2d:
    """A norm whose scale shall have these signs (:func:`built` sees to it)."""
    made = nn.BatchNorm2d(4)
    made.signs = scale.sign().flatten()
    return made


def built(forward, **parts) -> Net:
    """A network that the norms' producers do not take: the input passes a ReLU first."""
    net = Net(lambda s, x: forward(s, torch.relu(x)), **parts)
    for part in net.children():
        if isinstance(part, nn.BatchNorm2d):
            part.weight.data = (part.weight.data.abs() + 0.1) * part.signs
    return net


def test_golden() -> None:
    net = built(
        lambda s, x: (s.c(s.n(x).sign()), x * s.g + s.h > 0.5),
        n=norm(ZERO), c=conv(), g=NEGATIVE, h=SHIFT,
    )  # fmt: skip
    before = printer.render(trace(net, image(), dynamic=True))
    after, _ = run(BOTH, net, image())
    golden.check("thresholds", f"{before}\n---\n{printer.render(after)}")


@pytest.mark.parametrize(
    ("forward", "parts", "calls"),
    few([
        # only a threshold is left of a norm of positive scales, whoever reads the sign
        (lambda s, x: s.n(x).sign(), {"n": norm(POSITIVE)}, {"add": 1, "sign": 1}),
        (lambda s, x: s.n(x).sgn().cumsum(1), {"n": norm(POSITIVE)},
         {"add": 1, "sgn": 1, "cumsum": 1}),
        (lambda s, x: (x * POSITIVE).sign(), {}, {"sign": 1}),
        (lambda s, x: (x / 3 + SHIFT).sign(), {}, {"add": 1, "sign": 1}),
        # negative and zero scales go into what reads the sign
        (lambda s, x: s.c(s.n(x).sign()), {"n": norm(), "c": conv(padding=1)},
         {"add": 1, "sign": 1, "conv": 1}),
        (lambda s, x: s.c(s.n(x).sign()), {"n": norm(ZERO), "c": conv()},
         {"add": 1, "sign": 1, "conv": 1}),
        (lambda s, x: s.c((x * MIXED).sign()), {"c": conv(groups=2)}, {"sign": 1, "conv": 1}),
        (lambda s, x: s.c((x * ZERO).sign()), {"c": conv()}, {"sign": 1, "conv": 1}),
        (lambda s, x: s.c((x * MIXED + SHIFT).sign()), {"c": conv(padding=1)},
         {"add": 1, "sign": 1, "conv": 1}),
        (lambda s, x: s.l(s.n(x).sign().mean((2, 3))), {"n": norm(), "l": nn.Linear(4, 3)},
         {"add": 1, "sign": 1, "mean": 1, "linear": 1}),
        (lambda s, x: (lambda y: s.c(y) + s.d(y))(s.n(x).sign()),
         {"n": norm(), "c": conv(), "d": conv()}, {"add": 2, "sign": 1, "conv": 2}),
        (lambda s, x: s.c(F.avg_pool2d(s.n(x).flatten(2).sign().view(x.shape), 2)),
         {"n": norm(), "c": conv(k=1)}, {"add": 1, "sign": 1, "avg-pool": 1, "conv": 1}),
        # the shift goes up where the scale could not
        (lambda s, x: s.d(s.n(F.max_pool2d(s.c(x), 2)).sign()),
         {"n": norm(), "c": conv(), "d": conv(k=1)}, {"max-pool": 1, "sign": 1, "conv": 2}),
        # comparisons hold their threshold themselves
        (lambda s, x: s.n(x) > 0, {"n": norm(POSITIVE)}, {"gt": 1}),
        (lambda s, x: s.n(x) >= 0.3, {"n": norm(NEGATIVE)}, {"le": 1}),
        (lambda s, x: s.n(x) > 0.3, {"n": norm(NEGATIVE)}, {"lt": 1}),
        (lambda s, x: s.h >= x * s.g, {"g": NEGATIVE, "h": SHIFT}, {"ge": 1}),
        (lambda s, x: x * POSITIVE + SHIFT <= 0.1, {}, {"le": 1}),
        (lambda s, x: x + SHIFT < 0, {}, {"lt": 1}),
        (lambda s, x: torch.where(-x > -0.5, 1.0, -1.0), {}, {"lt": 1, "where": 1}),
        (lambda s, x: (lambda y: (y > 1).double() - (y < -1).double())(s.n(x)),
         {"n": norm(NEGATIVE)}, {"lt": 1, "gt": 1, "to": 2, "sub": 1}),
        (lambda s, x: (lambda y: (y > 0, y.sign()))(s.n(x)), {"n": norm(POSITIVE)},
         {"gt": 1, "add": 1, "sign": 1}),
    ], 11),
)  # fmt: skip
def test_it_becomes_a_threshold(forward, parts, calls) -> None:
    gm, _ = run(BOTH, built(forward, **parts), image())
    assert left(gm) == {"relu": 1, **calls}


@pytest.mark.parametrize(
    ("forward", "parts", "reason"),
    few([
        # nobody takes the negative scales
        (lambda s, x: s.n(x).sign(), {"n": norm()}, "output reads it"),
        (lambda s, x: s.n(x).sign().relu(), {"n": norm()}, "negative or zero scale does not pass"),
        (lambda s, x: (lambda y: (s.c(y), y))(s.n(x).sign()), {"n": norm(), "c": conv()},
         "output reads it"),
        (lambda s, x: F.conv2d(s.n(x).sign(), x.mean((0, 2, 3)).view(1, 4, 1, 1)),
         {"n": norm()}, "nothing is known of how conv2d"),
        # the constant of a dead channel does not cross the zero padding
        (lambda s, x: s.c(s.n(x).sign()), {"n": norm(ZERO), "c": conv(padding=1)},
         "pads with zeros"),
        # the norm itself is read
        (lambda s, x: (lambda y: s.c(y.sign()) * y.abs().mean())(s.n(x)),
         {"n": norm(), "c": conv()}, "abs is not linear"),
        (lambda s, x: (lambda y: y.sign() + y)(s.n(x)), {"n": norm(POSITIVE)}, "add"),
        # a shift alone is a threshold already
        (lambda s, x: (x + SHIFT).sign(), {}, "no threshold of its own"),
        # comparisons
        (lambda s, x: s.n(x) > 0, {"n": norm()}, "other signs in other channels"),
        (lambda s, x: s.n(x) > 0, {"n": norm(ZERO)}, "other signs in other channels"),
        (lambda s, x: x * 0.0 > -1, {}, "or is zero"),
        (lambda s, x: s.n(x) == 0, {"n": norm(POSITIVE)}, "eq decides"),
        (lambda s, x: s.n(x) > x.mean(), {"n": norm(POSITIVE)}, "gt decides"),
        (lambda s, x: s.n(x) > s.n(x).flip(0), {"n": norm(POSITIVE)}, "reads it|gt decides"),
        (lambda s, x: x.mean(1, keepdim=True) * 2 > SHIFT, {}, "gt decides"),
        (lambda s, x: s.n(x) > float("inf"), {"n": norm(POSITIVE)}, "beyond the range"),
        # other steps
        (lambda s, x: s.n(x).round(), {"n": norm(POSITIVE)}, "round rounds"),
        (lambda s, x: torch.heaviside(s.n(x), x.sum()), {"n": norm(POSITIVE)}, "heaviside"),
    ], 9),
)  # fmt: skip
def test_it_stays(forward, parts, reason) -> None:
    net = built(forward, **parts)
    before = left(trace(net, image(), dynamic=True))
    gm, declined = run(BOTH, net, image())
    assert left(gm) == before
    assert any(re.search(reason, d.reason) for d in declined), declined


def test_excluded_signs_stay() -> None:
    class Sign(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sign()

    net = built(lambda s, x: s.s(s.n(x)), n=norm(POSITIVE), s=Sign())
    with torch.no_grad():
        gm = trace(net, image())
        PIPELINES["default"].run(gm, Context(exclude=("s",)))
    assert left(gm) == {"relu": 1, "batch-norm": 1, "sign": 1}


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: (x * 2 + 0.5).sign(), [1, -1, 1, 0, 1]),
        (lambda x: x * -2 + 0.5 > 1, [False, True, False, False, False]),
        (lambda x: x * -2 + 0.5 >= 1, [False, True, False, True, False]),
        (lambda x: x * 2 + 0.5 < 0, [False, True, False, False, False]),
        (lambda x: x * 2 + 0.5 <= 0, [False, True, False, True, False]),
    ],
)
def test_on_the_threshold_and_beyond_all_numbers(function, expected) -> None:
    x = torch.tensor([torch.inf, -torch.inf, 0.0, -0.25, 3.0, torch.nan])
    with torch.no_grad():
        gm = trace(function, x)
        original = gm(x)
        for step in BOTH:
            step.run(gm)
        constants.materialise_all(gm)
        gm.recompile()
        assert "mul" not in left(gm)
        assert gm(x)[:-1].tolist() == expected
        assert torch.equal(gm(x), original)  # of NaN too, whatever a sign makes of it


@pytest.mark.parametrize(
    ("scale", "shift", "dtype", "reason"),
    [
        (1.5, 0.1, torch.float16, "too coarse"),
        (1.5, 0.1, torch.bfloat16, "too coarse"),
        (1e-30, 1e20, torch.float32, "beyond the range"),
        (1e15, 1e-30, torch.float32, "beyond the range"),
        (2.0, 1e-4, torch.float16, "beyond the range"),
        (0.5, 2.5 * (1 + 1e-9), torch.float32, "round to an integer"),
    ],
)
def test_a_threshold_that_its_dtype_does_not_hold(scale, shift, dtype, reason) -> None:
    factor = Factor(*(torch.tensor(v, dtype=torch.float64) for v in ([2, scale], [0, shift])))
    with pytest.raises(Declined, match=reason):
        thresholds.of_sign(factor, dtype)


@pytest.mark.parametrize(("mean", "scale"), [(6, 0.7), (7, 0.3), (15, 1.1), (5, 0.49)])
def test_an_integer_threshold_is_met_exactly(mean, scale) -> None:
    """A mean of 7 is 7, and not what float64 makes of (7 * 0.3) / 0.3."""
    assert mean * scale / scale != mean
    factor = Factor(*(torch.full((1,), v, dtype=torch.float64) for v in (scale, -mean * scale)))
    zero = torch.zeros(1, dtype=torch.float64)
    assert thresholds.of_sign(factor, torch.float64)[0].item() == -mean
    for operation in ("gt", "ge"):
        found = thresholds.of_comparison(factor, operation, zero, torch.float32)
        assert found[1].item() == mean


@given(
    scales=st.lists(st.sampled_from((0.5, -0.3, 1.0, -1.0, 0.0, 2.7)), min_size=4, max_size=4),
    shifts=st.lists(st.sampled_from((0.0, 0.25, -0.7, 1.3)), min_size=4, max_size=4),
    padding=st.integers(0, 1),
    stride=st.integers(1, 2),
    linear=st.booleans(),
)
@examples(20)
def test_any_signs_of_the_scale(scales, shifts, padding, stride, linear) -> None:
    scale = torch.tensor(scales).double().view(4, 1, 1)
    shift = torch.tensor(shifts).double().view(4, 1, 1)
    reader = nn.Linear(4, 3) if linear else conv(padding=padding, stride=stride)

    def forward(s, x):
        y = torch.addcmul(shift, x.relu(), scale).sign()
        return s.r(y.permute(0, 2, 3, 1)) if linear else s.r(y)

    x = image()
    x[:, :, ::2] = x[:, :, ::2].round()  # zeros and integers: some meet the threshold
    gm, _ = run(BOTH, Net(forward, r=reader), x)
    dead = (scale == 0) & (shift != 0)
    if linear or not padding or not bool(dead.any()):
        assert "addcmul" not in left(gm) or bool((scale == 1).all())


NUMBERS = st.floats(-8, 8, width=32).filter(lambda v: v == 0 or abs(v) > 1e-3)


@given(
    scale=NUMBERS.filter(lambda v: v != 0),
    shift=NUMBERS,
    value=NUMBERS,
    operation=st.sampled_from(("gt", "ge", "lt", "le")),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
)
@settings(max_examples=200, deadline=None)
def test_a_comparison_is_true_to_exact_arithmetic(scale, shift, value, operation, dtype) -> None:
    factor = Factor(torch.tensor([scale]).double(), torch.tensor([shift]).double())
    exact = (Fraction(value) - Fraction(shift)) / Fraction(scale)
    assume(exact == 0 or 2**-10 < abs(exact) < 2**14)
    found, threshold = thresholds.of_comparison(
        factor, operation, torch.tensor([value]).double(), dtype
    )
    t = threshold.to(dtype)
    assert t.double() == threshold, "it is a number of the dtype"
    ulp = torch.nextafter(t, torch.full_like(t, torch.inf))
    low = torch.nextafter(t, torch.full_like(t, -torch.inf))
    for x in (low, t, ulp, torch.zeros_like(t), -t, 2 * t):
        y = Fraction(scale) * Fraction(x.item()) + Fraction(shift)
        expected = getattr(operator, operation)(y, Fraction(value))
        assert bool(getattr(torch, found)(x, t)) == expected, (x, t, exact)
