"""What a compilation says to every pass alike: what is no option of one of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from refold.errors import UsageError
from refold.rewrite import cost


@dataclass(frozen=True)
class Context:
    """The policies that a pass runs under; the pipeline hands them to each.

    Attributes:
        costs: what calls cost where the graph will run, as its target says.
        growth: how many times larger the stored constants may become, for every pass; ``None``
            leaves each its own bound.
        exclude: globs of module paths that no pass touches: the pipeline pins their nodes.
        complex: whether what runs the graph computes complex numbers.

    Raises:
        UsageError: the growth is no number or less than 1.
    """

    costs: cost.CostModel = field(default_factory=cost.reference)
    growth: float | None = None
    exclude: tuple[str, ...] = ()
    complex: bool = True

    def __post_init__(self) -> None:
        number = isinstance(self.growth, (int, float)) and not isinstance(self.growth, bool)
        if self.growth is not None and not (number and self.growth >= 1):
            raise UsageError(
                f"max_growth is {self.growth!r}: expected 1 (no growth), more, or infinity"
            )

    def growth_or(self, own: float) -> float:
        """The growth that holds for a pass whose own bound is ``own``."""
        return own if self.growth is None else self.growth
