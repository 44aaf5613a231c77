"""Evaluates what depends on parameters, buffers and literals alone, once, at compile time.

The algebra is partial evaluation. A maximal constant subgraph (weight norm, spectral norm in eval
mode, weight standardisation, a generator that writes into ``zeros``) becomes the tensor it
computes. It is evaluated in float64 and rounded once; upstream of a discontinuity (round, sign, a
comparison) in the model's own dtype, bit for bit, so that a fake quantiser keeps its steps. So is
what the model's own arithmetic makes something else of, by more than sixteen roundings: a table of
``sin(5000 * f)``, computed in float32, is 1e-4 away from the exact one.

Before::

    v = get_attr[v];  g = get_attr[g]
    w = _weight_norm(v, g)
    y = conv2d(x, w, b)

After::

    folded_v = get_attr[folded_v]
    y = conv2d(x, folded_v, b)

Conditions: the operators draw no random numbers and read no written state; the result stores at
most twice what its sources store (few small results are free), and all results together keep the
model within ``max_growth``: parameters that many layers share count once, so a generator that feeds
many weights stays. The weights of parallel branches count as the one that they become. A low-rank
product stays factored, a dequantised weight stays integers. Where the target computes no complex
numbers, what is complex, or read off it, is stored whatever it takes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import fx

from refold.errors import Declined, first_line
from refold.graph import constants, ops, provenance
from refold.graph.aliasing import leaking
from refold.graph.evaluate import evaluate_constants, in_own_dtype
from refold.graph.nodes import arguments, aten, is_call, is_tensor, pinned
from refold.graph.ops import op_name
from refold.passes.prepare.decided_sizes import decide_sizes
from refold.rewrite.context import Context
from refold.rewrite.edit import Editor
from refold.rewrite.result import Applied, Decline, PassResult, applied, declined

SMALL = 64 * 1024  # bytes; below it a constant is not worth an operator ...
_MANY = 16  # ... unless all of them together are as much as so many of that size
_VIEWS = ops.VIEW | ops.PERMUTE | ops.PART | ops.ALIAS  # which store nothing
_LARGEST = 2.0  # one constant may store this many times what its sources store


@dataclass(frozen=True)
class FoldConstants:
    """Folds constant subgraphs into plain tensors.

    Attributes:
        max_growth: the stored constants may grow by this factor in all. A single constant may
            grow by it too, and by 2 where it is less; ``math.inf`` folds whatever is constant.
    """

    name: str = "fold-constants"
    exactness: str = "reassociates"
    max_growth: float = 1.25

    def run(self, gm: fx.GraphModule, context: Context = Context()) -> PassResult:
        result = PassResult()
        graph, editor = gm.graph, Editor(gm, self.name, result)
        decided = decide_sizes(editor)
        if decided is not None:
            result.modified = True
            result.applied.append(decided)
        constant = _foldable(graph)
        result.declined += _impure(self.name, graph, constant)
        leaks = leaking(graph)
        growth = context.growth_or(self.max_growth)
        chosen, refused = self._choose(graph, constant, leaks, set(), growth)
        forced = set() if context.complex else _of_complex(constant)
        if forced:
            kept = set(chosen)
            chosen, refused = self._choose(graph, constant, leaks, forced, growth)
            result.notes += _stored_anyway([n for n in chosen if n in forced and n not in kept])
        for node, reason, hint in refused:
            result.declined.append(declined(self.name, node, reason, hint))
        if not chosen:
            return result
        own = in_own_dtype(graph, constant)
        values = _evaluate(chosen, own)
        for node in chosen:
            with editor.candidate(node):
                value = values.pop(node) if node in values else _evaluated(node, own)
                result.applied.append(_fold(editor, node, value, leaks=node in leaks))
        result.modified |= bool(result.applied)
        return result

    # --- policy -----------------------------------------------------------------------------------

    def _choose(
        self,
        graph: fx.Graph,
        constant: set[fx.Node],
        leaks: set[fx.Node],
        forced: set[fx.Node],
        growth: float,
    ) -> tuple[list[fx.Node], list[tuple[fx.Node, str, str]]]:
        """The nodes to fold, in graph order, and those declined with reason and hint.

        ``forced`` ones are folded whatever they store; all others may grow the constants by
        ``growth``.
        """
        sources, parallel = _Storage(graph), _parallel_weights(graph)
        refused: dict[fx.Node, tuple[str, str]] = {}
        # not folded; only what the model itself reads is worth a word
        barred = {n for n in leaks if n in constant and is_tensor(n) and _strides_zero(n)}
        largest, limit = max(_LARGEST, growth), growth * sources.before
        chosen = self._frontier(graph, constant, leaks, barred)
        read = set(chosen)
        many = False  # small constants: so many that they are refused too
        while True:
            large = [n for n in chosen if _bytes(n) >= SMALL and n not in forced]
            again = False
            for node in large:
                new, old = _bytes(node), sources.of(node)
                if _strides_zero(node):
                    again = True
                    barred.add(node)
                    read.update(node.all_input_nodes)
                elif new > largest * old and not (
                    _is_view_of_one(node) or _is_merged(node, parallel)
                ):
                    again = True
                    barred.add(node)
                    words = "the folded constant would store"
                    refused[node] = _grown(words, new, old, "that it is computed from")
            if not again:
                total = sources.total(chosen) - _merged(chosen, parallel)
                free = sum(_bytes(n) for n in chosen if n in forced)
                # an infinite growth of nothing is no number, and no limit
                excess = total - free - limit
                many = many or total - free - sources.before > _MANY * SMALL
                growing = sources.growing(chosen, small=many) if excess > 0 else []
                growing = [n for n in growing if n not in forced]
                if not growing:
                    return chosen, [(n, *why) for n, why in refused.items() if n in read]
                words = f"past the growth of {growth:g}, all constants would store"
                while growing and excess > 0:
                    worst = growing.pop()
                    excess -= _bytes(worst)
                    barred.add(worst)
                    refused[worst] = _grown(words, total, sources.before, "of now")
            chosen = self._frontier(graph, constant, leaks, barred)

    @staticmethod
    def _frontier(
        graph: fx.Graph, constant: set[fx.Node], leaks: set[fx.Node], excluded: set[fx.Node]
    ) -> list[fx.Node]:
        """Constant calls that something not folded reads."""
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


def _of_complex(constant: set[fx.Node]) -> set[fx.Node]:
    """Constant tensors that are complex, or computed from one that is."""
    return {n for n in constant if is_tensor(n) and any(map(_is_complex, (n, *n.all_input_nodes)))}


def _is_complex(node: fx.Node) -> bool:
    return is_tensor(node) and bool(node.meta["val"].is_complex())


def _stored_anyway(folded: list[fx.Node]) -> list[str]:
    """What storing the constants made of complex numbers takes, as a sentence of the report."""
    if not folded:
        return []
    old = sum(_bytes(a) for a in dict.fromkeys(a for n in folded for a in _attributes(n)))
    new = sum(map(_bytes, folded))
    names = ", ".join(n.name for n in folded[:3]) + (", ..." if len(folded) > 3 else "")
    return [
        f"made of complex numbers, which the target does not compute, and so stored past "
        f"max_growth: {names}, {_growth(new, old)} that they are computed from"
    ]


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

    def growing(self, folded: list[fx.Node], *, small: bool) -> list[fx.Node]:
        """What makes the model larger, the worst last; ``small`` ones if nothing large does."""
        gone = self._gone(folded)
        kept = {key for node, (key, _) in self._kept.items() if node not in gone}
        reads = {n: dict(self._kept[a] for a in _attributes(n)) for n in folded}
        readers = Counter(key for read in reads.values() for key in read)
        growth = {
            n: _bytes(n) - sum(s for k, s in read.items() if readers[k] == 1 and k not in kept)
            for n, read in reads.items()
            if not _is_view_of_one(n)
        }
        worst = sorted((n for n in growth if growth[n] > 0), key=growth.__getitem__)
        return [n for n in worst if _bytes(n) >= SMALL] or (worst if small else [])

    def total(self, folded: list[fx.Node]) -> int:
        """Bytes stored once ``folded`` are tensors and what only they read is gone."""
        gone = self._gone(folded)
        stored: dict[object, int] = dict(s for n, s in self._kept.items() if n not in gone)
        for node in folded:
            if _is_view_of_one(node):
                key, size = self._kept[_attributes(node)[0]]
                stored[key] = size
            else:
                stored[node] = _bytes(node)
        return sum(stored.values())

    @staticmethod
    def _gone(folded: list[fx.Node]) -> set[fx.Node]:
        """What only ``folded`` read."""
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
        return gone


def _parallel_weights(graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Weights of layers that read one tensor and are summed: the branches become one layer."""
    found: dict[object, dict[fx.Node, None]] = {}
    for node in graph.nodes:
        if not is_call(node, aten.conv1d, aten.conv2d, aten.conv3d, aten.linear) or pinned(node):
            continue
        layer = arguments(node)
        total = node
        while len(total.users) == 1 and is_call(
            user := next(iter(total.users)), aten.add, aten.sub
        ):
            total = user
        if total is not node:
            key = (layer["input"], total, str(layer.get("stride")), layer.get("groups"))
            found.setdefault(key, {})[layer["weight"]] = None
    return {w: tuple(same) for same in found.values() if len(same) > 1 for w in same}


