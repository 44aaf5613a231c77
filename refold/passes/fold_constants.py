"""Evaluates what depends on parameters, buffers and literals alone, once, at compile time.

The algebra is partial evaluation. A maximal constant subgraph (weight norm, spectral norm in eval
mode, weight standardisation, a generator that writes into ``zeros``) becomes the tensor it
computes. It is evaluated in float64 and rounded once; upstream of a discontinuity (round, sign, a
comparison) in the model's own dtype, bit for bit, so that a fake quantiser keeps its steps.

Before::

    v = get_attr[v];  g = get_attr[g]
    w = _weight_norm(v, g)
    y = conv2d(x, w, b)

After::

    folded_v = get_attr[folded_v]
    y = conv2d(x, folded_v, b)

Conditions: the operators draw no random numbers and read no written state; the result stores at
most twice what its sources store (small results are free), and all results together keep the
model within ``max_growth``. A low-rank product stays factored, a dequantised weight stays integers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from refold.graph import constants, provenance
from refold.graph.evaluate import evaluate_constants
from refold.graph.functionalise import leaking
from refold.graph.kinds import op_name
from refold.graph.nodes import aten, call, is_call, is_tensor, pinned, replace
from refold.rewrite.result import Applied, Declined, PassResult, applied, declined

SMALL = 64 * 1024  # bytes; below it a constant is never worth an operator
_LARGEST = 2.0  # one constant may store this many times what its sources store
_VIEWS = frozenset({
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "movedim", "unsqueeze",
    "squeeze", "slice", "select", "narrow", "swapaxes", "numpy_T", "flatten", "unflatten",
    "alias", "detach", "mT",
})  # fmt: skip


@dataclass(frozen=True)
class FoldConstants:
    """Folds constant subgraphs into plain tensors.

    Attributes:
        max_growth: the stored constants may grow by this factor in all.
    """

    name: str = "fold-constants"
    exactness: str = "reassociates"
    max_growth: float = 1.25

    def run(self, gm: fx.GraphModule) -> PassResult:
        result = PassResult()
        graph = gm.graph
        constant = _foldable(graph)
        result.declined += _impure(self.name, graph, constant)
        leaks = leaking(graph)
        chosen, refused = self._choose(graph, constant, leaks)
        for node, reason, hint in refused:
            result.declined.append(declined(self.name, node, reason, hint))
        if not chosen:
            return result
        values = _evaluate(chosen)
        for node in chosen:
            value = values.pop(node)
            if isinstance(value, str):
                result.declined.append(declined(self.name, node, value))
                continue
            with graph.inserting_before(node):
                new = constants.add(gm, _name(node), _stored(value))
            new.meta["val"] = node.meta["val"]
            origin = [*_origin(node), node]
            provenance.derive(new, origin, self.name)
            inner = new
            if node in leaks:
                # The caller may write into what it gets: it gets a tensor of its own.
                with graph.inserting_before(node):
                    new = call(graph, aten.clone.default, (inner,), rule=self.name, sources=[inner])
            replace(node, new)
            result.applied.append(_erase(self.name, node, inner))
        result.modified = bool(result.applied)
        graph.lint()
        gm.recompile()
        return result

    # --- policy -----------------------------------------------------------------------------------

    def _choose(
        self, graph: fx.Graph, constant: set[fx.Node], leaks: set[fx.Node]
    ) -> tuple[list[fx.Node], list[tuple[fx.Node, str, str]]]:
        """The nodes to fold, in graph order, and those declined with reason and hint."""
        sources = _Storage(graph)
        refused: dict[fx.Node, tuple[str, str]] = {}
        barred: set[fx.Node] = set()  # neither folded nor worth a word
        while True:
            chosen = self._frontier(graph, constant, leaks, refused.keys() | barred)
            again = False
            for node in chosen:
                new, old = _bytes(node), sources.of(node)
                if new < SMALL:
                    continue
                if _strides_zero(node):
                    barred.add(node)
                    again = True
                elif new > _LARGEST * old and not _is_view_of_one(node):
                    refused[node] = (
                        f"the folded constant would store {_size(new)}, its sources {_size(old)}",
                        "kept factored; fold it by hand if the memory does not matter",
                    )
                    again = True
            if again:
                continue
            total, limit = sources.total(chosen), self.max_growth * sources.before
            growing = [n for n in chosen if _bytes(n) >= SMALL and not _is_view_of_one(n)]
            if total <= limit or not growing:
                return chosen, [(n, *why) for n, why in refused.items()]
            worst = max(growing, key=lambda n: _bytes(n) - sources.of(n))
            refused[worst] = (
                f"all constants would store {_size(total)} instead of {_size(sources.before)} "
                f"(this one {_size(_bytes(worst))} from {_size(sources.of(worst))}), past the "
                f"growth of {self.max_growth:g}",
                "raise max_growth to fold it",
            )

    @staticmethod
    def _frontier(
        graph: fx.Graph, constant: set[fx.Node], leaks: set[fx.Node], out: Iterable[fx.Node]
    ) -> list[fx.Node]:
        """Constant calls that something not folded reads."""
        excluded = set(out)
        frontier: list[fx.Node] = []
        # Nodes that stay although they are constant: excluded ones, and tuples somebody reads.
        stays: set[fx.Node] = set(excluded)
        for node in graph.nodes:
            if node not in constant or node.op == "get_attr" or node in stays:
                continue
            if any(s in stays for s in node.all_input_nodes) and not is_tensor(node):
                stays.add(node)
        for node in graph.nodes:
            if node not in constant or node.op == "get_attr" or node in stays:
                continue
            if not is_tensor(node) or not _read_from_outside(node, constant, stays):
                continue
            if (
                is_call(node, aten.clone.default)
                and node in leaks
                and node.args[0].op == "get_attr"
            ):
                continue  # already as far as it goes
            frontier.append(node)
        return frontier


def _read_from_outside(node: fx.Node, constant: set[fx.Node], stays: set[fx.Node]) -> bool:
    return any(u not in constant or u in stays for u in node.users)


def _foldable(graph: fx.Graph) -> set[fx.Node]:
    """Constant nodes that no pinned node lies upstream of."""
    constant = constants.constant_nodes(graph)
    out: set[fx.Node] = set()
    for node in graph.nodes:
        if node not in constant or (pinned(node) and node.op != "get_attr"):
            continue
        if op_name(node).startswith("dequantize"):
            continue  # what it reads is stored: integers, which a runtime may compute with
        if all(a in out for a in node.all_input_nodes) and _has_plain_value(node):
            out.add(node)
    return out


def _has_plain_value(node: fx.Node) -> bool:
    """Tensors of fixed size; not sizes, nor sparse or quantised tensors."""
    value = node.meta.get("val")
    leaves = value if isinstance(value, (tuple, list)) else [value]
    return all(
        isinstance(v, torch.Tensor)
        and v.layout == torch.strided
        and not v.is_quantized
        and all(isinstance(s, int) for s in v.shape)
        for v in leaves
    )


class _Storage:
    """What the stored constants weigh, before and after folding some nodes."""

    def __init__(self, graph: fx.Graph) -> None:
        self._kept = {n: _storage(n) for n in graph.nodes if n.op == "get_attr" and is_tensor(n)}
        self.before = sum(dict(self._kept.values()).values())
        self._sources: dict[fx.Node, int] = {}

    def of(self, node: fx.Node) -> int:
        """Bytes of the tensors that ``node`` is computed from, each counted once."""
        if node not in self._sources:
            read = [self._kept[a] for a in _attributes(node)]
            self._sources[node] = sum(dict(read).values())
        return self._sources[node]

    def total(self, folded: list[fx.Node]) -> int:
        """Bytes stored once ``folded`` are tensors and what only they read is gone."""
        new = set(folded)
        gone: set[fx.Node] = set()
        stack = list(folded)
        while stack:
            for source in stack.pop().all_input_nodes:
                if source in gone or source in new:
                    continue
                if all(u in new or u in gone for u in source.users):
                    gone.add(source)
                    stack.append(source)
        stored: dict[object, int] = dict(s for n, s in self._kept.items() if n not in gone)
        for node in folded:
            if _is_view_of_one(node):
                key, size = self._kept[_attributes(node)[0]]
                stored[key] = size
            else:
                stored[node] = _bytes(node)
        return sum(stored.values())


def _storage(node: fx.Node) -> tuple[object, int]:
    """Which memory a stored tensor lies in, and how much that is."""
    tensor = constants.tensor(node)
    if tensor.layout != torch.strided:
        return node, _bytes(node)
    memory = tensor.untyped_storage()
    return memory.data_ptr() or node, memory.nbytes()


def _attributes(node: fx.Node) -> list[fx.Node]:
    seen: set[fx.Node] = set()
    stack = [node]
    out: list[fx.Node] = []
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "get_attr":
            out.append(current)
        stack.extend(current.all_input_nodes)
    return out


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return int(value.numel()) * int(value.element_size())


def _size(count: int) -> str:
    for unit, width in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= width:
            return f"{count / width:.3g} {unit}"
    return f"{count} B"


def _strides_zero(node: fx.Node) -> bool:
    value = node.meta["val"]
    return any(
        stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)
    )


def _is_view_of_one(node: fx.Node) -> bool:
    """True if the node only views a stored tensor, and so stores nothing of its own."""
    while node.op == "call_function":
        if op_name(node) not in _VIEWS or len(node.all_input_nodes) != 1:
            return False
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


# --- the rewrite ----------------------------------------------------------------------------------


def _evaluate(chosen: list[fx.Node]) -> dict[fx.Node, torch.Tensor | str]:
    """Values of the chosen nodes, or the reason why one cannot be computed here."""
    try:
        return dict(evaluate_constants(chosen))
    except (RuntimeError, NotImplementedError):
        out: dict[fx.Node, torch.Tensor | str] = {}
        for node in chosen:
            try:
                out.update(evaluate_constants([node]))
            except (RuntimeError, NotImplementedError) as error:
                out[node] = f"it cannot be evaluated: {str(error).splitlines()[0]}"
        return out


def _stored(value: torch.Tensor) -> torch.Tensor:
    """The tensor to store: zero strides are written out, other views stay views."""
    if any(s == 0 and n > 1 for s, n in zip(value.stride(), value.shape, strict=True)):
        return value.contiguous()
    return value


def _name(node: fx.Node) -> str:
    sources = _attributes(node)
    if len(sources) == 1:
        return str(sources[0].target)
    path = provenance.module_path(node)
    return f"{path}.{node.name}" if path else node.name


def _origin(node: fx.Node) -> list[fx.Node]:
    """The calls that ``node`` is computed by, the nearest last."""
    seen: dict[fx.Node, None] = {}
    stack = list(node.all_input_nodes)
    while stack:
        current = stack.pop()
        if current not in seen:
            seen[current] = None
            stack.extend(current.all_input_nodes)
    return list(reversed(seen))


def _erase(rule: str, node: fx.Node, new: fx.Node) -> Applied:
    """Erases ``node`` and what only it read; returns the record."""
    graph = node.graph
    dead: list[fx.Node] = []
    stack = [node]
    gone: set[fx.Node] = set()
    while stack:
        current = stack.pop()
        if current in gone or current.op != "call_function" or pinned(current):
            continue
        if all(u in gone for u in current.users):
            gone.add(current)
            dead.append(current)
            stack.extend(current.all_input_nodes)
    value = new.meta["val"]
    shape = "x".join(str(s) for s in value.shape) or "scalar"
    record = applied(rule, reversed(dead), [new], f"{len(dead)} calls became one {shape} constant")
    sources = {a for n in dead for a in n.all_input_nodes if a.op == "get_attr"}
    for current in dead:
        graph.erase_node(current)
    for source in sources:
        if not source.users:
            graph.erase_node(source)
    return record


def _impure(rule: str, graph: fx.Graph, constant: set[fx.Node]) -> list[Declined]:
    """Calls that would be constant, were they deterministic."""
    out: list[Declined] = []
    state = constants.written(graph)
    unknown: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or not node.users:
            continue
        inputs = node.all_input_nodes
        if not all(a in constant or a in unknown for a in inputs):
            if any(a in state and a.op == "get_attr" for a in inputs) and all(
                a in constant or a in unknown or a.op == "get_attr" for a in inputs
            ):
                out.append(
                    declined(rule, node, "it reads a buffer that the model writes", "freeze it")
                )
            continue
        reason = constants.impurity(node)
        if reason is None or "not an ATen" in reason:
            if node not in constant and inputs and any(a in unknown for a in inputs):
                unknown.add(node)
            continue
        unknown.add(node)
        hint = "draw it once, outside of forward, and keep it as a buffer"
        out.append(declined(rule, node, reason, hint))
    return out
