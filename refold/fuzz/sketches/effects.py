"""Writes, state and choices: what only tracing takes."""

from __future__ import annotations

from refold.fuzz.draw import Draw, fits, sketch
from refold.fuzz.network import Cond, Drawn, DrawnCall, DrawnNetwork, Held, Value, mapped


@sketch(3, effect=True)
def _write(d: Draw, x: Value) -> Value:
    """An in-place call, on a value, a view of it, or an input."""
    name = d.one(("add_", "mul_", "relu_", "clamp_", "copy_", "sub_", "zero_", "fill_"))
    at = x
    if d.chance(0.4):
        fits(len(d.shape(x)) >= 2)
        at = d.call("slice", x, 1, 0, max(1, d.shape(x)[1] - 1))
    if name in ("relu_", "zero_"):
        d.call(name, at)
    elif name == "fill_":
        d.call(name, at, 0.5)
    elif name == "clamp_":
        d.call(name, at, -1.0, 1.0)
    elif name == "copy_":
        d.call(name, at, d.call("mul", at, 2.0))
    else:
        d.call(name, at, d.one((2.0, 0.5)))
    return d.call("mul", x, 1.5) if d.chance(0.5) else x


@sketch(1, effect=True)
def _state(d: Draw, x: Value) -> Value:
    """A buffer that each call writes."""
    width = d.shape(x)[-1]
    name = f"state{len(d.held)}"
    d.held[name] = Drawn("normal", (width,), d.dtype, d.rng.randrange(10**6), buffer=True)
    d.weights[name] = d.held[name].make()
    buffer = Held(name)
    old = d.call("mul", buffer, 1.0)
    if d.chance(0.5):
        d.call("add_", buffer, 1.0)
    else:
        axes = list(range(len(d.shape(x)) - 1))
        fits(axes)
        d.call("copy_", buffer, d.call("mean", x, axes))
    return d.call("add", x, old if d.chance(0.5) else buffer)


@sketch(1, effect=True)
def _choice(d: Draw, x: Value) -> Value:
    """One of two networks, by the sign of a sum."""
    shape = d.shape(x)
    first = Value(0)

    def branch() -> DrawnNetwork:
        own = Draw(d.rng, d.dtype)
        own.values = [d.values[x.index].clone()]
        y = own.linear(first, shape[-1])
        y = own.call(d.one(("relu", "tanh")), y) if d.chance(0.5) else own.call("mul", y, 2.0)
        base = len(d.held)
        names = {old: f"p{base + i}" for i, old in enumerate(own.held)}
        for old, new in names.items():
            d.held[new] = own.held[old]
            d.weights[new] = own.weights[old]
        steps = tuple(_renamed(s, names) for s in own.steps)
        return DrawnNetwork((Drawn("normal", shape),), {names[n]: h for n, h in own.held.items()},
                       steps, y)  # fmt: skip

    then, otherwise = branch(), branch()
    pick = d.call("gt", d.call("sum", x), 0)
    return d.call(Cond(then, otherwise), pick, x)


def _renamed(step: DrawnCall, names: dict[str, str]) -> DrawnCall:
    def moved(leaf: object) -> object:
        return Held(names[leaf.name]) if isinstance(leaf, Held) else leaf

    return DrawnCall(
        step.target, mapped(step.args, moved), mapped(dict(step.kwargs), moved), step.part
    )
