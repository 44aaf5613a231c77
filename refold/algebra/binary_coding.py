"""Binary codes of a matrix: every group of a row is a sum of scaled signs.

    w ~ alpha_1 b_1 + ... + alpha_q b_q,   b_i in {-1, +1},   alpha_1 >= ... >= alpha_q >= 0

Given the scales, the best signs are those of the nearest of the 2^q levels. Given the signs, the
best scales solve a least-squares problem of q unknowns. The two alternate, and the best iterate is
kept.

Families of scales:

- ``bcq``: any;
- ``uniform``: alpha_i = s 2^(q-i), so the levels are the odd multiples of s: a uniform grid without
  a zero, whose step is 2s;
- ``pot``: uniform, with s a power of two;
- ``apot3``: each alpha is a sum of at most three signed powers of two.

A group is sorted once. A round then costs 2^q searches in prefix sums, whatever the group's size.

Xu et al., Alternating Multi-bit Quantization (2018), arXiv:1802.00150; You et al., ShiftAddLLM
(2024), arXiv:2406.05981.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

Family = Literal["uniform", "bcq", "apot3", "pot"]

_CHUNK = 1 << 21  # elements of a weight that are in work at once
_RIDGE = 1e-10  # of a group's weight: decides between scales that the signs cannot tell apart
_CLIPS = (1.0, 0.85, 0.7, 0.6, 0.5, 0.42, 0.35, 0.28)  # starts of uniform, of the largest value

Rounding = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class BinaryCode:
    """A matrix ``[N, K]`` as signs and scales.

    Attributes:
        signs: int8 ``[q, N, K]`` of +1 and -1.
        alpha: ``[q, N, G]``, or ``[1, N, G]`` with alpha_i = alpha 2^(q-1-i).
        group_size: columns that share scales.
    """

    signs: torch.Tensor
    alpha: torch.Tensor
    group_size: int


def fit_scales(
    groups: torch.Tensor,
    bits: int,
    family: Family,
    *,
    rounds: int = 15,
    importance: torch.Tensor | None = None,
    rounding: Rounding | None = None,
) -> torch.Tensor:
    """The scales ``[R, q]`` (``[R, 1]``: uniform, pot) of groups ``[R, S]``.

    Args:
        groups: the values, one group a row.
        bits: number of planes.
        family: what the scales may be.
        rounds: rounds of the alternation from each start.
        importance: weights ``[S]`` of the squared errors, all positive.
        rounding: what storage does to a scale; the alternation then chooses among stored scales.
    """
    values = groups.double().contiguous()
    weights = torch.ones(values.shape[1]) if importance is None else importance
    out = []
    step = max(1, _CHUNK // max(1, values.shape[1]))
    for part in values.split(step):
        out.append(_fit_chunk(_Sorted.of(part, weights.to(part)), bits, family, rounds, rounding))
    return torch.cat(out)


def assign(
    values: torch.Tensor, alpha: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest level to each of ``values [R, S]``, and its signs ``[q, R, S]``.

    Args:
        values: one group a row.
        alpha: ``[R, q]`` or ``[R, 1]``, as :func:`fit_scales` returns it.
        bits: number of planes.
    """
    values, codes = Levels(alpha, bits).nearest(values)
    return values, signs_of(codes, bits)


