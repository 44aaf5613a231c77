"""The program that every frontend makes, and everything behind it reads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from refold.graph.guards import Guards

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword inputs


@dataclass(frozen=True)
class InputSpec:
    """One flattened input of the traced program.

    Attributes:
        name: the graph's placeholder.
        sizes: one entry a dimension: an int, or the name of a symbol (or an expression of one).
        dtype: of a tensor; ``None`` for another value.
        batch: the dynamic batch dimension, if there is one.
        constant: the value of an input that is not a tensor; the trace has it baked in.
        device: of a tensor.
    """

    name: str
    sizes: tuple[int | str, ...]
    dtype: torch.dtype | None
    batch: int | None = None
    constant: Any = None
    device: torch.device | None = None


@dataclass(frozen=True)
class BoundInput:
    """A tensor that was an input and is a constant now.

    Attributes:
        name: the parameter of the model's ``forward``; a dotted path inside of a container.
        shape: of the value.
        dtype: of the value.
        bytes: of the value.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Program:
    """A traced, functional program, and what the trace promised: a value that nobody changes.

    Frontends make it, from ``torch.export`` or another reader of models. Passes work on a copy of
    its graph, so that it is what a result is compared with.

    Attributes:
        graph_module: the IR; called with the user's own arguments.
        args: fresh copies of the positional inputs that it was traced with.
        kwargs: the same for keyword inputs.
        example: copies of the inputs (positional, keyword) as the user gave them.
        inputs: the flattened inputs.
        specialised: dimensions that were to be dynamic and came out static, as sentences.
        notes: what the user should know about the trace.
        ranges: smallest and largest size of each symbol (``None`` for no bound).
        guards: what else the sizes of symbols must fulfil.
        names: the names that the user's ``Dim`` objects give to symbols.
        node_count: calls in the IR as it was traced.
        state: the tensors of the model by the keys of its state dict.
        bound: name of each input that was declared constant, by the buffer that holds it.
        apart: how the trace differs from the model on the example, as a sentence; empty if not.
        module: gives a copy of the module that was traced, with eval semantics, over the same
            tensors, to be left as it is; ``None`` for a program, and where no copy can be made.
    """

    graph_module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    example: tuple[tuple[Any, ...], dict[str, Any]]
    inputs: tuple[InputSpec, ...]
    specialised: tuple[str, ...]
    notes: tuple[str, ...]
    ranges: dict[str, tuple[int, int | None]]
    names: dict[str, str]
    node_count: int
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    bound: Mapping[str, str] = field(default_factory=dict)
    apart: str = ""
    module: Callable[[], nn.Module] | None = None
    guards: Guards = field(default_factory=Guards)

    def admits(self, sizes: Mapping[str, int]) -> bool:
        """Whether the trace holds for other sizes of symbols; those not given stay as traced."""
        return self.guards.admits({**self._traced_sizes, **sizes})

    @functools.cached_property
    def _traced_sizes(self) -> dict[str, int]:
        return traced_sizes(self.inputs, (self.args, self.kwargs), self.guards)


def fresh(tree: Any) -> Any:
    """A copy of nested inputs whose tensors are new.

    One tensor given for two inputs becomes two: a trace would take them for one in every call.
    """
    return pytree.tree_map(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, tree
    )


def traced_sizes(inputs: Sequence[InputSpec], traced: Any, guards: Guards) -> dict[str, int]:
    """The sizes of symbols that inputs have."""
    sizes: dict[str, int] = {}
    for at, (spec, leaf) in enumerate(zip(inputs, pytree.tree_leaves(traced), strict=True)):
        for axis, size in enumerate(spec.sizes):
            if isinstance(size, str):
                name = size if size.isidentifier() else f"_{at}_{axis}"
                sizes.setdefault(name, int(leaf.shape[axis]))
    known = guards.with_roots(sizes)
    return {name: size for name, size in known.items() if not name.startswith("_")}


def as_call(example_inputs: Any) -> Call:
    """A tuple or list of positional inputs, a dict of keyword inputs, or a single input."""
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs,), {}
