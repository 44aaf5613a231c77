"""New weights for a folded model, without tracing or folding again.

A recipe is the tape of one fold (:mod:`refold.refit.tape`) and the names of what went into it. It
computes the folded constants from other weights of the same architecture, or from another value of
a bound input, exactly as folding anew would; where folding anew would leave another graph, it says
so and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from refold.errors import RefitError, UsageError, did_you_mean
from refold.graph import constants
from refold.refit.tape import Recorder, Tape

if TYPE_CHECKING:
    from refold.graph.program import Program

_SHOWN = 5


@dataclass(frozen=True)
class Source:
    """A tensor that folded constants are computed from.

    Attributes:
        keys: its names in the state dict (several where weights are tied); none for a tensor that
            the model holds outside of it.
        bound: the bound input that it is the value of, or ``""``.
        shape: of the tensor.
        dtype: of the tensor.
        device: of the tensor.
    """

    keys: tuple[str, ...]
    bound: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Recipe:
    """How the constants of a folded graph are computed from weights.

    Attributes:
        tape: the computation.
        sources: what it starts from, by the tape's names.
        shapes: of everything in the state dict, read or not.
        values: the present values of the sources, as far as they are kept.
    """

    tape: Tape
    sources: dict[str, Source]
    shapes: dict[str, tuple[int, ...]]
    values: dict[str, torch.Tensor]
    _stamps: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the bound inputs."""
        return tuple(dict.fromkeys(s.bound for s in self.sources.values() if s.bound))

    def assign(
        self,
        weights: Mapping[str, torch.Tensor] | None,
        bind: Mapping[str, Any] | None = None,
        *,
        strict: bool = True,
    ) -> Recipe:
        """The recipe with other values.

        Args:
            weights: a state dict; without one all weights stay.
            bind: values of bound inputs; others stay.
            strict: every weight that the folded graph is made of must be given.

        Raises:
            RefitError: keys are missing, unknown, or of another shape or dtype.
        """
        if bind is not None and not isinstance(bind, Mapping):
            raise UsageError(f"bind is {bind!r}: expected values by name of the input")
        new = self._bound(bind or {})
        if weights is not None:
            _check_tensors(weights)
            self._check_keys(weights, strict=strict)
            for name, source in self.sources.items():
                given = {k: weights[k] for k in source.keys if k in weights}
                if given:
                    new[name] = _fitting(source, given)
        for name in self.sources.keys() - new.keys():
            new[name] = self._kept(name)
        return replace(self, values=new, _stamps={n: _stamp(t) for n, t in new.items()})

    def constants(self) -> dict[str, torch.Tensor]:
        """The folded constants, by the names of the graph's attributes.

        Raises:
            RefitError: folding these values would leave another graph, or a constant was computed
                where it could not be recorded.
        """
        if self.tape.unknown:
            raise RefitError(
                f"how {listed(self.tape.unknown)} was computed is not known: compile again with "
                "the new weights"
            )
        return self.tape.run(self.values)

    def _check_keys(self, weights: Mapping[str, torch.Tensor], *, strict: bool) -> None:
        unknown = [k for k in weights if k not in self.shapes]
        if unknown:
            near = did_you_mean(unknown[0], self.shapes)
            hint = near if near.startswith(" (did") else ""
            raise RefitError(f"the model has no weight {listed(unknown)}{hint}")
        missing = [
            source.keys[0]
            for source in self.sources.values()
            if source.keys and not any(k in weights for k in source.keys)
        ]
        if missing and strict:
            raise RefitError(
                f"missing: {listed(missing)}; give all weights, or strict=False to keep these"
            )
        for key, value in weights.items():
            if tuple(value.shape) != self.shapes[key]:
                raise RefitError(
                    f"{key} is {list(self.shapes[key])} in the compiled model, got "
                    f"{list(value.shape)}: another architecture has to be compiled"
                )

    def _bound(self, bind: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        new: dict[str, torch.Tensor] = {}
        for name, value in bind.items():
            leaves = [v for v in pytree.tree_leaves(value) if isinstance(v, torch.Tensor)]
            named = [name] if len(leaves) == 1 else [f"{name}[{i}]" for i in range(len(leaves))]
            for label, leaf in zip(named, leaves, strict=True):
                found = [n for n, s in self.sources.items() if s.bound == label]
                if not found:
                    known = did_you_mean(label, self.inputs)
                    raise RefitError(f"the compiled model has no bound tensor {label!r}{known}")
                new[found[0]] = _fitting(self.sources[found[0]], {label: leaf.clone()})
            if not leaves:
                raise RefitError(
                    f"bound input {name!r} is a number, which the trace has fixed: compile again"
                )
        return new

    def _kept(self, name: str) -> torch.Tensor:
        source = self.sources[name]
        if name not in self.values:
            raise RefitError(f"{listed(source.keys or (source.bound or name,))} has to be given")
        value = self.values[name]
        if self._stamps.get(name, _stamp(value)) != _stamp(value):
            raise RefitError(
                f"{listed(source.keys)} was written after the model was compiled: pass all weights"
            )
        return value


def _check_tensors(weights: Mapping[str, torch.Tensor]) -> None:
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise RefitError(
                f"the weights have {key!r}: {type(value).__name__}; expected tensors by name, as "
                "state_dict() gives them"
            )
        if value.layout is not torch.strided or value.is_meta or value.is_quantized:
            kind = "has no values" if value.is_meta else "is sparse, quantised or nested"
            raise RefitError(f"the weight {key!r} {kind}: give a plain tensor")


def _fitting(source: Source, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The one tensor behind all names of a source."""
    (key, value), *others = given.items()
    for name, tensor in given.items():
        if tuple(tensor.shape) != source.shape or tensor.dtype != source.dtype:
            raise RefitError(
                f"{name} is {source.dtype} {list(source.shape)} in the compiled model, got "
                f"{tensor.dtype} {list(tensor.shape)}: convert it, or compile again"
            )
    for name, tensor in others:
        if tensor is not value and not torch.equal(tensor, value):
            raise RefitError(
                f"{key} and {name} were one tensor when the model was compiled and differ now: "
                "compile again"
            )
    return value.detach().to(source.device)


def _stamp(value: torch.Tensor) -> tuple[int, int]:
    """Changes when a tensor is written in place or gets other memory."""
    version = 0 if value.is_inference() else value._version
    return version, value.data_ptr()


def listed(names: Iterable[str]) -> str:
    found = sorted(names)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(repr(n) for n in found[:_SHOWN]) + more


def record(
    program: Program, gm: fx.GraphModule, fold: Callable[[Callable[[str], None]], Any]
) -> tuple[Any, Recipe]:
    """Runs a fold of a graph and records it.

    Args:
        program: what the graph was traced as.
        gm: the graph that is folded.
        fold: folds it; is given what to call with the name of each pass before it runs.
    """
    before = constants.stored(gm)
    recorder = Recorder(before)

    def label(name: str) -> None:
        recorder.label = name

    with recorder:
        result = fold(label)
    tape = recorder.finish(constants.stored(gm))
    keys = _keys(before, {k: t for k, t in program.state.items() if k not in program.bound})
    sources = {
        name: Source(keys[name], program.bound.get(name, ""), tuple(t.shape), t.dtype, t.device)
        for name, t in before.items()
        if name in tape.sources
    }
    shapes = {k: tuple(t.shape) for k, t in program.state.items() if k not in program.bound}
    values = {name: before[name] for name in sources}
    stamps = {name: _stamp(t) for name, t in values.items()}
    return result, Recipe(tape, sources, shapes, values, stamps)


def _keys(
    read: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> dict[str, tuple[str, ...]]:
    """The names in the state dict of each tensor that the graph reads."""

    def memory(t: torch.Tensor) -> Any:
        return (t.data_ptr(), t.dtype, tuple(t.shape), t.stride()) if t.numel() else id(t)

    named: dict[Any, list[str]] = {}
    for key, tensor in state.items():
        named.setdefault(memory(tensor), []).append(key)
    found = {}
    for name, tensor in read.items():
        keys = named.get(memory(tensor), [])
        found[name] = tuple(keys if name in keys or name not in state else [name])
    return found


def as_weights(weights: Any) -> Mapping[str, torch.Tensor] | None:
    """A state dict, or that of a module."""
    if weights is None:
        return None
    if isinstance(weights, nn.Module):
        found: Mapping[str, torch.Tensor] = weights.state_dict()
        return found
    if isinstance(weights, Mapping):
        return weights
    raise UsageError(f"refit: expected a state dict or a module, got {type(weights).__name__}")
