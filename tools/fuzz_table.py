"""Writes what runs of the fuzzer found into ``docs/trust.md``.

Run from the repository's root: ``python tools/fuzz_table.py RUN.json...``, with what
``refold fuzz --json`` printed. Several runs are added up; their seeds must not meet.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "trust.md"
_TABLE = re.compile(r"(<!-- fuzz -->\n)(.*?)(<!-- /fuzz -->)", re.DOTALL)
_OUTCOMES = {
    "right": "right",
    "wrong": "wrong",
    "crash": "crashed",
    "false alarm": "right, refused by verification",
    "unjudged": "not judged: rounding alone changes them",
    "refused": "not compiled",
}


def total(runs: list[dict[str, Any]], key: str) -> Counter[str]:
    """A count of several runs."""
    return sum((Counter(run[key]) for run in runs), Counter())


def overlap(runs: list[dict[str, Any]]) -> bool:
    """Whether two runs share seeds."""
    spans = sorted((r["first_seed"], r["first_seed"] + r["cases"]) for r in runs)
    return any(end > start for (_, end), (start, _) in itertools.pairwise(spans))


def table(runs: list[dict[str, Any]]) -> str:
    """The section: outcomes, ways, rules, operators."""
    cases, verified = sum(r["cases"] for r in runs), sum(r["verified"] for r in runs)
    seeds = ", ".join(f"{r['first_seed']} to {r['first_seed'] + r['cases'] - 1}" for r in runs)
    outcomes, exact = total(runs, "outcomes"), total(runs, "exact")
    lines = [f"{cases:,} networks, seeds {seeds}:", "", "| outcome | networks |", "|---|---:|"]
    lines += [f"| {text} | {outcomes[kind]:,} |" for kind, text in _OUTCOMES.items()]
    lines += [
        "",
        f"Verification looked at {verified:,} and refused {outcomes['false alarm']}. Modulo "
        f"a prime, {exact['equal']:,} were equal, {exact['different']} different, and of "
        f"{exact['unjudged']:,} the exact judge could say nothing.",
        "",
        "| rule | applied |",
        "|---|---:|",
    ]
    lines += [f"| `{name}` | {count:,} |" for name, count in total(runs, "rules").most_common()]
    operators = total(runs, "operators")
    listed = ", ".join(f"`{name}` {count:,}" for name, count in sorted(operators.items()))
    lines += [
        "",
        f"{len(operators)} operators, each with the networks that called it: {listed}.",
        "",
    ]
    return "\n".join(lines)


def main(files: list[str]) -> int:
    runs = [json.loads(Path(f).read_text(encoding="utf-8")) for f in files]
    if not runs or overlap(runs):
        print("give the JSON of runs whose seeds do not meet", file=sys.stderr)
        return 2
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(_TABLE.sub(rf"\g<1>{table(runs)}\g<3>", page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
