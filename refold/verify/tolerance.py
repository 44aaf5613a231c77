"""What rounding explains: the distance of an output from its reference, and the bound on it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from refold.errors import VerificationError
from refold.verify.samples import Call, shapes_of

OWN_ERROR_FACTOR = 4.0
FLOOR_UNITS = 64.0  # units in the last place that reassociation may always cost
_NARROW_UNITS = 8.0  # the same for half precision, where 64 units would hide a wrong result
_DOUBLE_FLOOR = 1e-12  # float64 has no wider oracle: the original's own distance reads 0


@dataclass
class Leaf:
    """One output over all inputs."""

    index: int
    name: str
    dtype: torch.dtype
    distance: float = 0.0
    own_distance: float = 0.0
    scale: float = 0.0
    error: float = 0.0
    own_error: float = 0.0
    tolerance: float = 0.0
    worst_call: int = 0
    count: int = 0
    differing: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = field(
        default_factory=list
    )

    def settle(self, allowed: float = 0.0) -> None:
        scale = self.scale or 1.0
        self.error, self.own_error = self.distance / scale, self.own_distance / scale
        self.tolerance = tolerance(self.own_error, self.dtype)
        if self.dtype.is_floating_point or self.dtype.is_complex:
            self.tolerance = max(self.tolerance, allowed)


def tolerance(own_error: float, dtype: torch.dtype) -> float:
    """What rounding explains at an output: see the module docstring."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    info = torch.finfo(dtype)
    floor = (FLOOR_UNITS if info.bits >= 32 else _NARROW_UNITS) * info.eps
    if dtype in (torch.float64, torch.complex128):
        floor = max(floor, _DOUBLE_FLOOR)
    return max(OWN_ERROR_FACTOR * own_error, floor)


def measure(leaf: Leaf, a: torch.Tensor, b: torch.Tensor, r: torch.Tensor, call: Call) -> None:
    wide = torch.complex128 if b.dtype.is_complex else torch.float64
    a, b, r = (t.detach().to("cpu", wide) for t in (a, b, r))
    finite_a, finite_b, finite_r = a.isfinite(), b.isfinite(), r.isfinite()
    if not (finite_a.all() and finite_b.all() and finite_r.all()):
        wrong = ~(_same_class(a, b) | _same_class(a, r))
        if wrong.any():
            raise VerificationError(
                f"{leaf.name}: {int(wrong.sum())} of {wrong.numel()} elements are NaN or infinite "
                f"on one side only, for inputs {shapes_of(call)}"
            )
    both = finite_a & finite_r
    if not both.any():
        return
    leaf.scale = max(leaf.scale, float(r[finite_r].abs().max()))
    distance = float((a - r)[both].abs().max())
    if distance > leaf.distance:
        leaf.distance, leaf.worst_call = distance, leaf.count
    both = finite_b & finite_r
    if both.any():
        leaf.own_distance = max(leaf.own_distance, float((b - r)[both].abs().max()))


def _same_class(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Elementwise: both finite, both NaN, or the same infinity."""
    both_finite, both_nan = a.isfinite() & b.isfinite(), a.isnan() & b.isnan()
    return both_finite | both_nan | (a == b)
