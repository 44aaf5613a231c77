"""A folded program over a flat list of tensors, for runtimes that know no Python containers."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree

from refold.errors import BackendError
from refold.graph import constants, provenance

if TYPE_CHECKING:
    from refold.graph.program import Program


_HALVES = {torch.float16, torch.bfloat16}


@dataclass(frozen=True)
class _Result:
    """One leaf of the model's output: a result of the runtime, or a Python constant."""

    index: int | None
    constant: Any = None
    is_integer: bool = False


@dataclass(frozen=True)
class Signature:
    """How a flat list of tensors and the model's own call convention map onto each other.

    Attributes:
        input_names: one for each tensor input.
        output_names: one for each distinct result.
        written: inputs that the model writes in place; a runtime cannot.
    """

    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    written: tuple[str, ...]
    _positions: tuple[int, ...]
    _results: tuple[_Result, ...]
    _in_spec: pytree.TreeSpec
    _out_spec: pytree.TreeSpec

    def tensors(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The tensor inputs of a call, in order."""
        # Flattening by the traced structure accepts dictionaries in any order.
        leaves = fx_pytree.tree_flatten_spec((tuple(args), kwargs), self._in_spec)
        return [leaves[p] for p in self._positions]

    def rebuild(self, results: Sequence[torch.Tensor]) -> Any:
        """The model's own output structure around the runtime's results."""
        leaves: list[Any] = []
        for r in self._results:
            if r.index is None:
                leaves.append(r.constant)
            else:
                value = results[r.index]
                leaves.append(int(value) if r.is_integer else value)
        return pytree.tree_unflatten(leaves, self._out_spec)

    def results(self, returned: Any) -> list[torch.Tensor]:
        """The runtime's results in what the model returns: the inverse of :meth:`rebuild`."""
        found: dict[int, torch.Tensor] = {}
        for r, leaf in zip(self._results, pytree.tree_leaves(returned), strict=True):
            if r.index is not None:
                found[r.index] = torch.as_tensor(leaf)
        return [found[i] for i in range(len(found))]


def match(
    path: Path, signature: Signature, inputs: Sequence[str], outputs: Sequence[str]
) -> tuple[list[int], list[int]]:
    """Which of the model's inputs and results a file's are: by names, else by position."""
    order = []
    for kind, wanted, got in (
        ("inputs", signature.input_names, inputs), ("outputs", signature.output_names, outputs),
    ):  # fmt: skip
        if len(got) != len(wanted):
            raise BackendError(
                f"{path} has {len(got)} {kind} ({', '.join(got)}), the model has {len(wanted)} "
                f"({', '.join(wanted)})"
            )
        by_name = set(got) == set(wanted)
        order.append([wanted.index(n) for n in got] if by_name else list(range(len(got))))
    return order[0], order[1]


def half_precision(gm: fx.GraphModule) -> str:
    """What to try if a converter fails on half precision, which many of their kernels lack."""
    values = [n.meta.get("val") for n in gm.graph.nodes]
    found = {v.dtype for v in values if isinstance(v, torch.Tensor)} & _HALVES
    if not found:
        return ""
    return f"\n  the model computes in {', '.join(sorted(map(str, found)))}: try model.float()"


def flatten(gm: fx.GraphModule, program: Program) -> tuple[fx.GraphModule, Signature]:
    """Copies a graph (sharing its tensors) with tensors alone as inputs and results.

    Python constants among the results, and results that are returned twice, are left out; the
    signature puts them back. Each node's provenance is stamped into ``meta["custom"]``, the one
    key that survives export.
    """
    written = constants.written(gm.graph)
    state = [str(n.target) for n in gm.graph.nodes if n in written and n.op == "get_attr"]
    if state:
        raise BackendError(
            f"the model writes its own state ({', '.join(state)}), which a file cannot keep "
            "between calls: use target='torch', or make the state an input and an output"
        )
    graph = fx.Graph()
    returned = graph.graph_copy(gm.graph, {})
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    positions = [i for i, n in enumerate(placeholders) if _is_tensor(n)]
    for node in placeholders:
        if not _is_tensor(node):
            if node.users:
                raise BackendError(f"input {node.name} is a number that the graph computes with")
            graph.erase_node(node)
    _stamp(graph)

    leaves, results, distinct = _leaves(returned), [], dict[fx.Node, int]()
    for leaf in leaves:
        if not isinstance(leaf, fx.Node):
            results.append(_Result(None, leaf))
            continue
        index = distinct.setdefault(leaf, len(distinct))
        results.append(_Result(index, None, not _is_tensor(leaf)))
    if not distinct:
        raise BackendError("the model returns no tensor")
    info = gm.graph._codegen.pytree_info  # type: ignore[attr-defined]
    # An input that is returned as it is needs a node of its own to carry the result's name.
    graph.output(tuple(_own_node(graph, n) for n in distinct))
    flat = fx.GraphModule(gm, graph)

    taken = {name for name, _ in [*flat.named_parameters(), *flat.named_buffers()]}
    names = [spec.name for spec in program.inputs if spec.dtype is not None]
    inputs = _unique(
        [names[i] if i < len(names) else f"input_{i}" for i in range(len(positions))], taken
    )
    paths = _paths(info.out_spec, len(leaves))
    wanted = {r.index: p for r, p in reversed(list(zip(results, paths, strict=True)))}
    outputs = _unique([wanted[i] for i in range(len(distinct))], taken | set(inputs))
    signature = Signature(
        inputs,
        outputs,
        tuple(n.name for n in gm.graph.nodes if n in written),
        tuple(positions),
        tuple(results),
        info.in_spec,
        info.out_spec,
    )
    return flat, signature


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _leaves(returned: Any) -> list[Any]:
    return list(returned) if isinstance(returned, (tuple, list)) else [returned]


def _own_node(graph: fx.Graph, node: fx.Node) -> fx.Node:
    if node.op == "call_function":
        return node
    clone = graph.call_function(torch.ops.aten.clone.default, (node,))
    clone.meta["val"] = node.meta["val"]
    return clone


def _stamp(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        origin: dict[str, Any] = provenance.of(node)
        path, _, line = provenance.source_line(node).rpartition(":")
        # File name alone: an artifact that travels must not tell the builder's folders.
        origin["source"] = f"{PurePath(path).name}:{line}" if path else ""
        custom = copy.copy(node.meta.get("custom") or {})
        custom["refold"] = origin
        node.meta["custom"] = custom


def _paths(spec: pytree.TreeSpec, count: int) -> list[str]:
    """A name for each output leaf: dictionary keys and field names where there are any."""
    try:
        tree = pytree.tree_unflatten(list(range(count)), spec)
        keyed, _ = pytree.tree_flatten_with_path(tree)
        parts = [[_key(k) for k in path] for path, _ in keyed]
    except (ValueError, TypeError):
        # Containers registered without key paths: positions are still stable.
        parts = [[str(i)] for i in range(count)]
    if count == 1 and (not parts[0] or parts[0] == ["0"]):
        return ["output"]
    return ["_".join(["output", *p] if not p or p[0].isdigit() else p) for p in parts]


def _key(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return re.sub(r"\W", "_", str(getattr(key, attribute)))
    return re.sub(r"\W", "_", str(key))


def _unique(names: Sequence[str], taken: set[str]) -> tuple[str, ...]:
    seen, out = set(taken), []
    for name in names:
        candidate, count = name, 0
        while candidate in seen:
            count += 1
            candidate = f"{name}_{count}"
        seen.add(candidate)
        out.append(candidate)
    return tuple(out)
