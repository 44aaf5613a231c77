"""Draws random networks: what rules rewrite, and every operator of the table by itself.

A network grows by sketches: a sketch takes a value and adds the calls of one idea (a convolution, a
block of branches, an expert mixture) with sizes, strides and weights of its own. Sizes coincide
often (channels = height = batch), because that is where an axis is taken for another one.
"""

from __future__ import annotations

import functools
import itertools
import random
from typing import Any

import torch
from torch import Tensor

from refold.fuzz.calls import DATA, KINDS, SHAPES, OperatorCall, calls_on, operators
from refold.fuzz.draw import SIZES, Draw, fits
from refold.fuzz.network import Drawn, DrawnNetwork, Value, mapped, renumbered
from refold.fuzz.program import Unsuited, program_of
from refold.fuzz.sketches import EFFECTS, SKETCHES
from refold.graph import ops

_DEPENDS = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
_TRIES = 12
_CALLS = 3  # of an operator on data of one shape


def network_of(
    seed: int, *, effects: bool = False, dtype: torch.dtype = torch.float64
) -> DrawnNetwork:
    """The network of a seed.

    Args:
        seed: of every choice.
        effects: with writes and choices, which only tracing takes.
        dtype: of inputs and weights.
    """
    return drawn(random.Random(seed), effects=effects, dtype=dtype, turn=seed)


def drawn(
    rng: random.Random,
    *,
    effects: bool = False,
    dtype: torch.dtype = torch.float64,
    turn: int | None = None,
) -> DrawnNetwork:
    """A network from a source of random numbers; see :func:`network_of`.

    Args:
        rng: of every choice.
        effects: with writes and choices.
        dtype: of inputs and weights.
        turn: which operator of the table is called by itself; without it, any.
    """
    draw = Draw(rng, dtype, effects)
    shape, vary = _input_shape(draw)
    count = rng.choice((1, 1, 1, 2, 2, 3))
    shapes = [shape, *(shape if rng.random() < 0.7 else _other_shape(draw, shape)
                       for _ in range(count - 1))]  # fmt: skip
    for each in shapes:
        draw.inputs.append(Drawn("normal", each, dtype, rng.randrange(10**6)))
    if rng.random() < 0.12:  # positions, as of tokens
        draw.inputs.append(
            Drawn("integers", (shape[0], rng.choice((2, 3, 4))), torch.int64, rng.randrange(10**6),
                  rng.choice((3, 4, 5)))
        )  # fmt: skip
    draw.values += [d.make() for d in draw.inputs]
    ideas = [*SKETCHES.values(), *(EFFECTS.values() if effects else ())]
    functions, weights = zip(*ideas, strict=True)
    wanted = rng.randint(1, 3) if rng.random() < 0.3 else rng.randint(2, 8)
    for _ in range(wanted):
        for _ in range(_TRIES):
            if draw.grow(rng.choices(functions, weights)[0], draw.pick()):
                break
        if rng.random() < 0.25:
            draw.part += 1
    names = [n for n in drawable() if effects or not _follows_values(n)]
    _reach_operator(draw, rng.choice(names) if turn is None else names[turn % len(names)])
    return _finished(draw, vary)


def _input_shape(draw: Draw) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of the first input, and its axes beside the batch that may vary."""
    rng = draw.rng
    if rng.random() < 0.3:
        return rng.choice([s for s in SHAPES if s]), ()
    rank = rng.choice((2, 3, 3, 4, 4, 4, 4, 5))
    if rng.random() < 0.35:
        return (rng.choice((2, 3, 4)),) * rank, ()
    shape = (rng.choice((2, 2, 3, 4)), *(rng.choice(SIZES) for _ in range(rank - 1)))
    vary: tuple[int, ...] = ()
    if rank >= 3 and rng.random() < 0.2:
        vary = tuple(range(2, rank)) if rank > 3 else (1,) if rng.random() < 0.5 else (2,)
        shape = (*shape[:2], *(max(n, 3) for n in shape[2:]))
    return shape, vary


def _other_shape(draw: Draw, shape: tuple[int, ...]) -> tuple[int, ...]:
    rank = draw.one((2, 3, 4))
    return (shape[0], *(draw.one(SIZES) for _ in range(rank - 1)))


def _reach_operator(draw: Draw, name: str) -> None:
    """One operator of the whole table, on a value whose shape suits it, or on a new input."""
    overloads = list(drawable()[name])
    draw.rng.shuffle(overloads)
    found = [Value(i) for i in draw.floats() if tuple(draw.values[i].shape) in SHAPES]
    draw.rng.shuffle(found)
    for overload in overloads:
        if any(_grown(draw, x, overload, "floats") for x in found[:3]):
            return
    for overload, kind in itertools.product(overloads, KINDS):
        shapes = [s for s in SHAPES if calls_on(overload, s, _CALLS, kind)]
        if shapes and _grown(draw, _new_input(draw, draw.one(shapes), kind), overload, kind):
            return


def _grown(draw: Draw, x: Value, overload: Any, kind: str) -> bool:
    """Adds the call, and most times something that reads its result."""
    if not draw.grow(lambda d, v: _any_operator(d, v, overload, kind), x):
        return False
    last = len(draw.values) - 1
    if draw.chance(0.6) and last in draw.floats():
        functions, weights = zip(*SKETCHES.values(), strict=True)
        draw.grow(draw.rng.choices(functions, weights)[0], Value(last))
    return True


def _new_input(draw: Draw, shape: tuple[int, ...], kind: str) -> Value:
    """Another input; the values behind it get other numbers."""
    at = len(draw.inputs)
    numbers = {i: i if i < at else i + 1 for i in range(len(draw.values))}
    draw.steps[:] = [renumbered(s, numbers) for s in draw.steps]
    seed = draw.rng.randrange(10**6)
    if kind == "floats":
        draw.inputs.append(Drawn("unit", shape, draw.dtype, seed))
    elif kind == "integers":
        draw.inputs.append(Drawn(kind, shape, torch.int64, seed, 4))
    else:
        draw.inputs.append(Drawn(kind, shape, torch.complex128, seed))
    draw.values.insert(at, draw.inputs[-1].make())
    return Value(at)


@functools.cache
def drawable() -> dict[str, list[Any]]:
    """The overloads of operators of the table that calls are drawn of, by the operator's name."""
    found: dict[str, list[Any]] = {}
    for label, overload in operators()[0].items():
        name = label.rpartition(".")[0]
        if name in ops.ROWS:
            found.setdefault(name, []).append(overload)
    return {name: found[name] for name in sorted(found)}


