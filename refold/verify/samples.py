"""Inputs to compare on: the example, then random ones like it, at other sizes too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from refold.frontends.export import Program

Call = tuple[tuple[Any, ...], dict[str, Any]]


def calls_like(program: Program, runs: int) -> Iterator[tuple[Call, bool]]:
    """The example, then random inputs like it: at batch 1, 2 and 3, at half the other sizes."""
    example: Call = program.example
    yield example, False
    generator = torch.Generator().manual_seed(0)
    given = 1
    symbols = {s.sizes[s.batch] for s in program.inputs if s.batch is not None}
    plain = bool(symbols) and all(isinstance(s, str) and s.isidentifier() for s in symbols)
    if plain:
        for batch in (1, 2, 3):
            if all(_allowed(program, s, batch) for s in symbols):
                yield _like(program, example, generator, dict.fromkeys(symbols, batch)), True
                given += 1
    halved = _halved(program, symbols)
    if halved:
        yield _like(program, example, generator, halved), True
        given += 1
    while given < runs:
        yield _like(program, example, generator, {}), True
        given += 1


def _halved(program: Program, batches: set[Any]) -> dict[Any, int]:
    """Half the example's size for each dynamic dimension that is not a batch."""
    found = {}
    for leaf, described in zip(pytree.tree_leaves(program.example), program.inputs, strict=True):
        for size, have in zip(described.sizes, getattr(leaf, "shape", ()), strict=False):
            if isinstance(size, str) and size not in batches:
                if not size.isidentifier() or not _allowed(program, size, have // 2):
                    return {}
                found[size] = int(have) // 2
    return found


def _allowed(program: Program, symbol: Any, size: int) -> bool:
    low, high = program.ranges.get(symbol, (0, None))
    # The tracer's own lower bound is 2, for want of a better one.
    return size >= (1 if low <= 2 else low) and (high is None or size <= high)


def _like(
    program: Program, example: Call, generator: torch.Generator, resized: dict[Any, int]
) -> Call:
    """Random inputs like the example's; ``resized`` holds other sizes for symbols."""
    leaves, spec = pytree.tree_flatten(example)
    out = []
    for leaf, described in zip(leaves, program.inputs, strict=True):
        if not isinstance(leaf, torch.Tensor):
            out.append(leaf)
            continue
        sizes = [
            resized.get(size, have) if isinstance(size, str) else have
            for size, have in zip(described.sizes, leaf.shape, strict=True)
        ]
        out.append(_random_like(leaf, [int(s) for s in sizes], generator))
    return pytree.tree_unflatten(out, spec)


def _random_like(leaf: torch.Tensor, sizes: list[int], generator: torch.Generator) -> torch.Tensor:
    """Random values in the range of ``leaf``; integers and booleans are drawn from its values."""
    if not (leaf.is_floating_point() or leaf.is_complex()):
        values = leaf.detach().reshape(-1).cpu()
        count = int(torch.tensor(sizes).prod()) if sizes else 1
        if not values.numel():
            return torch.zeros(sizes, dtype=leaf.dtype, device=leaf.device)
        chosen = torch.randint(values.numel(), (count,), generator=generator)
        return values[chosen].reshape(sizes).to(leaf.device)
    if leaf.is_complex():
        drawn = torch.randn([*sizes, 2], generator=generator, dtype=torch.float64)
        return torch.view_as_complex(drawn).to(leaf.device, leaf.dtype)
    finite = leaf.detach()[leaf.detach().isfinite()].double()
    low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)
    if low == high:  # a constant example says nothing about the range
        width = abs(low) or 1.0
        low, high = low - width, high + width
    drawn = torch.rand(sizes, generator=generator, dtype=torch.float64) * (high - low) + low
    return drawn.to(leaf.device, leaf.dtype)


def shapes_of(call: Call) -> str:
    tensors = [t for t in pytree.tree_leaves(call) if isinstance(t, torch.Tensor)]
    return ", ".join(str(list(t.shape)) for t in tensors) or "no tensors"
