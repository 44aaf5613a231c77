"""Every system of the papers folds as its row of ``docs/coverage.md`` says.

A check that is stated to fail must fail: a row that starts to work is noticed.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from refold.cli.torchvision_shim import declare_torchvision_ops
from refold.errors import RefoldError
from tests.models.systems import (
    SYSTEMS,
    Check,
    Outcome,
    System,
    examine,
    onnxruntime_error,
    structure_faults,
)

# The others, and exports to ONNX, which take seconds, belong to the sweep.
QUICK = {name for i, name in enumerate(SYSTEMS) if i % 12 == 1 and not SYSTEMS[name].slow}


def _systems(check: Check) -> Any:
    """Parametrises a test over the systems, each with the marks of this check."""

    def case(name: str) -> Any:
        chosen, marks = SYSTEMS[name], []
        if check == "onnxruntime" or name not in QUICK:
            marks.append(pytest.mark.sweep)
        if check in chosen.fails:
            raises = (AssertionError, RefoldError)
            marks.append(pytest.mark.xfail(reason=chosen.fails[check], strict=True, raises=raises))
        return pytest.param(name, marks=marks)

    return pytest.mark.parametrize("name", [case(name) for name in SYSTEMS if compiles(name)])


def compiles(name: str) -> bool:
    return not SYSTEMS[name].refused


def system(name: str) -> System:
    if SYSTEMS[name].requires:
        declare_torchvision_ops()  # they look for torchvision, which may be of another torch
    for package in SYSTEMS[name].requires:
        pytest.importorskip(package)
    return SYSTEMS[name]


@functools.cache
def outcome(name: str) -> Outcome:
    return examine(system(name))


@_systems("structure")
def test_structure(name: str) -> None:
    assert not structure_faults(SYSTEMS[name], outcome(name))


@_systems("numbers")
def test_numbers(name: str) -> None:
    assert outcome(name).error <= SYSTEMS[name].bound


@pytest.mark.parametrize("name", [name for name in SYSTEMS if not compiles(name)])
def test_refused_with_the_reason(name: str) -> None:
    with pytest.raises(RefoldError, match=SYSTEMS[name].refused):
        examine(SYSTEMS[name])


@_systems("onnxruntime")
def test_runs_in_onnxruntime(name: str) -> None:
    pytest.importorskip("onnxruntime")
    error, allowed = onnxruntime_error(system(name))
    assert error <= allowed


def test_every_system_has_its_row() -> None:
    page = (Path(__file__).parents[1] / "docs" / "coverage.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    named = [row[0].removeprefix("| ") for row in rows if row[0] != "| system"]
    assert sorted(named) == sorted(SYSTEMS)
    for name, chosen in SYSTEMS.items():
        state = rows[[row[0] for row in rows].index(f"| {name}")][-1]
        works = not chosen.fails and not chosen.refused
        assert state.startswith("works") == works, name
