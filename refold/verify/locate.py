"""Where two graphs part: the first layer whose value in float64 the folded graph does not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from refold.errors import VerificationError
from refold.graph import provenance
from refold.graph.evaluate import Oracle
from refold.graph.program import Call, fresh
from refold.verify.samples import shapes_of
from refold.verify.tolerance import Leaf, tolerance

_WATCH_LIMIT = 2**31  # bytes of intermediate values kept to find a deviating node


def too_far(
    leaf: Leaf,
    original: fx.GraphModule | None,
    folded: fx.GraphModule | None,
    calls: list[Call],
) -> VerificationError:
    call = calls[min(leaf.worst_call, len(calls) - 1)]
    text = (
        f"{leaf.name}{leaf.place} is {leaf.error:.2e} from the float64 reference (relative to its "
        f"scale {leaf.scale:.3g}), allowed are {leaf.tolerance:.2e}; the original itself is "
        f"{leaf.own_error:.2e} from it. Worst for inputs {shapes_of(call)}"
    )
    layer = None
    if folded is not None and original is not None:
        found = first_deviation(original, folded, call, leaf.tolerance)
        if found is None:
            text += (
                "\n  every layer agrees in float64: the loss is rounding, or comes after folding"
            )
        else:
            node, error = found
            layer = name_of(node)
            text += f"\n  first layer that deviates: {layer}, by {error:.2e}"
    return VerificationError(text, layer)


def name_of(node: fx.Node) -> str:
    path, line = provenance.module_path(node), provenance.source_line(node)
    return node.name + (f" in module {path!r}" if path else "") + (f" at {line}" if line else "")


def first_deviation(
    original: fx.GraphModule, folded: fx.GraphModule, call: Call, allowed: float
) -> tuple[fx.Node, float] | None:
    """The first node of the original whose value in float64 the folded graph does not have."""
    values: dict[str, tuple[fx.Node, torch.Tensor]] = {}
    kept = 0

    def keep(node: fx.Node, value: Any) -> None:
        nonlocal kept
        if node.op == "call_function" and isinstance(value, torch.Tensor):
            kept += value.numel() * value.element_size()
            if value.is_floating_point() and kept < _WATCH_LIMIT:
                values[node.name] = (node, value)

    Oracle(original).run(*fresh(call), watch=keep)
    found: list[tuple[fx.Node, float]] = []

    def look(node: fx.Node, value: Any) -> None:
        if found or not isinstance(value, torch.Tensor) or node.op == "get_attr":
            return
        name = stands_for(node, values)
        if name is None or values[name][1].shape != value.shape:
            return
        source, expected = values[name]
        finite = expected.isfinite() & value.isfinite()
        if not finite.any():
            return
        scale = float(expected[finite].abs().max()) or 1.0
        error = float((value - expected)[finite].abs().max()) / scale
        if error > max(allowed, tolerance(0.0, source.meta["val"].dtype)):
            found.append((source, error))

    Oracle(folded).run(*fresh(call), watch=look)
    return found[0] if found else None


def stands_for(node: fx.Node, names: Any) -> str | None:
    """The original node whose value a node of the folded graph has, if it is among ``names``."""
    name = provenance.value_of(node)
    return name if name in names else None
