"""A network as it is drawn: each call runs at once, so that the next ones know its shape."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from refold.fuzz.network import Drawn, DrawnCall, Held, Value, call, leaves, mapped

_MOST = 20_000  # elements of a value
_LARGEST = 1e5  # of a value: beyond it rounding says nothing
SIZES = (1, 2, 3, 4, 4, 4, 5, 6, 8)

Sketch = Callable[["Draw", Value], Value]
SKETCHES: dict[str, tuple[Sketch, int]] = {}
EFFECTS: dict[str, tuple[Sketch, int]] = {}  # what writes, or chooses: only tracing takes it


class Unfit(Exception):
    """A sketch does not fit the value that it was given."""


def sketch(weight: int = 1, *, effect: bool = False) -> Callable[[Sketch], Sketch]:
    """Registers a sketch, to be drawn ``weight`` times as often as one of weight 1."""

    def register(function: Sketch) -> Sketch:
        (EFFECTS if effect else SKETCHES)[function.__name__.strip("_")] = (function, weight)
        return function

    return register


def fits(condition: object) -> None:
    if not condition:
        raise Unfit


@dataclass
class Draw:
    """A network as it grows, with the values of every call so far."""

    rng: random.Random
    dtype: torch.dtype = torch.float64
    effects: bool = False
    inputs: list[Drawn] = field(default_factory=list)
    held: dict[str, Drawn] = field(default_factory=dict)
    steps: list[DrawnCall] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    part: int = 0

    # --- what sketches ask ------------------------------------------------------------------------

    def shape(self, x: Value) -> tuple[int, ...]:
        return tuple(self.values[x.index].shape)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def one(self, choices: Sequence[Any]) -> Any:
        fits(choices)
        return self.rng.choice(choices)

    def axis(self, x: Value) -> int:
        """An axis of a value: the batch is one of twelve."""
        rank = len(self.shape(x))
        fits(rank)
        first = 0 if rank == 1 or self.chance(0.08) else 1
        return self.rng.randrange(first, rank)

    def spatial(self, x: Value, *ranks: int) -> int:
        """The number of spatial axes of what has channels."""
        found = len(self.shape(x)) - 2
        fits(found in (ranks or (1, 2, 3)) and self.shape(x)[1] > 0)
        return found

    def hold(self, kind: str, *shape: int, **more: Any) -> Held:
        """A tensor that the network holds."""
        dtype, given = more.pop("dtype", self.dtype), "seed" in more
        seed = more.pop("seed") if given else self.rng.randrange(10**6)
        drawn = Drawn(kind, shape, dtype, seed, **more)
        same = [] if given else [n for n, d in self.held.items() if (d.kind, d.shape, d.dtype) ==
                (kind, shape, dtype)]  # fmt: skip
        if same and self.chance(0.06):
            return Held(self.one(same))  # a tensor that two calls share
        name = f"p{len(self.held)}"
        self.held[name] = drawn
        self.weights[name] = drawn.make()
        return Held(name)

    def numbers(self, *shape: int) -> Held:
        """A held tensor of some kind: normal, positive, with zeros, or of one number."""
        kind = self.one(("normal", "normal", "positive", "sparse", "full"))
        detail = self.one((1.0, -1.0, 0.5, 2.0, 0.0)) if kind == "full" else 0
        return self.hold(kind, *shape, detail=detail, buffer=self.chance(0.3))

    def maybe(self, *shape: int) -> Held | None:
        return self.numbers(*shape) if self.chance(0.6) else None

    # --- what sketches do -------------------------------------------------------------------------

    def call(self, name: Any, *args: Any, keep: bool = False, **kwargs: Any) -> Value:
        """Adds a call, and runs it.

        Args:
            name: of an operator of ATen, or an overload.
            args: operands.
            keep: whether a result that is not finite is kept.
            kwargs: keyword operands.

        Raises:
            Unfit: eager PyTorch does not take it, or its result is too large.
        """
        target = self._overload(name, args, kwargs) if isinstance(name, str) else name
        step = DrawnCall(target, args, kwargs, self.part)
        try:
            result = call(step, self.values, self.weights)
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError) as error:
            raise Unfit from error
        fits(keep or all(_sound(v) for v in leaves(result) if isinstance(v, Tensor)))
        self.steps.append(step)
        self.values.append(result)
        return Value(len(self.values) - 1)

    def _overload(self, name: str, args: Any, kwargs: Any) -> Any:
        def filled(leaf: Any) -> Any:
            if isinstance(leaf, Value):
                return self.values[leaf.index]
            return self.weights[leaf.name] if isinstance(leaf, Held) else leaf

        packet = getattr(torch.ops.aten, name)
        try:
            chosen = torch._C._jit_resolve_packet(
                f"aten::{name}", *mapped(args, filled), **mapped(kwargs, filled)
            )
        except RuntimeError as error:
            raise Unfit from error
        return getattr(packet, chosen or "default")

    def item(self, several: Value, at: int = 0) -> Value:
        return self.call(operator.getitem, several, at)

    def size(self, x: Value, axis: int) -> Value:
        return self.call("sym_size", x, axis)

    def reshape(self, x: Value, sizes: Sequence[int]) -> Value:
        """A reshape that keeps the leading size."""
        name = self.one(("reshape", "reshape", "view"))
        return self.call(name, x, [-1, *sizes[1:]])

    def alike(self, x: Value) -> Value | None:
        """Another value of the same shape, if there is one."""
        shape = self.shape(x)
        found = [Value(i) for i, v in enumerate(self.values)
                 if i != x.index and isinstance(v, Tensor) and v.shape == shape
                 and v.dtype == self.dtype]  # fmt: skip
        return self.one(found) if found else None

    def linear(self, x: Value, out: int, bias: bool | None = None) -> Value:
        width = self.shape(x)[-1]
        with_bias = self.chance(0.6) if bias is None else bias
        given = self.numbers(out) if with_bias else None
        return self.call("linear", x, self.hold("normal", out, width), given)

    def conv(self, x: Value, out: int, kernel: int = 1, *, bias: bool = True) -> Value:
        """A convolution that keeps sizes; the kernel is odd."""
        rank = self.spatial(x)
        weight = self.hold("normal", out, self.shape(x)[1], *[kernel] * rank)
        given = self.numbers(out) if bias else None
        ones = [1] * rank
        return self.call(f"conv{rank}d", x, weight, given, ones, [kernel // 2] * rank, ones, 1)

    def norm(self, x: Value) -> Value:
        """A batch norm as a trace has it."""
        c = self.shape(x)[1]
        weight, bias = self.hold("sparse" if self.chance(0.2) else "normal", c), self.numbers(c)
        mean = self.hold("normal", c, buffer=True)
        variance = self.hold("positive", c, buffer=True)
        if self.chance(0.25):
            return self.call("batch_norm", x, weight, bias, mean, variance, False, 0.1, 1e-5, True)
        made = self.call(
            "_native_batch_norm_legit_no_training", x, weight, bias, mean, variance, 0.1,
            self.one((1e-5, 1e-3)), keep=True,
        )  # fmt: skip
        return self.item(made)

    # --- growing ----------------------------------------------------------------------------------

    def floats(self) -> list[int]:
        return [i for i, v in enumerate(self.values) if isinstance(v, Tensor)
                and v.dtype == self.dtype and v.dim()]  # fmt: skip

    def pick(self) -> Value:
        """A value to go on from: the last one more often than not."""
        found = self.floats()
        return Value(found[-1] if self.chance(0.6) else self.one(found))

    def grow(self, function: Sketch, x: Value) -> bool:
        """Adds a sketch to a value; leaves everything as it was where it does not fit."""
        marks = len(self.steps), len(self.values), dict(self.held)
        kept = {n: w.clone() for n, w in self.weights.items()} if self.effects else self.weights
        before = [v.clone() if isinstance(v, Tensor) else v for v in self.values] \
            if self.effects else self.values  # fmt: skip
        try:
            function(self, x)
        except Unfit:
            del self.steps[marks[0] :]
            if self.effects:
                self.values, self.weights = before, kept
            del self.values[marks[1] :]
            self.held = marks[2]
            self.weights = {n: w for n, w in self.weights.items() if n in self.held}
            return False
        return True


def _sound(value: Tensor) -> bool:
    if not 0 < value.numel() <= _MOST or value.dim() > 6:
        return False
    if not value.is_floating_point():
        return not value.is_complex() or bool(value.isfinite().all())
    return bool(value.isfinite().all()) and float(value.abs().max()) <= _LARGEST
