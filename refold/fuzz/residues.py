"""Numbers modulo a prime that have a sign, square roots and any function one likes.

The exact judge (:mod:`refold.fuzz.modular`) computes with residues: integers in [0, P), held in
float64 tensors, so that PyTorch's own kernels add and multiply them without rounding as long as a
sum stays below 2^53. A floating tensor is residues, an integer or boolean one is what it is.

**Numbers.** A float is ``m * 2^e`` and has an exact residue; one that is the float nearest to a
fraction with a small denominator (``1 / 9`` in a pooling kernel) stands for the fraction.

**Signs.** P is 7 modulo 8, so of ``r`` and ``-r`` one is a square. Squares count as positive: the
quadratic character is a sign with ``sign(a b) = sign(a) sign(b)`` and ``sign(-a) = -sign(a)``,
and ``relu``, ``abs``, comparisons and maxima of it have ``f(s x + t) = s f(x) + t`` for positive s
where the true ones have. Squares of squares are squares, so a positive residue has one positive
square root: ``sqrt(a b) = sqrt(a) sqrt(b)``. All primes up to 31 are squares modulo P.

A float's residue may have another sign than the float. With ``signed``, the one of ``r`` and
``-r`` is taken that has it: this keeps products, quotients, signs and equality of numbers, but
sums of small fractions alone. Without, sums of all numbers are kept, and signs of small ones.

**Functions.** What is neither arithmetic nor ordered is a fixed random function of its arguments:
it is the same for the same residues, and nothing else is known of it, except its value at zero.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refold.algebra.affine_map import ROUNDING

P = 880871
_GENERATOR = 41  # every residue but 0 is a power of it
_EXACT = 2.0**53  # integers of float64 up to here are exact
_FRACTIONS = 2**6 * 3**3 * 5**3 * 7**2 * 11 * 13  # a denominator that small ones divide
_LARGEST = 2.0**45  # numerators up to which a float is read as a fraction
_SPLIT = 1024.0
# What a fold compares with to tell a value from its rounding: sums that cancel, whole thresholds.
_BOUNDS = frozenset({ROUNDING, 4 * torch.finfo(torch.float64).eps})
PAIRS = 1 << 24  # comparisons of elements with each other that are still cheap


@dataclass(frozen=True)
class Unknown:
    """What has no residue, and why, as a sentence without a full stop."""

    reason: str


class Unjudged(Exception):
    """A call whose result has no residue."""


class NoInverse(Exception):
    """A division by zero: other inputs may have none."""


class _Tables(NamedTuple):
    sign: Tensor  # -1, 0 or 1
    inverse: Tensor
    root: Tensor  # the positive square root of the residue, or of its negative
    powers: Tensor  # of two, from 2^-1200


@functools.cache
def _tables() -> _Tables:
    powers = torch.ones(1, dtype=torch.int64)
    while len(powers) < P - 1:
        step = pow(_GENERATOR, len(powers), P)
        powers = torch.cat([powers, powers * step % P])
    powers = powers[: P - 1]
    index = torch.arange(P - 1)
    even, half = index % 2 == 0, (P - 1) // 2  # odd
    sign, inverse, root = (torch.zeros(P, dtype=torch.float64) for _ in range(3))
    sign[powers] = torch.where(even, 1.0, -1.0).double()
    inverse[powers] = powers[-index % (P - 1)].double()
    below = torch.where(even, index, (index + half) % (P - 1)) // 2
    root[powers] = powers[torch.where(below % 2 == 0, below, below + half)].double()
    two = [pow(2, e % (P - 1), P) for e in range(-1200, 1100)]
    return _Tables(sign, inverse, root, torch.tensor(two))


def mod(values: Tensor) -> Tensor:
    """Residues of integers."""
    return values.remainder(P)


def centred(values: Tensor) -> Tensor:
    """The same residues, as small as they can be."""
    return torch.where(values > P // 2, values - P, values)


def sign(values: Tensor) -> Tensor:
    """-1, 0 or 1."""
    return _tables().sign[values.long()]


def positive(values: Tensor) -> Tensor:
    """Which residues count as greater than zero."""
    return sign(values) > 0


def inverse(values: Tensor) -> Tensor:
    """What each residue has to be multiplied with to give 1."""
    if bool((values == 0).any()):
        raise NoInverse
    return _tables().inverse[values.long()]


def root(values: Tensor) -> Tensor:
    """The positive square root, of negative ones that of their absolute value."""
    return _tables().root[values.long()]


def multiplied(a: Tensor, b: Tensor) -> Tensor:
    return mod(a * b)


def divided(a: Tensor, b: Tensor) -> Tensor:
    return mod(a * inverse(b))


def power(values: Tensor, exponent: int) -> Tensor:
    """To a whole power."""
    base = inverse(values) if exponent < 0 else values
    out, rest = torch.ones_like(values), abs(exponent)
    while rest:
        if rest & 1:
            out = multiplied(out, base)
        base, rest = multiplied(base, base), rest >> 1
    return out


def count(values: Tensor, dims: Sequence[int]) -> int:
    """How many elements are reduced over dimensions."""
    return math.prod(values.shape[d] for d in dims)


def mean(values: Tensor, dims: Sequence[int]) -> Tensor:
    """Over dimensions, which stay."""
    total = mod(values.sum(tuple(dims), keepdim=True))
    return divided(total, torch.full_like(total, count(values, dims) % P))


def variance(values: Tensor, dims: Sequence[int], correction: int = 0) -> Tensor:
    """Over dimensions, which stay."""
    apart = mod(values - mean(values, dims))
    total = mod(multiplied(apart, apart).sum(tuple(dims), keepdim=True))
    return divided(total, torch.full_like(total, (count(values, dims) - correction) % P))


def bilinear(
    function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, length: int
) -> Tensor:
    """A product of two tensors that sums over ``length`` terms."""
    a, b = centred(a), centred(b)
    if length <= _EXACT / (P // 2 + 1) ** 2:
        return mod(function(a, b))
    if length > _EXACT / _SPLIT / P:
        raise Unjudged(f"a sum of {length} terms is longer than residues allow")
    high = (a / _SPLIT).floor()
    return mod(mod(function(high, b)) * _SPLIT + mod(function(a - high * _SPLIT, b)))


def largest(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """Of the last dimension: the mean of those that are above most others.

    Of two it is the greater. It keeps what a maximum keeps of scales, shifts and orders; a maximum
    of maxima is not one of all, because "above" has circles here.

    Args:
        values: residues.
        valid: which of them count.
    """
    if values.shape[-1] == 1 and valid is None:
        return values[..., 0]
    if values.numel() * values.shape[-1] > PAIRS:
        raise Unjudged(f"a maximum of {values.shape[-1]} elements takes too many comparisons")
    above = sign(mod(values[..., :, None] - values[..., None, :]))
    if valid is not None:
        above = torch.where(valid[..., None, :], above, 0.0)
    score = above.sum(-1)
    if valid is not None:
        score = torch.where(valid, score, -math.inf)
    top = (score == score.amax(-1, keepdim=True)).double()
    return divided(mod((values * top).sum(-1)), top.sum(-1))


class Residues:
    """The residues of numbers, and functions of residues.

    Args:
        signed: whether a float's residue has its sign.
        seed: of the functions.

    Attributes:
        seed: of the functions.
        limits: whether an infinity or NaN was read: arithmetic with those is not theirs.
    """

    def __init__(self, *, signed: bool, seed: int = 0) -> None:
        self.signed = signed
        self.limits = False
        self.seed = seed
        self._numbers: dict[float, float] = {}

    def number(self, value: float) -> float:
        """Of a Python number; that of an integer is always exact.

        Exact arithmetic has no rounding: a bound on it is zero.
        """
        if isinstance(value, int):
            return float(value % P)
        if value in _BOUNDS:
            return 0.0
        found = self._numbers.get(value)
        if found is None:
            found = float(self.of(torch.tensor(value, dtype=torch.float64)))
            self._numbers[value] = found
        return found

    def of(self, values: Tensor) -> Tensor:
        """Of a tensor; one of integers or booleans has exact ones."""
        if not values.is_floating_point():
            return mod(values.double())
        values = values.detach().double()
        size = values.abs()
        ends = ~size.isfinite()
        limits = bool(ends.any())
        if limits:
            self.limits = True
            size = torch.where(ends, torch.where(values.isnan(), 0.123456789, 0.987654321), size)
        out = _residues(size)
        if self.signed:
            out = torch.where(positive(out) | (out == 0), out, P - out)
        return torch.where((values < 0) & (out > 0), P - out, out)

    def read(self, value: Any) -> Tensor:
        """An operand of a call: residues as they are, the residues of a tensor or a number."""
        if not isinstance(value, Tensor):
            return torch.tensor(self.number(value), dtype=torch.float64)
        return value if value.is_floating_point() else self.of(value)

    def times(self, values: Tensor, factor: Any) -> Tensor:
        """The product with an operand."""
        one = not isinstance(factor, Tensor) and factor == 1
        return values if one else multiplied(values, self.read(factor))

    def function(self, name: str, *arguments: Tensor | float) -> Tensor:
        """A function of that name, of residues, integers and numbers that broadcast."""
        return self._hashed(name, arguments).remainder(P).double()

    def coin(self, name: str, *arguments: Tensor | float) -> Tensor:
        """A function that is true or false."""
        return self._hashed(name, arguments) % 2 == 0

    def _hashed(self, name: str, arguments: Sequence[Tensor | float]) -> Tensor:
        out: Tensor | int = _key(name, self.seed)
        for argument in arguments:
            given = argument if isinstance(argument, Tensor) else self.number(argument)
            whole = given.long() if isinstance(given, Tensor) else int(given)
            out = _mixed(out + whole)
        out = _mixed(out)
        assert isinstance(out, Tensor), "a function reads a tensor"
        return out >> 8


def _residues(size: Tensor) -> Tensor:
    """Of finite numbers that are not negative."""
    numerator = (size * _FRACTIONS).round()
    fraction = (numerator / _FRACTIONS == size) & (numerator < _LARGEST)
    mantissa, exponent = size.frexp()
    whole = (mantissa * _EXACT).long() % P
    binary = whole * _tables().powers[exponent.long() + 1200 - 53] % P
    small = mod(numerator) * pow(_FRACTIONS, -1, P)
    return torch.where(fraction, mod(small), binary.double())


@functools.cache
def _key(name: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def _mixed(values: Tensor | int) -> Tensor | int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), with signed shifts."""
    values = _wrapped((values ^ (values >> 30)) * -4658895280553007687)
    values = _wrapped((values ^ (values >> 27)) * -7723592293110705685)
    return values ^ (values >> 31)


def _wrapped(value: Tensor | int) -> Tensor | int:
    """To 64 bits, which a tensor's arithmetic does by itself."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63) if isinstance(value, int) else value
