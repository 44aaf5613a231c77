"""Shared fixtures: one thread, a seed for every test, the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from refold import cli


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


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
