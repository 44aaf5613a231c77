from __future__ import annotations

import re
from pathlib import Path

from refold.backends import registry

PAGE = Path(__file__).resolve().parents[2] / "docs/write-your-own-target.md"


def test_the_code_of_the_tutorial_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 2
    try:
        exec(
            compile("\n".join(blocks), str(PAGE), "exec", dont_inherit=True),
            {"__name__": "tutorial"},
        )
    finally:
        registry._registered.pop("listing", None)
