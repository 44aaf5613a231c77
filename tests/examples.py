"""What the quick suite takes of many cases or examples; the slow one has them all.

For properties and tables whose cases take a trace each. A mistake that one case in ten shows is
found in minutes, a rarer one before the change lands.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import settings

_FEWEST = 4
_few = False


def draw_few(few: bool) -> None:
    """Said once, before any test is imported: decorators read it then."""
    global _few
    _few = few


def few(cases: Iterable[Any], quick: int) -> list[Any]:
    """Cases for ``parametrize``: some, evenly spread, are of the quick suite, the others slow."""
    listed = list(cases)
    kept = {round(i * len(listed) / quick) for i in range(quick)}
    return [c if i in kept else _slow(c) for i, c in enumerate(listed)]


def _slow(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)


def examples(number: int) -> settings:
    """Settings of a property with a number of examples; its test runs in both suites."""
    return settings(max_examples=max(_FEWEST, number // 4) if _few else number, deadline=None)
