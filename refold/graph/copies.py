"""Copies of graphs over the same tensors: weights are large, graphs are not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx, nn

from refold.graph import constants


def copy_sharing_tensors(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph over the same tensors, with the same call convention."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    graph.set_codegen(gm.graph._codegen)
    return fx.GraphModule(gm, graph)


def with_tensors(gm: fx.GraphModule, tensors: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    """A copy of a graph that reads other tensors; those not named are shared."""
    copy = copy_sharing_tensors(gm)
    written = {str(n.target) for n in constants.written(copy.graph) if n.op == "get_attr"}
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        owner = copy.get_submodule(path)
        if not hasattr(owner, attribute):
            continue
        value = tensor.clone() if name in written else tensor
        if attribute in owner._parameters:
            owner._parameters[attribute] = nn.Parameter(value, requires_grad=False)
        else:
            setattr(owner, attribute, value)
    return copy
