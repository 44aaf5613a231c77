"""Makes a failing network smaller while it fails in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from refold.fuzz.network import Drawn, DrawnNetwork, Value, call, leaves, mapped

_MOST = 400  # networks that are tried


def shrunk(network: DrawnNetwork, fails: Callable[[DrawnNetwork], bool]) -> DrawnNetwork:
    """A smaller network that fails too: fewer outputs, fewer steps, inputs nearer to the fault.

    Args:
        network: one that fails.
        fails: whether a network fails in the same way.
    """
    tried = 0
    found = True
    while found:
        found = False
        for candidate in _smaller(network):
            tried += 1
            if tried > _MOST:
                return network
            if fails(candidate):
                network, found = candidate, True
                break
    return network


def _smaller(network: DrawnNetwork) -> Iterator[DrawnNetwork]:
    """Candidates, those that would lose most first."""
    outputs = [v for v in leaves(network.outputs) if isinstance(v, Value)]
    if len(outputs) > 1:
        yield from (replace(network, outputs=(one,)).pruned() for one in outputs)
    elif network.outputs != (outputs[0],):
        yield replace(network, outputs=(outputs[0],)).pruned()
    if network.wraps:
        yield replace(network, wraps=False)
    if any(s.part for s in network.steps):
        yield replace(network, steps=tuple(replace(s, part=0) for s in network.steps))
    values = _values(network)
    count = len(network.inputs)
    for at in range(len(network.steps) - 1, -1, -1):
        number = count + at
        value = values[number]
        if not isinstance(value, Tensor):
            continue
        for source in dict.fromkeys(network.steps[at].reads):
            if _alike(values[source], value):
                yield _replaced(network, number, source).pruned()
        if len(network.inputs) < 4 and value.is_floating_point():
            yield _given(network, number, value).pruned()
    used = {v for s in network.steps for v in s.reads} | {v.index for v in outputs}
    for at in range(count - 1, -1, -1):
        if at not in used and count > 1:
            yield _without_input(network, at)


def _values(network: DrawnNetwork) -> list[object]:
    values: list[object] = [v.clone() for v in network.example()]
    held = network.weights()
    for step in network.steps:
        try:
            values.append(call(step, values, held))
        except (RuntimeError, ValueError, IndexError, TypeError):
            values.append(None)
    return values


def _alike(value: object, other: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == other.shape and value.dtype == other.dtype


def _replaced(network: DrawnNetwork, old: int, new: int) -> DrawnNetwork:
    def moved(leaf: object) -> object:
        return Value(new) if leaf == Value(old) else leaf

    steps = tuple(
        replace(s, args=mapped(s.args, moved), kwargs=mapped(dict(s.kwargs), moved))
        for s in network.steps
    )
    return replace(network, steps=steps, outputs=mapped(network.outputs, moved))


def _given(network: DrawnNetwork, number: int, value: Tensor) -> DrawnNetwork:
    """The value of a step becomes an input, so that what made it can go."""
    count = len(network.inputs)
    drawn = Drawn("normal", tuple(value.shape), value.dtype, seed=number)
    batch = network.inputs[0].shape[:1]
    shifted = {i: i if i < count else i + 1 for i in range(count + len(network.steps))}
    moved = network.renumbered(shifted)
    moved = replace(
        moved,
        inputs=(*network.inputs, drawn),
        batched=(*network.batched, tuple(value.shape[:1]) == batch),
    )
    return _replaced(moved, number + 1, count)


def _without_input(network: DrawnNetwork, at: int) -> DrawnNetwork:
    numbers = {i: i - (i > at) for i in range(len(network.inputs) + len(network.steps)) if i != at}
    moved = network.renumbered(numbers)
    return replace(
        moved,
        inputs=tuple(d for i, d in enumerate(network.inputs) if i != at),
        batched=tuple(b for i, b in enumerate(network.batched) if i != at),
        sizes=network.sizes if at else (),
    )
