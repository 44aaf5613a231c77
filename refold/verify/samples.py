"""Inputs to compare on: the example, then random ones like it, at other sizes too."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from refold.graph.program import Call, Program

_ENOUGH = 8  # values of a channel that tell its distribution

_LARGEST_BATCH = 9  # three batches below are tried, those that the guards admit


def calls_like(program: Program, runs: int) -> Iterator[tuple[Call, bool]]:
    """The example, then random inputs like it: at batch 1, 2 and 3, at half the other sizes."""
    example: Call = program.example
    yield example, False
    generator = torch.Generator().manual_seed(0)
    given = 1
    symbols = {s.sizes[s.batch] for s in program.inputs if s.batch is not None}
    plain = bool(symbols) and all(isinstance(s, str) and s.isidentifier() for s in symbols)
    if plain:
        admitted = (b for b in range(1, _LARGEST_BATCH) if _admitted(program, symbols, b))
        for batch in itertools.islice(admitted, 3):
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
    return found if program.admits(found) else {}


def _admitted(program: Program, symbols: set[Any], batch: int) -> bool:
    return all(_allowed(program, s, batch) for s in symbols) and program.admits(
        dict.fromkeys(symbols, batch)
    )


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
    """Random values distributed like those of ``leaf``.

    Integers, booleans and whole numbers are drawn from its values; other floats have the mean,
    deviation and range of each channel.
    """
    if leaf.is_complex():
        drawn = torch.randn([*sizes, 2], generator=generator, dtype=torch.float64)
        return torch.view_as_complex(drawn).to(leaf.device, leaf.dtype)
    values = leaf.detach().reshape(-1).cpu()
    if not leaf.is_floating_point():
        return _drawn_from(values, sizes, generator).to(leaf.device)
    values = values.double()  # float8 has no isfinite
    finite = values[values.isfinite()]
    if finite.numel() > 1 and not bool((finite == finite[0]).all()) and _are_whole(finite):
        return _drawn_from(finite, sizes, generator).to(leaf.device, leaf.dtype)
    drawn = torch.randn(sizes, generator=generator, dtype=torch.float64)
    told = leaf.ndim < 2 or leaf.shape[1] == sizes[1]
    channels = leaf.detach().cpu().double() if told else finite  # of another number of channels
    mean, deviation, low, high = _distribution(channels, finite)
    drawn = (mean + deviation * drawn).clamp(low, high)
    return drawn.to(leaf.device, leaf.dtype)


def _drawn_from(values: torch.Tensor, sizes: list[int], generator: torch.Generator) -> torch.Tensor:
    if not values.numel():
        return torch.zeros(sizes, dtype=values.dtype)
    count = math.prod(sizes)
    return values[torch.randint(values.numel(), (count,), generator=generator)].reshape(sizes)


def _are_whole(values: torch.Tensor) -> bool:
    """Floats that count or name something: masks, classes, positions."""
    return bool((values == values.round()).all())


def _distribution(leaf: torch.Tensor, finite: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Mean, deviation, lowest and highest value of each channel (axis 1), to be broadcast.

    Of channels with too few values to tell, they are those of the whole; a constant example says
    nothing about the range.
    """
    if not finite.numel():
        finite = torch.zeros(1, dtype=torch.float64)
    whole = [finite.mean(), finite.std(correction=0), finite.min(), finite.max()]
    if float(whole[2]) == float(whole[3]):
        width = float(whole[2].abs()) or 1.0
        return whole[0], torch.tensor(width), whole[2] - width, whole[3] + width
    others = [i for i in range(leaf.ndim) if i != 1]
    if leaf.ndim < 2 or len(finite) < leaf.numel() or leaf.numel() < _ENOUGH * leaf.shape[1]:
        return tuple(whole)
    deviation, mean = torch.std_mean(leaf, others, correction=0, keepdim=True)
    low, high = leaf.amin(others, keepdim=True), leaf.amax(others, keepdim=True)
    constant = low == high
    found = zip((mean, deviation, low, high), whole, strict=True)
    return tuple(torch.where(constant, every, own) for own, every in found)


def shapes_of(call: Call) -> str:
    tensors = [t for t in pytree.tree_leaves(call) if isinstance(t, torch.Tensor)]
    return ", ".join(str(list(t.shape)) for t in tensors) or "no tensors"
