"""A random network as data: calls of operators over numbered values.

The inputs come first, then the result of each call. The weights are drawn from seeds
(:class:`Drawn`), so that the printed module (:mod:`refold.fuzz.source`) has the very same numbers,
and so has the graph (:mod:`refold.fuzz.program`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Value:
    """The number of a value: an input, or the result of a step."""

    index: int


@dataclass(frozen=True)
class Held:
    """A tensor that the network holds, by name."""

    name: str


@dataclass(frozen=True)
class Drawn:
    """How a tensor is made.

    Attributes:
        kind: ``normal``, ``positive`` (0.5 and more), ``unit`` (from 0.25 to 0.95), ``sparse`` (a
            normal one with zeros), ``full`` (one number), ``integers``, ``mask``, ``complex`` or
            ``given`` (the numbers themselves).
        shape: its sizes.
        dtype: of the result.
        seed: of the draw.
        detail: the number of ``full``, the limit of ``integers``, the values of ``given``.
        buffer: whether it is a buffer of the module, rather than a parameter.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    seed: int = 0
    detail: Any = 0
    buffer: bool = False

    def make(self, shape: Sequence[int] | None = None) -> torch.Tensor:
        """The tensor, or one of another shape that is made alike."""
        return draw_tensor(
            self.kind, self.shape if shape is None else shape, self.dtype, self.seed, self.detail
        )


def draw_tensor(
    kind: str, shape: Sequence[int], dtype: torch.dtype, seed: int, detail: Any = 0
) -> torch.Tensor:
    """Makes a tensor from a seed: what a printed module calls, which has this very function."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "given":
        return torch.tensor(detail, dtype=dtype).reshape(tuple(shape))
    if kind == "full":
        return torch.full(tuple(shape), detail, dtype=dtype)
    if kind == "integers":
        return torch.randint(0, detail, tuple(shape), generator=generator).to(dtype)
    if kind == "mask":
        return torch.rand(tuple(shape), generator=generator) > 0.5
    if kind == "complex":
        return torch.randn(tuple(shape), generator=generator, dtype=dtype)
    values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    if kind == "unit":
        values = torch.rand(tuple(shape), generator=generator, dtype=torch.float64) * 0.7 + 0.25
    if kind == "positive":
        values = values.abs() + 0.5
    if kind == "sparse":
        values = values * (torch.rand(tuple(shape), generator=generator) > 0.4)
    return values.to(dtype)


@dataclass(frozen=True)
class Cond:
    """Stands as the target of a step that takes one of two networks, by a truth value."""

    then: DrawnNetwork
    otherwise: DrawnNetwork


@dataclass(frozen=True)
class DrawnCall:
    """One call: ``target(*args, **kwargs)``, with :class:`Value` and :class:`Held` in it.

    Attributes:
        target: an overload of an operator, ``getitem``, or :class:`Cond`.
        args: its operands.
        kwargs: its keyword operands.
        part: the submodule that makes it, a number from 0.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    part: int = 0

    @property
    def reads(self) -> list[int]:
        """The numbers of the values that it reads."""
        return [v.index for v in leaves((self.args, self.kwargs)) if isinstance(v, Value)]

    @property
    def holds(self) -> list[str]:
        """The names of the held tensors that it reads."""
        return [v.name for v in leaves((self.args, self.kwargs)) if isinstance(v, Held)]


