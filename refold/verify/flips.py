"""Integers and booleans: an element may differ only where rounding of floats explains it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

from refold.errors import VerificationError
from refold.graph.evaluate import Oracle, flat_inputs
from refold.graph.nodes import is_tensor
from refold.graph.ops import op_name
from refold.graph.program import Call, fresh
from refold.graph.records.comparisons import MIRRORED
from refold.verify.given import state_kept
from refold.verify.locate import name_of, stands_for
from refold.verify.result import Numerics
from refold.verify.tolerance import OWN_ERROR_FACTOR, Leaf, measure, tolerance

_INDEX_OF = frozenset({"argmax", "argmin", "max", "min", "topk", "sort", "argsort"})


def settle_flips(
    result: Numerics,
    leaves: dict[int, Leaf],
    original: fx.GraphModule | None,
    folded: fx.GraphModule | None,
    calls: list[Call],
    allowed: float,
) -> None:
    """Counts flips that rounding explains; raises on the others."""
    outputs = pytree.tree_leaves(original.graph.output_node().args[0]) if original else []
    for leaf in leaves.values():
        for at, a, b, r in leaf.differing:
            flipped = a != b
            count = int(flipped.sum())
            node = outputs[leaf.index] if original is not None else None
            explained = None
            if folded is not None and original is not None:
                explained = _follows_from_floats(
                    leaf.index, a, original, folded, calls[at], allowed
                )
            if explained is None:
                natural = OWN_ERROR_FACTOR * int((b != r).sum())
                explained = int((a != r).sum()) <= natural or (
                    original is not None and _within_margin(node, original, calls[at], a, b)
                )
            if not explained:
                layer = name_of(node) if isinstance(node, fx.Node) else leaf.name
                raise VerificationError(
                    f"{leaf.name}: {count} of {flipped.numel()} {leaf.dtype} elements differ from "
                    f"the original's, more than rounding explains ({layer})",
                    layer,
                )
            result.flips += count
            result.notes.append(
                f"{leaf.name}: {count} of {flipped.numel()} elements flipped within rounding"
            )


def _within_margin(
    node: Any, original: fx.GraphModule, call: Call, a: torch.Tensor, b: torch.Tensor
) -> bool:
    """For an index of an extreme value: is the value at the other index as good, up to rounding?

    For a comparison: are both sides equal, up to rounding?
    """
    if not isinstance(node, fx.Node):
        return False
    if op_name(node) in MIRRORED:
        return _near_threshold(node, original, call, (a != b).cpu())
    source = node.args[0] if op_name(node) == "getitem" else node
    if not isinstance(source, fx.Node) or op_name(source) not in _INDEX_OF:
        return False
    scored = source.args[0]
    if not isinstance(scored, fx.Node) or not is_tensor(scored):
        return False
    traced = scored.meta["val"].dtype
    if not traced.is_floating_point:
        return False
    seen: dict[str, torch.Tensor] = {}
    Oracle(original).run(
        *fresh(call), watch=lambda n, v: seen.update({n.name: v}) if n is scored else None
    )
    if scored.name not in seen:
        return False
    values = seen[scored.name]
    args = list(source.args[1:])
    axis: Any = {"topk": args[1] if op_name(source) == "topk" and len(args) > 1 else -1}.get(
        op_name(source), args[0] if args else source.kwargs.get("dim")
    )
    if axis is None:
        values, a, b, axis = values.reshape(-1), a.reshape(-1), b.reshape(-1), 0
    if not isinstance(axis, int) or isinstance(axis, bool):
        axis = -1
    values = values.to(a.device)
    if a.dim() == values.dim() - 1:
        a, b = a.unsqueeze(axis), b.unsqueeze(axis)
    if a.dim() != values.dim():
        return False
    gap = (values.gather(axis, a.long()) - values.gather(axis, b.long())).abs().max()
    scale = float(values.abs().max()) or 1.0
    return float(gap) / scale <= 2 * tolerance(0.0, traced)


def _near_threshold(
    node: fx.Node, original: fx.GraphModule, call: Call, flipped: torch.Tensor
) -> bool:
    left, right = node.args[0], cast(Any, node.args[1])
    if not isinstance(left, fx.Node) or not is_tensor(left):
        return False
    dtype = left.meta["val"].dtype
    if not dtype.is_floating_point:
        return False
    sides = {n.name for n in (left, right) if isinstance(n, fx.Node)}
    seen = _watched(Oracle(original).run, call, sides, {})
    x = seen[left.name].cpu()
    y = seen[right.name].cpu() if isinstance(right, fx.Node) else right
    gap = (x - y).abs().expand(flipped.shape)[flipped].max()
    scale = float(x.abs().max()) or 1.0
    return float(gap) / scale <= 2 * tolerance(0.0, dtype)


def _follows_from_floats(
    index: int,
    value: torch.Tensor,
    original: fx.GraphModule,
    folded: fx.GraphModule,
    call: Call,
    allowed: float,
) -> bool | None:
    """Are the floats behind an integer output close, and is it what follows from them?

    ``None`` if those floats cannot be found in the folded graph.
    """
    node = pytree.tree_leaves(original.graph.output_node().args[0])[index]
    sources = {n.name: n for n in _float_sources(node)} if isinstance(node, fx.Node) else {}
    if not sources:
        return None
    reference = _watched(Oracle(original).run, call, set(sources), {})
    own = _native(original, call, {name: name for name in sources})
    twins: dict[str, str] = {}
    for other in folded.graph.nodes:
        name = stands_for(other, sources)
        if name is not None:
            twins[other.name] = name
    got = _native(folded, call, twins)
    for name, traced in sources.items():
        if name not in got or got[name].shape != reference[name].shape:
            return None
        leaf = Leaf(0, name, traced.meta["val"].dtype)
        measure(leaf, got[name], own[name], reference[name], call)
        leaf.settle(allowed)
        if not leaf.error <= leaf.tolerance:
            return False
    args, kwargs = fresh(call)
    known = {traced: got[name] for name, traced in sources.items()}
    with state_kept(original), torch.no_grad():
        outputs = fx.Interpreter(original).run(
            *flat_inputs(original.graph, args, kwargs),
            initial_env=known,
            enable_io_processing=False,
        )
    return torch.equal(pytree.tree_leaves(outputs)[index], value)


def _float_sources(node: fx.Node) -> list[fx.Node]:
    """The nearest floating values upstream of an integer one, input and constants left out."""
    out: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = list(node.all_input_nodes)
    while stack:
        current = stack.pop()
        if current in seen or current.op != "call_function":
            continue
        seen.add(current)
        if is_tensor(current) and current.meta["val"].dtype.is_floating_point:
            out.append(current)
        else:
            stack.extend(current.all_input_nodes)
    return out


def _native(gm: fx.GraphModule, call: Call, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Values of some nodes in the model's own dtype, under the names given."""
    seen: dict[str, torch.Tensor] = {}

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in names:
                seen[names[n.name]] = value.detach().clone()
            return value

    args, kwargs = fresh(call)
    with state_kept(gm), torch.no_grad():
        Watching(gm).run(*flat_inputs(gm.graph, args, kwargs), enable_io_processing=False)
    return seen


def _watched(
    run: Callable[..., Any], call: Call, names: set[str], seen: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    def watch(node: fx.Node, value: Any) -> None:
        if node.name in names:
            seen[node.name] = value

    run(*fresh(call), watch=watch)
    return seen
