"""Records what is computed from weights while a graph is folded, to compute it again from others.

Under a :class:`Recorder` every operator call becomes a step of a :class:`Tape`, whoever makes it: a
pass, or a constant expression that is evaluated at the end. Where Python looks at a value (``bool``
of a comparison, ``item``, ``tolist``, a size that depends on values), the fold may have gone one
way because of it: that value is kept beside the step, and a run of the tape with other weights
fails if it differs. So a run either computes what folding anew would, bit for bit, or says where
the two part.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from refold.errors import RefitError

aten = torch.ops.aten
# Another name of the same tensor: no step.
_SAME = frozenset({aten.detach.default, aten.alias.default, aten.lift_fresh.default})
_READERS = frozenset({"tolist", "numpy", "__array__", "__array_wrap__", "__dlpack__", "data_ptr"})


@dataclass(frozen=True)
class StepValue:
    """The value that one step made, as an operand of another."""

    index: int


@dataclass
class TapeStep:
    """One operator call.

    Attributes:
        op: the operator; ``None`` if the step only looks at its operand.
        args: its operands.
        kwargs: its keyword operands.
        out: the slots of its results, in order; -1 for a result that is no tensor.
        seen: what Python saw of the result: a number, a truth value, a shape, or a tensor.
        looks: whether Python looked.
        where: who looked: pass, file and function.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: tuple[int, ...]
    seen: Any = None
    looks: bool = False
    where: str = ""


