"""The page adds up runs whose seeds do not meet."""

from __future__ import annotations

from typing import Any

from tools.fuzz_table import overlap, table


def made(first: int, cases: int) -> dict[str, Any]:
    return {
        "first_seed": first,
        "cases": cases,
        "verified": 10,
        "outcomes": {"right": cases - 1, "false alarm": 1},
        "exact": {"equal": 3},
        "rules": {"fold-branches": 2},
        "operators": {"relu": 4},
    }


def test_runs_are_added_up() -> None:
    text = table([made(0, 100), made(100, 50)])
    assert text.startswith("150 networks, seeds 0 to 99, 100 to 149:")
    assert "| right | 148 |" in text
    assert "looked at 20 and refused 2" in text
    assert "| `fold-branches` | 4 |" in text
    assert "`relu` 8" in text


def test_seeds_are_counted_once() -> None:
    assert overlap([made(0, 100), made(99, 50)])
    assert not overlap([made(100, 50), made(0, 100)])
