"""State that a model keeps between calls: what a trace can record of it, and what it cannot.

``torch.export`` records a write into a buffer. After an assignment (``self.past = new``) the module
holds another tensor: during a trace that becomes a write into the buffer at the end of the call,
which is the same to every later call. State in plain attributes cannot be recorded: a trace bakes
in what it found. Whether such an attribute matters is asked of the model itself, by calling it
again.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from refold.errors import FrontendError
from refold.graph import constants

_DEEPEST = 6  # containers in containers that are looked into
_NO_STATE = frozenset(vars(nn.Module())) | {"_initialize_hook", "_load_hook"}
_VALUES = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, torch.Size)
_PLAIN = frozenset(_VALUES) | {bool, types.FunctionType, types.MethodType, type}
_CONTAINERS = (list, dict, set, deque)
_SHOWN = 3
_SHRINK = 0.75
_FACTOR, _ROUNDING = 16, 1e-4  # later calls may be off by so much more than the first is


# --- buffers that are assigned --------------------------------------------------------------------


class SharedBuffers(Exception):
    """Buffers that are one tensor, of which one is assigned: ``names`` have to be parted first."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(", ".join(sorted(names)))
        self.names = names


@contextlib.contextmanager
def recorded(module: nn.Module, parted: Collection[str] = ()) -> Iterator[None]:
    """Makes each assignment to a buffer, in calls of ``module``, a write at the end of the call.

    The module is as it was afterwards.

    Args:
        module: what is traced.
        parted: names of buffers that are one tensor and shall be several.

    Raises:
        FrontendError: a buffer gets another shape, dtype or device.
        SharedBuffers: the buffer is another module's too, which does not see the assignment.
    """
    held: list[list[_Buffer]] = []
    before_all = ModelSnapshot(module)
    _part(module, parted)

    def before(_: nn.Module, args: Any) -> None:
        held.append(_buffers(module))

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        buffers = held.pop()
        return output if held else _written_back(buffers, output)  # a call inside of a call

    handles = (module.register_forward_pre_hook(before), module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        before_all.restore()


@dataclass(frozen=True)
class _Buffer:
    owner: nn.Module
    name: str
    path: str
    tensor: torch.Tensor

    @property
    def now(self) -> Any:
        return self.owner._buffers.get(self.name)


def _buffers(module: nn.Module) -> list[_Buffer]:
    return [
        _Buffer(owner, name, f"{path}.{name}" if path else name, tensor)
        for path, owner in module.named_modules()
        for name, tensor in owner._buffers.items()
        if tensor is not None
    ]


def _written_back(buffers: Sequence[_Buffer], output: Any) -> Any:
    """Writes what was assigned into the buffers; returns the output, apart from their storage."""
    assigned = [b for b in buffers if b.now is not b.tensor]
    values = [b for b in assigned if isinstance(b.now, torch.Tensor)]
    _refuse_shared(buffers, assigned)
    for b in values:
        _refuse_other_kind(b)
    overwritten = {_storage(b.tensor) for b in values}
    leaves = pytree.tree_leaves(output)
    returned = {_storage(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)}
    if returned & overwritten:
        output = pytree.tree_map(lambda leaf: _apart_from(leaf, overwritten), output)
    news = [_apart_from(b.now, overwritten | returned) for b in values]  # before the first write
    for b, new in zip(values, news, strict=True):
        b.tensor.copy_(new)
    for b in assigned:
        setattr(b.owner, b.name, b.tensor)
    return output


def _apart_from(leaf: Any, storages: set[int]) -> Any:
    shares = isinstance(leaf, torch.Tensor) and _storage(leaf) in storages
    return leaf.clone() if shares else leaf


def _refuse_shared(buffers: Sequence[_Buffer], assigned: Sequence[_Buffer]) -> None:
    for b in assigned:
        alike = [o for o in buffers if o is not b and _storage(o.tensor) == _storage(b.tensor)]
        if any(o.now is not b.now for o in alike):
            raise SharedBuffers(frozenset(o.path for o in (b, *alike)))


def _refuse_other_kind(b: _Buffer) -> None:
    old, new = b.tensor, b.now
    if old.shape == new.shape and old.dtype == new.dtype and old.device == new.device:
        return
    raise FrontendError(
        f"forward assigns the buffer {b.path!r}, {_kind(old)}, a tensor of another kind, "
        f"{_kind(new)}: a trace keeps state of one shape and dtype only\n  fix: register it "
        f"(register_buffer) with the shape and dtype that it has from the first call on, or make "
        "it an input and an output"
    )


def _kind(t: torch.Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')}{[str(s) for s in t.shape]}".replace("'", "")


def _storage(t: torch.Tensor) -> int:
    return int(t.untyped_storage()._cdata) if t.layout is torch.strided else id(t)


def _part(module: nn.Module, names: Collection[str]) -> None:
    """Gives buffers tensors of their own."""
    for name in names:
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        owner._buffers[last] = owner._buffers[last].clone()  # type: ignore[union-attr]


# --- everything that a call may leave behind ------------------------------------------------------


class ModelSnapshot:
    """What the modules of a model hold: attributes, those of their classes, and what is inside.

    It holds all that it compares, so that nothing new can take an old one's place in memory.
    """

    def __init__(self, module: nn.Module) -> None:
        self._seen: dict[int, _Holder] = {}
        for path, owner in module.named_modules():
            classes = [k for k in type(owner).__mro__ if not _is_known(k)]
            for value in (owner, owner._parameters, owner._buffers, *classes):
                if id(value) not in self._seen:
                    self._look_inside(value, path, named=True, depth=0)

    def changed(self) -> list[str]:
        """Paths of the attributes that are not what they were."""
        found: dict[str, None] = {}
        for held in self._seen.values():
            now = _content(held.value)
            if not _same(held.content, now):
                names = _differing(held.content, now) if held.named else [""]
                found.update(dict.fromkeys(_joined(held.path, name) for name in names))
        return list(found)

    def restore(self) -> None:
        """Puts everything back but what is in tensors."""
        for held in self._seen.values():
            if not isinstance(held.value, torch.Tensor):
                _put(held, held.content)

    def own(self, chosen: Callable[[torch.Tensor], bool]) -> None:
        """Puts copies in the place of tensors; :meth:`restore` takes them out again.

        Tensors that share memory share it still.
        """
        copies: dict[int, torch.Tensor] = {}
        memory: dict[int, torch.UntypedStorage] = {}

        def copy(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or not chosen(value):
                return value
            if id(value) not in copies:
                copies[id(value)] = constants.copied(value, memory)
            return copies[id(value)]

        for held in self._seen.values():
            if isinstance(held.content, dict):
                _put(held, {k: copy(v) for k, v in held.content.items()})
            elif not isinstance(held.value, torch.Tensor):
                _put(held, [copy(v) for v in held.content])

    def _look(self, value: Any, path: str, depth: int) -> None:
        if type(value) in _PLAIN or depth > _DEEPEST or id(value) in self._seen:
            return
        if isinstance(value, _VALUES):
            return
        if isinstance(value, tuple):
            for item in value:
                self._look(item, path, depth + 1)
        elif isinstance(value, (torch.Tensor, *_CONTAINERS)):
            self._look_inside(value, path, named=False, depth=depth)
        elif _is_plain_object(value):
            self._look_inside(value, path, named=True, depth=depth)

    def _look_inside(self, value: Any, path: str, *, named: bool, depth: int) -> None:
        content = _content(value)
        self._seen[id(value)] = _Holder(value, content, path, named)
        if isinstance(value, torch.Tensor):
            return
        for key, item in content.items() if isinstance(content, dict) else enumerate(content):
            self._look(item, _joined(path, str(key)) if named else path, depth + 1)


@dataclass(frozen=True)
class _Holder:
    """Something that holds others: a module, a class, an object, a container; or a tensor."""

    value: Any
    content: Any
    path: str
    named: bool  # whether what it holds are attributes, not items


@contextlib.contextmanager
def kept(
    module: nn.Module, written: Callable[[torch.Tensor], bool] | None = None
) -> Iterator[None]:
    """Leaves what a model holds as it was, whatever calls do to it.

    Args:
        module: it may share containers, objects and tensors with others.
        written: the tensors that calls may write: copies stand for them meanwhile.
    """
    with restored(ModelSnapshot(module), written):
        yield


@contextlib.contextmanager
def restored(
    before: ModelSnapshot, written: Callable[[torch.Tensor], bool] | None = None
) -> Iterator[None]:
    """:func:`kept` for a module that is what it was when ``before`` was taken."""
    if written is not None:
        before.own(written)
    try:
        yield
    finally:
        before.restore()


def named(module: nn.Module, names: Collection[str]) -> Callable[[torch.Tensor], bool]:
    """Whether a tensor shares its memory with one of the attributes of these names."""
    found = set()
    for name in names:
        path, _, last = name.rpartition(".")
        try:
            value = getattr(module.get_submodule(path), last, None)
        except AttributeError:  # a constant that the trace named
            continue
        if isinstance(value, torch.Tensor):
            found.add(_storage(value))
    return lambda t: _storage(t) in found


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _is_plain_object(value: Any) -> bool:
    """An instance of somebody's class that keeps what it holds in ``__dict__``."""
    kind = type(value)
    if issubclass(kind, (nn.Module, type)):
        return False
    if _is_known(kind) and kind is not types.SimpleNamespace:  # type: ignore[arg-type]
        return False
    return isinstance(getattr(value, "__dict__", None), dict)


@functools.cache
def _is_known(kind: type) -> bool:
    """Whether a class is Python's or PyTorch's: their objects are no state of a model."""
    return kind.__module__.partition(".")[0] in {*sys.stdlib_module_names, "torch"} - {"__main__"}


def _content(value: Any) -> Any:
    """What of a value can be compared, and put back, later."""
    if isinstance(value, torch.Tensor):
        return (0 if value.is_inference() else value._version, _address(value))
    if isinstance(value, nn.Module):
        return {k: v for k, v in vars(value).items() if k not in _NO_STATE}
    if isinstance(value, type):
        return {k: v for k, v in vars(value).items() if _is_class_state(k, v)}
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, _CONTAINERS):
        return list(value)
    return dict(vars(value))


def _is_class_state(name: str, value: Any) -> bool:
    return not name.startswith("__") and isinstance(value, (*_VALUES, *_CONTAINERS, torch.Tensor))


def _address(value: torch.Tensor) -> int:
    plain = type(value) in (torch.Tensor, nn.Parameter) and value.layout is torch.strided
    return value.data_ptr() if plain else 0


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, dict):
        return before.keys() == after.keys() and _alike(before.values(), after.values())
    return len(before) == len(after) and _alike(before, after)


def _alike(before: Iterable[Any], after: Iterable[Any]) -> bool:
    return all(
        a is b or (type(a) is type(b) and isinstance(a, _VALUES) and a == b)
        for a, b in zip(before, after, strict=True)
    )


def _differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    none = object()
    keys = dict.fromkeys([*before, *after])
    return [k for k in keys if not _alike([before.get(k, none)], [after.get(k, none)])]


def _put(held: _Holder, content: Any) -> None:
    """Lets something hold other things than it holds now."""
    value, now = held.value, _content(held.value)
    if _same(content, now):
        return
    if isinstance(value, (list, deque)):
        value.clear()
        value.extend(content)
    elif isinstance(value, (dict, set)):
        value.clear()
        value.update(content)
    elif isinstance(value, type):
        for name in now.keys() - content.keys():
            delattr(value, name)
        for name, item in content.items():
            setattr(value, name, item)
    else:
        for name in now.keys() - content.keys():
            del vars(value)[name]
        vars(value).update(content)


# --- calls that follow each other -----------------------------------------------------------------


@dataclass(frozen=True)
class Calls:
    """Calls of a model one after the other, as many as it takes to see whether it keeps state.

    Attributes:
        inputs: of each call.
        outputs: of each call.
        changed: paths of the attributes, parameters and buffers that the calls changed.
    """

    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        module: nn.Module,
        inputs: Any,
        written: Callable[[torch.Tensor], bool] | None = None,
        whole: ModelSnapshot | None = None,
    ) -> Calls:
        """Calls a module with ``inputs``; if that changes something, with others, then again.

        Args:
            module: it is left as it was.
            inputs: positional and keyword inputs.
            written: the tensors that a call may write, if it writes any.
            whole: of the module, where it is what it was then.
        """
        made, changed = cls(), dict[str, None]()
        before = whole = whole or ModelSnapshot(module)
        if written is not None:
            whole.own(written)
            before = ModelSnapshot(module)
        try:
            for given in (inputs, _others(inputs), inputs):
                made._call(module, given)
                now = before.changed()
                changed.update(dict.fromkeys(now))
                if not now:
                    break
                before = ModelSnapshot(module)
        finally:
            if changed or written is not None or not made.outputs:
                whole.restore()
        made.changed.extend(changed)
        return made

    def _call(self, module: nn.Module, inputs: Any) -> None:
        args, kwargs = _copied(inputs)
        try:
            result = module(*args, **kwargs)
        except Exception:
            if not self.outputs:
                raise
            return  # other inputs than the caller's need not fit
        self.inputs.append(inputs)
        self.outputs.append(_copied(result))


