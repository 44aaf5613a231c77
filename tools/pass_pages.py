"""Writes one page per pass under ``docs/passes/`` from the modules' docstrings.

Run from the repository's root: ``python tools/pass_pages.py [--check]``. ``--check`` changes
nothing and ends with 1 if a page is out of date.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from refold.passes import PASSES, PIPELINES  # noqa: E402

PAGES = ROOT / "docs" / "passes"


def page(name: str, kind: type) -> str:
    """The page of one pass, as Markdown."""
    made = kind()
    module = sys.modules[kind.__module__]
    source = Path(inspect.getfile(kind)).relative_to(ROOT)
    options = [f for f in dataclasses.fields(kind) if f.name not in ("name", "exactness")]
    text = inspect.cleandoc(module.__doc__ or "").replace("::\n", ":\n")
    lines = [f"# {name}", "", f"Exactness: *{made.exactness}*. Source: `{source}`.", "", text, ""]
    if options:
        lines += ["## Options", ""]
        lines += [f"- `{f.name}` (default `{f.default!r}`)" for f in options]
        lines += ["", inspect.cleandoc(kind.__doc__ or ""), ""]
    places = [n for n, p in PIPELINES.items() if name in p.names]
    return "\n".join([*lines, f"In the pipelines: {', '.join(places)}.", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    options = parser.parse_args()
    stale = 0
    for name, kind in PASSES.items():
        path = PAGES / f"{name}.md"
        text = page(name, kind)
        if path.exists() and path.read_text() == text:
            continue
        stale += 1
        print(path.relative_to(ROOT))
        if not options.check:
            PAGES.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return int(options.check and stale > 0)


if __name__ == "__main__":
    raise SystemExit(main())