class Levels:
    """The 2^q levels of each of some groups."""

    def __init__(self, alpha: torch.Tensor, bits: int) -> None:
        self._values, self._order = _levels(alpha, bits)
        self._middles = ((self._values[:, 1:] + self._values[:, :-1]) / 2).contiguous()

    def nearest(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest level to each of ``values [R, S]``, and its code."""
        index = torch.searchsorted(self._middles, values.contiguous(), right=True)
        return self._values.gather(1, index), self._order.gather(1, index)


def signs_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The signs ``[q, ...]`` of codes: the highest bit is the first plane's."""
    places = torch.arange(bits - 1, -1, -1, device=codes.device).view(-1, *[1] * codes.dim())
    return ((codes >> places & 1) * 2 - 1).to(torch.int8)


def encode(
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    family: Family,
    *,
    rounds: int = 15,
    importance: torch.Tensor | None = None,
    rounding: Rounding | None = None,
) -> BinaryCode:
    """The code of a matrix ``[N, K]``: the smallest (weighted) squared error of each group.

    Args:
        weight: the matrix; K need not be a multiple of ``group_size``.
        bits: number of planes.
        group_size: columns that share scales.
        family: what the scales may be.
        rounds: rounds of the alternation from each start.
        importance: weights ``[K]`` of the squared errors, all positive.
        rounding: what storage does to a scale.
    """
    rows, features = weight.shape
    signs = torch.empty(bits, rows, features, dtype=torch.int8, device=weight.device)
    scales = []
    for start in range(0, features, group_size):
        slab = weight[:, start : start + group_size].double()
        own = None if importance is None else importance[start : start + group_size]
        alpha = fit_scales(slab, bits, family, rounds=rounds, importance=own, rounding=rounding)
        signs[:, :, start : start + group_size] = assign(slab, alpha, bits)[1]
        scales.append(alpha)
    return BinaryCode(signs, torch.stack(scales, -1).transpose(0, 1).contiguous(), group_size)


def decode(code: BinaryCode) -> torch.Tensor:
    """The matrix ``[N, K]`` that a code stands for, in float64."""
    planes, _, features = code.signs.shape
    weight = torch.zeros(code.signs.shape[1:], dtype=torch.float64, device=code.signs.device)
    for scale, signs in zip(planar(code.alpha, planes), code.signs, strict=True):
        weight += scale.repeat_interleave(code.group_size, dim=-1)[:, :features] * signs
    return weight


def planar(alpha: torch.Tensor, bits: int) -> torch.Tensor:
    """Scales ``[A, ...]`` as one for each plane, ``[q, ...]``."""
    if alpha.shape[0] == bits:
        return alpha.double()
    places = 2.0 ** torch.arange(bits - 1, -1, -1, device=alpha.device, dtype=torch.float64)
    return alpha.double() * places.view(-1, *[1] * (alpha.dim() - 1))


def power_of_two(x: torch.Tensor) -> torch.Tensor:
    """The power of two nearest to each non-negative value; 0 stays 0."""
    mantissa, exponent = torch.frexp(x)
    nearest = torch.ldexp(torch.ones_like(x), exponent - (mantissa < 0.75).to(exponent.dtype))
    return torch.where(x == 0, torch.zeros_like(x), nearest)


def sum_of_powers(x: torch.Tensor, terms: int) -> torch.Tensor:
    """Each value as a sum of at most ``terms`` signed powers of two, chosen greedily."""
    out = torch.zeros_like(x)
    for _ in range(terms):
        rest = x - out
        out = out + rest.sign() * power_of_two(rest.abs())
    return out


# --- fitting --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sorted:
    """Groups in ascending order, with prefix sums of 1, w and w^2 times the importance."""

    values: torch.Tensor  # [R, S]
    weights: torch.Tensor  # [R, S]
    count: torch.Tensor  # [R, S + 1]
    total: torch.Tensor  # [R, S + 1]
    squares: torch.Tensor  # [R]

    @classmethod
    def of(cls, groups: torch.Tensor, weights: torch.Tensor) -> _Sorted:
        values, order = groups.sort(dim=1)
        own = weights[order]
        return cls(
            values,
            own,
            F.pad(own.cumsum(1), (1, 0)),
            F.pad((own * values).cumsum(1), (1, 0)),
            (own * values.square()).sum(1),
        )

    def bins(self, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and weighted sum of what is nearest to each of the levels ``[R, ..., L]``."""
        middles = ((levels[..., 1:] + levels[..., :-1]) / 2).flatten(1)
        at = torch.searchsorted(self.values, middles).unflatten(1, (*levels.shape[1:-1], -1))
        at = F.pad(F.pad(at, (1, 0)), (0, 1), value=self.values.shape[1])
        flat = at.flatten(1)
        count, total = (t.gather(1, flat).view_as(at) for t in (self.count, self.total))
        return count.diff(dim=-1), total.diff(dim=-1)

    def error(self, levels: torch.Tensor) -> torch.Tensor:
        """The squared error of the nearest levels."""
        count, total = self.bins(levels)
        return self.squares + (levels * (count * levels - 2 * total)).sum(1)


class _Best:
    """The best scales so far, row by row."""

    def __init__(self, data: _Sorted, bits: int) -> None:
        self._data, self._bits = data, bits
        self.alpha: torch.Tensor | None = None
        self.error = torch.full((len(data.values),), torch.inf).to(data.values)

    def offer(self, alpha: torch.Tensor) -> bool:
        """Takes scales where they are better; says if they were anywhere."""
        error = self._data.error(_levels(alpha, self._bits)[0])
        better = error < self.error
        if self.alpha is None:
            self.alpha = alpha.clone()
        self.alpha[better] = alpha[better]
        self.error = torch.where(better, error, self.error)
        return bool(better.any())


def _fit_chunk(
    data: _Sorted, bits: int, family: Family, rounds: int, rounding: Rounding | None
) -> torch.Tensor:
    stored = rounding if rounding is not None else lambda a: a
    uniform = _fit_uniform(data, bits, rounds)
    best = _Best(data, bits)
    if family == "uniform":
        best.offer(stored(uniform))
        assert best.alpha is not None
        return best.alpha
    if family == "pot":
        nearest = power_of_two(uniform)
        for factor in (1.0, 0.5, 2.0, 0.25, 4.0):
            best.offer(nearest * factor)
        assert best.alpha is not None
        return best.alpha
    snap: Rounding = (lambda a: stored(sum_of_powers(a, 3))) if family == "apot3" else stored
    for start in (planar(uniform.T, bits).T, _greedy(data, bits)):
        own, alpha = _Best(data, bits), start
        for _ in range(rounds + 1):
            alpha = _ordered(snap(alpha))
            if not own.offer(alpha):
                break
            alpha = _least_squares(data, alpha, bits)
        assert own.alpha is not None
        best.offer(own.alpha)
    assert best.alpha is not None
    return best.alpha


def _fit_uniform(data: _Sorted, bits: int, rounds: int) -> torch.Tensor:
    """Half steps ``[R, 1]``: from several clippings, so that a group's tail is not its scale."""
    largest = data.values.abs().amax(1, keepdim=True)
    odd = torch.arange(1 - 2**bits, 2**bits, 2).to(data.values)
    alpha = largest * torch.tensor(_CLIPS).to(odd) / (2**bits - 1)  # [R, clips], all at once
    best, least = alpha, torch.full_like(alpha, torch.inf)
    for _ in range(rounds + 1):
        count, total = data.bins(alpha.unsqueeze(-1) * odd)
        size, product = (count * odd.square()).sum(-1), (total * odd).sum(-1)
        error = alpha * (alpha * size - 2 * product)
        better = error < least
        if not better.any():
            break
        best, least = torch.where(better, alpha, best), torch.where(better, error, least)
        alpha = (product / size.clamp_min(1e-300)).abs()
    return best.gather(1, least.argmin(1, keepdim=True))


def _greedy(data: _Sorted, bits: int) -> torch.Tensor:
    rest, scales = data.values, []
    size = data.weights.sum(1, keepdim=True).clamp_min(1e-300)
    for _ in range(bits):
        scale = (data.weights * rest.abs()).sum(1, keepdim=True) / size
        rest = rest - torch.where(rest >= 0, scale, -scale)
        scales.append(scale)
    return torch.cat(scales, 1)


def _least_squares(data: _Sorted, alpha: torch.Tensor, bits: int) -> torch.Tensor:
    """The best scales for the signs that ``alpha`` chooses."""
    levels, order = _levels(alpha, bits)
    count, total = data.bins(levels)
    signs = _signs(bits).to(levels)[order]  # [R, L, q]
    weighted = signs * count.unsqueeze(-1)
    gram = weighted.transpose(1, 2) @ signs
    size = count.sum(1).clamp_min(1e-300)[:, None, None]
    gram = gram + size * _RIDGE * torch.eye(bits).to(gram)
    return torch.linalg.solve(gram, (signs * total.unsqueeze(-1)).sum(1))


def _ordered(alpha: torch.Tensor) -> torch.Tensor:
    """A negative scale is a flipped plane; planes are in descending order of their scales."""
    return alpha.abs().sort(dim=1, descending=True).values


def _levels(alpha: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The 2^q levels in ascending order, and the code (first plane: highest bit) of each."""
    if alpha.shape[1] == bits and bits > 1:
        return (alpha @ _signs(bits).to(alpha).T).sort(dim=1, stable=True)
    odd = torch.arange(1 - 2**bits, 2**bits, 2, device=alpha.device)
    return alpha * odd, torch.arange(2**bits, device=alpha.device).expand(len(alpha), -1)


def _signs(bits: int) -> torch.Tensor:
    """The signs of each code, ``[2^q, q]``."""
    codes = torch.arange(2**bits)[:, None] >> torch.arange(bits - 1, -1, -1)
    return (codes & 1) * 2 - 1
