"""The table of what CI runs names every target and says what the code says of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from refold.backends.registry import BUILT_IN, find_target
from tools import ci_table

ROOT = Path(__file__).resolve().parent.parent
ROWS = {row.name: row for row in ci_table.ROWS}


def test_every_target_has_a_row() -> None:
    assert ROWS.keys() >= BUILT_IN.keys()


def test_the_page_says_what_the_tool_says() -> None:
    assert [row[:2] for row in ci_table.rows_of_page()] == [[r.name, r.how] for r in ci_table.ROWS]


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_is_verified_here_is_what_is_executed(name: str) -> None:
    verified, how = find_target(name).capabilities.verified, ROWS[name].how
    assert ("never executed" in how) == ("never run" in verified or name == "trt")


def test_every_row_counts_tests() -> None:
    """Of a target that lies beside the environment in the suite that installs it."""
    for name, _, *counts, edge, rtx in ci_table.rows_of_page():
        assert any((*counts, edge, rtx)), name
        assert bool(edge) == (name in ("executorch", "litert", "ncnn", "coreml")), name
        assert bool(rtx) == (name == "trt, by TensorRT-RTX"), name


def test_tests_are_counted_where_they_belong() -> None:
    tests = {
        "tests/backends/edge/test_edge_targets.py::test_calls[ncnn]": "edge",
        "tests/backends/edge/test_openvino.py::test_threads": "quick",
        "tests/rewrite/test_edit.py::test_anything": "quick",
    }
    found = ci_table.counted(tests)
    assert {name: dict(c) for name, c in found.items() if c} == {
        "ncnn": {"edge": 1}, "openvino": {"quick": 1}, "torch": {"quick": 1},
    }  # fmt: skip


def test_ci_calls_every_command_that_the_page_names() -> None:
    page, script = ci_table.PAGE.read_text(), (ROOT / ".ci" / "run").read_text()
    section = page.split("## What CI runs")[1].split("\n## ")[0]
    named = set(re.findall(r"^\| `(make [\w-]+)`", section, re.MULTILINE))
    assert named
    assert named == set(re.findall(r"^(make [\w-]+)$", script, re.MULTILINE))