def _is_merged(node: fx.Node, parallel: dict[fx.Node, tuple[fx.Node, ...]]) -> bool:
    """True if a branch beside a weight's own has one at least as large, which it joins."""
    return any(o is not node and _bytes(o) >= _bytes(node) for o in parallel.get(node, ()))


def _merged(folded: list[fx.Node], parallel: dict[fx.Node, tuple[fx.Node, ...]]) -> int:
    """Bytes of the weights of parallel branches beyond the largest of each group."""
    plain = {*folded, *(w for w in parallel if w.op == "get_attr")}
    groups = dict.fromkeys(parallel.values())
    sizes = [[_bytes(w) for w in group if w in plain] for group in groups]
    return sum(sum(stored) - max(stored) for stored in sizes if stored)


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


def _grown(words: str, new: int, old: int, what: str) -> tuple[str, str]:
    """Why a constant stays factored, and what to do about it."""
    return (
        f"{words} {_growth(new, old)} {what}: it stays factored",
        "a larger max_growth folds it",
    )


def _growth(new: int, old: int) -> str:
    factor = f"{new / old:.3g} times the {_size(old)}" if old else "from nothing"
    return f"{_size(new)}, {factor}"


def _strides_zero(node: fx.Node) -> bool:
    value = node.meta["val"]
    return any(
        stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)
    )


