"""Tensors behind one another."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from refold.graph.nodes import arguments, aten, is_call, is_tensor, shape


@dataclass(frozen=True)
class Cat:
    """Tensors of one rank behind one another along ``axis``."""

    node: fx.Node
    parts: tuple[fx.Node, ...]
    axis: int


def cat(node: object) -> Cat | None:
    """Reads a concatenation; an empty vector among tensors of any rank is skipped by PyTorch."""
    if not is_call(node, aten.cat.default):
        return None
    assert isinstance(node, fx.Node)
    args, rank = arguments(node), len(shape(node))
    parts = tuple(args["tensors"])
    if not all(is_tensor(p) and len(shape(p)) == rank for p in parts):
        return None
    return Cat(node, parts, int(args["dim"]) % rank)
