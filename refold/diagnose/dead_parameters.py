"""Parameters, or entries of them, that provably no output depends on, whatever their values are.

Three proofs, on the graph as traced:

- nothing reads the parameter;
- it reaches its layers through linear calls alone (slices, sums, stores into ``zeros``), and the
  sum of its coefficients is 0: a central difference takes its centre weight away again. The
  coefficients are found by reverse differentiation with whole random numbers, in float64: where
  they cancel, they cancel exactly;
- it is the shift of a norm or a convolution that only comes as a difference with itself:
  ``pool(n) - n`` is the same for ``n + b`` where the pool keeps constants.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from refold.graph import constants, ops
from refold.graph.evaluate import ancestors, wide_call
from refold.graph.nodes import arguments, aten, is_call, is_tensor
from refold.graph.ops import op_name
from refold.graph.records import convolutions, sums, windows

_LARGEST = 2**22  # entries; the search needs several copies of a parameter in float64
_ATTEMPTS = 2
_COTANGENT = 2**16

# Norms whose shift is one number a channel, the same at every place.
_NORMS = {aten.batch_norm.default, aten.group_norm.default, aten.instance_norm.default}


@dataclass(frozen=True)
class DeadParameter:
    """A parameter that no output depends on, or the part of it.

    Attributes:
        name: of the parameter.
        entries: how many of its numbers are dead.
        of: how many it has.
        where: the dead entries as an index, ``[:, :, 1, 1]``; empty if they are no such block.
        reason: the proof, in one sentence without a full stop.
    """

    name: str
    entries: int
    of: int
    where: str
    reason: str


def dead_parameters(gm: fx.GraphModule) -> list[DeadParameter]:
    """Finds the parameters of a traced graph that provably change nothing."""
    parameters = dict(gm.named_parameters())
    read = {
        str(n.target): n
        for n in gm.graph.find_nodes(op="get_attr")
        if constants.is_get_attr(n) and n.users
    }
    storages = {constants.tensor(n).data_ptr() for n in read.values()}
    found = [
        _whole(name, parameter, "nothing reads it")
        for name, parameter in parameters.items()
        # a tied parameter is read under another name
        if name not in read and parameter.numel() and parameter.data_ptr() not in storages
    ]
    trained = {n: name for name, n in read.items() if name in parameters}
    found += _cancelled_entries(gm, trained)
    found += _cancelled_shifts(gm, trained)
    return found


def _whole(name: str, parameter: torch.Tensor, reason: str) -> DeadParameter:
    return DeadParameter(name, parameter.numel(), parameter.numel(), "", reason)


# --- linear calls ---------------------------------------------------------------------------------


def _cancelled_entries(gm: fx.GraphModule, trained: dict[fx.Node, str]) -> list[DeadParameter]:
    constant = constants.constant_nodes(gm.graph)
    sources = _sources(gm.graph, constant, trained)
    alive = {n for n in trained if _is_alive(n, constant) or not _is_searched(n)}
    for node in gm.graph.nodes:
        if node in constant and node.op != "get_attr" and not _is_linear(node, sources):
            alive |= sources[node]
    wanted = [n for n in trained if n not in alive]
    ends = [
        n
        for n in gm.graph.nodes
        if n in constant and n.op != "get_attr" and sources[n].intersection(wanted)
        and any(u not in constant for u in n.users)
    ]  # fmt: skip
    if any(not is_tensor(n) for n in ends):
        return []
    if not wanted or not ends:
        return []
    found = []
    try:
        uncovered = _uncovered(wanted, ends, constant)
    except (RuntimeError, NotImplementedError):
        return []  # an operator without a derivative: nothing is known of what it reads
    for node, dead in uncovered.items():
        count = int(dead.sum())
        if count:
            reason = "the constants computed from it do not depend on it: its coefficients cancel"
            found.append(DeadParameter(trained[node], count, dead.numel(), _block(dead), reason))
    return found


def _sources(
    graph: fx.Graph, constant: set[fx.Node], trained: Iterable[fx.Node]
) -> dict[fx.Node, set[fx.Node]]:
    """For each constant node the parameters that it is computed from."""
    kept = set(trained)
    out: dict[fx.Node, set[fx.Node]] = {}
    for node in graph.nodes:
        if node in constant:
            out[node] = {node} & kept
            out[node].update(*(out[a] for a in node.all_input_nodes))
    return out


def _is_alive(node: fx.Node, constant: set[fx.Node]) -> bool:
    """True if something that is no constant call reads the parameter as it is."""
    return any(u not in constant for u in node.users)


def _is_searched(node: fx.Node) -> bool:
    value = node.meta["val"]
    return value.is_floating_point() and 0 < value.numel() <= _LARGEST


def _is_linear(node: fx.Node, sources: dict[fx.Node, set[fx.Node]]) -> bool:
    if not sources[node]:
        return True
    depending = [a for a in node.all_input_nodes if sources[a]]
    if ops.has(node, ops.LINEAR):
        return True
    if op_name(node) == "div":
        return depending == [node.args[0]] and arguments(node).get("rounding_mode") is None
    return ops.has(node, ops.BILINEAR) and len(depending) == 1 and _reads(node, depending[0]) == 1


def _reads(node: fx.Node, source: fx.Node) -> int:
    count = 0

    def visit(argument: fx.Node) -> fx.Node:
        nonlocal count
        count += argument is source
        return argument

    fx.map_arg((node.args, node.kwargs), visit)
    return count


def _uncovered(
    wanted: list[fx.Node], ends: list[fx.Node], constant: set[fx.Node]
) -> dict[fx.Node, torch.Tensor]:
    """Which entries of parameters have the coefficient 0 in all of ``ends``, as masks."""
    generator = torch.Generator().manual_seed(0)
    needed = ancestors(ends)
    values: dict[fx.Node, torch.Tensor] = {}
    with torch.enable_grad():
        for node in ends[0].graph.nodes:
            if node not in needed:
                continue
            if node.op != "get_attr":
                values[node] = wide_call(node, values)
                continue
            tensor = constants.tensor(node)
            values[node] = tensor.double() if tensor.is_floating_point() else tensor
            if node in wanted:
                values[node] = values[node].clone().requires_grad_()
        leaves = [values[n] for n in wanted]
        dead = [torch.ones(leaf.shape, dtype=torch.bool) for leaf in leaves]
        for _ in range(_ATTEMPTS):
            weights = [_whole_numbers(values[n], generator) for n in ends]
            slopes = torch.autograd.grad(
                [values[n] for n in ends], leaves, weights, retain_graph=True, allow_unused=True
            )
            for mask, slope in zip(dead, slopes, strict=True):
                if slope is not None:
                    mask &= (slope == 0).cpu()
    return dict(zip(wanted, dead, strict=True))


def _whole_numbers(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.randint(1, _COTANGENT, like.shape, generator=generator)
    return drawn.to(like.dtype).to(like.device)


def _block(dead: torch.Tensor) -> str:
    """The dead entries as one index, if they are all of some axes and one place of the others."""
    if bool(dead.all()):
        return ""
    places = dead.nonzero()
    index = [
        ":" if len(axis.unique()) == size else str(int(axis[0]))
        for axis, size in zip(places.unbind(1), dead.shape, strict=True)
    ]
    expected = 1
    for word, size in zip(index, dead.shape, strict=True):
        expected *= size if word == ":" else 1
    return f"[{', '.join(index)}]" if expected == len(places) else ""


# --- shifts ---------------------------------------------------------------------------------------


def _cancelled_shifts(gm: fx.GraphModule, trained: dict[fx.Node, str]) -> list[DeadParameter]:
    found = []
    for node in gm.graph.nodes:
        bias = _shift_of(node)
        if bias in trained and len(bias.users) == 1 and _cancels(node):
            name = trained[bias]
            reason = f"it shifts {node.name}, which is only read as a difference with itself"
            found.append(_whole(name, bias.meta["val"], reason))
    return found


def _shift_of(node: fx.Node) -> fx.Node | None:
    """The parameter that a norm or a convolution adds to each channel of its output."""
    if node.op != "call_function" or not is_tensor(node):
        return None
    if node.target in _NORMS or convolutions.conv(node) is not None:
        bias = arguments(node).get("bias")
        return bias if isinstance(bias, fx.Node) else None
    return None


def _cancels(start: fx.Node) -> bool:
    """True if every path of a value, plus the same shift everywhere, ends in a sum without it."""
    shifted = {start: 1.0}  # how many times the shift is in a node
    queue = sorted(start.users)  # in the order of the graph: what a node reads is known before it
    seen = set(queue)
    while queue:
        node = heapq.heappop(queue)
        amount = _carried(node, shifted)
        if amount is None:
            return False
        shifted[node] = amount
        for user in node.users if amount else ():
            if user not in seen:
                seen.add(user)
                heapq.heappush(queue, user)
    return True


def _carried(node: fx.Node, shifted: dict[fx.Node, float]) -> float | None:
    """How many times the shift is in a call's result, or ``None`` if that cannot be said."""
    total = sums.add(node)
    if total is not None:
        return shifted.get(total.left, 0.0) + total.alpha * shifted.get(total.right, 0.0)
    pool = windows.avg_pool(node)
    if pool is not None and pool.keeps_constants:
        return shifted[pool.x]
    if is_call(node, aten.clone.default, aten.contiguous.default):
        return shifted[node.all_input_nodes[0]]
    return None
