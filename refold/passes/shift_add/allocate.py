"""Chooses a width for every layer: the least total loss within a budget of bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from refold.errors import MissingDependencyError, UsageError


@dataclass(frozen=True)
class WidthCost:
    """What one width of one layer costs."""

    loss: float
    bytes: int


def allocate_bits(layers: Sequence[Mapping[int, WidthCost]], budget: int) -> list[int]:
    """The widths with the smallest sum of losses whose bytes are within the budget.

    An integer program: one binary variable for each layer and width, exactly one of each layer's
    is 1, and the bytes of those that are add up to the budget at most.

    Args:
        layers: for each layer its widths and what they cost.
        budget: bytes for all layers together, scales included.

    Raises:
        UsageError: even the smallest widths take more than the budget.
        MissingDependencyError: scipy is not installed.
    """
    require_budget(sum(min(c.bytes for c in layer.values()) for layer in layers), budget)
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError:
        raise MissingDependencyError(
            "bits='auto' solves an integer program with scipy: pip install 'refold[shiftadd]'"
        ) from None
    flat = [(i, width, c) for i, layer in enumerate(layers) for width, c in layer.items()]
    if not flat:
        return []
    losses = np.array([c.loss for _, _, c in flat])
    one_each = np.array([[float(i == at) for i, _, _ in flat] for at in range(len(layers))])
    sizes = np.array([[float(c.bytes) for _, _, c in flat]])
    solved = milp(
        losses / (np.abs(losses).max() or 1.0),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(sizes / budget, -np.inf, 1.0),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert solved.x is not None, solved.message
    return [width for (_, width, _), chosen in zip(flat, solved.x, strict=True) if chosen > 0.5]


def require_budget(least: int, budget: int) -> None:
    """Raises a :class:`UsageError` if the smallest widths take more than the budget."""
    if least > budget:
        raise UsageError(
            f"{budget} bytes are too few: the smallest widths and their scales take {least}; "
            "raise average_bits or group_size"
        )
