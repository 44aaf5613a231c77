"""Exports a copy of a module, runs it beside its trace, and explains what goes wrong."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from refold.errors import FrontendError, UsageError
from refold.frontends import bind as binding
from refold.frontends import lengths, state, unusual, variadic
from refold.frontends.eval_copy import eval_copy
from refold.frontends.functionalise import functional_module
from refold.graph.constants import draws_random
from refold.graph.program import Program, fresh

_TORCH = os.path.dirname(torch.__file__) + os.sep
_FAKE_CONSTANT = "fake tensor in the exported program constant"
_OWN = str(Path(__file__).resolve().parents[1]) + os.sep


class Tracer:
    """Exports a shallow eval copy of a module; the module itself only where the copy fails."""

    def __init__(self, model: nn.Module, bind: Mapping[str, Any], example: Any) -> None:
        self.original = model
        self.example = example
        self.bind = bind
        self.bound: dict[str, str] = {}
        self.used_original = False
        self._detaches = False
        self.lengths_vary: bool | None = None  # None until a trace has read one, False never
        self._module: nn.Module = model
        self._untraced: tuple[nn.Module, state.ModelSnapshot] | None = None
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

    def _untouched(self) -> tuple[nn.Module, state.ModelSnapshot]:
        """One copy for every call of the model, and what it holds: each puts that back."""
        if self._untraced is None or self.used_original:
            module = self.fresh_module()
            self._untraced = module, state.ModelSnapshot(module)
        self._module = self._untraced[0]
        return self._untraced

    def untouched_module(self) -> nn.Module:
        """A copy that no trace has run through; what calls it leaves it as it was."""
        return self._untouched()[0]

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """How ``t.data`` and ``len(t)`` are read in a trace."""
        with contextlib.ExitStack() as stack:
            if self._detaches:
                stack.enter_context(_DataDetaches())
            if self.lengths_vary:
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
        watch, program, refusal = lengths.Watch(), None, None
        try:
            with watch.on():
                program = self._export(inputs, dynamic_shapes, copies=copies)
        except FrontendError as error:
            refusal = error
        if watch.fixed and self.lengths_vary is None:
            self.lengths_vary = True  # what it fixed need not be fixed
            try:
                return self._export(inputs, dynamic_shapes, copies=copies)
            except FrontendError:
                self.lengths_vary = False  # it needs a number
        if program is None:
            assert refusal is not None
            raise refusal
        return program

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
                f"functional ({type(error).__name__}: {first_lines(error)})\n  fix: keep "
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
        text = first_lines(error)
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


def first_lines(error: BaseException) -> str:
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
