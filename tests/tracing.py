"""Small graphs for tests of the engine: ``torch.export`` in one spelling, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from refold.frontends.canonical import write_canonical
from refold.graph.ops import op_name


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def trace(model: Any, *inputs: torch.Tensor, dynamic: bool = False) -> fx.GraphModule:
    """Traces a module, or a function of tensors; ``dynamic`` lets the leading size vary."""
    inputs = tuple(i.clone() for i in inputs)  # the same tensor twice would become one input
    module = model if isinstance(model, nn.Module) else _Function(model)
    batch = torch.export.Dim.DYNAMIC
    shapes = tuple({0: batch} for _ in inputs) if dynamic else None
    if shapes is not None and not isinstance(model, nn.Module):
        shapes = (shapes,)  # the parameter is *args
    with torch.no_grad():
        program = torch.export.export(module.eval(), inputs, strict=False, dynamic_shapes=shapes)
    graph_module = program.module(check_guards=False)
    for node in list(graph_module.graph.nodes):
        if op_name(node) == "_assert_tensor_metadata":
            graph_module.graph.erase_node(node)
    write_canonical(graph_module)
    return graph_module


def ops(graph_module: fx.GraphModule) -> Counter[str]:
    return Counter(op_name(n) for n in graph_module.graph.nodes if n.op == "call_function")


def find(graph_module: fx.GraphModule, name: str) -> fx.Node:
    """The last call of an operator."""
    return [n for n in graph_module.graph.nodes if n.op == "call_function" and op_name(n) == name][
        -1
    ]