def _others(inputs: Any) -> Any:
    """Inputs of the same shapes with other values in the same range."""

    def other(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided:
            return leaf
        mirrored = leaf.detach().reshape(-1).flip(0).reshape(leaf.shape)
        return mirrored * _SHRINK if leaf.is_floating_point() else mirrored

    return pytree.tree_map(other, inputs)


def _copied(tree: Any) -> Any:
    return pytree.tree_map(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf, tree
    )


def refuse_lost(
    name: str, calls: Calls, gm: fx.GraphModule, fresh_call: Callable[[Any], Any]
) -> None:
    """Refuses a model whose later calls are not those of its trace.

    Args:
        name: of the model's class.
        calls: of the model; only one where a call changes nothing.
        gm: the trace, with state of its own.
        fresh_call: what the model returns for inputs at its first call.

    Raises:
        FrontendError: the model keeps state that the trace has lost.
    """
    if len(calls.outputs) < 2:
        return
    state = [str(n.target) for n in constants.written(gm.graph) if n.op == "get_attr"]
    traced = _outputs(gm, calls.inputs)
    first, *later = map(_distance, traced, calls.outputs)
    allowed = max(_FACTOR * first, _ROUNDING)
    late = [i for i, far in enumerate(later, 1) if not far <= allowed]
    if not late:
        return
    if not state and all(
        _distance(fresh_call(calls.inputs[i]), calls.outputs[i]) <= allowed for i in late
    ):
        return  # the trace is off on these inputs, whatever was called before
    lost = [path for path in calls.changed if path not in state] or calls.changed
    raise FrontendError(lost_in(name, lost))


def lost_in(name: str, paths: Sequence[str]) -> str:
    """What to say of state of a model that is in attributes a trace cannot record."""
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return (
        f"{name} keeps state between calls that a trace cannot record: forward changes "
        f"{', '.join(paths[:_SHOWN])}{more}, and what a later call returns depends on it\n  fix: "
        "keep that state in a buffer of fixed shape (register_buffer), written in place or "
        "assigned, or make it an input and an output"
    )


def written_constants(program: ExportedProgram) -> list[str]:
    """Attributes that are tensors, no buffers, and that a trace writes: torch resolves no such."""
    return _written_attributes(program, {InputKind.CONSTANT_TENSOR})


def written_in_part(program: ExportedProgram) -> list[str]:
    """Buffers that share memory, of which a trace writes one: to it they are apart."""
    tensors = {**program.state_dict, **program.constants}
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor):
            groups.setdefault(_storage(tensor), []).append(name)
    kinds = {InputKind.BUFFER, InputKind.PARAMETER, InputKind.CONSTANT_TENSOR}
    for name in _written_attributes(program, kinds):
        sharing = groups.get(_storage(tensors[name]), []) if name in tensors else []
        if len(sharing) > 1:
            return sharing
    return []


