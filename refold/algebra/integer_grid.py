"""Sums of scaled planes as integers: where that is exact, and the nearest integers where it is not.

    W[n, k] = sum over i of alpha_i[n, g] * b_i[n, k]      b in {-1, +1}, g = k // group_size

If the scales of a group are integers n_i times one unit u, its weights are u times the odd (or
even) integers between -S and S, S = sum of the n_i. Runtimes multiply integers of 2, 4 or 8 bits:

    S <= m = 2**(bits - 1) - 1      the integers themselves, W = u * c
    S even, S / 2 <= m              their halves, W = 2u * c
    S odd, (S - 1) / 2 <= m         W = 2u * (c + 1/2), c = (integer - 1) / 2: the halves are added
                                    as (sum of x over the group) * u, no longer a matter of bits
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

_LARGEST = 255  # what 8 bits hold with the halves apart
_PROBED = 64  # groups that are looked at first: scales of no grid are told by the first few
_CANDIDATES = 48  # scales tried for a group whose weights are rounded


@dataclass(frozen=True)
class Grid:
    """Scales as integers times a unit.

    Attributes:
        counts: the integers, ``[q, N, G]``; each group has the smallest that there are.
        unit: ``[N, G]`` in float64; 0 where all scales are.
    """

    counts: torch.Tensor
    unit: torch.Tensor

    @property
    def sums(self) -> torch.Tensor:
        """The largest integer of each group, ``[N, G]``."""
        return self.counts.sum(0)


@dataclass(frozen=True)
class Codes:
    """Weights as ``scale * code + offset``, scale and offset by group.

    Attributes:
        codes: ``[N, K]``, int8.
        scale: ``[N, G]`` in float64.
        offset: ``[N, G]`` in float64, or ``None`` where all are 0.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None


def find(alpha: torch.Tensor, planes: int) -> Grid | None:
    """The integers behind the scales of ``planes`` planes, or ``None`` where there are none.

    The ratios are compared exactly, by cross multiplication: nothing is rounded to fit.
    """
    wide = alpha.double()
    if alpha.shape[0] == 1:
        powers = 2 ** torch.arange(planes - 1, -1, -1)
        counts = powers[:, None, None] * (wide != 0)
        return Grid(counts, wide[0]) if bool((wide >= 0).all()) else None
    if not bool(wide.isfinite().all()) or bool((wide < 0).any()):
        return None
    flat = wide.flatten(1)
    if flat.shape[1] > _PROBED and _integers(flat[:, :_PROBED]) is None:
        return None
    found = _integers(flat)
    if found is None:
        return None
    counts, unit = found
    return Grid(counts.view(planes, *alpha.shape[1:]), unit.view(alpha.shape[1:]))


def _integers(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Counts and units of scales ``[q, groups]``."""
    least = flat.masked_fill(flat == 0, math.inf).amin(0)
    zero = least.isinf()
    ratio = torch.where(zero, 0.0, flat / least)
    counts = torch.zeros_like(flat, dtype=torch.int64)
    unit = torch.zeros_like(least)
    open_ = ~zero
    if bool((ratio.sum(0) > _LARGEST).any()):
        return None
    # The least scale is d units; of float32 scales times at most 255 float64 loses nothing.
    for d in range(1, _LARGEST + 1):
        if not open_.any():
            return counts, unit
        tried = (ratio[:, open_] * d).round()
        fits = (flat[:, open_] * d == tried * least[open_]).all(0) & (tried.sum(0) <= _LARGEST)
        at = open_.nonzero().flatten()[fits]
        counts[:, at] = tried[:, fits].long()
        unit[at] = least[at] / d
        open_[at] = False
    return None if open_.any() else (counts, unit)


def bits_needed(grid: Grid, widths: tuple[int, ...]) -> int | None:
    """The smallest of some widths that holds the integers exactly, or ``None``."""
    sums = grid.sums
    for bits in sorted(widths):
        most = 2 ** (bits - 1) - 1
        if bool(((sums <= most) | (sums // 2 <= most)).all()):
            return bits
    return None


def needs_offset(grid: Grid, bits: int) -> bool:
    """Whether some group is held as halves."""
    sums = grid.sums
    return bool(((sums > 2 ** (bits - 1) - 1) & (sums % 2 == 1)).any())


def encode(signs: Iterable[torch.Tensor], grid: Grid, group_size: int, bits: int) -> Codes:
    """The exact integers of a width that :func:`bits_needed` allows.

    Args:
        signs: the planes one by one, +1 and -1 as ``[N, K]``.
        grid: what their scales are.
        group_size: weights that share a scale.
        bits: the width.
    """
    sums = grid.sums
    halved = sums > 2 ** (bits - 1) - 1
    odd = halved & (sums % 2 == 1)

    def over(each: torch.Tensor, features: int) -> torch.Tensor:
        return each.to(torch.int16).repeat_interleave(group_size, dim=-1)[:, :features]

    whole: torch.Tensor | None = None
    for plane, counts in zip(signs, grid.counts, strict=True):
        term = plane * over(counts, plane.shape[1])
        whole = term if whole is None else whole.add_(term)
    assert whole is not None
    features = whole.shape[1]
    halves = (whole - over(odd, features)) >> 1
    codes = torch.where(over(halved, features) != 0, halves, whole)
    scale = torch.where(halved, 2 * grid.unit, grid.unit)
    offset = torch.where(odd, grid.unit, 0.0) if odd.any() else None
    return Codes(codes.to(torch.int8), scale, offset)


def requantise(weight: torch.Tensor, group_size: int, bits: int) -> Codes:
    """The nearest symmetric integers, each group with the best of some scales. Not exact."""
    most = 2 ** (bits - 1) - 1
    features = weight.shape[1]
    padded = torch.nn.functional.pad(weight.double(), (0, -features % group_size))
    grouped = padded.unflatten(1, (-1, group_size))
    full = grouped.abs().amax(-1)
    best = torch.full_like(full, math.inf)
    chosen = full / most
    for share in torch.linspace(0.5, 1.0, _CANDIDATES).tolist():
        scale = share * full / most
        rounded = _round(grouped, scale, most) * scale[..., None]
        error = (grouped - rounded).square().sum(-1)
        chosen = torch.where(error < best, scale, chosen)
        best = torch.minimum(error, best)
    codes = _round(grouped, chosen, most).flatten(1)[:, :features].to(torch.int8)
    return Codes(codes, chosen, None)


def _round(grouped: torch.Tensor, scale: torch.Tensor, most: int) -> torch.Tensor:
    safe = torch.where(scale == 0, 1.0, scale)[..., None]
    return (grouped / safe).round().clamp(-most, most)
