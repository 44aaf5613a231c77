"""What a comparison found, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refold.verify.tolerance import Leaf


@dataclass
class Numerics:
    """How far a compiled model is from the float64 oracle of its original.

    Attributes:
        error: the largest distance of the candidate, relative to the output's scale.
        own_error: the distance of the unfolded model in its own dtype, at the same output.
        tolerance: what was allowed at that output.
        inputs: how many inputs were compared.
        worst_output: which output that is.
        flips: integer or boolean elements that differ, each explained by rounding.
        notes: what was left out, and why.
        passed: whether everything was within its tolerance (or nothing could be compared).
    """

    error: float = 0.0
    own_error: float = 0.0
    tolerance: float = 0.0
    inputs: int = 0
    worst_output: str = ""
    flips: int = 0
    notes: list[str] = field(default_factory=list)
    passed: bool = True

    def take(self, worst: Leaf) -> None:
        """Takes in the output that is the furthest past what is allowed."""
        self.error, self.own_error = worst.error, worst.own_error
        self.tolerance, self.worst_output = worst.tolerance, worst.name

    @property
    def badness(self) -> float:
        """The error as a share of what is allowed."""
        return self.error / self.tolerance if self.tolerance else 0.0

    @property
    def summary(self) -> str:
        if not self.inputs:
            return f"not compared: {'; '.join(self.notes)}"
        text = (
            f"{self.inputs} inputs, relative error {self.error:.1e} "
            f"(unfolded {self.own_error:.1e}, allowed {self.tolerance:.1e})"
        )
        return text + (f", {self.flips} flips within rounding" if self.flips else "")

    def to_dict(self) -> dict[str, Any]:
        """The record as plain data, with a one-line ``summary``."""
        return {**asdict(self), "summary": self.summary}
