"""Golden texts: ``check(name, text)`` compares with ``tests/golden/NAME.txt``.

Run with ``REFOLD_UPDATE_GOLDENS=1`` (or ``tools/regenerate_goldens.py``) to write them anew, and
review the difference like code.
"""

from __future__ import annotations

import os
from pathlib import Path

DIRECTORY = Path(__file__).parent / "golden"


def check(name: str, text: str) -> None:
    path = DIRECTORY / f"{name}.txt"
    if os.environ.get("REFOLD_UPDATE_GOLDENS") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return
    assert path.exists(), f"no golden {path.name}; run tools/regenerate_goldens.py"
    assert text == path.read_text(), f"{path.name} differs; if it is meant, regenerate the goldens"