def _written_attributes(program: ExportedProgram, kinds: Collection[InputKind]) -> list[str]:
    attributes = {
        spec.arg.name: str(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.kind in kinds
    }
    found: dict[str, None] = {}
    for node in program.graph.nodes:
        if constants.is_mutation(node):
            source = node
            while source.op == "call_function" and source.all_input_nodes:
                source = source.all_input_nodes[0]  # a write goes through views of it
            if source.name in attributes:
                found[attributes[source.name]] = None
    return list(found)


def _outputs(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """What calls of a graph one after the other return; its state stays as it is."""
    state = [constants.tensor(n) for n in constants.written(gm.graph) if n.op == "get_attr"]
    saved = [t.clone() for t in state]
    found = []
    try:
        for given in inputs:
            args, kwargs = _copied(given)
            found.append(_copied(gm(*args, **kwargs)))
    finally:
        for tensor, value in zip(state, saved, strict=True):
            tensor.copy_(value)
    return found


def _distance(ours: Any, theirs: Any) -> float:
    """The largest difference of any output, relative to its largest value."""
    a, b = pytree.tree_leaves(ours), pytree.tree_leaves(theirs)
    return max(map(_apart, a, b), default=0.0) if len(a) == len(b) else math.inf


def _apart(a: Any, b: Any) -> float:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return 0.0 if type(a) is type(b) else math.inf
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if not (a.is_floating_point() or a.is_complex()):
        return float(not torch.equal(a, b))
    a, b = a.to(torch.complex128), b.to(torch.complex128)
    if not torch.equal(a.isfinite(), b.isfinite()):
        return math.inf
    finite = b.isfinite()
    scale = float(b[finite].abs().max()) if bool(finite.any()) else 0.0
    size = float((a - b)[finite].abs().max()) if scale or bool(finite.any()) else 0.0
    return size / (scale or 1.0)
