"""Brings a model into the IR with ``torch.export``: the one door of ``compile_for_inference``.

Whatever comes in, the caller's objects stay as they are: the model is traced through a shallow
copy that shares its parameters, with eval semantics, on fresh copies of the example tensors.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import re
import types
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from refold import bind as binding
from refold.errors import FrontendError, UsageError
from refold.frontends import archive, lengths, state, unusual, variadic
from refold.frontends import guards as size_guards
from refold.frontends.faithful import (
    DIFFERS,
    Comparison,
    apart,
    draws_random,
    lowest,
    settle,
)
from refold.graph import constants, provenance
from refold.graph.functionalise import fix_ranks as fix_ranks_of
from refold.graph.functionalise import functional_module, settle_squeezes
from refold.graph.guards import Guard, Guards, names_in
from refold.graph.kinds import op_name
from refold.graph.program import InputSpec, Program, fresh

_TORCH = os.path.dirname(torch.__file__) + os.sep
_FAKE_CONSTANT = "fake tensor in the exported program constant"
_OWN = str(Path(__file__).resolve().parents[1]) + os.sep


def trace(
    model: nn.Module | ExportedProgram | str | Path,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    dynamic_batch: bool = True,
    bind: Mapping[str, Any] | None = None,
    trust: bool = False,
) -> Program:
    """Traces a model into functional, pre-dispatch ATen.

    Args:
        model: a module, an exported program, or the path of a ``.pt2``.
        args: positional example inputs.
        kwargs: keyword example inputs.
        dynamic_shapes: as ``torch.export.export`` takes it; decides alone when given.
        dynamic_batch: let the leading dimension that the inputs share be dynamic.
        bind: inputs that are constant, by name of the parameter of ``forward``.
        trust: load a ``.pt2`` even if it asks for code to be run.

    Raises:
        FrontendError: the model cannot be traced; the message names the user's own line.
    """
    kwargs = dict(kwargs or {})
    args = tuple(args)
    if isinstance(model, (str, Path)):
        path = Path(model)
        if path.suffix == ".onnx":
            raise FrontendError(
                f"{path}: ONNX as input: not yet. Give the torch module, or a .pt2 of it"
            )
        program = archive.load(path, trust=trust)
        return _from_program(program, args, kwargs, dynamic_shapes, bind or {}, from_file=True)
    if isinstance(model, ExportedProgram):
        return _from_program(model, args, kwargs, dynamic_shapes, bind or {}, from_file=False)
    if not isinstance(model, nn.Module):
        raise FrontendError(_not_a_module(model))
    compiled = getattr(model, "_orig_mod", None)  # what torch.compile returns is a wrapper
    if isinstance(compiled, nn.Module) and type(model).__module__.startswith("torch._dynamo"):
        model = compiled
    return _from_module(model, args, kwargs, dynamic_shapes, dynamic_batch, dict(bind or {}))


def fix_ranks(program: Program, target: str) -> None:
    """Refuses sizes at which results would have another rank, for a target that fixes ranks."""
    texts = _texts(program.inputs, program.names)
    refused = []
    for size, node in fix_ranks_of(program.graph_module):
        code = f"{size} != 1"
        text = re.sub(r"[A-Za-z_]\w*", lambda m: texts.get(m[0], m[0]), code)
        reason = f"{node.name} drops a dimension of size 1, and {target} computes for one rank"
        refused.append(Guard(code, text, provenance.source_line(node), reason))
    guards = program.guards
    program.guards = replace(guards, conditions=(*guards.conditions, *dict.fromkeys(refused)))


def _not_a_module(model: object) -> str:
    kind = f"{type(model).__module__}.{type(model).__qualname__}".removeprefix("builtins.")
    if isinstance(model, type) and issubclass(model, nn.Module):
        name = model.__name__
        return f"model is the class {name}, not a module: pass an instance, {name}(...)"
    if isinstance(model, dict):
        return (
            "model is a dict (a state_dict?): build the module, call load_state_dict on it, "
            "and pass the module"
        )
    return (
        f"model is a {kind}; expected a torch.nn.Module, a torch.export.ExportedProgram or the "
        "path of a .pt2. Wrap a function in a module whose forward calls it"
    )


# --- programs -------------------------------------------------------------------------------------


def _from_program(
    program: ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    bind: Mapping[str, Any],
    *,
    from_file: bool,
) -> Program:
    if dynamic_shapes is not None:
        raise FrontendError(
            "dynamic_shapes cannot be given with an exported program: its shapes are fixed "
            "already. Give them to torch.export.export, or pass the module"
        )
    own = not args and not kwargs and program.example_inputs is not None
    if own:
        args, kwargs = program.example_inputs[0], dict(program.example_inputs[1])
    unusual.check_program(program)
    try:
        with torch.no_grad():
            gm, redone = functional_module(program, aliasing_known=not from_file)
    except Exception as error:
        raise FrontendError(
            f"torch could not unlift the exported program ({type(error).__name__}: "
            f"{_first_lines(error)}); export the module again with this version of torch"
        ) from error
    bound: dict[str, str] = {}
    if bind:
        whole = (args, kwargs) if own else None
        bound, remaining = binding.replace_inputs(gm, bind, whole)
        args, kwargs = remaining or (args, kwargs)
    _check_structure(gm, args, kwargs)
    notes = [*_graph_notes(gm), *binding.warnings_of(bind)]
    if redone:
        notes.append("in-place writes were resolved by run_decompositions({})")
    example = fresh((args, kwargs))
    inputs = _input_specs(gm, example)
    sizes = [s.sizes for s in inputs]
    recorded, unread = size_guards.read(program, gm, sizes, {}, None)
    notes += _unread(unread)
    derived = size_guards.derived(sizes, [s.name for s in inputs])
    guards = Guards(tuple(recorded), tuple(derived))
    finished = _finish(program, gm, fresh(example), example, (), notes, guards)
    finished.bound = bound
    return finished


def _check_structure(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    expected = gm.graph._codegen.pytree_info.in_spec  # type: ignore[attr-defined]
    spec = pytree.tree_structure((args, kwargs))
    if spec.num_leaves != expected.num_leaves:
        raise FrontendError(
            f"the exported program takes {expected.num_leaves} inputs, {spec.num_leaves} were "
            "given; pass example_inputs as it was exported, or none if it carries its own"
        )


# --- modules --------------------------------------------------------------------------------------


def _from_module(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    dynamic_batch: bool,
    bind: Mapping[str, Any],
) -> Program:
    notes: list[str] = []
    if model.training or any(m.training for m in model.modules()):
        notes.append("the model was in training mode; it was traced with eval semantics")
    unusual.check_inputs((args, kwargs))
    example = fresh((args, kwargs))
    tracer = Tracer(model, bind, example)
    if bind:
        tracer.check(example)
    specialised: list[str] = []
    batch: int | None = None
    traced = example
    names: dict[str, str] = {}
    if dynamic_shapes is not None:
        dynamic_shapes = tracer.flat_shapes(dynamic_shapes)
        program = tracer.export(example, dynamic_shapes)
        requests = _requests(program, dynamic_shapes, example)
        specialised += _static_despite(requests)
        names = _given_names(requests)
    else:
        batch = _batch_size(example) if dynamic_batch else None
        attempt = _dynamic_batch(tracer, example, batch, specialised) if batch is not None else None
        if attempt is None:
            program, batch = tracer.export(example, None), None
        else:
            program, traced, varies = attempt
            if not varies:
                batch = None
            if batch == 1:
                notes.append("the example has batch 1; it was traced at batch 2, rows repeated")
    gm, redone = tracer.functional(program)
    guards, free = Guards(), set[str]()
    differs = apart(tracer, gm, traced)
    if differs is not None:
        differs = (
            f"the traced program is not the model: on the example {differs}. torch.export traces "
            "another path than a call takes (a fused fast path, a test for export)"
        )
        notes.append(differs)
    else:
        inputs = _input_specs(gm, traced)
        derived = size_guards.derived([s.sizes for s in inputs], [s.name for s in inputs])
        comparison = Comparison(tracer, gm, traced, inputs, derived)
        sizes = [s.sizes for s in inputs]
        recorded, unread = size_guards.read(program, gm, sizes, names, tracer.signature)
        reason = _batch_one_differs(comparison, recorded, batch) if batch is not None else None
        if reason:
            specialised.append(f"the batch dimension is static at {batch}: {reason}")
            program, traced, batch = tracer.export(example, None), example, None
            gm, redone = tracer.functional(program)
        else:
            own = {str(s) for s, r in program.range_constraints.items() if _bounds(r)[0] <= 2}
            guards, spurious = _settled(comparison, recorded, own, names)
            notes += _unread(unread)
            notes += [f"sizes need not fulfil {g}: the trace is right without" for g in spurious]
            free = {n for g in spurious for n in g.symbols} - names.keys()
            free -= {n for g in guards.conditions for n in g.symbols if g in recorded}
    _refuse_seeds(tracer, gm, traced)
    if tracer.used_original:
        notes.append("the model could not be copied and was traced itself")
    if redone:
        notes.append("in-place writes were resolved by run_decompositions({})")
    notes += _graph_notes(gm)
    notes += binding.warnings_of(bind)
    written = {str(n.target) for n in constants.written(gm.graph) if n.op == "get_attr"}
    finished = _finish(program, gm, fresh(traced), example, tuple(specialised), notes, guards)
    if differs is None:
        tracer.refuse_lost_state(finished, traced, written)
    finished.names = names
    finished.bound = tracer.bound
    finished.apart = differs or ""
    finished.module = None if tracer.used_original else tracer.fresh_module
    finished.ranges |= dict.fromkeys(free, (0, None))
    return finished


def _batch_one_differs(comparison: Comparison, recorded: Sequence[Guard], batch: int) -> str | None:
    """Compares the trace with the model at batch 1, which tracing at 2 or more cannot see."""
    one = dict.fromkeys(_batches(comparison.inputs), 1)
    if batch > 1 and not Guards(tuple(recorded)).admits({**comparison.hints, **one}):
        return None  # a guard refuses it
    verdict = comparison.at(one)
    if verdict.outcome != DIFFERS:
        return None
    return f"the model takes another path at batch 1 ({verdict.reason})"


def _batches(inputs: Iterable[InputSpec]) -> list[str]:
    """The symbols of leading dimensions."""
    leading = [s.sizes[0] for s in inputs if s.sizes and isinstance(s.sizes[0], str)]
    return list(dict.fromkeys(name for size in leading for name in names_in(str(size))))


def _settled(
    comparison: Comparison, recorded: Sequence[Guard], own: set[str], names: Mapping[str, str]
) -> tuple[Guards, list[Guard]]:
    """What sizes must fulfil: what the trace recorded, and what it cannot see below two.

    Args:
        comparison: the trace beside its model.
        recorded: by the trace.
        own: symbols whose lower bound is the tracer's own.
        names: the user's names of symbols.

    Returns:
        The guards, and the recorded ones that are spurious.
    """
    texts = {s: t for s, t in _texts(comparison.inputs, names).items() if s in own}
    low = list(lowest(comparison, _batches(comparison.inputs), texts).values())
    kept, spurious = settle(recorded, comparison, low)
    return Guards((*low, *kept), tuple(comparison.derived)), spurious


def _unread(codes: Iterable[str]) -> list[str]:
    return [f"a condition of the trace is not checked in calls: {code}" for code in codes]


def _texts(inputs: Sequence[InputSpec], names: Mapping[str, str]) -> dict[str, str]:
    """Each symbol in the user's words: the name of its ``Dim``, or the dimension it stands for."""
    found: dict[str, str] = {}
    for spec in inputs:
        for axis, size in enumerate(spec.sizes):
            for symbol in names_in(size) if isinstance(size, str) else ():
                text = f"{spec.name}.shape[{axis}]" if symbol == size else symbol
                found.setdefault(symbol, names.get(symbol, text))
    return found


