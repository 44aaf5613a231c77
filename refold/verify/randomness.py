"""Whether two runs of a graph may differ: random numbers, and memory that nothing has written."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from refold.graph import constants
from refold.graph.evaluate import flat_inputs
from refold.graph.nodes import same, shape
from refold.graph.ops import op_name
from refold.graph.program import Call, fresh
from refold.verify.given import state_kept


def draws(gm: fx.GraphModule) -> bool:
    """True if two runs of a graph may differ."""
    return any(_draws(n) or _unwritten(n) for n in gm.graph.nodes)


def first_draw(gm: fx.GraphModule, call: Call) -> fx.Node | None:
    """The first node for which two runs on a call differ."""
    drawn = next((n for n in gm.graph.nodes if _draws(n)), None)
    unwritten = {n for n in gm.graph.nodes if _unwritten(n)}
    if drawn is not None or not unwritten or _same_whatever_holds(gm, unwritten, call):
        return drawn
    return next(n for n in gm.graph.nodes if n in unwritten)


def _draws(node: fx.Node) -> bool:
    return bool(node.users) and "random" in _impurity(node)


def _unwritten(node: fx.Node) -> bool:
    """Allocates memory that is not empty, and that nothing is known to write at once."""
    if not node.users or "uninitialised" not in _impurity(node):
        return False
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and any(same(size, 0) for size in value.shape):
        return False
    return not _overwritten(node)


def _impurity(node: fx.Node) -> str:
    return (constants.impurity(node) if node.op == "call_function" else None) or ""


def _same_whatever_holds(gm: fx.GraphModule, unwritten: set[fx.Node], call: Call) -> bool:
    """Runs a graph with one content of its uninitialised memory and with another."""
    results = [_filled(gm, unwritten, call, content) for content in (0, 1)]
    first, second = map(pytree.tree_leaves, results)
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(first, second, strict=True)
    )


def _filled(gm: fx.GraphModule, unwritten: set[fx.Node], call: Call, content: int) -> Any:
    class Filling(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            return value.fill_(content) if n in unwritten else value

    args, kwargs = fresh(call)
    with state_kept(gm), torch.no_grad():
        return Filling(gm).run(*flat_inputs(gm.graph, args, kwargs), enable_io_processing=False)


def _overwritten(node: fx.Node) -> bool:
    """True if a permutation writes every row of a tensor before anything reads one."""
    for user in node.users:
        if op_name(user) != "index_put" or user.args[0] is not node:
            return False
        indices: Any = user.args[1]
        accumulate = user.args[3] if len(user.args) > 3 else user.kwargs.get("accumulate", False)
        if accumulate or len(indices) != 1 or not _permutes(indices[0], node):
            return False
    return True


def _permutes(index: fx.Node, rows: fx.Node) -> bool:
    source: Any = index.args[0] if index.op == "call_function" and index.args else None
    if op_name(index) == "getitem" and index.args[1] == 1 and op_name(source) == "sort":
        drawn = source.args[0]
    elif op_name(index) == "argsort":
        drawn = source
    else:
        return False
    return len(shape(drawn)) == 1 and same(shape(drawn)[0], shape(rows)[0])
