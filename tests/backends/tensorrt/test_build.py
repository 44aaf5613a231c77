"""Building an engine, without the library: what happens around its calls."""

from __future__ import annotations

import _thread
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from refold.backends.tensorrt import build


def test_an_interruption_while_the_library_calls_python_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def parse(library: Any, path: Path) -> None:
        """Stands for C++ that calls a logger, and goes on whatever that raises."""
        try:
            timer.start()
            for _ in range(20):
                time.sleep(0.02)
        except KeyboardInterrupt:
            pass
        raise AssertionError("the build went on")

    # A process that was started in the background ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.1, _thread.interrupt_main)
    monkeypatch.setattr(build.libraries, "parse", parse)
    unused: Any = None
    try:
        with pytest.raises(KeyboardInterrupt):
            build._compile(Path(), unused, unused, Path())
    finally:
        signal.signal(signal.SIGINT, before)
