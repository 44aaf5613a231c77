"""Calls of a compiled model: brought into the traced form and checked against its promises."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree

from refold.bind import free_signature
from refold.errors import UsageError

if TYPE_CHECKING:
    from refold.frontends.export import InputSpec, Program

Call = tuple[tuple[Any, ...], dict[str, Any]]


def as_call(example_inputs: Any) -> Call:
    """A tuple or list of positional inputs, a dict of keyword inputs, or a single input."""
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs,), {}


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
            traced = self.signature.bind(*self.args, **self.kwargs).arguments
            given = self.signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise UsageError(f"{error}; {self._call_mismatch(args, kwargs)}") from None
        values: dict[str, Any] = {}
        for name in {**traced, **given}:
            parameter = self.signature.parameters[name]
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise UsageError(self._call_mismatch(args, kwargs))
            value = given.get(name, parameter.default)
            if name in traced:
                values[name] = value
            elif value is not parameter.default:
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
        sizes: dict[str, tuple[int, str]] = {}
        for spec, leaf, was in zip(self.specs, leaves, traced, strict=True):
            if isinstance(was, torch.Tensor):
                _check_tensor(spec, leaf, sizes, self.ranges)
            elif isinstance(leaf, torch.Tensor) or leaf != was:
                raise UsageError(
                    f"input {spec.name!r} was traced as the constant {was!r}, got "
                    f"{_describe(leaf)}: compile again with that value"
                )

    def _call_mismatch(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        return (
            f"the model was traced with {_call_text(self.args, self.kwargs)}, "
            f"called with {_call_text(args, kwargs)}"
        )


def _signature_of(model: Any, bind: Iterable[str]) -> inspect.Signature | None:
    if not isinstance(model, torch.nn.Module) or isinstance(model, torch.fx.GraphModule):
        return None
    return free_signature(inspect.signature(model.forward), bind)


def _check_tensor(
    spec: InputSpec,
    value: Any,
    sizes: dict[str, tuple[int, str]],
    ranges: Mapping[str, tuple[int, int | None]],
) -> None:
    if not isinstance(value, torch.Tensor):
        raise UsageError(f"input {spec.name!r}: expected a tensor, got {_describe(value)}")
    if value.dtype != spec.dtype:
        raise UsageError(
            f"input {spec.name!r}: expected dtype {spec.dtype}, got {value.dtype}: "
            f"convert it with .to({spec.dtype})"
        )
    expected = f"[{', '.join(str(s) for s in spec.sizes)}]"
    if value.dim() != len(spec.sizes):
        raise UsageError(
            f"input {spec.name!r}: expected {len(spec.sizes)} dimensions {expected}, "
            f"got {value.dim()} {list(value.shape)}"
        )
    for dim, (size, got) in enumerate(zip(spec.sizes, value.shape, strict=True)):
        if isinstance(size, int):
            if got != size:
                raise UsageError(
                    f"input {spec.name!r}: dimension {dim} is {size} in the compiled model, got "
                    f"{got} in {list(value.shape)}: make it dynamic with dynamic_shapes= "
                    "when compiling"
                )
        elif size.isidentifier():
            first, where = sizes.setdefault(size, (got, f"dimension {dim} of {spec.name!r}"))
            if first != got:
                raise UsageError(
                    f"input {spec.name!r}: dimension {dim} must equal {where} ({first}), got {got}"
                )
            low, high = ranges.get(size, (0, None))
            # A lower bound of 2 is the tracer's own, for want of a better one.
            if (low > 2 and got < low) or (high is not None and got > high):
                bounds = f"at least {low}" if high is None else f"from {low} to {high}"
                raise UsageError(
                    f"input {spec.name!r}: dimension {dim} must be {bounds}, as traced, got {got}"
                )


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)}"
    return f"{value!r}" if value is None else f"{value!r} ({type(value).__name__})"


def _call_text(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    parts = [f"{len(args)} positional input{'s' if len(args) != 1 else ''}"]
    if kwargs:
        parts.append(f"keywords {', '.join(kwargs)}")
    return " and ".join(parts)