def _is_view_of_one(node: fx.Node) -> bool:
    """True if the node only views a stored tensor, and so stores nothing of its own."""
    while node.op == "call_function":
        if not ops.has(node, _VIEWS) or len(node.all_input_nodes) != 1:
            return False
        node = node.all_input_nodes[0]
    return node.op == "get_attr"


# --- the rewrite ----------------------------------------------------------------------------------


def _evaluate(chosen: list[fx.Node], own: set[fx.Node]) -> dict[fx.Node, torch.Tensor]:
    """Values of the chosen nodes; none where one cannot be computed: then each is by itself."""
    try:
        return evaluate_constants(chosen, own=own)
    except Exception:
        return {}


def _evaluated(node: fx.Node, own: set[fx.Node]) -> torch.Tensor:
    try:
        return evaluate_constants([node], own=own)[node]
    except (RuntimeError, NotImplementedError) as error:
        raise Declined(f"it cannot be evaluated: {first_line(error)}") from error


def _fold(editor: Editor, node: fx.Node, value: torch.Tensor, *, leaks: bool) -> Applied:
    """Lets a stored tensor stand for a node, and removes what only that read.

    Where the result ``leaks``, the caller may write into what it gets: a tensor of its own.
    """
    origin, known = [*_origin(node), node], _strides_known(value, node)
    with editor.edit() as edit:
        with edit.before(node):
            stored = edit.constant(_name(node), value if known else value.contiguous())
            if known:
                stored.meta["val"] = node.meta["val"]
            edit.stamp(stored, origin)
            new = edit.call(aten.clone.default, (stored,), sources=[stored]) if leaks else stored
        edit.replace(node, new)
        edit.sweep([node], covered=origin)
    dead = [n for n in reversed(edit.gone) if n.op == "call_function"]
    size = "x".join(str(s) for s in value.shape) or "scalar"
    return applied(editor.rule, dead, [stored], f"{len(dead)} calls became one {size} constant")


def _strides_known(value: torch.Tensor, node: fx.Node) -> bool:
    """True if a tensor can be stored as it is: a view stays one, but zero strides are written out.

    In float64 the strides of some results (``real``) are others than those that the trace saw.
    """
    traced = zip(value.shape, value.stride(), node.meta["val"].stride(), strict=True)
    return not _strides_zero(node) and all(size == 1 or a == b for size, a, b in traced)


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


def _impure(rule: str, graph: fx.Graph, constant: set[fx.Node]) -> list[Decline]:
    """Calls that would be constant, were they deterministic."""
    out: list[Decline] = []
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
