"""Values whose rank is another where a size is 1: a squeeze drops that dimension in the call.

The trace has one rank for them, that of larger sizes. ``squeeze_copy`` with dimensions is what
tracing leaves of such a squeeze; see :func:`refold.frontends.functionalise.settle_squeezes`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from refold.graph import ops
from refold.graph.ops import op_name


def squeezes(graph: fx.Graph) -> list[fx.Node]:
    """The squeezes that drop dimensions in some calls and not in others."""
    found = graph.find_nodes(op="call_function", target=torch.ops.aten.squeeze_copy.dims)
    return list(found)


def sources(values: Iterable[fx.Node]) -> set[fx.Node]:
    """The squeezes that the rank of some of these values depends on."""
    found: set[fx.Node] = set()
    seen, stack = set[fx.Node](), list(values)
    while stack:
        node = stack.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        if node.target is torch.ops.aten.squeeze_copy.dims:
            found.add(node)
        if states_its_rank(node):
            continue
        like = _LIKE.get(op_name(node))
        stack.extend(node.all_input_nodes if like is None else [node.args[like]])  # type: ignore[list-item]
    return found


_LIKE = {"view_as": 1, "expand_as": 1, "reshape_as": 1}  # which operand's rank a result has


def states_its_rank(node: fx.Node) -> bool:
    """Whether a call's result has one rank, whatever the call reads."""
    return ops.has(node, ops.SIZED)


def objection(
    old: Iterable[fx.Node], new: Iterable[fx.Node], made: Iterable[fx.Node]
) -> str | None:
    """Why values may not take the place of others in a graph that has such squeezes.

    Args:
        old: the values that are replaced.
        new: what stands for them.
        made: the calls that were made for it.
    """
    if sources(old) != sources(new):
        return _REASON
    permutes = [n for n in made if not n._erased and ops.has(n, ops.PERMUTE)]
    return _REASON if any(sources(n.all_input_nodes) for n in permutes) else None


_REASON = "a squeeze before it drops a dimension where its size is 1, and the rank is another then"
