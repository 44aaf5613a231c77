"""A skip that nothing explains is a failure, wherever it is raised."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.skips import RIGHT

TESTS = Path(__file__).resolve().parent
MODULE = """
import pytest

def test_right():
    pytest.skip("no neon here")

def test_wrong():
    pytest.skip("no neon here today")

@pytest.mark.skipif(True, reason="not now")
def test_marked():
    pass

@pytest.fixture
def absent():
    pytest.importorskip("no_such_package")

def test_fixture(absent):
    pass

@pytest.mark.xfail(reason="known")
def test_known():
    raise AssertionError
"""


@pytest.mark.slow
def test_unexpected_skips_fail(tmp_path: Path) -> None:
    """In a worker of xdist too, and as a whole module; so does a right one in another file."""
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "test_kernel.py").write_text(MODULE)
    (tmp_path / "test_whole.py").write_text(
        'import pytest\npytest.skip("no neon here", allow_module_level=True)'
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.skips", "-p", "no:cacheprovider", "-n", "1",
         "--continue-on-collection-errors", "-rA", "--tb=line"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    summary = done.stdout.split("short test summary info")[1]
    told = {tuple(line.split()[:2]) for line in summary.splitlines()[1:-1]}
    assert told == {
        ("SKIPPED", "[1]"),
        ("XFAIL", "native/test_kernel.py::test_known"),
        ("FAILED", "native/test_kernel.py::test_wrong"),
        ("ERROR", "native/test_kernel.py::test_marked"),
        ("ERROR", "native/test_kernel.py::test_fixture"),
        ("ERROR", "test_whole.py"),
    }
    assert "test_kernel.py:8: skipped (no neon here today), which is none of" in done.stdout


def test_every_right_skip_is_one_that_its_file_makes() -> None:
    """A line for what no test does would excuse what nobody looks at."""
    files = {p.relative_to(TESTS).as_posix(): p.read_text() for p in TESTS.rglob("test_*.py")}
    for skip in RIGHT:
        found = [text for name, text in files.items() if re.fullmatch(skip.where, name)]
        assert found, skip
        assert all("pytest.skip(" in text or "skipif" in text for text in found), skip
