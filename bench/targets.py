"""Edge and server runtimes: converted or not, numbers, operators, size and CPU time.

Run from the repository's root: ``python -m bench.targets [NAME ...] [--targets T ...]``. Each
runtime gets the folded and the unfolded graph through the same lowering; times are paired, on one
thread, batch 1. A target that is not installed is left out, and said so.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
from dataclasses import fields
from typing import Any

import torch
from torch import fx

from bench.common import interleaved, quiet, ratio, save
from refold.backends.base import Target
from refold.backends.registry import find_target, make_options
from refold.errors import MissingDependencyError, RefoldError
from refold.frontends.export import trace
from refold.graph.copies import copy_sharing_tensors
from refold.graph.program import Program
from refold.passes import PIPELINES
from refold.verify.compare import verify_widely
from refold.verify.references import references
from tests.models.timm_networks import NETWORKS, network

TARGETS = ("ort-format", "openvino", "executorch", "litert", "ncnn", "coreml")
# A transformer without convolutions but its stem, to see what the runtimes make of attention.
_SIZES = {**NETWORKS, "vit_tiny_patch16_224": 224}


class Traced:
    """A network as traced, folded, and what it computes, for runtimes of one kind of shapes."""

    def __init__(self, name: str, *, dynamic: bool) -> None:
        model, images = network(name, _SIZES.get(name))
        self.program: Program = trace(model, (images[:1],), {}, dynamic_batch=dynamic)
        self.unfolded = copy_sharing_tensors(self.program.graph_module)
        self.known = references(self.unfolded, self.program)
        PIPELINES["default"].run(self.program.graph_module)
        self.folded = self.program.graph_module


def lowered(target: Target, traced: Traced, gm: fx.GraphModule) -> tuple[dict[str, Any], Any]:
    """What a target makes of a graph, and its runner if it can be run here."""
    threads = {"threads": 1} if "threads" in {f.name for f in fields(target.options)} else {}
    options = make_options(target, threads)
    artifact = target.lower(traced.program, gm, options)
    record: dict[str, Any] = {**target.stats(artifact), "notes": list(artifact.notes)}
    try:
        return record, target.load(artifact, options)
    except MissingDependencyError:
        return record, None


def measure(target: Target, traced: Traced, rounds: int) -> dict[str, Any]:
    """One network on one target; what fails is told with its reason."""
    row: dict[str, Any] = {}
    runs: dict[str, Any] = {}
    (image,) = traced.program.example[0]
    for form, gm in (("unfolded", traced.unfolded), ("folded", traced.folded)):
        try:
            record, runner = lowered(target, traced, copy_sharing_tensors(gm))
            if runner is not None:
                runs[form] = lambda run=runner: run(image)
                found, _ = verify_widely(traced.unfolded, runner, traced.program, traced.known)
                record["numbers"] = {
                    k: getattr(found, k) for k in ("error", "own_error", "tolerance")
                }
        except RefoldError as error:
            reason = re.sub(r"\S*/site-packages/", "", str(error))
            record = {"error": f"{type(error).__name__}: {reason}"}
        row[form] = record
    if len(runs) == 2 and all("numbers" in row[form] for form in runs):
        seconds = interleaved(runs, rounds)
        row["median ms"] = {f: 1e3 * statistics.median(s) for f, s in seconds.items()}
        row["unfolded / folded"] = ratio(seconds["unfolded"], seconds["folded"])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(_SIZES), help="names of timm models")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--rounds", type=int, default=20, help="paired rounds")
    parser.add_argument("--output", default="targets", help="name of the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        # ExecuTorch has one thread a core and no safe way to have fewer.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    targets = []
    for name in options.targets:
        missing = find_target(name).available()
        print(f"{name}: {missing}") if missing else targets.append(find_target(name))
    rows: list[dict[str, Any]] = []
    for name in options.networks:
        row: dict[str, Any] = {"network": name, "targets": {}}
        with quiet():
            kinds = {t.capabilities.static for t in targets}
            traced = {static: Traced(name, dynamic=not static) for static in kinds}
            row["image"] = list(next(iter(traced.values())).program.example[0][0].shape)
            for target in targets:
                row["targets"][target.name] = measure(
                    target, traced[target.capabilities.static], options.rounds
                )
        rows.append(row)
        print(row, flush=True)
        path = save(options.output, vars(options), rows)  # a crash keeps the rows before it
    print(path)


if __name__ == "__main__":
    main()
