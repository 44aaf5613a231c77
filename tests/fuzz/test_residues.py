"""Residues have the algebra of numbers that the judge relies on: sums, products, signs, roots."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from refold.fuzz import residues
from refold.fuzz.residues import (
    P,
    Residues,
    bilinear,
    inverse,
    largest,
    mod,
    multiplied,
    positive,
    power,
    root,
    sign,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, P, shape, generator=torch.Generator().manual_seed(seed)).double()


def test_the_prime_is_what_signs_need() -> None:
    assert all(P % d for d in range(2, math.isqrt(P) + 1))
    assert P % 8 == 7  # so that 2 is a square and -1 is none
    for prime in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31):
        assert bool(positive(torch.tensor(float(prime))))
    every = torch.arange(P, dtype=torch.float64)
    assert len(set(residues._tables().inverse.tolist())) == P  # the generator makes them all
    assert torch.equal(multiplied(every[1:], inverse(every[1:])), torch.ones(P - 1).double())
    assert torch.equal(mod(root(every) ** 2), mod(every * sign(every)))


def test_signs_and_roots_multiply() -> None:
    a, b = drawn(500), drawn(500, seed=1)
    assert torch.equal(sign(multiplied(a, b)), sign(a) * sign(b))
    assert torch.equal(sign(mod(-a)), -sign(a))
    assert torch.equal(root(multiplied(a, b)), multiplied(root(a), root(b)))
    assert bool(positive(root(a)).all())


@pytest.mark.parametrize("signed", [False, True])
def test_products_and_signs_of_numbers_stay(signed: bool) -> None:
    field = Residues(signed=signed)
    a, b = torch.randn(2, 400).double().bfloat16().double()  # so that products are exact
    assert torch.equal(field.of(a * b), multiplied(field.of(a), field.of(b)))
    assert torch.equal(field.of(-a), mod(-field.of(a)))
    assert bool((sign(field.of(a)) == a.sign()).all()) == signed
    assert field.of(torch.tensor([0.0, 1.0, -1.0, 4.0])).tolist() == [0.0, 1.0, P - 1.0, 4.0]


def test_sums_of_numbers_stay_without_signs() -> None:
    field = Residues(signed=False)
    a, b = torch.randn(2, 400).bfloat16().double()
    assert torch.equal(field.of(a + b), mod(field.of(a) + field.of(b)))
    exact = Fraction(0.7071067811865476)
    expected = exact.numerator * pow(exact.denominator, -1, P) % P
    assert field.number(0.7071067811865476) == expected


def test_a_float_that_rounds_a_small_fraction_stands_for_it() -> None:
    field = Residues(signed=True)
    for count in (3, 7, 9, 25, 27, 49, 64, 125, 196):
        assert field.number(1 / count) * count % P == 1
        shares = torch.full((2,), 2 / count, dtype=torch.float64)
        assert (field.of(shares) * count % P).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("length", [10, 5000, 100_000])
def test_long_sums_are_exact(length: int) -> None:
    a, b = drawn(1, length), drawn(length, 1, seed=1)
    expected = (
        sum(int(x) * int(y) for x, y in zip(a[0].tolist(), b[:, 0].tolist(), strict=True)) % P
    )
    assert int(bilinear(torch.matmul, a, b, length)) == expected


def test_a_maximum_keeps_scales_shifts_and_orders() -> None:
    x, shift = drawn(50, 6), drawn(50, 1, seed=2)
    scale = root(drawn(50, 1, seed=3))
    found = largest(x)
    assert torch.equal(largest(mod(x * scale + shift)), mod(found * scale[:, 0] + shift[:, 0]))
    assert torch.equal(largest(x[:, torch.randperm(6)]), found)
    pair = x[:, :2]
    assert torch.equal(
        largest(pair), torch.where(positive(mod(pair[:, 0] - pair[:, 1])), *pair.unbind(1))
    )
    valid = torch.ones_like(x, dtype=torch.bool)
    valid[:, 4:] = False
    assert torch.equal(largest(x, valid), largest(x[:, :4]))


def test_powers_are_products() -> None:
    x = drawn(20)
    assert torch.equal(power(x, 3), multiplied(x, multiplied(x, x)))
    assert torch.equal(power(x, -2), inverse(multiplied(x, x)))


def test_a_function_is_known_by_its_name_and_arguments() -> None:
    field, x = Residues(signed=True), drawn(1000)
    assert torch.equal(field.function("f", x), field.function("f", x.clone()))
    for other in (
        field.function("g", x),
        field.function("f", mod(x + 1)),
        field.function("f", x, 1.0),
        Residues(signed=True, seed=1).function("f", x),
    ):
        assert int((field.function("f", x) == other).sum()) <= 1
    assert 400 < int(field.coin("f", x).sum()) < 600


def test_a_bound_on_rounding_is_zero_and_another_small_number_is_not() -> None:
    field, eps = Residues(signed=True), torch.finfo(torch.float64).eps
    assert [field.number(n * eps) == 0 for n in (1, 4, 5, 64, 65)] == [
        False,
        True,
        False,
        True,
        False,
    ]
