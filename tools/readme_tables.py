"""Writes the tables between ``<!-- table:NAME -->`` and ``<!-- /table:NAME -->`` from results.

Run from the repository's root: ``python tools/readme_tables.py [--check] [FILE ...]``. ``--check``
changes nothing and ends with 1 if a table is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "targets", "native-kernel")),
)
_MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n)(.*?)(<!-- /table:\2 -->)", re.DOTALL)

Result = dict[str, Any]


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(map(str, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(_cell(c) for c in line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def patterns_summary(result: Result) -> str:
    """How many patterns each contender brings to the optimum."""
    rows = result["rows"]
    contenders = [c for c in rows[0]["left"] if c != "traced"]
    reached = {c: sum(_reached(row, c) for row in rows) for c in contenders}
    body = [(c, f"{n} of {len(rows)}") for c, n in reached.items()]
    return table(["tool", "patterns at their optimum"], body) + _footer(result)


def patterns(result: Result) -> str:
    """Compute nodes left: linear + other, for each pattern and contender."""
    rows = result["rows"]
    contenders = list(rows[0]["left"])
    body = [
        [row["pattern"], row["optimum"], *(_nodes(row["left"][c]) for c in contenders)]
        for row in rows
    ]
    return table(["pattern", "optimum", *contenders], body) + _footer(result)


def _reached(row: dict[str, Any], contender: str) -> bool:
    count = row["left"][contender]
    return "error" not in count and count["linear"] + count["other"] <= row["optimum"]


def _nodes(count: dict[str, Any]) -> str:
    return "failed" if "error" in count else f"{count['linear']}+{count['other']}"


def networks(result: Result) -> str:
    """Nodes before, after refold and in timm's deploy form, with errors."""
    body = []
    for row in result["rows"]:
        before, ours, theirs = row["before"], row["refold"], row["deploy"]
        body.append(
            [
                row["network"],
                *(_three(k, before, ours, theirs) for k in ("conv-like", "batch-norm", "total")),
                f"{row['errors']['refold in float64']:.0e}",
                f"{row['errors']['refold']:.1e} / {row['errors']['original']:.1e}",
                f"{row['seconds']['fold / export']:.2f}",
            ]
        )
    head = [
        "network",
        "convs and linears",
        "batch norms",
        "all nodes",
        "float64 error",
        "float32 error / the original's own",
        "fold / export time",
    ]
    note = "\n\nCounts: as trained -> refold (timm's deploy form)."
    return table(head, body) + note + _footer(result)


def _three(kind: str, before: dict[str, int], ours: dict[str, int], theirs: dict[str, int]) -> str:
    return f"{before[kind]} -> {ours[kind]} ({theirs[kind]})"


def latency(result: Result) -> str:
    """Ratios of CPU time in ONNX Runtime, each with its interval."""
    counts = list(result["rows"][0]["threads"])
    pairs = ("unfolded / refold", "deploy / refold")
    head = ["network", *(f"{pair}, {c} thread{'s' * (c != '1')}" for c in counts for pair in pairs)]
    body = [
        [row["network"], *(_interval(row["threads"][c][pair]) for c in counts for pair in pairs)]
        for row in result["rows"]
    ]
    rounds = result["settings"]["rounds"]
    note = (
        f"\n\nRatios of median CPU time over {rounds} paired rounds, batch 1, float32, with 95 % "
        "bootstrap intervals; above 1, refold is faster."
    )
    return table(head, body) + note + _footer(result)


def _interval(value: dict[str, float]) -> str:
    return f"{value['ratio']:.2f} ({value['low']:.2f} to {value['high']:.2f})"


def scale_nodes(result: Result) -> str:
    """Seconds of a fold by the nodes of the graph."""
    body = []
    for row in result["rows"]:
        body.append(
            [
                row["form"],
                f"{row['nodes']:,}",
                f"{row['calls'][0]:,} -> {row['calls'][1]:,}",
                f"{row['seconds']:.1f}",
                f"{1e3 * row['seconds'] / row['nodes']:.2f}",
                f"{row['exponent']:.2f}",
            ]
        )
    head = ["blocks of", "nodes", "calls", "CPU s", "ms a node", "exponent"]
    return table(head, body) + _footer(result)


