"""Graphs whose parameters arrive as arguments, as ``torch.compile`` makes them.

Dynamo hands a backend the caller's own parameters and buffers, and marks them. Turned into
``get_attr`` constants they can be folded; whoever does that must notice when they change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from refold.graph import nodes
from refold.graph.copies import copy_sharing_tensors

_ROOT = re.compile(r"^[LG]\['[^']*'\]\.?")
_KEY = re.compile(r"(?:_modules|_parameters|_buffers)\['([^']+)'\]")


def parameters(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> dict[int, str]:
    """Positions and dotted names of the inputs that are parameters or buffers of modules."""
    names: dict[int, str] = {}
    taken: set[str] = set()
    placeholders = gm.graph.find_nodes(op="placeholder")
    for index, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
        if not _is_parameter(value):
            continue
        source = getattr(node, "_dynamo_source", None)
        name = ".".join(_KEY.findall(_text(source))) or node.name
        # Two models in one graph may have the same names.
        if any(name == t or name.startswith(f"{t}.") or t.startswith(f"{name}.") for t in taken):
            name = node.name
        taken.add(name)
        names[index] = name
    return names


def _is_parameter(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and getattr(value, "_dynamo_static_input_type", None) is not None
        and value.layout is torch.strided
        and not value.is_quantized
        and not is_traceable_wrapper_subclass(value)
        and not isinstance(value, torch._subclasses.FakeTensor)
    )


def _text(source: Any) -> str:
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def module_path(path: str) -> str:
    """``c.0`` for ``L['model'].c.0`` and for ``L['model']._modules['c']._modules['0']``."""
    keys = _KEY.findall(path)
    return ".".join(keys) if keys else _ROOT.sub("", path)


def bind(gm: fx.GraphModule, values: Mapping[int, tuple[str, torch.Tensor]]) -> fx.GraphModule:
    """A copy of the graph in which some placeholders are constants: the given tensors themselves.

    Args:
        gm: the graph, not changed.
        values: name and tensor of each placeholder that becomes a constant, by position.
    """
    bound = copy_sharing_tensors(gm)
    bind_here(bound, values)
    return bound


def bind_here(gm: fx.GraphModule, values: Mapping[int, tuple[str, torch.Tensor]]) -> None:
    """The same in the graph itself."""
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if index not in values:
            continue
        name, tensor = values[index]
        _register(gm, name, tensor)
        with gm.graph.inserting_before(node):
            constant = gm.graph.get_attr(name)
        constant.meta = {k: v for k, v in node.meta.items() if k != "grapharg"}
        node.replace_all_uses_with(constant, propagate_meta=False)
        gm.graph.erase_node(node)
    gm.recompile()


def _register(root: nn.Module, name: str, tensor: torch.Tensor) -> None:
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor)


def output_values(gm: fx.GraphModule) -> list[Any]:
    """Fake values of the outputs, from running the whole graph on the fakes of its inputs."""
    values: dict[fx.Node, Any] = {}
    with nodes.fake_execution(nodes.fake_mode(gm.graph)):
        for node in gm.graph.nodes:
            if node.op == "output":
                return [values[n] if isinstance(n, fx.Node) else n for n in node.args[0]]
            if isinstance(node.target, torch._ops.OpOverload):
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
            elif node.op == "get_attr" and isinstance(node.meta.get("val"), torch.Tensor):
                owner: Any = gm
                for part in str(node.target).split("."):
                    owner = getattr(owner, part)
                values[node] = torch.empty_strided(
                    owner.shape, owner.stride(), dtype=owner.dtype, device=owner.device
                )
            elif node.op == "call_function" and not isinstance(
                node.target, torch._ops.HigherOrderOperator
            ):
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            else:
                values[node] = node.meta.get("val")
    raise AssertionError("a graph ends with its output")
