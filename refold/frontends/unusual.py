"""Tensors that the IR cannot hold: sparse, quantised and nested ones, and those without values.

They are refused by name at the door: deeper down they are raw errors about storage.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from refold.errors import FrontendError
from refold.graph import provenance

_FIXES = {
    "sparse": "keep it dense (to_dense()): a matrix product folds and runs as it is",
    "nested": "pad it to one tensor, with a mask",
    "quantised": "dequantise it (dequantize()), or quantise with fake_quantize operators",
    "meta": "give it values first (to_empty() and load_state_dict())",
    "mkldnn": "convert it to a plain tensor (to_dense())",
}

_SAID = {
    "meta": "is on the meta device and has no values",
    "mkldnn": "is in a layout of MKL-DNN's",
}


def kind_of(value: Any) -> str | None:
    """What is unusual about a tensor, or ``None``."""
    if not isinstance(value, torch.Tensor):
        return None
    if value.is_nested:
        return "nested"
    if value.is_quantized:
        return "quantised"
    if value.layout is not torch.strided:
        return "mkldnn" if "mkldnn" in str(value.layout) else "sparse"
    return None


def _stored(value: Any) -> str | None:
    without = isinstance(value, torch.Tensor) and value.is_meta
    return kind_of(value) or ("meta" if without else None)


def _refusal(what: str, kind: str) -> FrontendError:
    said = _SAID.get(kind, f"is {kind}")
    return FrontendError(f"{what} {said}, which cannot be compiled\n  fix: {_FIXES[kind]}")


def check_inputs(example: Any) -> None:
    """Refuses example inputs of an unusual kind.

    Raises:
        FrontendError: naming the input.
    """
    args, kwargs = example
    named = [*((f"input {i}", a) for i, a in enumerate(args)), *kwargs.items()]
    for name, value in named:
        for leaf in pytree.tree_leaves(value):
            kind = _stored(leaf)
            if kind is not None:
                what = name if name.startswith("input ") else f"input {name!r}"
                raise _refusal(what, kind)


def in_module(module: nn.Module) -> FrontendError | None:
    """Why a module that cannot be traced is refused, if it holds an unusual tensor."""
    named = [*module.named_parameters(), *module.named_buffers()]
    for path, owner in module.named_modules():
        plain = ((k, v) for k, v in vars(owner).items() if isinstance(v, torch.Tensor))
        named += [(f"{path}.{name}" if path else name, value) for name, value in plain]
    for name, value in named:
        kind = _stored(value)
        if kind is not None:
            return _refusal(f"{type(module).__name__}: the tensor {name!r}", kind)
    return None


def check_program(program: ExportedProgram) -> None:
    """Refuses a program that reads or makes an unusual tensor.

    Raises:
        FrontendError: naming the tensor, or the line that makes it.
    """
    specs = program.graph_signature.input_specs
    for node, spec in zip(program.graph.find_nodes(op="placeholder"), specs, strict=True):
        name = spec.target
        if name is None or not node.users:
            continue
        value = program.state_dict.get(name, program.constants.get(name))
        kind = _stored(value)
        if kind is not None:
            raise _refusal(f"the tensor {name!r}", kind)
    for name, tensor, traced in stored_and_traced(program):
        if (tensor.dtype, tensor.shape) != (traced.dtype, traced.shape):
            raise FrontendError(
                f"the tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, and the program was "
                f"traced with {traced.dtype} {list(traced.shape)}\n  fix: export it again with "
                "these weights"
            )
    for node in program.graph.nodes:
        kind = _made(node)
        if kind is not None:
            where = provenance.source_line(node)
            raise _refusal(f"the result of {node.name}{f' at {where}' if where else ''}", kind)


def stored_and_traced(
    program: ExportedProgram,
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The tensors of a program by name, each with what its graph was traced with."""
    specs = program.graph_signature.input_specs
    for node, spec in zip(program.graph.find_nodes(op="placeholder"), specs, strict=True):
        if spec.target is None:
            continue
        value = program.state_dict.get(spec.target, program.constants.get(spec.target))
        traced = node.meta.get("val")
        if isinstance(value, torch.Tensor) and isinstance(traced, torch.Tensor):
            yield spec.target, value, traced


def _made(node: fx.Node) -> str | None:
    if node.op != "call_function":
        return None
    values = node.meta.get("val")
    if isinstance(values, torch.Tensor):  # by far the most
        return kind_of(values)
    return next(filter(None, map(kind_of, pytree.tree_leaves(values))), None)