def scale_big(result: Result) -> str:
    """What a fold and an export of weights on a memory map take."""
    body = []
    for row in result["rows"]:
        body.append(
            [
                f"{row['parameters'] / 1e9:.2f}",
                row["dtype"],
                _gigabytes(row["weight bytes"]),
                _gigabytes(row["file bytes"]),
                f"{row['calls'][0]} -> {row['calls'][1]}",
                *(_gigabytes(row["peaks"][stage]) for stage in ("trace", "fold", "lower", "write")),
                f"{row['error of one block']:.0e}",
            ]
        )
    head = ["1e9 parameters", "dtype", "weights", "ONNX", "calls", "peak: trace", "fold", "lower",
            "write", "error of one block"]  # fmt: skip
    return table(head, body) + _footer(result)


def memory(result: Result) -> str:
    """Peak resident bytes beyond the model."""
    body = []
    for row in result["rows"]:
        allowed = row.get("allowed growth")
        body.append(
            [
                row["mode"],
                f"{row['parameters'] / 1e9:.2f}",
                _gigabytes(row["weight bytes"]),
                _gigabytes(row["growth"]),
                _gigabytes(allowed) if allowed else "",
                f"{row['peak / weights']:.2f}",
            ]
        )
    head = [
        "step",
        "1e9 parameters",
        "weights",
        "peak growth",
        "new constants + one layer",
        "peak / weights",
    ]
    return table(head, body) + _footer(result)


def shift_add_kernel(result: Result) -> str:
    """Ratios of the least time of a layer, peers over the native kernel."""
    forms = ("native q=2", "native q=3", "native q=2 exact", "native q=3 exact")
    peers = ("torch float32", "ONNX Runtime 4 bits")
    head = ["outputs x features", "rows", "threads", *(f.removeprefix("native ") for f in forms)]
    body = []
    for row in result["rows"]:
        found = row["of minima"]
        cells = [
            " / ".join(f"{found[pair]:.1f}" for p in peers if (pair := f"{p} / {form}") in found)
            for form in forms
        ]
        shape = f"{row['rows']} x {row['features']}"
        body.append([shape, row["batch"], row["threads"], *(c or "-" for c in cells)])
    note = (
        "\n\nTimes faster than torch's float32 / than ONNX Runtime's 4 bits (one row alone); "
        "ratios of minima: CPU time for one thread, wall time for more."
    )
    return table(head, body) + note + _footer(result)


def torch_compile(result: Result) -> str:
    """Ratios of CPU time and of compilation against Inductor with freezing."""
    rows = [row for row in result["rows"] if "network" in row]
    forms = ["deploy", "refold", "refold, frozen", "target"]
    body = [
        [
            row["network"],
            *(_interval(row[f"freezing / {form}"]) for form in forms),
            " / ".join(f"{row['compile seconds'][f]:.1f}" for f in ("freezing", *forms[1:])),
            f"{row['check us']:.0f} us, {row['check / call']:.1%}",
        ]
        for row in rows
    ]
    head = [
        "network",
        "freezing / author's deploy form",
        "freezing / refold",
        "freezing / refold, frozen",
        "freezing / target inductor",
        "seconds to compile: freezing / refold / frozen / target",
        "look at the parameters, of a call",
    ]
    return table(head, body) + _footer(result)


def half(result: Result) -> str:
    """Errors of three float16 models of one network, and their ratios."""
    labels = list(result["rows"][0]["errors"])
    ratios = ("refold / unfolded", "refold / folded in float16")
    body = [
        [
            row["network"],
            *(f"{row['errors'][label]:.1e}" for label in labels),
            *(f"{row[ratio]:.2f}" for ratio in ratios),
        ]
        for row in result["rows"]
    ]
    middle = [statistics.median(row[ratio] for row in result["rows"]) for ratio in ratios]
    body.append(["median", *("" for _ in labels), *(f"{m:.2f}" for m in middle)])
    note = (
        f"\n\nMedian difference from the float64 network over all outputs of "
        f"{result['settings']['inputs']} images, relative to the largest output."
    )
    return table(["network", *labels, *ratios], body) + note + _footer(result)