@functools.cache
def _follows_values(name: str) -> bool:
    """Whether sizes of its results depend on values: only tracing takes it."""
    return all(_DEPENDS & set(overload.tags) for overload in drawable()[name])


def callable_alone(name: str) -> bool:
    """Whether some call of an operator is found by trying, and a trace knows its sizes."""
    return any(
        _traced(overload, shape, kind)
        for overload in drawable()[name]
        for shape, kind in itertools.product(SHAPES, KINDS)
    )


def _traced(overload: Any, shape: tuple[int, ...], kind: str) -> bool:
    """Whether a call of an operator alone is found, and can be written as a graph."""
    if _DEPENDS & set(overload.tags) or not calls_on(overload, shape, _CALLS, kind):
        return False
    draw = Draw(random.Random(0))
    x = _new_input(draw, shape, kind)
    if not draw.grow(lambda d, v: _any_operator(d, v, overload, kind), x):
        return False
    try:
        program_of(_finished(draw, ()), dynamic=False)
    except Unsuited:
        return False
    return True


def _any_operator(draw: Draw, x: Value, overload: Any, kind: str) -> Value:
    calls = calls_on(overload, draw.shape(x), _CALLS, kind)
    fits(calls)
    chosen: OperatorCall = draw.one(calls)
    other = draw.alike(x)

    def operand(leaf: Any) -> Any:
        if leaf is DATA:
            return x
        if not isinstance(leaf, Tensor):
            return leaf
        same = leaf.is_floating_point() and tuple(leaf.shape) == draw.shape(x)
        if same and other is not None and draw.chance(0.5):
            return other
        dtype = draw.dtype if leaf.is_floating_point() else leaf.dtype
        return draw.hold("given", *leaf.shape, dtype=dtype, detail=leaf.flatten().tolist(),
                         buffer=True)  # fmt: skip

    made = draw.call(overload, *mapped(list(chosen.args), operand), keep=True,
                     **mapped(chosen.kwargs, operand))  # fmt: skip
    result = draw.values[made.index]
    if isinstance(result, (tuple, list)):
        for at, part in enumerate(result):
            if isinstance(part, Tensor):
                made = draw.item(Value(len(draw.values) - 1 - at), at)
    return made


def _finished(draw: Draw, vary: tuple[int, ...]) -> DrawnNetwork:
    """The network whose outputs are what nothing reads, and at times something that is read."""
    count = len(draw.inputs)
    tensors = [i for i in range(count, len(draw.values)) if isinstance(draw.values[i], Tensor)]
    if not tensors:
        fallback = draw.call("mul", Value(0), 2.0)
        tensors = [fallback.index]
    read = {i for s in draw.steps for i in s.reads}
    outputs = [i for i in tensors if i not in read] or tensors[-1:]
    if draw.chance(0.15):
        outputs.append(draw.one(tensors))
    if draw.chance(0.04):
        outputs.append(0)  # an input, given back
    tree: Any = tuple(Value(i) for i in outputs[-6:])
    wraps = draw.effects and draw.chance(0.2)
    if draw.effects and draw.chance(0.3):
        tree = {"first": tree[0], "rest": [list(tree[1:])]} if len(tree) > 1 else {"only": tree}
    batched = tuple(bool(d.shape) and d.shape[0] == draw.inputs[0].shape[0] for d in draw.inputs)
    network = DrawnNetwork(
        tuple(draw.inputs), dict(draw.held), tuple(draw.steps), tree, batched, vary, wraps
    )
    return network.pruned()
