"""What is pushed: ``scale * x + shift``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from refold.errors import Declined
from refold.graph import nodes


@dataclass(frozen=True)
class Factor:
    """``scale * x + shift``: float64, rank of the tensor, every axis 1 or full."""

    scale: torch.Tensor
    shift: torch.Tensor

    @property
    def shifts(self) -> bool:
        return bool(self.shift.any())

    @property
    def is_identity(self) -> bool:
        return not self.shifts and bool((self.scale == 1).all())

    @property
    def is_positive(self) -> bool:
        return bool((self.scale > 0).all())

    def equals(self, other: Factor) -> bool:
        same = self.scale.dim() == other.scale.dim()
        return same and bool(
            (self.scale == other.scale).all() and (self.shift == other.shift).all()
        )

    def varies(self) -> set[int]:
        """Axes along which the scale or the shift varies."""
        return {a for t in (self.scale, self.shift) for a in range(t.dim()) if t.shape[a] != 1}

    def of_rank(self, rank: int) -> Factor:
        """The factor for a tensor that has more axes in front."""
        lead = (1,) * (rank - self.scale.dim())
        return Factor(*(t.reshape(*lead, *t.shape) for t in (self.scale, self.shift)))

    def padded(self, amounts: dict[int, tuple[int, int]]) -> Factor:
        """One, and no shift, in front of and behind axes on which the factor varies.

        Negative amounts cut off.
        """
        if not amounts:
            return self
        sizes = list(torch.broadcast_shapes(self.scale.shape, self.shift.shape))
        wide = [s if a in amounts else 1 for a, s in enumerate(sizes)]
        flat = [n for a in reversed(range(len(sizes))) for n in amounts.get(a, (0, 0))]

        def extended(t: torch.Tensor, fill: float) -> torch.Tensor:
            full = t.expand(torch.broadcast_shapes(t.shape, wide))
            return torch.nn.functional.pad(full, flat, value=fill)

        return Factor(extended(self.scale, 1.0), extended(self.shift, 0.0))

    def vectors(self, axis: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift as ``[size]`` vectors along the one axis they may vary on."""
        if self.varies() - {axis % self.scale.dim()}:
            raise Declined("the constant varies along another axis than the channels")
        scale, shift = self.scale.reshape(-1), self.shift.reshape(-1)
        if {scale.numel(), shift.numel()} - {1, size}:
            raise Declined("the constant has another length than the channels")
        return scale.expand(size), shift.expand(size)


def narrow(t: torch.Tensor, axis: int, start: int, size: int) -> torch.Tensor:
    return t if t.shape[axis] == 1 else t.narrow(axis, start, size)


def aligned(factor: Factor, operand: fx.Node) -> Factor:
    """The factor for one operand of a broadcasting product."""
    sizes = nodes.shape(operand)
    rank = factor.scale.dim()
    lead = rank - len(sizes)
    for axis in factor.varies():
        if axis < lead or nodes.same(sizes[axis - lead], 1):
            raise Declined("the constant varies along an axis that this factor broadcasts")
    shape = (lambda t: t.reshape(t.shape[lead:])) if lead else (lambda t: t)
    return Factor(shape(factor.scale), shape(factor.shift))


def preimage(factor: Factor, value: float) -> float | None:
    """The one number that becomes ``value`` in every channel, or ``None``."""
    if bool((factor.scale == 0).any()):
        return None
    found = (value - factor.shift) / factor.scale
    first = float(found.reshape(-1)[0])
    rounding = 8 * torch.finfo(torch.float64).eps * abs(first)
    return first if bool(((found - first).abs() <= rounding).all()) else None