@dataclass(frozen=True)
class DrawnNetwork:
    """Steps over inputs and held tensors.

    Attributes:
        inputs: how each input is made; the leading size of those that ``batched`` says is the
            batch.
        held: the tensors of the module.
        steps: in the order in which they run.
        outputs: a tree of :class:`Value`.
        batched: for each input, whether its first dimension is the batch.
        sizes: dimensions of the first input, beside the batch, that may vary.
        wraps: whether the inputs are given in a dictionary.
    """

    inputs: tuple[Drawn, ...]
    held: Mapping[str, Drawn]
    steps: tuple[DrawnCall, ...]
    outputs: Any
    batched: tuple[bool, ...] = ()
    sizes: tuple[int, ...] = ()
    wraps: bool = False

    # --- running ----------------------------------------------------------------------------------

    def run(self, inputs: Sequence[torch.Tensor], held: Mapping[str, torch.Tensor]) -> Any:
        """What eager PyTorch computes."""
        values: list[Any] = list(inputs)
        with torch.no_grad():
            for step in self.steps:
                values.append(call(step, values, held))
        return pytree.tree_map(
            lambda v: values[v.index] if isinstance(v, Value) else v, self.outputs,
            is_leaf=_is_leaf,
        )  # fmt: skip

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: drawn.make() for name, drawn in self.held.items()}

    def example(self, batch: int | None = None, seed: int = 0, more: int = 0) -> list[torch.Tensor]:
        """Inputs: those of the network, or others of another batch and of larger sizes."""
        made = []
        for at, (drawn, batched) in enumerate(zip(self.inputs, self.batched, strict=True)):
            shape = list(drawn.shape)
            if batched and batch is not None:
                shape[0] = batch
            for axis in self.sizes if at == 0 else ():
                shape[axis] += more
            made.append(replace(drawn, seed=drawn.seed + 1000 * seed).make(shape))
        return made

    # --- reading ----------------------------------------------------------------------------------

    @property
    def operators(self) -> list[str]:
        """The names of what it calls, branches too."""
        found = []
        for step in self.steps:
            if isinstance(step.target, Cond):
                found += [*step.target.then.operators, *step.target.otherwise.operators]
            elif isinstance(step.target, torch._ops.OpOverload):
                found.append(step.target._schema.name.split("::")[-1])
        return found

    @property
    def pure(self) -> bool:
        """Whether no call writes into a tensor, and none is a choice of two networks."""
        return not any(writes(s.target) or isinstance(s.target, Cond) for s in self.steps)

    def pruned(self) -> DrawnNetwork:
        """Without steps and held tensors that nothing needs, and with values numbered anew."""
        count = len(self.inputs)
        needed = {v.index for v in leaves(self.outputs)}
        kept: set[int] = set()
        for at in reversed(range(len(self.steps))):
            step = self.steps[at]
            if count + at in needed or writes(step.target):
                kept.add(at)
                needed.update(step.reads)
        order = [*range(count), *(count + at for at in sorted(kept))]
        return self.renumbered({old: new for new, old in enumerate(order)})

    def renumbered(self, numbers: Mapping[int, int]) -> DrawnNetwork:
        """With other numbers for values; steps whose number is not among them are left out."""
        count = len(self.inputs)

        steps = [renumbered(s, numbers) for at, s in enumerate(self.steps) if count + at in numbers]
        names = {name for s in steps for name in s.holds}
        for step in steps:
            if isinstance(step.target, Cond):
                names |= {*step.target.then.held, *step.target.otherwise.held}
        held = {name: drawn for name, drawn in self.held.items() if name in names}
        return replace(self, steps=tuple(steps), outputs=_moved(self.outputs, numbers), held=held)

    def arguments(self, inputs: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        """Inputs as the module takes them."""
        if self.wraps:
            return ({f"x{i}": [v] for i, v in enumerate(inputs)},)
        return tuple(inputs)


def _is_leaf(value: Any) -> bool:
    return isinstance(value, (Value, Held))


def leaves(tree: Any) -> list[Any]:
    """The leaves of nested operands, :class:`Value` and :class:`Held` among them."""
    if isinstance(tree, (list, tuple)):
        return [leaf for item in tree for leaf in leaves(item)]
    if isinstance(tree, Mapping):
        return [leaf for item in tree.values() for leaf in leaves(item)]
    return [tree]


def mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Nested operands with every leaf changed."""
    if isinstance(tree, (list, tuple)):
        return type(tree)(mapped(item, change) for item in tree)
    if isinstance(tree, Mapping):
        return {key: mapped(item, change) for key, item in tree.items()}
    return change(tree)


def _moved(tree: Any, numbers: Mapping[int, int]) -> Any:
    return mapped(tree, lambda v: Value(numbers[v.index]) if isinstance(v, Value) else v)


def renumbered(step: DrawnCall, numbers: Mapping[int, int]) -> DrawnCall:
    """A step whose operands have other numbers."""
    args, kwargs = _moved(step.args, numbers), _moved(dict(step.kwargs), numbers)
    return replace(step, args=args, kwargs=kwargs)


def call(step: DrawnCall, values: Sequence[Any], held: Mapping[str, torch.Tensor]) -> Any:
    """Runs one step."""

    def filled(leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return values[leaf.index]
        return held[leaf.name] if isinstance(leaf, Held) else leaf

    args, kwargs = mapped(step.args, filled), mapped(step.kwargs, filled)
    if isinstance(step.target, Cond):
        chosen = step.target.then if bool(args[0]) else step.target.otherwise
        return chosen.run(args[1:], held)
    return step.target(*args, **kwargs)


def writes(target: Any) -> bool:
    """Whether a call writes into an operand."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
