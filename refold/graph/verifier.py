"""Checks between passes: the graph is well formed, and its contract with the caller unchanged.

The default checks cost a few milliseconds for a thousand nodes; ``repropagate=True`` also runs
every call on fake tensors and compares what comes out with ``meta["val"]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NoReturn

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from refold.errors import VerifierError
from refold.graph import aliasing, constants, nodes, printer

Sharing = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Invariants:
    """What a pass must leave as it is.

    Attributes:
        inputs: placeholder names, in order.
        outputs: the output leaves' fake values (or the literals that they are).
        structure: the output's nesting.
        sharing: pairs of things that share storage: two outputs, or an output and an input or
            a constant.
        mutations: what the graph writes, in order.
    """

    inputs: tuple[str, ...]
    outputs: tuple[Any, ...]
    structure: str
    sharing: Sharing
    mutations: tuple[tuple[str, ...], ...]


def signature(gm: fx.GraphModule) -> Invariants:
    """Reads the signature of a graph."""
    graph = gm.graph
    leaves, spec = pytree.tree_flatten(graph.output_node().args)
    return Invariants(
        tuple(n.name for n in graph.nodes if n.op == "placeholder"),
        tuple(n.meta.get("val") if isinstance(n, fx.Node) else n for n in leaves),
        str(spec),
        _sharing(graph),
        _mutations(graph),
    )


def verify(gm: fx.GraphModule, before: Invariants, *, repropagate: bool = False) -> Invariants:
    """Checks a graph that a pass has changed, and reads its signature.

    Args:
        gm: the graph module after the pass.
        before: its signature before the pass.
        repropagate: also run every call on fake tensors.

    Raises:
        VerifierError: the pass left an invalid graph; the message shows the lines in question.
    """
    for node in gm.graph.nodes:
        _check_node(gm, node)
    try:
        gm.graph.lint()
    except RuntimeError as error:
        raise VerifierError(f"the graph is malformed: {error}") from error
    after = _check_signature(gm, before)
    if repropagate:
        _repropagate(gm)
    return after


def _fail(gm: fx.GraphModule, node: fx.Node, message: str) -> NoReturn:
    raise VerifierError(f"%{node.name}: {message}\n{printer.excerpt(gm, node)}")


def _check_node(gm: fx.GraphModule, node: fx.Node) -> None:
    if node.op == "output":
        return
    if node.op == "get_attr":
        _check_constant(gm, node)
    elif "val" not in node.meta:
        _fail(gm, node, "has no fake value; make nodes with refold.graph.nodes.call, which sets it")


def _check_constant(gm: fx.GraphModule, node: fx.Node) -> None:
    owner: Any = gm
    for part in str(node.target).split("."):
        if not hasattr(owner, part):
            _fail(gm, node, f"reads {node.target!r}, which the module does not have")
        owner = getattr(owner, part)
    if not isinstance(owner, torch.Tensor):
        return
    fake = node.meta.get("val")
    if not isinstance(fake, torch.Tensor):
        _fail(gm, node, "a constant without a fake value; add constants with constants.add")
    if tuple(owner.shape) != tuple(fake.shape) or owner.dtype != fake.dtype:
        _fail(
            gm,
            node,
            f"the constant is {_describe(owner)}, its fake value says {_describe(fake)}",
        )


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return repr(value)


def _check_signature(gm: fx.GraphModule, before: Invariants) -> Invariants:
    after = signature(gm)
    output = gm.graph.output_node()
    if after.inputs != before.inputs:
        raise VerifierError(
            f"the inputs changed from {list(before.inputs)} to {list(after.inputs)}"
        )
    if after.structure != before.structure:
        _fail(
            gm,
            output,
            f"the outputs' structure changed from {before.structure} to {after.structure}",
        )
    for index, (old, new) in enumerate(zip(before.outputs, after.outputs, strict=True)):
        difference = _difference(old, new)
        if difference is not None:
            _fail(gm, output, f"output {index} {difference}")
    if after.mutations != before.mutations:
        raise VerifierError(
            f"the graph wrote {list(before.mutations)}, now it writes {list(after.mutations)}"
        )
    for one, other in sorted(after.sharing - before.sharing):
        _fail(gm, output, f"{one} now shares storage with {other}; it did not before")
    return after


def _difference(old: Any, new: Any) -> str | None:
    """How two values differ in kind, shape, dtype or device, or ``None``."""
    if isinstance(old, torch.Tensor) != isinstance(new, torch.Tensor):
        return f"changed from {_describe(old)} to {_describe(new)}"
    if isinstance(old, torch.SymBool) and isinstance(new, torch.SymBool):
        return None  # a condition on sizes that depend on data: nothing decides it
    if not isinstance(old, torch.Tensor):
        equal = nodes.same(old, new) if isinstance(old, torch.SymInt) else old == new
        return None if equal or _same_hint(old, new) else f"changed from {old!r} to {new!r}"
    if old.dtype != new.dtype or old.device != new.device or old.dim() != new.dim():
        return f"was {_describe(old)}, now it is {_describe(new)}"
    if not all(_equal_size(a, b) for a, b in zip(old.shape, new.shape, strict=True)):
        return f"was {_describe(old)}, now it is {_describe(new)}"
    return None


def _equal_size(a: nodes.Size, b: nodes.Size) -> bool:
    return nodes.same(a, b) or _same_hint(a, b)


def _same_hint(a: Any, b: Any) -> bool:
    # Sizes that are equal but not provably so must not stop a compilation: this is a check, not
    # a proof. Sizes that depend on data have no hint to compare.
    if not all(isinstance(s, (int, torch.SymInt)) for s in (a, b)):
        return False
    if not any(isinstance(s, torch.SymInt) for s in (a, b)):
        return bool(a == b)
    if free_unbacked_symbols([a, b]):
        return True
    return nodes.hint(a) == nodes.hint(b)


def _sharing(graph: fx.Graph) -> Sharing:
    """Runs the layout calls before each output on fresh fake tensors and compares storages."""
    leaves = [n for n in pytree.tree_leaves(graph.output_node().args) if isinstance(n, fx.Node)]
    values: dict[fx.Node, Any] = {}
    owner: dict[int, str] = {}
    for leaf in leaves:
        for node in _ancestry(leaf):
            if node in values:
                continue
            if aliasing.passes(node) and _runs_on_fakes(node):
                values[node] = aliasing.run_fake(node, values)
                continue
            values[node] = _fresh(graph, node.meta.get("val"))
            label = {"placeholder": f"input {node.name}", "get_attr": "a constant"}.get(node.op)
            for part in pytree.tree_leaves(values[node]):
                key = aliasing.storage(part)
                if key is not None and label is not None:
                    owner[key] = label
    stores = [(f"output {i}", aliasing.storage(values[n])) for i, n in enumerate(leaves)]
    pairs = {(name, owner[key]) for name, key in stores if key in owner}
    pairs |= {(a, b) for (a, x), (b, y) in combinations(stores, 2) if x is not None and x == y}
    return frozenset(pairs)


def _ancestry(leaf: fx.Node) -> Iterator[fx.Node]:
    """The layout calls from the owners of a storage down to ``leaf``, owners first."""
    order: list[fx.Node] = []
    stack = [(leaf, False)]
    seen: set[fx.Node] = set()
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((source, False) for source in aliasing.passes(node))
    return iter(order)


def _fresh(graph: fx.Graph, value: Any) -> Any:
    mode = nodes.fake_mode(graph)

    def make(leaf: Any) -> Any:
        if aliasing.storage(leaf) is None or mode is None:
            return leaf
        with nodes.fake_execution(mode):
            return torch.empty_strided(
                leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device
            )

    return pytree.tree_map(make, value)


def _runs_on_fakes(node: fx.Node) -> bool:
    """True for calls of tensor operators; the branches of a higher-order call are graphs."""
    return node.op == "call_function" and all("val" in n.meta for n in node.all_input_nodes)


def _mutations(graph: fx.Graph) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (str(node.target), *(str(n.target) for n in constants.targets_of(node)))
        for node in constants.mutations(graph)
    )


def _repropagate(gm: fx.GraphModule) -> None:
    values: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        if node.op == "output":
            continue
        if node.meta.get("val") is None or not _runs_on_fakes(node):
            values[node] = node.meta.get("val")
            continue
        try:
            values[node] = aliasing.run_fake(node, values)
        except Exception as error:
            _fail(gm, node, f"does not run on its inputs: {error}")
        old, new = pytree.tree_leaves(node.meta["val"]), pytree.tree_leaves(values[node])
        if len(old) != len(new):
            _fail(gm, node, f"gives {len(new)} values, its fake value says {len(old)}")
        for a, b in zip(old, new, strict=True):
            difference = _difference(a, b)
            if difference is not None:
                _fail(gm, node, f"its fake value is stale: it {difference}")
