"""float16: fold in float64 and cast, beside the unfolded model and folding in float16.

Run from the repository's root: ``python -m bench.half [NAME ...] [--inputs N]``.

Three float16 models of each trained float32 network, judged by the network in float64:

- *unfolded*: every parameter and statistic cast to float16;
- *refold*: folded in float64, each new constant cast once;
- *folded in float16*: the same folds upon the float16 parameters, every intermediate result of the
  weight arithmetic rounded to float16.

The error is the median of the absolute differences of all outputs of all inputs, relative to the
largest output.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

import refold
from bench.common import quiet, save
from refold.algebra.lazy import Lazy
from tests.compare import call
from tests.models.timm_networks import NETWORKS, network

_BATCH = 8  # inputs at a time: what a small machine holds


def half(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with its constants and its float32 dtype arguments in float16."""
    gm = deepcopy(gm).half()
    for node in gm.graph.find_nodes(op="get_attr"):  # a model's cached tensors are not its buffers
        path, _, name = str(node.target).rpartition(".")
        value = getattr(gm.get_submodule(path), name)
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
            setattr(gm.get_submodule(path), name, value.half())
    narrow = {torch.float32: torch.float16}
    for node in gm.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(
            lambda a: narrow.get(a, a) if isinstance(a, torch.dtype) else a,
            (node.args, node.kwargs),
        )
    gm.recompile()
    return gm


@contextmanager
def rounding_to_half() -> Iterator[None]:
    """Rounds every tensor of the weight arithmetic to float16 as soon as it is computed."""
    exact = Lazy._checked

    def rounded(self: Lazy) -> torch.Tensor:
        return exact(self).half().double()

    with mock.patch.object(Lazy, "_checked", rounded):
        yield


def outputs(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    """All outputs in float64."""
    parts = [call(model, (batch,)) for batch in inputs.split(_BATCH)]
    return torch.cat([p.double() for p in parts])


def measure(name: str, count: int) -> dict[str, Any]:
    with quiet():
        model, image = network(name, NETWORKS[name])
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(count, *image.shape[1:], generator=generator).half()
        exact = outputs(deepcopy(model).double(), inputs.double())
        folded = refold.fold(model, (image,), verify=False)
        with rounding_to_half():
            narrow = refold.fold(deepcopy(model).half(), (image.half(),), verify=False)
        candidates: dict[str, nn.Module] = {
            "unfolded": deepcopy(model).half(),
            "refold": half(folded.graph_module),
            "folded in float16": narrow.graph_module,
        }
        errors = {}
        for label, candidate in candidates.items():
            difference = (outputs(candidate, inputs) - exact).abs()
            errors[label] = float(difference.median() / exact.abs().max())
        return {
            "network": name,
            "image": list(image.shape[1:]),
            "folds": sum(len(p.applied) for p in folded.report.passes),
            "errors": errors,
            "refold / unfolded": errors["refold"] / errors["unfolded"],
            "refold / folded in float16": errors["refold"] / errors["folded in float16"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help="names of timm models")
    parser.add_argument("--inputs", type=int, default=32, help="images per network")
    parser.add_argument("--output", default="half", help="name of the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.networks:
        rows.append(measure(name, options.inputs))
        print(rows[-1], flush=True)
    print(save(options.output, vars(options), rows))


if __name__ == "__main__":
    main()
