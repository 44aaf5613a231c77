"""What the original computes, in float64 and in its own dtype: all that a judge needs of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from refold.frontends.export import Program, fresh
from refold.graph import constants, provenance
from refold.graph.evaluate import Oracle
from refold.graph.kinds import op_name
from refold.graph.nodes import same, shape
from refold.verify.samples import Call, calls_like, shapes_of

_NEIGHBOURS = 4  # runs of the original beside each of them


@dataclass
class References:
    """What the original computes: inputs, float64 results and the model's own, for comparisons.

    They outlive the original, so that a compilation may release its weights. ``allowed`` is the
    relative error that the user accepts for approximations asked for by name.
    """

    calls: list[Call] = field(default_factory=list)
    exact: list[Any] = field(default_factory=list)
    own: list[Any] = field(default_factory=list)
    nearby: list[list[Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    allowed: float = 0.0


def references(
    original: fx.GraphModule, program: Program, *, runs: int = 4, most: int | None = None
) -> References:
    """Runs the original in float64 and in its own dtype on at least ``runs`` inputs.

    No more than ``most``, where that is given.

    A graph that draws random numbers gives no references, and a note.
    """
    found = References()
    drawn = next((n for n in original.graph.nodes if _draws(n)), None)
    if drawn is not None:
        where = provenance.source_line(drawn)
        place = f"{drawn.name}{f' at {where}' if where else ''}"
        found.notes.append(f"{place} draws random numbers: two runs cannot be compared")
        return found
    oracle = Oracle(original)
    for call, generated in itertools.islice(calls_like(program, runs), most):
        try:
            exact = oracle.run(*fresh(call))
            with state_kept(original), torch.no_grad():
                own = original(*fresh(call)[0], **fresh(call)[1])
        except Exception as error:
            if not generated:
                raise
            found.notes.append(f"{shapes_of(call)}: the original fails on it ({first_line(error)})")
            continue
        found.calls.append(call)
        found.exact.append(exact)
        found.own.append(own)
        found.nearby.append([])
    return found


def add_nearby(original: fx.GraphModule, found: References) -> None:
    generator = torch.Generator().manual_seed(1)
    for call, results in zip(found.calls, found.nearby, strict=True):
        for _ in range(_NEIGHBOURS):
            args, kwargs = pytree.tree_map_only(
                torch.Tensor, lambda t: _one_rounding_away(t, generator), fresh(call)
            )
            with state_kept(original), torch.no_grad():
                results.append(original(*args, **kwargs))


def _one_rounding_away(leaf: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if not leaf.is_floating_point():
        return leaf
    drawn = torch.rand(leaf.shape, generator=generator, dtype=torch.float64) * 2 - 1
    factor = 1 + torch.finfo(leaf.dtype).eps * drawn
    return (leaf.double().cpu() * factor).to(leaf.device, leaf.dtype)


def outputs(gm: fx.GraphModule, calls: list[Call]) -> list[Any]:
    """What a graph returns for each call, in its own dtype; its state stays as it is."""
    found = []
    for call in calls:
        args, kwargs = fresh(call)
        with state_kept(gm), torch.no_grad():
            found.append(gm(*args, **kwargs))
    return found


def draws(gm: fx.GraphModule) -> bool:
    """True if two runs of a graph may differ."""
    return any(_draws(n) for n in gm.graph.nodes)


def _draws(node: fx.Node) -> bool:
    reason = constants.impurity(node) if node.op == "call_function" else None
    if reason is None or not node.users:
        return False
    return "random" in reason or ("uninitialised" in reason and not _overwritten(node))


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


@contextmanager
def state_kept(*graphs: fx.GraphModule) -> Iterator[None]:
    """Runs with the graphs' state as it was, and puts it back afterwards."""
    written = [n for gm in graphs for n in constants.written(gm.graph)]
    state = [constants.tensor(n) for n in written if n.op == "get_attr"]
    saved = [t.clone() for t in state]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(state, saved, strict=True):
                tensor.copy_(value)


def first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
