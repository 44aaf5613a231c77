"""What a scale and shift in front of a sign or a comparison become: another threshold.

    sign(s * x + h) = sgn(s) * sign(x + h / s)       where s = 0: sign(h)
    s * x + h > c   = x > (c - h) / s                where s < 0: x < (c - h) / s

Over the reals this holds for every x, on the threshold too. In floating point the results differ
within rounding of the threshold alone. A comparison rounds its threshold to the side on which no x
of its dtype lies between, so it is true to the exact one for every x; a sign in half precision has
no such way out, and keeps its scale. Infinity and NaN give what they gave, except where a scale is
zero: they made NaN of the constant there.
"""

from __future__ import annotations

import torch

from refold.errors import Declined
from refold.graph.records.comparisons import MIRRORED
from refold.passes.scale_shift.push.factor import Factor


def of_sign(factor: Factor, dtype: torch.dtype) -> tuple[torch.Tensor, Factor]:
    """What is added to ``x`` before the sign, and what is left to do after it."""
    zero = factor.scale == 0
    added = factor.shift / torch.where(zero, 1.0, factor.scale)
    added = _snapped(torch.where(zero, 0.0, added))
    stored = added.to(dtype).double()
    _check_range(added, stored, dtype)
    inexact = stored != added
    if dtype in (torch.float16, torch.bfloat16) and bool(inexact.any()):
        raise Declined(f"{dtype} is too coarse for its threshold: many values would meet it")
    if bool((inexact & (stored == stored.round())).any()):
        raise Declined("its threshold would round to an integer, which the tensor may hold")
    shift = torch.where(zero, factor.shift.sign(), 0.0)
    return added, Factor(factor.scale.sign(), shift)


def of_comparison(
    factor: Factor, operation: str, value: torch.Tensor, dtype: torch.dtype
) -> tuple[str, torch.Tensor]:
    """The comparison of ``x`` itself that is true where ``operation`` of ``s * x + h`` is."""
    if not factor.is_positive and not bool((factor.scale < 0).all()):
        raise Declined("the scale has other signs in other channels, or is zero")
    if not factor.is_positive:
        operation = MIRRORED[operation]
    exact = _snapped((value - factor.shift) / factor.scale)
    stored = exact.to(dtype)
    _check_range(exact, stored.double(), dtype)
    # x > t and x <= t ask about the last x that is not above t, the others about the first above
    below = operation in ("gt", "le")
    passed = stored.double() > exact if below else stored.double() < exact
    towards = torch.full_like(stored, -torch.inf if below else torch.inf)
    return operation, torch.where(passed, torch.nextafter(stored, towards), stored).double()


def _snapped(value: torch.Tensor) -> torch.Tensor:
    """An integer where float64 left one up to rounding: tensors of integers meet it exactly."""
    whole = value.round()
    noise = 4 * torch.finfo(torch.float64).eps * value.abs()
    return torch.where((value - whole).abs() <= noise, whole, value)


def _check_range(exact: torch.Tensor, stored: torch.Tensor, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    if bool((~stored.isfinite() | ((exact != 0) & (stored.abs() < limits.tiny))).any()):
        raise Declined(f"its threshold is beyond the range of {dtype}")
