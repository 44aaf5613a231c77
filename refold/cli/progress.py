"""A sign of life of work that takes long."""

from __future__ import annotations

import threading
import time
from typing import TextIO

# Work shorter than this needs none.
_QUIET_SECONDS = 2.0
_SPINNER = "|/-\\"


class Progress:
    """Says what is being done once it takes long: a line each, or a spinner on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._animated = stream.isatty()
        self._stop: threading.Event | None = None
        self._thread: threading.Thread | None = None

    def __call__(self, stage: str) -> None:
        self.close()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._tell, args=(stage, self._stop), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the present stage."""
        if self._stop is not None and self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._stop = self._thread = None

    def _tell(self, stage: str, stop: threading.Event) -> None:
        start = time.monotonic()
        if stop.wait(_QUIET_SECONDS):
            return
        if not self._animated:
            print(f"refold: {stage} ...", file=self._stream, flush=True)
            return
        frame = 0
        while not stop.wait(0.1):
            seconds = time.monotonic() - start
            self._stream.write(f"\r{_SPINNER[frame % 4]} {stage} {seconds:.0f} s ")
            self._stream.flush()
            frame += 1
        self._stream.write("\r\x1b[K")
        self._stream.flush()
