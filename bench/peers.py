"""What other compilers publish that they rewrite: calls that refold leaves, and that they leave.

Run from the repository's root: ``python -m bench.peers [--only GLOB] [--json]``. A row a case:
calls before, after refold, and after the peer, layouts and sizes not counted; ``--json`` stores
them.
"""

from __future__ import annotations

import argparse
import fnmatch
import operator
from copy import deepcopy
from typing import Any

import torch
from torch import fx, nn

import refold
from bench.common import quiet, save
from refold.graph.ops import is_layout
from tests.compare import EXACT, SINGLE, call, relative_error
from tests.models.peer_cases import CASES, PEFT, Framed, PeerCase
from tests.randomise import randomise

AS_FAR, LESS, STATED, WRONG = "as far", "less", "less, with a reason", "WRONG"


def count(graph: fx.Graph) -> int:
    """Calls of a graph that compute something; the sines of the frame do not count."""
    return sum(
        node.op == "call_function"
        and node.target is not operator.getitem
        and isinstance(node.meta.get("val"), torch.Tensor | tuple | list)
        and not is_layout(node)
        and node.target is not torch.ops.aten.sin.default
        for node in graph.nodes
    )


def traced(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Calls of a model as it is written."""
    with torch.no_grad():
        return count(torch.export.export(model, inputs, strict=False).graph)


def compare(case: PeerCase) -> dict[str, Any]:
    """One row: calls, the error in float64, and the verdict."""
    torch.manual_seed(0)
    inputs = tuple(torch.randn(shape) for shape in case.inputs)
    model = case.make().eval()
    bound = SINGLE
    if case.peer != PEFT:  # whose weights are random already, and who computes some in float32
        model, bound = Framed(randomise(model, inputs)).double(), EXACT
        inputs = tuple(x.double() for x in inputs)
    settings = {"dynamic_shapes": ({},) * len(inputs)} if case.static else {}
    left = case.left
    before = traced(model, inputs) if case.peer != PEFT else None
    if left is None:
        left = traced(deepcopy(model).merge_and_unload(), inputs)
    folded = refold.fold(deepcopy(model), inputs, **settings)
    after = count(folded.graph_module.graph)
    error = relative_error(call(folded, inputs), call(model, inputs))
    return {
        "peer": case.peer, "case": case.name, "before": before, "refold": after,
        "peer_leaves": left, "error": error, "verdict": verdict(case, after, left, error <= bound),
        "reason": case.reason, "declined": [d.reason for d in folded.report.declined],
        "calls": [str(n.target) for n in folded.graph_module.graph.nodes
                  if n.op == "call_function"],
    }  # fmt: skip


def verdict(case: PeerCase, after: int, left: int, right: bool) -> str:
    if not right:
        return WRONG
    if after <= left:
        return AS_FAR
    return STATED if case.reason else LESS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", help="glob of 'peer: case'")
    parser.add_argument("--json", action="store_true", help="stores the rows in bench/results")
    options = parser.parse_args()
    torch.set_num_threads(1)

    rows: list[dict[str, Any]] = []
    for case in CASES:
        if not fnmatch.fnmatch(case.title, options.only):
            continue
        try:
            with quiet():
                row = compare(case)
        except Exception as error:  # a case that fails is a result too
            failure = f"{type(error).__name__}: {error}"[:300]
            row = {
                "peer": case.peer, "case": case.name, "reason": case.reason, "error": failure,
                "verdict": STATED if case.reason else "failed",
            }  # fmt: skip
        rows.append(row)
        print(line(row), flush=True)
    print(summary(rows))
    if options.json:
        print(save("peers", {"only": options.only}, rows))


def line(row: dict[str, Any]) -> str:
    calls = f"{row.get('before')} -> {row.get('refold')} (peer {row.get('peer_leaves')})"
    tail = row["error"] if row["verdict"] == "failed" else row["reason"]
    return f"| {row['peer']} | {row['case']} | {calls} | {row['verdict']} | {tail} |"


def summary(rows: list[dict[str, Any]]) -> str:
    """Peers with the number of their cases by verdict."""
    lines = []
    for peer in dict.fromkeys(row["peer"] for row in rows):
        verdicts = [row["verdict"] for row in rows if row["peer"] == peer]
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
        lines.append(f"{peer}: {len(verdicts)} cases: {counts}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
