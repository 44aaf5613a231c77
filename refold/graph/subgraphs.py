"""The branches of ``torch.cond``: graphs inside a graph.

``torch.export`` hands a branch all that it reads as operands, parameters too, so nothing in it is
a constant to a pass. For the time of the passes the constants move inside (:func:`sink`), and each
branch is an IR graph like any other; afterwards they are operands again (:func:`lift`), the form
that exporters read.

Before::

    y = cond(gate, true_graph_0, false_graph_0, (x, get_attr[deep.weight], get_attr[head.weight]))

Between::

    y = cond(gate, true_graph_0, false_graph_0, (x,))    # each reads its own get_attr
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from refold.graph import constants, provenance
from refold.graph.copies import copy_sharing_tensors
from refold.graph.nodes import is_call


def conds(gm: fx.GraphModule) -> list[fx.Node]:
    """The calls of ``torch.cond`` in a graph, not those inside its branches."""
    return [n for n in gm.graph.nodes if is_call(n, torch.ops.higher_order.cond)]


def branches(cond: fx.Node) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graphs that a cond chooses from: for true, for false."""
    yes, no = (_module(node) for node in cond.args[1:3])
    return yes, no


def walk(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """A graph module and all branches inside it."""
    yield gm
    for cond in conds(gm):
        for branch in branches(cond):
            yield from walk(branch)


def own(gm: fx.GraphModule) -> None:
    """Gives a graph copies of its branches, whose calls carry a module path.

    The graph that it was copied from shares its branches. Their calls have lost the module that
    they were traced in: a call gets the path of the parameters that it reads, else the cond's own.
    """
    for number, cond in enumerate(conds(gm)):
        copies = []
        for word, old in zip(("true", "false"), branches(cond), strict=True):
            copy = copy_sharing_tensors(old)
            _name_modules(cond, copy)
            own(copy)
            name = _unique(gm, f"{word}_graph_{number}")
            setattr(gm, name, copy)
            with gm.graph.inserting_before(cond):
                copies.append(gm.graph.get_attr(name))
        cond.args = (cond.args[0], *copies, cond.args[3])


def sink(cond: fx.Node) -> None:
    """Moves the constants among a cond's operands into the branches that read them."""
    operands: Any = cond.args[3]
    state = constants.written(cond.graph)
    moved = [o if constants.is_get_attr(o) and o not in state else None for o in operands]
    for branch in branches(cond):
        places = list(branch.graph.find_nodes(op="placeholder"))
        for place, operand in zip(places, moved, strict=True):
            if operand is None:
                continue
            if place.users:
                name = _unique(branch, str(operand.target).replace(".", "_"))
                branch.register_buffer(name, constants.tensor(operand))
                with branch.graph.inserting_after(places[-1]):
                    inside = branch.graph.get_attr(name)
                inside.meta["val"] = place.meta["val"]
                inside.meta["refold_operand"] = str(operand.target)
                provenance.derive(inside, [operand], "sink", value=None)
                place.replace_all_uses_with(inside, propagate_meta=False)
            branch.graph.erase_node(place)
        branch.recompile()
    kept = [o for o, constant in zip(operands, moved, strict=True) if constant is None]
    cond.args = (*cond.args[:3], type(operands)(kept))


def lift(gm: fx.GraphModule, cond: fx.Node) -> None:
    """Makes the constants that a cond's branches read its operands again.

    Operands that no branch reads go.
    """
    both = branches(cond)
    outer: dict[str, fx.Node] = {}
    for branch in both:
        for node in branch.graph.nodes:
            if not constants.is_get_attr(node) or _origin(node) in outer:
                continue
            with gm.graph.inserting_before(cond):
                outer[_origin(node)] = _outside(gm, node)
    operands: Any = cond.args[3]
    places = [_as_placeholders(branch, outer) for branch in both]
    kept = []
    for operand, *same in zip([*operands, *outer.values()], *places, strict=True):
        if any(place.users for place in same):
            kept.append(operand)
            continue
        for place in same:
            place.graph.erase_node(place)
    cond.args = (*cond.args[:3], type(operands)(kept))
    for branch in both:
        branch.graph.lint()
        branch.recompile()


def _outside(gm: fx.GraphModule, inside: fx.Node) -> fx.Node:
    """The constant of a branch in the graph around it: what it was there, or a new one."""
    operand = inside.meta.get("refold_operand")
    if operand is None:
        node = constants.add(gm, str(inside.target), constants.tensor(inside))
    else:
        node = gm.graph.get_attr(operand)
        node.meta["val"] = inside.meta["val"]
    node.meta["custom"] = inside.meta.get("custom", {})
    return node


def _as_placeholders(branch: fx.GraphModule, outer: dict[str, fx.Node]) -> list[fx.Node]:
    """All placeholders of a branch, with one more for each lifted constant."""
    graph = branch.graph
    inner = [n for n in graph.nodes if constants.is_get_attr(n)]
    first = next(n for n in graph.nodes if n.op != "placeholder")
    made = {}
    for key, operand in outer.items():
        with graph.inserting_before(first):
            made[key] = graph.placeholder(operand.name)
        made[key].meta["val"] = operand.meta["val"]
    for node in inner:
        place = made[_origin(node)]
        place.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(place, propagate_meta=False)
        graph.erase_node(node)
    for name in {str(node.target) for node in inner}:
        delattr(branch, name)
    return list(graph.find_nodes(op="placeholder"))


def _origin(node: fx.Node) -> str:
    """One key for one constant: operands that both branches read are one."""
    operand = node.meta.get("refold_operand")
    return operand if operand is not None else f"{id(node.graph)}.{node.target}"


def _module(node: Any) -> fx.GraphModule:
    owner: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        owner = getattr(owner, part)
    return owner


def _name_modules(cond: fx.Node, branch: fx.GraphModule) -> None:
    operands: Any = cond.args[3]
    places = dict(zip(branch.graph.find_nodes(op="placeholder"), operands, strict=True))
    for node in branch.graph.nodes:
        if node.op != "call_function" or node.meta.get("nn_module_stack"):
            continue
        read = [places.get(a) for a in node.all_input_nodes]
        named = [a for a in read if a is not None and constants.is_get_attr(a)]
        path = provenance.module_path((named or [cond])[0])
        node.meta["nn_module_stack"] = {"": (path, "")}


def _unique(gm: fx.GraphModule, name: str) -> str:
    count, made = 0, name
    while hasattr(gm, made):
        count += 1
        made = f"{name}_{count}"
    return made
