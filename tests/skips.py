"""The skips that are right, with the reason why; any other makes its test fail.

A suite that skips what it should run is green for nothing. ``make`` installs what the tests of a
suite need, so a package that is missing is a fault of the machine, not a reason to pass.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Skip(NamedTuple):
    """A skip that is right.

    Attributes:
        where: the file that may skip so, under ``tests/``, or files as a pattern.
        reason: a pattern of the whole sentence that the test gives.
        why: no suite runs it on every machine.
    """

    where: str
    reason: str
    why: str


RIGHT = (
    Skip(
        "native/test_(kernel|product).py",
        "no (neon|avx2|avx512) here",
        "a processor has the vector instructions of its own family; every kernel is compared with "
        "the reference on the processors that have it, and NEON's on an emulated one too",
    ),
    Skip(
        "native/test_check.py",
        "no aarch64-linux-gnu-gcc and qemu-aarch64",
        "a compiler for another processor and its emulator are packages of the system, not "
        "Python's: `apt-get install gcc-aarch64-linux-gnu qemu-user`",
    ),
    Skip("native/test_check.py", "no sanitizers: .*", "a C compiler may come without them"),
    Skip(
        "native/test_bounds.py",
        "mprotect as Linux has it",
        "pages without access are asked of Linux by a number of its own",
    ),
    Skip(
        "native/test_kernel.py",
        "no large pages on this system|threads are counted as Linux lists them",
        "these ask Linux about memory and threads of a process",
    ),
    Skip(
        "(backends/tensorrt/test_tensorrt|rtx/test_rtx).py",
        "there is a GPU",
        "what is said without one; with one the engines are run instead",
    ),
)


def unexpected(path: str, reason: str) -> bool:
    """Whether nothing in the list explains a skip."""
    return not any(
        re.search(f"(^|/){s.where}$", path) and re.fullmatch(s.reason, reason) for s in RIGHT
    )


def _fail(report: Any) -> None:
    """Turns the report of an unexpected skip into that of a failure."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    path, line, text = report.longrepr
    reason = text.removeprefix("Skipped: ")
    if unexpected(Path(path).as_posix(), reason):
        report.outcome = "failed"
        report.longrepr = (
            f"{path}:{line}: skipped ({reason}), which is none of the skips that are right: let "
            "`make` install what is missing, or say in tests/skips.py why no suite can run it"
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """Of each phase of a test, where it runs: the reports of xdist's workers are failures too."""
    report = yield
    _fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    """Of a module that skips itself while it is imported."""
    report = yield
    _fail(report)
    return report
