"""The mutants of a small source: what is changed, what is not, and keys that edits leave alone."""

from __future__ import annotations

import ast

from tools.mutate import Finder

SOURCE = '''
def rule(x: int | None = 3) -> bool:
    """At least 1."""
    assert x > 0, "never 0"
    if x < 5 and not even(x):
        raise Declined("1 of 2")
    return any(n == 0 for n in parts(x) if n)
'''


def changes(source: str) -> dict[str, str]:
    tree = ast.parse(source)
    made = {}
    for mutant in Finder("rule.py", tree).mutants:
        compile(mutant.module(tree), "rule.py", "exec")
        made[mutant.key] = mutant.change
    return made


def test_conditions_numbers_and_statements_are_changed_and_texts_are_not() -> None:
    assert set(changes(SOURCE).values()) == {
        "3 -> 4",
        "x < 5 and (not even(x)) -> not (x < 5 and (not even(x)))",
        "x < 5 and (not even(x)) -> x < 5",
        "x < 5 and (not even(x)) -> not even(x)",
        "x < 5 -> x <= 5",
        "5 -> 6",
        "not even(x) -> even(x)",
        "raise Declined('1 of 2') -> pass",
        "return any((n == 0 for n in parts(x) if n)) -> return None",
        "any((n == 0 for n in parts(x) if n)) -> all((n == 0 for n in parts(x) if n))",
        "n == 0 -> n != 0",
        "0 -> 1",
        "n -> True",
    }


def test_keys_stay_what_they_are_when_something_else_is_edited() -> None:
    edited = "import os\n\n\n" + SOURCE.replace("n == 0", "n == 2")
    before, after = changes(SOURCE), changes(edited)
    gone = {change for key, change in before.items() if key not in after}
    everything = "any((n == 0 for n in parts(x) if n))"
    assert gone == {
        f"return {everything} -> return None",
        f"{everything} -> all((n == 0 for n in parts(x) if n))",
        "n == 0 -> n != 0",
        "0 -> 1",
        "n -> True",
    }
