"""Sizes that depend on the values of constants: they are known as soon as these are looked at.

``weight[mask]`` has as many rows as the mask says, which a trace does not know: it writes a symbol
for the size, and checks on it. Where the mask is a constant, the size is a number; so it is in all
that is computed from it.

Before::

    rows = index(weight, [mask])                 # [u0, 8]
    size = sym_size(rows, 0);  _assert_scalar(size <= 8)
    y = linear(x, rows)                          # [s0, u0]

After::

    rows = index(weight, [mask])                 # [4, 8]
    y = linear(x, rows)                          # [s0, 4]

A number that is read off a constant (``item``) is known likewise. A constant mask that picks from a
tensor of the graph becomes the positions that it picks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._sympy.symbol import SymT, symbol_is_type

from refold.graph import aliasing, constants, nodes
from refold.graph.evaluate import evaluate_constants
from refold.graph.nodes import aten, is_call, is_tensor, pinned
from refold.rewrite.edit import Edit, Editor
from refold.rewrite.result import Applied, applied

# What asks whether a size that depends on data is one that the trace allows.
_CHECKS = (
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)
# What gives a size, or an element, as a number.
_ASK = (aten.sym_size.int, aten.item.default, aten._local_scalar_dense.default)
_UNBACKED = (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT)
_NUMBERS = (bool, int, float)
_LARGEST = 1 << 17  # positions that a mask is written out as


def decide_sizes(editor: Editor) -> Applied | None:
    """Writes the sizes that constants decide as numbers; ``None`` where there are none."""
    calls = (editor.graph.find_nodes(op="call_function", target=target) for target in _ASK)
    asked = [n for found in calls for n in found if _symbols(n.meta["val"])]
    if not asked:
        return None
    with editor.candidate(asked[0]):  # what one decides, others are computed from
        return _decide(editor, asked)
    return None


def _decide(editor: Editor, asked: list[fx.Node]) -> Applied | None:
    with editor.edit() as edit:
        known = _known(edit, asked)
        values = _values(editor.graph, known) if known else None
        if values is None:
            edit.roll_back()
            return None
        decided = [n for n, value in values.items() if isinstance(value, _NUMBERS)]
        checks = {u: None for n in decided for u in n.users if is_call(u, *_CHECKS)}
        edit.learn(values)
        gone = [*(c for c in checks if not c.all_input_nodes), *decided]
        numbers = ", ".join(sorted(str(v) for v in known.values()))
        sized = [n for n in values if is_tensor(n)]
        record = applied(editor.rule, gone, sized, f"constants decide sizes: {numbers}")
        edit.remove(gone)
    return record


def _known(edit: Edit, asked: list[fx.Node]) -> dict[sympy.Symbol, int | float]:
    """The numbers behind symbols, for those that constants decide."""
    constant = constants.constant_nodes(edit.graph)
    found: dict[sympy.Symbol, int | float] = {}
    for node in asked:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        symbol = node.meta["val"].node._expr
        if not symbol.is_Symbol or pinned(source):
            continue
        if source in constant and is_tensor(source):
            value = evaluate_constants([source])[source]
            found[symbol] = (
                value.shape[node.args[1]]  # type: ignore[index]
                if is_call(node, aten.sym_size.int)
                else value.item()
            )
        elif is_call(source, aten.index.Tensor):
            count = _written_as_positions(edit, source, constant)
            if count is not None:
                found[symbol] = count
    return found


def _written_as_positions(edit: Edit, node: fx.Node, constant: set[fx.Node]) -> int | None:
    """Turns the masks of an index into positions; how many they are."""
    indices: Any = node.args[1]
    masks = [i for i in indices if i is not None and nodes.dtype(i) == torch.bool]
    if not masks or any(m not in constant for m in masks):
        return None
    looked = evaluate_constants(masks)
    places = {m: looked[m].nonzero(as_tuple=True) for m in masks}
    count = max(int(p[0].numel()) for p in places.values())
    if count * len(masks) > _LARGEST:
        return None
    written: list[Any] = []
    with edit.before(node):
        for index in indices:
            if index not in places:
                written.append(index)
                continue
            name = f"{node.name}.positions"
            written += [edit.constant(name, p.clone()) for p in places[index]]
    edit.set(node, args=(node.args[0], written))
    return count


def _values(
    graph: fx.Graph, known: Mapping[sympy.Symbol, int | float]
) -> dict[fx.Node, Any] | None:
    """The fake values of all that depends on a symbol, with its number instead.

    ``None`` where a call does not take the numbers: then the model itself would not run.
    """
    constant = constants.constant_nodes(graph)
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        old = node.meta.get("val")
        symbols = _symbols(old)
        asks = old is not None and not is_tensor(node)  # of a number: what it says is one, too
        if not symbols & known.keys() and not (
            asks and any(isinstance(values.get(a), _NUMBERS) for a in node.all_input_nodes)
        ):
            continue
        if node in constant or symbols - known.keys():
            values[node] = _substituted(graph, old, known)
            continue
        try:
            values[node] = aliasing.run_fake(node, values)
        except (RuntimeError, ValueError):
            return None
    return None if any(v is False for v in values.values()) else values


def _symbols(value: Any) -> set[sympy.Symbol]:
    """The symbols of sizes that depend on data, those that the trace found equal to others too."""
    found: set[sympy.Symbol] = set()
    for leaf in pytree.tree_leaves(value):
        parts = (*leaf.shape, *leaf.stride()) if isinstance(leaf, torch.Tensor) else (leaf,)
        for part in parts:
            if isinstance(part, (torch.SymInt, torch.SymBool, torch.SymFloat)):
                found |= {s for s in part.node._expr.free_symbols if symbol_is_type(s, _UNBACKED)}
    return found


def _substituted(graph: fx.Graph, value: Any, known: Mapping[sympy.Symbol, int | float]) -> Any:
    def size(s: Any) -> Any:
        if not isinstance(s, (torch.SymInt, torch.SymFloat)):
            return s
        if s.node._expr in known:
            return known[s.node._expr]
        expr = s.node._expr.xreplace({k: sympy.sympify(v) for k, v in known.items()})
        return int(expr) if expr.is_number else s.node.shape_env.create_symintnode(expr, hint=None)

    def leaf(v: Any) -> Any:
        if not isinstance(v, torch.Tensor):
            return size(v)
        with nodes.fake_execution(nodes.fake_mode(graph)):
            return torch.empty_strided(
                [size(s) for s in v.shape], [size(s) for s in v.stride()],
                dtype=v.dtype, device=v.device,
            )  # fmt: skip

    return pytree.tree_map(leaf, value)
