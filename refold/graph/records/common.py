"""What the readers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from refold.algebra.lazy import Lazy
from refold.graph import constants
from refold.graph.nodes import is_empty, is_tensor

Ints = tuple[int, ...]


def ints(value: Any, count: int) -> Ints | None:
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(v, (fx.Node, torch.SymInt)) for v in items):
        return None
    if len(items) == 1:
        items = items * count
    return tuple(int(v) for v in items) if len(items) == count else None


def fixed_float(node: fx.Node) -> bool:
    """True for floating tensors that are not known to be empty: layers of no width fold nothing."""
    return (
        is_tensor(node)
        and node.meta["val"].dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and not is_empty(node)
    )


def constant(value: Any, rank: int) -> Lazy | None:
    """A constant operand, a number or a node, with its shape padded to ``rank``."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        number = float(value)
        return Lazy((1,) * rank, lambda: torch.full((1,) * rank, number, dtype=torch.float64))
    lazy = constants.compact(value)
    if lazy is None or len(lazy.shape) > rank:
        return None
    full = (1,) * (rank - len(lazy.shape)) + lazy.shape
    return lazy if full == lazy.shape else lazy.map(full, lambda t: t.reshape(full))