def _dynamic_batch(
    tracer: Tracer, example: Any, batch: int, specialised: list[str]
) -> tuple[ExportedProgram, Any, bool] | None:
    """Exports with a dynamic batch axis; ``None`` (and the reason) where that is not possible.

    The result says whether some batch axis really came out dynamic.
    """
    traced = _repeated(example) if batch == 1 else example
    inputs = fresh(traced)
    shapes = ShapesCollection()
    seen: set[int] = set()
    for leaf in pytree.tree_leaves(inputs):
        if _has_batch(leaf, 2 if batch == 1 else batch) and id(leaf) not in seen:
            seen.add(id(leaf))
            shapes[leaf] = {0: Dim.AUTO}
    try:
        program = tracer.export(inputs, shapes, copies=False)
    except FrontendError as error:
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {_first_lines(cause)[:160]}"
        specialised.append(
            f"the batch dimension is static at {batch}: tracing it failed ({reason})"
        )
        return None
    values = [n.meta["val"] for n in _user_placeholders(program)]
    leaves = pytree.tree_leaves(traced)
    fixed = [
        node
        for node, value, leaf in zip(_user_placeholders(program), values, leaves, strict=True)
        if _has_batch(leaf, 2 if batch == 1 else batch) and not _is_symbolic(value.shape[0])
    ]
    if not fixed:
        return program, traced, True
    names = ", ".join(n.name for n in fixed)
    specialised.append(
        f"the batch dimension is static at {batch}: the model fixes dimension 0 of {names}"
    )
    if batch == 1:
        return None
    some = len(fixed) < sum(_has_batch(leaf, batch) for leaf in leaves)
    return program, traced, some


