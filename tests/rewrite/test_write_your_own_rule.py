from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs/write-your-own-rule.md"


def test_the_code_of_the_tutorial_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 6
    code = compile("\n".join(blocks), str(PAGE), "exec", dont_inherit=True)
    exec(code, {"__name__": "tutorial"})


def test_a_rule_is_at_most_ten_lines() -> None:
    text = PAGE.read_text()
    example = text[
        text.index("hardswish = rule") : text.index("```", text.index("hardswish = rule"))
    ]
    assert len(example.strip().splitlines()) <= 10
