"""Writes ``docs/coverage.md``: what folding leaves of each system of the papers, measured.

Run from the repository's root: ``python tools/coverage.py [--check]``. It runs the checks of
``tests/test_systems.py``. ``--check`` changes nothing and ends with 1 if the page is out of date
(the errors' digits, which differ from machine to machine, do not count); both end with 1 where a
check comes out other than the system states.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from refold.errors import RefoldError  # noqa: E402
from tests.models.systems import (  # noqa: E402
    REGISTRIES,
    Check,
    Outcome,
    System,
    examine,
    onnxruntime_error,
    structure_faults,
)

PAGE = ROOT / "docs" / "coverage.md"
_ERROR = re.compile(r"\d\.\de-\d\d|\b0\b(?= \|)")
_INTRODUCTION = """\
# Coverage

What folding leaves of the systems of the papers. Each is written from its paper's formulas in
training form (`tests/models/systems/`: small, with every structural feature, random weights,
calibrated statistics). *There* and *left* count calls before and after; *error* is the largest in
float64, relative to the output; *passes* are those that applied something. A system *works* if its
structure is as stated, its error is within its bound (1e-12 unless the row says otherwise) and ONNX
Runtime gives the same numbers. Written by `python tools/coverage.py`.
"""
_HEAD = "| system | paper | there | left | error | passes | state |\n|---|---|---|---|---|---|---|"


def measure(system: System) -> tuple[Outcome | None, dict[Check, str]]:
    """The outcome of folding a system, and what each failing check found."""
    failed: dict[Check, str] = {}
    try:
        found = examine(system)
    except (AssertionError, RefoldError) as error:
        if system.refused and re.search(system.refused, str(error)):
            return None, {}
        return None, dict.fromkeys(("structure", "numbers"), str(error))
    faults = structure_faults(system, found)
    if system.refused:
        faults = ["it compiles, and is stated to be refused"]
    if faults:
        failed["structure"] = "; ".join(faults)
    if found.error > system.bound:
        failed["numbers"] = f"error {found.error:.1e}"
    try:
        error, allowed = onnxruntime_error(system)
        if error > allowed:
            failed["onnxruntime"] = f"error {error:.1e}, allowed {allowed:.1e}"
    except (AssertionError, RefoldError) as problem:
        failed["onnxruntime"] = str(problem)
    return found, failed


def row(name: str, system: System, found: Outcome | None) -> str:
    """The line of a system."""
    left, error, passes = "", "", ""
    if found is not None:
        left = _counts({k: found.left.get(k, 0) for k in (*system.there, *system.left)})
        error = f"{found.error:.1e}" if found.error else "0"
        passes = ", ".join(found.passes)
    if system.bound > 1e-12:
        error += f" (bound {system.bound:.0e})"
    reasons = dict.fromkeys(system.fails.values())
    state = "; ".join(f"does not work yet: {reason}" for reason in reasons) or "works"
    if found is not None:
        stated: dict[str, str] = {}  # where each reason first comes up
        for record in found.declined:
            if _matches(record.reason, system.declines):
                stated.setdefault(record.reason, record.module or record.node)
        state += "".join(f"; declined at `{at}`: {reason}" for reason, at in stated.items())
        if system.dead:
            more = f" and {len(system.dead) - 2} more" if len(system.dead) > 2 else ""
            state += f"; dead: {', '.join(f'`{name}`' for name in system.dead[:2])}{more}"
        state += "; the report warns of it" if system.warns else ""
        state += "".join(f"; for ONNX Runtime {sentence}" for sentence in system.noted)
    if found is not None and found.report.bound:
        size = f"{found.report.before.bytes} -> {found.report.after.bytes} bytes in float64"
        state += f"; bound {', '.join(b.name for b in found.report.bound)}: {size}"
    if system.refused:
        state = f"refused: {system.refused}"
    cells = [name, system.paper, _counts(system.there), left, error, passes, state]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _matches(reason: str, expressions: Iterable[str]) -> bool:
    return any(re.search(expression, reason) for expression in expressions)


def _counts(calls: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in calls.items() if count) or "nothing"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines, wrong = [_INTRODUCTION], 0
    for registry in REGISTRIES:
        lines += [f"## {registry.title}", "", _HEAD]
        for name, system in registry.items():
            found, failed = measure(system)
            for check in sorted(failed.keys() ^ system.fails.keys()):
                wrong += 1
                print(f"{name}: {check}: {failed.get(check, 'works, and is stated to fail')}")
            lines.append(row(name, system, found))
        lines.append("")
    text = "\n".join(lines)
    old = PAGE.read_text() if PAGE.exists() else ""
    if _ERROR.sub("", text) != _ERROR.sub("", old):
        print(PAGE.relative_to(ROOT))
        if options.check:
            return 1
    if not options.check:
        PAGE.write_text(text)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
