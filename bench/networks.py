"""Real networks: nodes before and after, against timm's deploy form; errors; fold against export.

Run from the repository's root: ``python -m bench.networks [NAME ...] [--size N]``.
"""

from __future__ import annotations

import argparse
import time
from copy import deepcopy
from typing import Any

import torch
from torch import fx, nn

import refold
from bench.common import quiet, save
from refold.frontends.export import trace
from refold.passes import PIPELINES
from tests.compare import call, double, relative_error
from tests.models import counts
from tests.models.timm_networks import NETWORKS, deploy_form, network, traced

_KINDS = ("conv-like", "conv", "linear", "batch-norm", "add", "mul")


def census(gm: fx.GraphModule) -> dict[str, int]:
    """Conv, batch norm, add, mul and all calls."""
    found = counts(gm)
    total = sum(n for kind, n in found.items() if kind != "conv-like")
    return {**{kind: found.get(kind, 0) for kind in _KINDS}, "total": total}


def seconds(model: nn.Module, image: torch.Tensor, repeats: int) -> dict[str, float]:
    """CPU seconds of ``torch.export`` and of the folding of its graph: the smallest of each."""
    pipeline = PIPELINES["default"]
    export, fold = [], []
    for _ in range(repeats):
        start = time.process_time()
        with torch.no_grad():
            torch.export.export(model, (image,), strict=False)
        export.append(time.process_time() - start)
        gm = trace(model, (image,), {}).graph_module
        start = time.process_time()
        pipeline.run(gm)
        fold.append(time.process_time() - start)
    return {"export": min(export), "fold": min(fold), "fold / export": min(fold) / min(export)}


def errors(
    model: nn.Module, folded: Any, deploy: nn.Module, image: torch.Tensor
) -> dict[str, float]:
    """Largest difference from the float64 original, relative to the output's scale."""
    oracle = call(deepcopy(model).double(), double((image,)))
    exact = refold.fold(deepcopy(model).double(), double((image,)), verify=False)
    candidates = {"original": model, "refold": folded, "deploy": deploy}
    found = {name: relative_error(call(c, (image,)), oracle) for name, c in candidates.items()}
    found["refold in float64"] = relative_error(call(exact, double((image,))), oracle)
    return found


def measure(name: str, size: int | None, repeats: int) -> dict[str, Any]:
    with quiet():
        model, image = network(name, size)
        deploy = deploy_form(model)
        cost = seconds(model, image, repeats)
        folded = refold.fold(model, (image,))
        left = [
            {"node": d.node, "module": d.module, "reason": d.reason}
            for d in folded.report.declined
            if d.rule == "fold-batch-norm"
        ]
        return {
            "network": name,
            "image": list(image.shape),
            "before": census(traced(model, image)),
            "refold": census(folded.graph_module),
            "deploy": census(traced(deploy, image)),
            "errors": errors(model, folded, deploy, image),
            "seconds": cost,
            "batch norms declined": left,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help="names of timm models")
    parser.add_argument("--size", type=int, help="image size (default: the model's own)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of export and fold")
    parser.add_argument("--output", default="networks", help="name of the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.networks:
        rows.append(measure(name, options.size, options.repeats))
        print(rows[-1], flush=True)
    print(save(options.output, vars(options), rows))


if __name__ == "__main__":
    main()
