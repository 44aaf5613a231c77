"""Shared fixtures: one thread, a seed for every test, the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from refold import cli
from refold.rewrite.result import Decline, watch_failures
from tests.examples import draw_few
from tests.skips import pytest_make_collect_report, pytest_runtest_makereport

__all__ = ["pytest_make_collect_report", "pytest_runtest_makereport"]  # hooks of the whole suite

_FAILURES: list[Decline] = []


def pytest_configure(config: pytest.Config) -> None:
    draw_few(config.getoption("markexpr").startswith("not slow"))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def watched() -> Iterator[None]:
    with watch_failures(_FAILURES.append):
        yield


@pytest.fixture(autouse=True)
def failures(watched: None) -> Iterator[list[Decline]]:
    """Errors inside of refold that cost a rewrite: a test that makes none fails with them.

    A test that makes some clears the list.
    """
    yield _FAILURES
    left = [f"{f.rule} at {f.node} ({f.source}): {f.reason}" for f in _FAILURES]
    _FAILURES.clear()
    assert not left, left


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, str, str]]:
    """Calls the command line from the repository's root: exit code, stdout, stderr."""
    monkeypatch.chdir(Path(__file__).parents[1])

    def call(*arguments: object) -> tuple[Any, str, str]:
        try:
            code: Any = cli.main([str(a) for a in arguments])
        except SystemExit as error:
            code = error.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return call