@dataclass
class Tape:
    """Steps from sources to results.

    Attributes:
        steps: in the order in which they ran.
        sources: slot of each source, by name.
        literals: tensors that depend on no source.
        results: slot of each result, by name.
        unknown: results that were computed where the recorder could not see.
    """

    steps: list[TapeStep]
    sources: dict[str, int]
    literals: dict[int, torch.Tensor]
    results: dict[str, int]
    unknown: frozenset[str] = frozenset()

    def run(self, sources: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Computes the results from other sources.

        Raises:
            RefitError: Python saw another value while the tape was recorded.
        """
        values: dict[int, Any] = {slot: sources[name] for name, slot in self.sources.items()}
        for slot, literal in self.literals.items():
            values[slot] = literal.clone() if slot in self._written else literal
        last = self._last_uses
        with torch.no_grad():
            for position, step in enumerate(self.steps):
                args, kwargs = filled((step.args, step.kwargs), values.__getitem__)
                result = args[0] if step.op is None else step.op(*args, **kwargs)
                if step.looks and not _same(_look(step, result), step.seen):
                    raise RefitError(self._parted(position, _look(step, result)))
                results = result if isinstance(result, (tuple, list)) else (result,)
                for slot, value in zip(step.out, results, strict=False):
                    if slot >= 0:
                        values[slot] = value
                for slot in last.get(position, ()):
                    del values[slot]
        return {name: values[slot] for name, slot in self.results.items()}

    @functools.cached_property
    def arithmetic(self) -> tuple[list[TapeStep], set[int]]:
        """The steps that make the results, without those that only look, and their unknowns.

        The unknowns are the slots whose memory depends on a source, before or after it is written.
        """
        groups = _grouped(self.steps)
        needed = {groups.root(slot) for slot in self.results.values()}
        steps = []
        for step in reversed(self.steps):
            if step.op is not None and not needed.isdisjoint(_made(groups, step)):
                needed |= _read(groups, step)
                steps.append(step)
        found = _following(groups, self.steps, self.sources.values())
        return steps[::-1], {slot for slot in groups.parent if groups.root(slot) in found}

    @functools.cached_property
    def _written(self) -> set[int]:
        return _written(self.steps)

    @functools.cached_property
    def _last_uses(self) -> dict[int, list[int]]:
        """What nothing reads after each step."""
        kept = set(self.results.values())
        last: dict[int, int] = {}
        for position, step in enumerate(self.steps):
            for slot in (*_slots((step.args, step.kwargs)), *(s for s in step.out if s >= 0)):
                last[slot] = position
        out: dict[int, list[int]] = {}
        for slot, position in last.items():
            if slot not in kept:
                out.setdefault(position, []).append(slot)
        return out

    def _parted(self, position: int, now: Any) -> str:
        step = self.steps[position]
        names = self.names_behind(_slots((step.args, step.kwargs)), position)
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        then = "" if isinstance(now, torch.Tensor) else f" ({step.seen} then, {now} now)"
        return (
            f"the fold depends on a value that these weights change{then}: {step.where} looked at "
            f"{shown}; compile again with the new weights"
        )

    def names_behind(self, slots: Iterable[int], before: int | None = None) -> list[str]:
        """The sources that values were computed from."""
        wanted = set(slots)
        for step in reversed(self.steps[:before]):
            read = _slots((step.args, step.kwargs))
            if wanted.intersection(step.out) or (_writes(step) and wanted.intersection(read)):
                wanted.update(read)
        return [name for name, slot in self.sources.items() if slot in wanted]


def filled(operands: Any, value: Callable[[int], Any]) -> Any:
    """Operands with the values of slots in their places."""
    if isinstance(operands, StepValue):
        return value(operands.index)
    if isinstance(operands, tuple):
        return tuple(filled(o, value) for o in operands)
    if isinstance(operands, list):
        return [filled(o, value) for o in operands]
    if isinstance(operands, dict):
        return {k: filled(o, value) for k, o in operands.items()}
    return operands


def _slots(operands: Any) -> list[int]:
    if isinstance(operands, StepValue):
        return [operands.index]
    if isinstance(operands, (tuple, list)):
        return [s for o in operands for s in _slots(o)]
    if isinstance(operands, dict):
        return [s for o in operands.values() for s in _slots(o)]
    return []


def _look(step: TapeStep, result: Any) -> Any:
    """What Python sees of a result: its value, or the shape where that depends on values."""
    if step.op is not None and isinstance(result, torch.Tensor):
        return tuple(result.shape)
    return result


def _same(now: Any, then: Any) -> bool:
    if isinstance(now, torch.Tensor) and isinstance(then, torch.Tensor):
        return (
            now.dtype == then.dtype
            and now.shape == then.shape
            and bool(torch.equal(now, then) or torch.allclose(now, then, 0, 0, equal_nan=True))
        )
    return bool(type(now) is type(then) and (now == then or (now != now and then != then)))


def _writes(step: TapeStep) -> bool:
    return step.op is not None and step.op._schema.is_mutable


def _written(steps: Iterable[TapeStep]) -> set[int]:
    """Slots whose memory some step writes."""
    groups = _grouped(steps)
    roots = {groups.root(s) for step in steps if _writes(step) for s in _targets(step)}
    return {s for s in groups.parent if groups.root(s) in roots}


def _targets(step: TapeStep) -> list[int]:
    """The slots that a step writes."""
    return _aliased(step, lambda info: info.is_write)


def _aliased(step: TapeStep, which: Callable[[Any], bool]) -> list[int]:
    out: list[int] = []
    if step.op is None:
        return out
    for position, argument in enumerate(step.op._schema.arguments):
        info = argument.alias_info
        if info is None or not which(info):
            continue
        given = step.args[position] if position < len(step.args) else step.kwargs.get(argument.name)
        out += _slots(given)
    return out


class _Groups:
    """Slots that share memory."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}

    def root(self, slot: int) -> int:
        at = slot
        while self.parent.setdefault(at, at) != at:
            at = self.parent[at]
        while self.parent[slot] != at:
            self.parent[slot], slot = at, self.parent[slot]
        return at

    def join(self, step: TapeStep) -> None:
        shared = _aliased(step, lambda info: True)
        made = [s for s in step.out if s >= 0]
        if shared:
            first = self.root(shared[0])
            for slot in (*shared, *made):
                self.parent[self.root(slot)] = first


def _grouped(steps: Iterable[TapeStep]) -> _Groups:
    groups = _Groups()
    for step in steps:
        groups.join(step)
    return groups


def _read(groups: _Groups, step: TapeStep) -> set[int]:
    """The groups that a step reads."""
    return {groups.root(s) for s in _slots((step.args, step.kwargs))}


def _made(groups: _Groups, step: TapeStep) -> set[int]:
    """The groups that a step makes or writes."""
    return {groups.root(s) for s in (*step.out, *_targets(step)) if s >= 0}


def _following(groups: _Groups, steps: Sequence[TapeStep], slots: Iterable[int]) -> set[int]:
    """The groups that depend on some slots; one is written after another step has read it."""
    found = {groups.root(slot) for slot in slots}
    before = -1
    while len(found) != before:
        before = len(found)
        for step in steps:
            if not found.isdisjoint(_read(groups, step)):
                found |= _made(groups, step)
    return found


# --- recording ------------------------------------------------------------------------------------


@dataclass
class _Mark:
    """What a tensor's attribute says: which slot of which recording it is."""

    recorder: Recorder
    slot: int


class _Reads(TorchFunctionMode):
    """Sees what no operator call shows: a tensor that becomes Python data, ``.data``."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _READERS and name != "data_ptr":
            self._recorder.looked_at(args[0])
        elif func is torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            self._recorder.same(args[0], result)
        return result


class Recorder(TorchDispatchMode):
    """Records a tape while it is entered, in this thread.

    Args:
        sources: the tensors that everything is computed from, by name. They are not written.
    """

    def __init__(self, sources: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.label = ""
        self._kept = dict(sources)  # an id may be reused once its tensor is gone
        self._of_source: dict[int, int] = {}
        self._sources: dict[str, int] = {}
        self._steps: list[TapeStep] = []
        self._literals: dict[int, torch.Tensor] = {}
        self._count = 0
        self._groups = _Groups()
        self._dependent: set[int] = set()  # roots of groups that depend on sources
        self._foreign: set[int] = set()  # roots of groups that depend on what was not seen
        self._reads = _Reads(self)
        for name, tensor in sources.items():
            if id(tensor) not in self._of_source:
                self._of_source[id(tensor)] = self._new()
                self._dependent.add(self._of_source[id(tensor)])
            self._sources[name] = self._of_source[id(tensor)]

    def __enter__(self) -> Recorder:
        super().__enter__()
        self._reads.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._reads.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(issubclass(t, FakeTensor) for t in types) or _is_meta(result):
            return result
        if func in _SAME:
            self._mark(result, self._slot(args[0], lifted=func is aten.lift_fresh.default))
            return result
        step = TapeStep(func, self._operands(args), self._operands(kwargs), ())
        results = result if isinstance(result, (tuple, list)) else (result,)
        step.out = tuple(self._result(r) for r in results)
        self._groups.join(step)
        read = {self._groups.root(s) for s in _slots((step.args, step.kwargs))}
        made = {self._groups.root(s) for s in (*step.out, *_targets(step)) if s >= 0}
        dependent = not read.isdisjoint(self._dependent)
        if dependent:
            self._dependent |= made
        if not read.isdisjoint(self._foreign):
            self._foreign |= made
        numbers = bool(results) and not any(isinstance(r, torch.Tensor) for r in results)
        if dependent and (numbers or torch.Tag.dynamic_output_shape in func.tags):
            step.seen, step.looks, step.where = _look(step, result), True, self._where()
        self._steps.append(step)
        return result

    def looked_at(self, tensor: torch.Tensor) -> None:
        """Python read all of a tensor."""
        if isinstance(tensor, FakeTensor) or tensor.is_meta:
            return
        slot = self._slot(tensor)
        if self._groups.root(slot) in self._dependent:
            seen = tensor.detach().clone()
            self._steps.append(
                TapeStep(None, (StepValue(slot),), {}, (), seen, True, self._where())
            )

    def same(self, tensor: torch.Tensor, other: torch.Tensor) -> None:
        """``other`` is ``tensor`` by another name."""
        if not isinstance(tensor, FakeTensor) and not tensor.is_meta:
            self._mark(other, self._slot(tensor))

    def finish(self, results: Mapping[str, torch.Tensor]) -> Tape:
        """The tape that computes these tensors, without steps that nothing needs."""
        slots: dict[str, int] = {}
        unknown: set[str] = set()
        for name, tensor in results.items():
            slot = self._known(tensor)
            if slot is None or self._groups.root(slot) in self._foreign:
                unknown.add(name)
            else:
                slots[name] = slot
        blind = [
            s
            for s in self._steps
            if s.looks
            and any(self._groups.root(i) in self._foreign for i in _slots((s.args, s.kwargs)))
        ]
        if blind:  # nothing that follows can be relied upon
            unknown, slots = set(results), {}
        steps, same = _deduplicated(self._steps)
        slots = {name: same.get(slot, slot) for name, slot in slots.items()}
        steps = _live(steps, set(slots.values()))
        read = {i for s in steps for i in _slots((s.args, s.kwargs))} | set(slots.values())
        literals = {i: t for i, t in self._literals.items() if i in read}
        for tensor in results.values():
            vars(tensor).pop("_refold_mark", None)
        return Tape(steps, self._sources, literals, slots, frozenset(unknown))

    # --- slots ------------------------------------------------------------------------------------

    def _new(self) -> int:
        self._count += 1
        return self._count - 1

    def _known(self, tensor: torch.Tensor) -> int | None:
        slot = self._of_source.get(id(tensor))
        if slot is not None:
            return slot
        mark: _Mark | None = getattr(tensor, "_refold_mark", None)
        return mark.slot if mark is not None and mark.recorder is self else None

    def _slot(self, tensor: torch.Tensor, *, lifted: bool = False) -> int:
        """The slot of a tensor; one that was never seen is a literal if Python just made it."""
        slot = self._known(tensor)
        if slot is None:
            slot = self._new()
            self._literals[slot] = tensor.detach().clone()
            self._mark(tensor, slot)
            if not lifted:
                self._foreign.add(self._groups.root(slot))
                self._dependent.add(self._groups.root(slot))
        return slot

    def _mark(self, tensor: torch.Tensor, slot: int) -> None:
        if id(tensor) not in self._of_source:
            tensor._refold_mark = _Mark(self, slot)  # type: ignore[attr-defined]

    def _result(self, value: Any) -> int:
        if not isinstance(value, torch.Tensor):
            return -1
        slot = self._known(value)
        if slot is None:
            slot = self._new()
            self._mark(value, slot)
        return slot

    def _operands(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return StepValue(self._slot(value))
        if isinstance(value, (tuple, list)):
            return type(value)(self._operands(v) for v in value)
        if isinstance(value, dict):
            return {k: self._operands(v) for k, v in value.items()}
        return value

    def _where(self) -> str:
        frame: Any = sys._getframe(1)
        while frame is not None and (
            "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__
        ):
            frame = frame.f_back
        place = "" if frame is None else f" ({frame.f_code.co_name}, line {frame.f_lineno})"
        return f"{self.label or 'the fold'}{place}"


def _is_meta(result: Any) -> bool:
    first = result[0] if isinstance(result, (tuple, list)) and result else result
    return isinstance(first, FakeTensor) or (isinstance(first, torch.Tensor) and first.is_meta)


def _deduplicated(steps: list[TapeStep]) -> tuple[list[TapeStep], dict[int, int]]:
    """Steps that compute what an earlier one did are left out; also says which slots are which."""
    written = _written(steps)
    same: dict[int, int] = {}
    first: dict[Any, TapeStep] = {}
    kept: list[TapeStep] = []
    for step in steps:
        step.args, step.kwargs = _renamed(step.args, same), _renamed(step.kwargs, same)
        touched = {*_slots((step.args, step.kwargs)), *step.out}
        if not written.isdisjoint(touched):
            kept.append(step)
            continue
        earlier = first.setdefault((step.op, _key((step.args, step.kwargs))), step)
        if earlier is step:
            kept.append(step)
        else:
            same.update(zip(step.out, earlier.out, strict=True))
    return kept, same


def _renamed(operands: Any, same: Mapping[int, int]) -> Any:
    if isinstance(operands, StepValue):
        return StepValue(same[operands.index]) if operands.index in same else operands
    if isinstance(operands, (tuple, list)):
        return type(operands)(_renamed(o, same) for o in operands)
    if isinstance(operands, dict):
        return {k: _renamed(o, same) for k, o in operands.items()}
    return operands


def _key(operands: Any) -> Any:
    """Operands as a dictionary key: 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    if isinstance(operands, (tuple, list)):
        return (type(operands), *(_key(o) for o in operands))
    if isinstance(operands, dict):
        return tuple((k, _key(o)) for k, o in sorted(operands.items()))
    if isinstance(operands, float):
        return (float, repr(operands))
    return (type(operands), operands)


def _live(steps: list[TapeStep], results: set[int]) -> list[TapeStep]:
    """Steps that a result or a look depends on."""
    groups = _grouped(steps)
    needed = {groups.root(s) for s in results}
    kept: list[TapeStep] = []
    for step in reversed(steps):
        if step.looks or not needed.isdisjoint(_made(groups, step)):
            kept.append(step)
            needed |= _read(groups, step)
    kept.reverse()
    return kept
