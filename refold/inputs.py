"""Calls of a compiled model: brought into the traced form and checked against its promises."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree

from refold.errors import UsageError
from refold.frontends.bind import free_signature
from refold.frontends.variadic import flat_arguments
from refold.graph.guards import Guards
from refold.graph.program import Call, InputSpec, Program


@dataclass(frozen=True)
class InputCheck:
    """What a trace promised about its inputs.

    An edited graph has lost the guards of its export: without this check a wrong shape could
    compute a wrong number instead of failing.
    """

    specs: tuple[InputSpec, ...]
    ranges: Mapping[str, tuple[int, int | None]]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    spec: pytree.TreeSpec
    signature: inspect.Signature | None
    guards: Guards = field(default_factory=Guards)
    static_batch: str = ""  # why the batch is, where it was to vary

    @classmethod
    def of(cls, program: Program, model: Any, bind: Iterable[str] = ()) -> InputCheck:
        info = program.graph_module.graph._codegen.pytree_info  # type: ignore[attr-defined]
        return cls(
            program.inputs,
            program.ranges,
            program.args,
            program.kwargs,
            info.in_spec,
            _signature_of(model, bind),
            program.guards,
            next((s for s in program.specialised if s.startswith("the batch dimension")), ""),
        )

    def normalise(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The same call in the form that was traced (which inputs are positional, their order).

        Raises:
            UsageError: the call does not fit what was traced.
        """
        if len(args) == len(self.args) and kwargs.keys() == self.kwargs.keys():
            return args, {name: kwargs[name] for name in self.kwargs}
        if self.signature is None:
            raise UsageError(self._call_mismatch(args, kwargs))
        try:
            traced = flat_arguments(self.signature, self.args, self.kwargs)
            given = flat_arguments(self.signature, args, kwargs)
        except TypeError as error:
            raise UsageError(f"{error}; {self._call_mismatch(args, kwargs)}") from None
        values: dict[str, Any] = {}
        for name in {**traced, **given}:
            parameter = self.signature.parameters.get(name)
            if parameter is None and not (name in traced and name in given):
                raise UsageError(self._call_mismatch(args, kwargs))
            default = None if parameter is None else parameter.default
            value = given.get(name, default)
            if name in traced:
                values[name] = value
            elif value is not default:
                raise UsageError(
                    f"input {name!r} was not given when the model was traced: "
                    "compile again with it among the example inputs"
                )
        names = list(traced)[: len(self.args)]
        return tuple(values[n] for n in names), {n: values[n] for n in self.kwargs}

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compares structure, dtypes, ranks, sizes and constants with what was traced."""
        try:
            leaves = fx_pytree.tree_flatten_spec((args, kwargs), self.spec)
        except (KeyError, IndexError, RuntimeError, TypeError, AttributeError):
            leaves = []
        if len(leaves) != len(self.specs) or len(pytree.tree_leaves((args, kwargs))) != len(leaves):
            raise UsageError(
                "the inputs are nested differently than when the model was traced: expected "
                f"{self.spec}, got {pytree.tree_structure((args, kwargs))}"
            )
        traced = fx_pytree.tree_flatten_spec((self.args, self.kwargs), self.spec)
        sizes: dict[str, int] = {}
        for at, (spec, leaf, was) in enumerate(zip(self.specs, leaves, traced, strict=True)):
            if isinstance(was, torch.Tensor):
                _check_tensor(spec, leaf)
                self._read_sizes(at, leaf.shape, sizes)
            elif isinstance(leaf, torch.Tensor) or leaf != was:
                raise UsageError(
                    f"input {spec.name!r} was traced as the constant {was!r}, got "
                    f"{_describe(leaf)}: compile again with that value"
                )

        if sizes:
            self._check_sizes(sizes)

    def _read_sizes(self, at: int, shape: torch.Size, sizes: dict[str, int]) -> None:
        """Compares the fixed sizes of an input, and adds those of symbols."""
        spec = self.specs[at]
        for dim, (size, got) in enumerate(zip(spec.sizes, shape, strict=True)):
            if isinstance(size, int):
                if got != size:
                    raise UsageError(
                        f"input {spec.name!r}: dimension {dim} is {size} in the compiled model, "
                        f"got {got} in {list(shape)}: {self._advice(dim)}"
                    )
            elif not size.isidentifier():
                sizes[f"_{at}_{dim}"] = got
            elif sizes.setdefault(size, got) != got:
                name, first = self._where(size)
                raise UsageError(
                    f"input {spec.name!r}: dimension {dim} must equal dimension {first} of "
                    f"{name!r} ({sizes[size]}), got {got}"
                )

    def _advice(self, dim: int) -> str:
        if dim == 0 and self.static_batch:
            return f"{self.static_batch}; compile another one for that size"
        return "make it dynamic with dynamic_shapes= when compiling"

    def _where(self, symbol: str) -> tuple[str, int]:
        """The first input and dimension that a symbol stands for."""
        places = ((s.name, s.sizes.index(symbol)) for s in self.specs if symbol in s.sizes)
        return next(places)

    def _check_sizes(self, sizes: dict[str, int]) -> None:
        """What the trace took for granted of the sizes that vary."""
        if self.guards.derived:
            sizes = self.guards.with_roots(sizes)
            misfit = self.guards.misfit(sizes)
            if misfit is not None:
                size, expected = misfit
                raise UsageError(
                    f"{size.where} must be {size.code} ({expected}), as traced, "
                    f"got {sizes[size.name]}"
                )
        broken = self.guards.broken(sizes)
        if broken is not None:
            got = ", ".join(str(list(s)) for s in self._shapes(sizes))
            raise UsageError(
                f"the trace does not hold for inputs of shape {got}: it needs {broken}: compile "
                "again with inputs of these sizes"
            )
        for symbol, extent in sizes.items():
            low, high = self.ranges.get(symbol, (0, None))
            # A lower bound of 2 is the tracer's own, for want of a better one.
            if (low > 2 and extent < low) or (high is not None and extent > high):
                bounds = f"at least {low}" if high is None else f"from {low} to {high}"
                name, dim = self._where(symbol)
                raise UsageError(
                    f"input {name!r}: dimension {dim} must be {bounds}, as traced, got {extent}"
                )

    def _shapes(self, sizes: Mapping[str, int]) -> Iterator[list[int]]:
        for at, spec in enumerate(self.specs):
            if spec.dtype is not None:
                yield [
                    s if isinstance(s, int) else sizes.get(s, sizes.get(f"_{at}_{dim}", 0))
                    for dim, s in enumerate(spec.sizes)
                ]

    def _call_mismatch(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        return (
            f"the model was traced with {_call_text(self.args, self.kwargs)}, "
            f"called with {_call_text(args, kwargs)}"
        )


def _signature_of(model: Any, bind: Iterable[str]) -> inspect.Signature | None:
    if not isinstance(model, torch.nn.Module) or isinstance(model, torch.fx.GraphModule):
        return None
    return free_signature(inspect.signature(model.forward), bind)


def _check_tensor(spec: InputSpec, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise UsageError(f"input {spec.name!r}: expected a tensor, got {_describe(value)}")
    if value.dtype != spec.dtype:
        raise UsageError(
            f"input {spec.name!r}: expected dtype {spec.dtype}, got {value.dtype}: "
            f"convert it with .to({spec.dtype})"
        )
    if value.layout is not torch.strided:
        raise UsageError(f"input {spec.name!r}: expected a dense tensor, got one of {value.layout}")
    expected = f"[{', '.join(str(s) for s in spec.sizes)}]"
    if value.dim() != len(spec.sizes):
        raise UsageError(
            f"input {spec.name!r}: expected {len(spec.sizes)} dimensions {expected}, "
            f"got {value.dim()} {list(value.shape)}"
        )


_LONGEST = 80  # of a value in a message


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)}"
    if value is None:
        return f"{value!r}"
    if type(value).__module__ == "numpy" and hasattr(value, "shape"):
        return f"an array of numpy {list(value.shape)}: torch.from_numpy makes a tensor of it"
    text = repr(value)
    return f"{text if len(text) <= _LONGEST else text[:_LONGEST] + ' ...'} ({type(value).__name__})"


def _call_text(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    parts = [f"{len(args)} positional input{'s' if len(args) != 1 else ''}"]
    if kwargs:
        parts.append(f"keywords {', '.join(kwargs)}")
    return " and ".join(parts)