def targets(result: Result) -> str:
    """For each network and target: operators, size, error and the ratio of CPU times."""
    names = list(result["rows"][0]["targets"])
    body = [
        [row["network"], *(_on_target(row["targets"][name]) for name in names)]
        for row in result["rows"]
    ]
    rounds = result["settings"]["rounds"]
    note = (
        "\n\nOperators: unfolded -> refold; megabytes: the same; error: relative to the float64 "
        "original (what rounding may explain); time: unfolded / refold, the ratio of median CPU "
        f"times over {rounds} paired rounds with its 95 % interval, above 1 refold is faster. "
        "Batch 1, float32, one core."
    )
    return table(["network", *names], body) + note + _footer(result)


def _on_target(cell: dict[str, Any]) -> str:
    before, after = cell["unfolded"], cell["folded"]
    if "error" in after:
        return f"failed: {after['error'].splitlines()[0]}"
    was = "failed" if "error" in before else before["nodes"]
    size = "failed" if "error" in before else f"{before['bytes'] / 1e6:.1f}"
    parts = [f"{was} -> {after['nodes']}", f"{size} -> {after['bytes'] / 1e6:.1f} MB"]
    numbers = after.get("numbers")
    if numbers:
        parts.append(f"error {numbers['error']:.0e} ({numbers['tolerance']:.0e})")
    else:
        parts.append("not run")
    if "unfolded / folded" in cell:
        parts.append(f"time {_interval(cell['unfolded / folded'])}")
    return "; ".join(parts)


def horizontal_merge(result: Result) -> str:
    """For each set of layers and backend: microseconds apart and merged, and their ratio."""
    cells: dict[str, dict[str, str]] = {}
    for row in result["rows"]:
        least = row["least us"]
        figures = f"{least['apart']:.0f} -> {least['merged']:.0f} us; "
        found = figures + _interval(row["apart / merged"]) + (", merged" if row["merges"] else "")
        cells.setdefault(row["layers"], {})[row["backend"]] = found
    names = result["settings"]["backends"]
    body = [
        [layers, *(row.get(name, "left apart") for name in names)] for layers, row in cells.items()
    ]
    note = (
        "\n\nThe least CPU time, apart -> merged, and the ratio of medians over "
        f"{result['settings']['rounds']} paired rounds with its 95 % interval; above 1, merged is "
        "faster. Batch 1, float32, one thread. *Merged*: refold merges them for that backend. "
        "Blocks are causal attentions compiled by refold, as a whole."
    )
    return table(["layers of one input", *names], body) + note + _footer(result)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _footer(result: Result) -> str:
    used = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    where = f"{result['machine']['processor']}, {result['machine']['cores']} cores"
    return f"\n\nMeasured {result['date']} on {where}; {used}.\n"


# Name of the table: the result it is made from, and how.
TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "patterns-summary": ("patterns", patterns_summary),
    "patterns": ("patterns", patterns),
    "networks": ("networks", networks),
    "latency": ("ort_latency", latency),
    "memory": ("memory", memory),
    "scale-nodes": ("scale_nodes", scale_nodes),
    "scale-big": ("scale_big", scale_big),
    "targets": ("targets", targets),
    "half": ("half", half),
    "torch-compile": ("dynamo", torch_compile),
    "horizontal-merge": ("horizontal_merge", horizontal_merge),
    "shift-add-kernel": ("shift_add_kernel", shift_add_kernel),
}


def fill(text: str, results: Path = RESULTS) -> str:
    """Returns the document with every marked table made anew; without its result, one is kept."""

    def replace(match: re.Match[str]) -> str:
        start, name, body, end = match.groups()
        if name not in TABLES:
            raise SystemExit(f"no table is named {name!r}; known: {', '.join(TABLES)}")
        source, render = TABLES[name]
        path = results / f"{source}.json"
        if path.exists():
            body = f"\n{render(json.loads(path.read_text()))}\n"
        return f"{start}{body}{end}"

    return _MARKED.sub(replace, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, default=[d for d in DOCUMENTS if d.exists()])
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    options = parser.parse_args()
    stale = []
    for path in options.files:
        old = path.read_text()
        new = fill(old)
        if new != old:
            stale.append(path)
            if not options.check:
                path.write_text(new)
    for path in stale:
        print(f"{path}: {'out of date' if options.check else 'written'}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