def _refuse_seeds(tracer: Tracer, gm: fx.GraphModule, example: Any) -> None:
    """Refuses a model that draws the same numbers at every call, from a seed in its forward.

    A trace keeps the draw and loses the seed: the graph would draw other weights at every call.
    """
    draws = [n for n in gm.graph.nodes if draws_random(n)]
    if not draws or not _repeats(tracer.fresh_module(), example) or _repeats(gm, example):
        return
    where = provenance.source_line(draws[0])
    raise FrontendError(
        f"{type(tracer.original).__name__} seeds the random numbers that it draws in forward "
        f"({op_name(draws[0])}{' at ' + where if where else ''}): a traced program loses the seed "
        "and draws others at every call\n  fix: draw them once, outside of forward, and keep them "
        "as a buffer (register_buffer)"
    )


def _repeats(module: nn.Module, example: Any) -> bool:
    """Whether two calls give the same numbers under different seeds; its state is not written."""
    results = []
    for seed in (0, 1):
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            results.append(torch.func.functional_call(module, buffers, *fresh(example)))
    first, second = map(pytree.tree_leaves, results)
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(first, second, strict=True)
    )


class Tracer:
    """Exports a shallow eval copy of a module; the module itself only where the copy fails."""

    def __init__(self, model: nn.Module, bind: Mapping[str, Any], example: Any) -> None:
        self.original = model
        self.example = example
        self.bind = bind
        self.bound: dict[str, str] = {}
        self.used_original = False
        self._detaches = False
        self._lengths_vary = False
        self._module: nn.Module = model
        self._untraced: tuple[nn.Module, state.Snapshot] | None = None
        self._parted: frozenset[str] = frozenset()
        self._calls: dict[int, state.Calls] = {}

    def fresh_module(self) -> nn.Module:
        """A copy that no trace has run through: forward may have left fake tensors on the last."""
        self._module = self.original if self.used_original else eval_copy(self.original)
        if self.bind:
            if self._module is self.original:
                raise UsageError(
                    "bind= needs a copy of the module, and this one cannot be copied: wrap it in "
                    "a module whose forward calls it"
                )
            self.bound = binding.install(self._module, self.bind)
        if self._module is not self.original:
            variadic.name_inputs(self._module, *self.example)
        return self._module

    def _untouched(self) -> tuple[nn.Module, state.Snapshot]:
        """One copy for every call of the model, and what it holds: each puts that back."""
        if self._untraced is None or self.used_original:
            module = self.fresh_module()
            self._untraced = module, state.Snapshot(module)
        self._module = self._untraced[0]
        return self._untraced

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """How ``t.data`` and ``len(t)`` are read in a trace."""
        with contextlib.ExitStack() as stack:
            if self._detaches:
                stack.enter_context(_DataDetaches())
            if self._lengths_vary:
                stack.enter_context(lengths.symbolic())
            yield

    def flat_shapes(self, dynamic_shapes: Any) -> Any:
        """Dynamic shapes by the names that inputs of ``*args`` and ``**kwargs`` are traced with."""
        forward = inspect.signature(self.original.forward)
        free = binding.free_signature(forward, self.bind)
        args, kwargs = self.example
        return variadic.flat_shapes(free, args, kwargs, dynamic_shapes)

    def check(self, inputs: Any) -> None:
        """Runs the module once: a trace does not see every wrong dtype."""
        try:
            self.run(inputs)
        except UsageError:
            raise
        except Exception as error:
            raise FrontendError(self._explain(error, *inputs)) from error

    def export(self, inputs: Any, dynamic_shapes: Any, *, copies: bool = True) -> ExportedProgram:
        watch = lengths.Watch()
        try:
            with watch.on():
                program = self._export(inputs, dynamic_shapes, copies=copies)
        except FrontendError:
            if not watch.fixed or self._lengths_vary:
                raise
        if not watch.fixed or self._lengths_vary:
            return program
        self._lengths_vary = True  # what it fixed need not be fixed
        return self._export(inputs, dynamic_shapes, copies=copies)

    def _export(self, inputs: Any, dynamic_shapes: Any, *, copies: bool) -> ExportedProgram:
        args, kwargs = fresh(inputs) if copies else inputs
        try:
            module = self.fresh_module()
            recorded = state.recorded(module, self._parted)
            with torch.no_grad(), _quiet(), self._reading(), recorded:
                return torch.export.export(
                    module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False
                )
        except (UsageError, FrontendError):
            raise
        except state.SharedBuffers as shared:
            self._parted |= shared.names
            return self._export(inputs, dynamic_shapes, copies=copies)
        except Exception as error:
            if _FAKE_CONSTANT in str(error) and not self._detaches:
                self._detaches = True
                return self._export(inputs, dynamic_shapes, copies=copies)
            if self._may_trace_original(error):
                self.used_original = True
                try:
                    return self._export(inputs, dynamic_shapes, copies=copies)
                except FrontendError:
                    self.used_original = False  # the copy was not at fault
                    raise
            refusal = unusual.in_module(self.original)
            raise refusal or FrontendError(self._explain(error, args, kwargs)) from error

    @property
    def signature(self) -> inspect.Signature:
        """Of the forward that was traced last."""
        return inspect.signature(self._module.forward)

    def run(self, inputs: Any) -> Any:
        """What the model itself returns, of a copy that no trace has run through."""
        return self._call(*fresh(inputs))

    def line_of(self, error: BaseException) -> str:
        """The user's line behind an exception of the model's."""
        return _user_frame(error, self._module)

    def functional(self, program: ExportedProgram) -> tuple[fx.GraphModule, bool]:
        unusual.check_program(program)
        try:
            with torch.no_grad():
                return functional_module(program)
        except Exception as error:
            lost = state.written_constants(program)
            if lost:
                message = state.lost_in(type(self.original).__name__, lost)
                raise FrontendError(message) from error
            shared = state.written_in_part(program)
            if shared:
                raise FrontendError(
                    f"{type(self.original).__name__} writes one of {', '.join(shared)}, which "
                    "share memory: a trace knows each of them by itself\n  fix: keep one buffer, "
                    "and take views of it in forward"
                ) from error
            raise FrontendError(
                f"{type(self.original).__name__} was traced, but torch could not make the trace "
                f"functional ({type(error).__name__}: {_first_lines(error)})\n  fix: keep "
                "gradients, and transforms of torch.func inside others, out of forward"
            ) from error

    def _may_trace_original(self, error: Exception) -> bool:
        """Whether the copy may be at fault; a model in training mode is never traced itself."""
        if self.bind or self.used_original or any(m.training for m in self.original.modules()):
            return False
        kinds = {type(e).__name__ for e in _chain(error)}
        return not any(k.startswith(("GuardOnDataDependent", "DataDependent")) for k in kinds)

    def _explain(self, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        place = _user_frame(error, self._module)
        text = _first_lines(error)
        where = f"\n  at {place}" if place else ""
        name = type(self.original).__name__
        given = ", ".join(_describe(leaf) for leaf in pytree.tree_leaves((args, kwargs)))
        if self.bind:
            given += f"; bound: {', '.join(self.bind)}"
        scripted = [
            f" ({path!r})" if path else ""
            for path, module in self.original.named_modules()
            if isinstance(module, torch.jit.ScriptModule)
        ]
        if scripted or "ScriptModule" in text:
            held = (*scripted, "")[0]
            fix = "pass the nn.Module that was scripted, not the result of torch.jit.script"
            return f"{name} cannot be traced: it holds a TorchScript module{held}\n  fix: {fix}"
        kind = {type(e).__name__ for e in _chain(error)}
        if any(k.startswith(("GuardOnDataDependent", "DataDependent")) for k in kind) or (
            "data-dependent" in text
        ):
            return (
                f"{name} cannot be traced: its control flow or its sizes depend on the values of "
                f"tensors ({text}){where}\n  fix: write the branch with torch.where or torch.cond, "
                "or keep it outside of the compiled module"
            )
        if "pytree" in text or "Unsupported input type" in text or "unsupported output" in text:
            fix = (
                "register the type with torch.export.register_dataclass or "
                "torch.utils._pytree.register_pytree_node"
            )
            return f"{name} cannot be traced: {text}{where}\n  fix: {fix}"
        if "onstraint" in text or "dynamic_shapes" in text:
            fix = "change dynamic_shapes as the message says, or leave the dimension out"
            return f"{name} cannot be traced with these dynamic_shapes: {text}{where}\n  fix: {fix}"
        if self._runs(args, kwargs):
            return (
                f"{name} runs, but torch.export cannot trace it: {type(error).__name__}: {text}"
                f"{where}\n  fix: keep what it cannot trace outside of the compiled module"
            )
        return (
            f"{name} raises on the example inputs ({given or 'none'}): "
            f"{type(error).__name__}: {text}{where}\n  fix: check that "
            "model(*args, **kwargs) runs on these inputs: their number, shapes and dtypes"
        )

    def _runs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        try:
            self.run((args, kwargs))
        except Exception:  # what it raises is explained already
            return False
        return True

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model returns, which is left as it is."""
        module, before = self._untouched()
        parameters = {id(p) for p in module.parameters()}
        with torch.no_grad(), state.restored(before, lambda t: id(t) not in parameters):
            return module(*args, **kwargs)

    def call(self, inputs: Any) -> Any:
        """What a model returns that writes none of its tensors, as its trace says."""
        if any(not calls.changed for calls in self._calls.values()):
            return self.run(inputs)  # it keeps nothing, as another call has shown
        with torch.no_grad():
            calls = self._calls[id(inputs)] = self._calls_of(inputs, set())
        return calls.outputs[0]

    def refuse_lost_state(self, program: Program, inputs: Any, written: set[str]) -> None:
        """Refuses a model that keeps state which its trace has lost."""
        gm = program.graph_module
        if any(map(draws_random, gm.graph.nodes)):
            return
        with torch.no_grad():
            try:
                calls = self._calls.get(id(inputs)) or self._calls_of(inputs, written)
            except Exception:  # the model itself refuses these inputs: nothing to compare
                return
            name = type(self.original).__name__
            state.refuse_lost(name, calls, gm, lambda given: self._call(*fresh(given)))

    def _calls_of(self, inputs: Any, written: set[str]) -> state.Calls:
        module, before = self._untouched()
        touched = state.named(module, written) if written else None
        return state.Calls.of(module, inputs, touched, before)


class _DataDetaches(TorchFunctionMode):
    """Reads ``t.data`` as ``t.detach()``: a trace takes the former for a constant, with no values.

    They are the same tensor; only versions of writes through it are counted differently.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func == _READ_DATA:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


_READ_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the log of a call that fails in the trace: the error says it, in one line."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:400] if lines else type(error).__name__


def _user_frame(error: BaseException, module: nn.Module) -> str:
    """``file:line in function (module 'path')`` of the innermost line that is the user's own."""
    paths = {id(m): path for path, m in module.named_modules()}
    best: tuple[int, str] | None = None
    for current in _chain(error):
        trace_ = current.__traceback__
        path = ""
        while trace_ is not None:
            frame = trace_.tb_frame
            file = frame.f_code.co_filename
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and paths.get(id(owner)):
                path = paths[id(owner)]
            if not file.startswith((_TORCH, _OWN, "<")):
                rank = 1 if "site-packages" in file else 2
                text = f"{file}:{trace_.tb_lineno} in {frame.f_code.co_name}"
                if (
                    isinstance(owner, nn.Module)
                    and id(owner) in paths
                    and (best is None or rank >= best[0])
                ) or (best is not None and rank >= best[0]):
                    best = (rank, text + (f" (module {path!r})" if path else ""))
            trace_ = trace_.tb_next
        if best is not None and best[0] == 2:
            break
    if best is not None:
        return best[1]
    for current in _chain(error):  # a data-dependent guard is raised anew, its line in the text
        named = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', str(current))
        own = [n for n in named if not n[0].startswith((_TORCH, _OWN))]
        if own:
            return f"{own[-1][0]}:{own[-1][1]} in {own[-1][2]}"
    return ""


def _describe(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}"
    return type(leaf).__name__


# --- inputs ---------------------------------------------------------------------------------------


def _batch_size(example: Any) -> int | None:
    """The leading size that most tensors share, the first one's where that is undecided."""
    sizes = [t.shape[0] for t in pytree.tree_leaves(example) if _is_tensor(t) and t.ndim]
    if not sizes or not sizes[0]:
        return None
    counts = Counter(sizes)
    most = max(counts.values())
    return int(next(s for s in sizes if counts[s] == most)) or None


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _has_batch(leaf: Any, batch: int) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch


def _repeated(example: Any) -> Any:
    return pytree.tree_map(lambda t: t.repeat_interleave(2, 0) if _has_batch(t, 1) else t, example)


def _is_symbolic(size: Any) -> bool:
    # AUTO may leave a SymInt behind whose expression has become a number.
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


@dataclass(frozen=True)
class _Request:
    """What the caller's ``dynamic_shapes`` say of one dimension of an input."""

    node: fx.Node
    axis: int
    dim: Any

    @property
    def size(self) -> Any:
        return self.node.meta["val"].shape[self.axis]


def _requests(program: ExportedProgram, asked: Any, example: Any) -> list[_Request]:
    if isinstance(asked, ShapesCollection):
        return []
    wanted: list[Any] = []

    def walk(spec: Any, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            wanted.append(spec)
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(spec.get(key) if isinstance(spec, dict) else None, item)
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                walk(spec[i] if isinstance(spec, (list, tuple)) and i < len(spec) else None, item)
        else:
            wanted.append(None)

    args, kwargs = example
    if isinstance(asked, dict):
        names = [n.name for n in _user_placeholders(program)]
        if not kwargs and len(asked) == len(args):
            walk(list(asked.values()), args)
        else:
            bound = {**dict(zip(names, args, strict=False)), **kwargs}
            walk(asked, bound)
    else:
        walk([*asked, *([None] * len(kwargs))], [*args, *kwargs.values()])
    nodes = _user_placeholders(program)
    if len(wanted) != len(nodes):
        return []
    return [
        _Request(node, axis, dim)
        for node, spec in zip(nodes, wanted, strict=True)
        for axis, dim in (spec.items() if isinstance(spec, dict) else enumerate(spec or ()))
    ]


def _static_despite(requests: Sequence[_Request]) -> list[str]:
    """Sentences about dimensions that were asked to be dynamic and came out static."""
    return [
        f"dimension {r.axis} of {r.node.name} was asked to be dynamic and is static at "
        f"{r.size}: the model fixes it"
        for r in requests
        if not (r.dim is None or isinstance(r.dim, int) or r.dim is Dim.STATIC)
        and not _is_symbolic(r.size)
    ]


def _given_names(requests: Sequence[_Request]) -> dict[str, str]:
    """The names of the user's ``Dim`` objects, by the symbols that the trace made of them."""
    return {
        str(r.size): r.dim.__name__
        for r in requests
        if hasattr(r.dim, "__name__") and _is_symbolic(r.size) and r.size.node.expr.is_symbol
    }


def _user_placeholders(program: ExportedProgram) -> list[fx.Node]:
    user = set(program.graph_signature.user_inputs)
    specs = program.graph_signature.input_specs
    nodes = program.graph.find_nodes(op="placeholder")
    kind = torch.export.graph_signature.InputKind.USER_INPUT
    return [n for n, s in zip(nodes, specs, strict=True) if s.kind == kind or n.name in user]


# --- the result -----------------------------------------------------------------------------------


def _finish(
    program: ExportedProgram,
    gm: fx.GraphModule,
    traced: Any,
    example: Any,
    specialised: tuple[str, ...],
    notes: list[str],
    guards: Guards,
) -> Program:
    for node in gm.graph.nodes:
        if constants.is_mutation(node) and "val" not in node.meta:
            node.meta["val"] = node.args[0].meta["val"]  # a copy-back that unlifting added
    constants.own_written(gm)  # the caller's stay as they are
    ranges = {str(s): _bounds(r) for s, r in program.range_constraints.items()}
    settle_squeezes(gm, {s: guards.least(s) if r[0] <= 2 else r[0] for s, r in ranges.items()})
    inputs = _input_specs(gm, traced)
    return Program(
        graph_module=gm,
        args=tuple(traced[0]),
        kwargs=dict(traced[1]),
        example=(tuple(example[0]), dict(example[1])),
        inputs=inputs,
        specialised=specialised,
        notes=tuple(notes),
        ranges=ranges,
        names={},
        node_count=sum(n.op == "call_function" for n in gm.graph.nodes),
        exported=program,
        guards=guards,
    )


def _input_specs(gm: fx.GraphModule, traced: Any) -> tuple[InputSpec, ...]:
    placeholders = gm.graph.find_nodes(op="placeholder")
    leaves = pytree.tree_leaves(traced)
    return tuple(_input_spec(n, leaf) for n, leaf in zip(placeholders, leaves, strict=True))


def _input_spec(node: fx.Node, leaf: Any) -> InputSpec:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return InputSpec(node.name, (), None, None, leaf)
    sizes = tuple(str(s) if _is_symbolic(s) else int(s) for s in value.shape)
    batch = 0 if sizes and isinstance(sizes[0], str) else None
    return InputSpec(node.name, sizes, value.dtype, batch, None, value.device)


def _bounds(values: Any) -> tuple[int, int | None]:
    low = int(values.lower) if values.lower.is_Integer else 0
    return low, (int(values.upper) if values.upper.is_Integer else None)


def _graph_notes(gm: fx.GraphModule) -> list[str]:
    notes: list[str] = []
    opaque = Counter(
        str(getattr(n.target, "__name__", n.target))
        for n in gm.graph.nodes
        if n.op == "call_function" and isinstance(n.target, torch._ops.HigherOrderOperator)
    )
    for name, count in opaque.items():
        inside = "its sub-graphs are kept as they are, nothing folds inside"
        if name == "cond":
            inside = "decided at run time, each branch is folded by itself"
        notes.append(f"{count} x {name}: {inside}")
    if constants.written(gm.graph):
        notes.append("the model writes its own state; the compiled model keeps a state of its own")
    training = sum(trains(n) for n in gm.graph.nodes)
    if training:
        notes.append(f"{training} operators were exported in training mode and stay so")
    return notes


def trains(node: fx.Node) -> bool:
    """Dropout that drops, or batch norm with running statistics that it does not use."""
    if node.op != "call_function":
        return False
    name = op_name(node)
    if name in ("dropout", "feature_dropout", "alpha_dropout"):
        return bool(len(node.args) > 2 and node.args[2] and node.args[1] != 0)
    if name == "batch_norm":
        return bool(node.args[5]) and node.args[3] is not None
    return name == "_native_batch_norm_legit_functional"


# --- the shallow copy -----------------------------------------------------------------------------


_TABLES = frozenset(k for k, v in vars(nn.Module()).items() if isinstance(v, (dict, set)))


def eval_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree in eval mode that shares every parameter and buffer.

    Modules that other modules reach through plain attributes, containers, hooks, bound methods or
    closures are the copies there too. ``train()`` is not called: some modules merge weights in it.
    """
    originals = list(model.modules())
    if any(isinstance(m, torch.jit.ScriptModule) for m in originals):
        return model
    memo: dict[int, Any] = {}
    for module in originals:
        memo[id(module)] = object.__new__(type(module))
    keep: list[Any] = []  # ids in the memo must not be reused
    for module in originals:
        copy = memo[id(module)]
        # most of what a module holds are empty tables of hooks, which no two modules share
        state = {
            k: type(v)() if k in _TABLES and not v else _rewired(v, memo, keep, 0)
            for k, v in vars(module).items()
        }
        state["training"] = False
        copy.__dict__.update(state)
    copied: nn.Module = memo[id(model)]
    return copied


def _rewired(value: Any, memo: dict[int, Any], keep: list[Any], depth: int) -> Any:
    """``value`` with modules replaced by their copies; containers are copied, tensors shared."""
    if id(value) in memo:
        return memo[id(value)]
    if depth > 6 or isinstance(value, (torch.Tensor, str, int, float, bytes, type(None))):
        return value
    new: Any = value
    if type(value) in (list, dict, OrderedDict, set):
        new = type(value)()
        memo[id(value)] = new
        keep.append(value)
        _fill(new, value, functools.partial(_rewired, memo=memo, keep=keep, depth=depth + 1))
        return new
    if type(value) is tuple:
        new = tuple(_rewired(v, memo, keep, depth + 1) for v in value)
    elif isinstance(value, types.MethodType):
        owner = _rewired(value.__self__, memo, keep, depth + 1)
        if owner is not value.__self__:
            new = types.MethodType(value.__func__, owner)
    elif isinstance(value, functools.partial):
        inner = [_rewired(v, memo, keep, depth + 1) for v in (value.func, value.args)]
        new = functools.partial(
            inner[0], *inner[1], **_rewired(value.keywords, memo, keep, depth + 1)
        )
    elif inspect.isfunction(value) and value.__closure__:
        new = _rewired_closure(value, memo, keep, depth)
    if new is not value:
        memo[id(value)] = new
        keep.append(value)
    return new


def _fill(new: Any, old: Any, rewire: Callable[[Any], Any]) -> None:
    if isinstance(new, list):
        new.extend(rewire(v) for v in old)
    elif isinstance(new, set):
        new.update(rewire(v) for v in old)
    else:
        new.update((k, rewire(v)) for k, v in old.items())


def _rewired_closure(
    function: types.FunctionType, memo: dict[int, Any], keep: list[Any], depth: int
) -> types.FunctionType:
    cells: Iterable[types.CellType] = function.__closure__ or ()
    contents = [c.cell_contents if _is_set(c) else None for c in cells]
    if not any(isinstance(c, nn.Module) and id(c) in memo for c in contents):
        return function
    new_cells = tuple(
        types.CellType(memo[id(v)]) if isinstance(v, nn.Module) and id(v) in memo else c
        for c, v in zip(cells, contents, strict=True)
    )
    new = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        new_cells,
    )
    new.__kwdefaults__ = function.__kwdefaults__
    new.__dict__.update(function.__dict__)
    return new


def _is_set(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
