"""The report that users get: the record of a compilation, and its renderings."""

from __future__ import annotations

from dataclasses import dataclass

from refold.report.record import Record
from refold.report.terminal import Renderer


@dataclass
class Report(Record):
    """What one compilation did; its attributes are those of the record."""

    def render(self, *, color: bool = False, width: int = 100) -> str:
        """The report as text for a terminal.

        Args:
            color: use ANSI colours.
            width: columns to fit in; 40 at least.
        """
        return Renderer(self, color, max(width, 40)).text()

    def __str__(self) -> str:
        return self.render()
