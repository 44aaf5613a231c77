"""The backend ``refold`` of ``torch.compile``: folds with the parameters' values, then hands over.

Dynamo passes the parameters of a module as arguments of every call. A folded graph is right for the
values that it was folded with, so every call compares the parameters with those first.
"""

from __future__ import annotations

import fnmatch
import functools
import logging
import operator
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import fx
from torch._inductor.exc import InductorError
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from refold.backends.pytorch import inductor
from refold.backends.pytorch.own_outputs import OwnOutputs
from refold.compile_lock import one_at_a_time
from refold.errors import RefoldError, UsageError, did_you_mean, first_line
from refold.frontends.dynamo import Captured, NotFoldable, capture, hold
from refold.graph import provenance
from refold.graph.copies import copy_sharing_tensors
from refold.passes import find_pipeline
from refold.rewrite.context import Context
from refold.rewrite.cost import CostModel, on_cpu
from refold.rewrite.pipeline import Pipeline
from refold.verify.compare import verify_widely
from refold.verify.references import references
from refold.weights.watch import watch

log = logging.getLogger(__name__)

_KEPT = 4  # variants of one graph that are kept, the most recently used first
_RUNS = 4  # slices that are joined faster than items are picked one by one
_FOLDS = 8  # folds of one graph, as many as dynamo compiles it for; after that it runs unfolded

Flat = Callable[..., Any]


@dataclass(frozen=True)
class _BackendSettings:
    pipeline: str | Pipeline = "default"
    exclude: tuple[str, ...] = ()
    inner: str | Callable[..., Any] = "inductor"
    checksum: bool = False
    frozen: bool = False
    verify: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.pipeline, str):
            object.__setattr__(self, "pipeline", find_pipeline(self.pipeline))
        if isinstance(self.exclude, str):
            object.__setattr__(self, "exclude", (self.exclude,))
        object.__setattr__(self, "exclude", tuple(self.exclude))
        if isinstance(self.inner, str) and self.inner not in _backends():
            raise UsageError(f"unknown inner {self.inner!r}{did_you_mean(self.inner, _backends())}")
        if self.frozen and self.checksum:
            raise UsageError(
                "frozen=True reads no parameter and checksum=True reads all: give one of them"
            )

    @property
    def passes(self) -> Pipeline:
        assert isinstance(self.pipeline, Pipeline)
        return self.pipeline

    @property
    def costs(self) -> CostModel:
        """What calls cost in what compiles the folded graph."""
        named = self.inner if isinstance(self.inner, str) else "another compiler"
        return on_cpu("torch" if named == "eager" else named)


def backend(
    *,
    pipeline: str | Pipeline = "default",
    exclude: Sequence[str] = (),
    inner: str | Callable[..., Any] = "inductor",
    checksum: bool = False,
    frozen: bool = False,
    verify: bool = True,
) -> Callable[..., Flat]:
    """A configured backend: ``torch.compile(model, backend=refold.backend(...))``.

    ``torch.compile(model, backend="refold", options={...})`` takes the same names, and Inductor's.

    Args:
        pipeline: as for :func:`refold.compile_for_inference`.
        exclude: globs of module paths that no pass touches.
        inner: what compiles the folded graph: ``inductor``, ``eager``, another backend's name, or
            a callable of a graph module and its fake inputs.
        checksum: also compare the parameters' contents on every call, which finds writes that
            leave no trace (``param.data.mul_()``, writes through NumPy) and reads all weights.
        frozen: nobody writes into the parameters after compilation, as Inductor's ``freezing``
            takes for granted: **a write in place gives old numbers**. Calls do not pass parameters;
            dynamo guards which ones they are, and optimizer steps are noticed.
        verify: compare the folded graph with the unfolded one in float64 while compiling.

    Raises:
        UsageError: an unknown pipeline or inner backend, or ``frozen`` with ``checksum``.
    """
    globs = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    settings = _BackendSettings(pipeline, globs, inner, checksum, frozen, verify)
    return functools.partial(_compile, settings=settings)


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Flat:
    """The entry point of ``torch.compile(model, backend="refold", mode=..., options=...)``."""
    return _compile(gm, example_inputs, mode=mode, options=options, settings=_BackendSettings())


@one_at_a_time
def _compile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    settings: _BackendSettings,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Flat:
    settings, inductor_settings = _read(settings, mode, options)
    compiler = _Compiler(settings.inner, inductor_settings)
    try:
        captured = capture(gm, example_inputs)
        return _Guarded(gm, captured, settings, compiler, example_inputs)
    except NotFoldable as reason:
        _say(f"a graph was not folded: {reason}", loud=reason.avoidable)
        return compiler.plain(gm, example_inputs)


def _read(
    settings: _BackendSettings, mode: str | None, options: Mapping[str, Any] | None
) -> tuple[_BackendSettings, dict[str, Any]]:
    """Splits the options of ``torch.compile`` into refold's and Inductor's."""
    import torch._inductor

    own = {f.name for f in fields(_BackendSettings)}
    known = set(torch._inductor.list_options())
    given, theirs = {}, inductor.mode_settings(mode)
    for name, value in (options or {}).items():
        if name in own:
            given[name] = value
        elif name.replace("-", "_") in known:
            theirs[name.replace("-", "_")] = value
        else:
            raise UsageError(
                f"backend 'refold' has no option {name!r}{did_you_mean(name, {*own, *known})}"
            )
    return replace(settings, **given), theirs


def _backends() -> list[str]:
    return [n for n in torch._dynamo.list_backends(exclude_tags=()) if n != "refold"]


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _say(message: str, *, loud: bool) -> None:
    if loud:
        _warn_once(f"refold: {message}")
    else:
        log.info(message)


@dataclass(frozen=True)
class _Compiler:
    """What compiles graphs once refold is done with them."""

    inner: str | Callable[..., Any]
    settings: dict[str, Any]

    def folded(self, gm: fx.GraphModule, fakes: Sequence[Any]) -> Flat:
        if self.inner != "inductor":
            return self._other(gm, fakes)
        try:
            return OwnOutputs(gm).of(inductor.compile_graph(gm, fakes, self.settings))
        except InductorError as error:
            first = first_line(error)
            raise NotFoldable(
                f"Inductor cannot compile the folded graph ({first})",
                "report it as a bug of refold",
            ) from error

    def plain(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Flat:
        if self.inner == "inductor":
            return inductor.compile_graph(gm, example_inputs, self.settings, freeze=False)
        return self._other(gm, example_inputs)

    def _other(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Flat:
        if self.inner == "eager":
            return gm
        compiler = torch._dynamo.lookup_backend(self.inner)
        compiled: Flat = compiler(gm, list(inputs))
        return OwnOutputs(gm).of(compiled)


@dataclass
class _State:
    """The parameters of one call, as far as a cheap look tells.

    Identity, version and address miss two things that training does. A batch norm updates its
    running statistics without counting a version: buffers of their kind (floating, at most one
    dimension) are compared by content instead. Fused optimizers write likewise: their steps are
    observed.

    ``held`` shares the parameters' storage: while it lives, no other tensor gets the same address.
    """

    tensors: tuple[torch.Tensor, ...]
    ambiguous: bool
    unchanged: Callable[[], bool]
    held: list[torch.Tensor]
    sums: list[int] | None
    steps: int

    @classmethod
    def of(cls, tensors: list[torch.Tensor], checksum: bool, frozen: bool = False) -> _State:
        statistics = [
            t.dim() <= 1 and t.dtype in _COMPARED and not isinstance(t, torch.nn.Parameter)
            for t in tensors
        ]
        return cls(
            tuple(tensors),
            any(t.numel() < 2 for t in tensors),
            (lambda: True) if frozen else watch(tensors, statistics),
            [t.detach() for t in tensors],
            list(map(_checksum, tensors)) if checksum else None,
            _observer().steps,
        )

    def matches(self, tensors: tuple[torch.Tensor, ...]) -> bool:
        return (
            self._same(tensors)
            and self.unchanged()
            and self._unstepped(tensors)
            and (self.sums is None or list(map(_checksum, tensors)) == self.sums)
        )

    def _same(self, tensors: tuple[torch.Tensor, ...]) -> bool:
        """Whether these are the very tensors, at a tenth of what asking one by one takes.

        Tuples compare elements by identity first. Others are compared as tensors, and a result of
        more than one element has no truth value.
        """
        if self.ambiguous:
            return all(map(operator.is_, tensors, self.tensors))
        try:
            return tensors == self.tensors
        except RuntimeError:
            return False

    def _unstepped(self, tensors: Sequence[torch.Tensor]) -> bool:
        observer = _observer()
        now = observer.steps
        if now == self.steps:
            return True
        if observer.stepped(tensors, self.steps):
            return False
        self.steps = now  # the steps were other models'
        return True

    def fits(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether tensors are of the kind that the graph was traced with."""
        return all(
            a.shape == b.shape
            and a.stride() == b.stride()
            and a.dtype == b.dtype
            and a.device == b.device
            for a, b in zip(self.held, tensors, strict=True)
        )


_COMPARED = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


class _StepObserver:
    """Notes which parameters the optimizers of this process have stepped, and when."""

    def __init__(self) -> None:
        self.steps = 0
        self._last = WeakIdKeyDictionary()
        register_optimizer_step_post_hook(self._stepped)

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.steps += 1
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._last[parameter] = self.steps

    def stepped(self, tensors: Sequence[torch.Tensor], since: int) -> bool:
        """Whether one of the tensors was stepped after ``since``."""
        return any(self._last.get(t, 0) > since for t in tensors)


@functools.cache
def _observer() -> _StepObserver:
    return _StepObserver()


def _checksum(tensor: torch.Tensor) -> int:
    """A weighted sum of the contents; the odd weights lose no single change and no exchange."""
    with torch.no_grad():
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        data = data.view(torch.int32) if data.numel() % 4 == 0 else data
        weights = torch.arange(data.numel(), dtype=torch.int64, device=data.device) * 2 + 1
        return int((data.to(torch.int64) * (weights * _ODD)).sum())


_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2**64 over the golden ratio, as a signed number


@dataclass(frozen=True)
class _Variant:
    """The graph folded for one state of its parameters."""

    state: _State
    run: Flat
    guards: inductor.SizeGuards


class _Guarded:
    """A folded graph that looks at its parameters first; called with dynamo's arguments."""

    def __init__(
        self,
        gm: fx.GraphModule,
        captured: Captured,
        settings: _BackendSettings,
        compiler: _Compiler,
        example_inputs: Sequence[Any],
    ) -> None:
        self._unfolded = gm
        self._captured = captured
        self._settings = settings
        self._compiler = compiler
        self._parameters = _picker(list(captured.parameters))
        self._inputs = _picker(captured.inputs)
        order = (*captured.parameters, *captured.inputs)
        self._with_parameters = _picker(sorted(range(len(order)), key=order.__getitem__))
        self._written = captured.written
        self._lock = threading.RLock()
        self._folds = 0
        self._seen: _State | None = None
        state = self._state(self._parameters(tuple(example_inputs)))
        self._variants = [self._fold(state, example_inputs, inside=True)]
        self._count = len(example_inputs)
        if settings.frozen:
            self._unfolded = copy_sharing_tensors(gm)
            hold(gm, captured, example_inputs)

    def __call__(self, *args: Any) -> Any:
        if len(args) < self._count:  # frozen: dynamo guards what the parameters are
            args = self._with_parameters((*self._template.tensors, *args))
        parameters = self._parameters(args)
        variant: _Variant | None = self._variants[0]
        if variant is None or not variant.state.matches(parameters):
            variant = self._other_variant(parameters, args)
        inputs = self._inputs(args)
        if variant is None or not variant.guards.hold(inputs):
            return self._unfolded(*args)
        if self._written and self._shares(args):
            return self._unfolded(*args)
        with torch.no_grad(), torch._C._DisableAutocast():
            return variant.run(*inputs)

    def _state(self, tensors: Sequence[torch.Tensor]) -> _State:
        return _State.of(list(tensors), self._settings.checksum, self._settings.frozen)

    def _other_variant(
        self, parameters: tuple[torch.Tensor, ...], args: Sequence[Any]
    ) -> _Variant | None:
        """The variant for these parameters; new ones are folded when they come a second time.

        Weights that change before every call must not cost a compilation each.
        """
        with self._lock:
            for variant in self._variants:
                if variant.state.matches(parameters):
                    self._use(variant)
                    return variant
            if self._folds >= _FOLDS or not self._template.fits(parameters):
                _say(
                    "the parameters of a compiled model have changed too often, it now runs "
                    "unfolded; fix: compile after the last change",
                    loud=self._folds >= _FOLDS,
                )
                return None
            if self._seen is None or not self._seen.matches(parameters):
                self._seen = self._state(parameters)
                return None
            seen, self._seen = self._seen, None
            try:
                variant = self._fold(seen, args, inside=False)
            except NotFoldable as reason:
                _say(f"a graph was not folded again: {reason}", loud=reason.avoidable)
                return None
            self._use(variant)
            return variant

    def _use(self, variant: _Variant) -> None:
        others = [v for v in self._variants if v is not variant]
        self._variants = [variant, *others][:_KEPT]

    @one_at_a_time
    def _fold(self, state: _State, args: Sequence[Any], *, inside: bool) -> _Variant:
        self._folds += 1
        self._template = state
        captured = self._captured
        with torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast():
            gm = self._folded(args)
            if inside:
                run = self._compiler.folded(gm, captured.fakes)
                return _Variant(state, run, inductor.SizeGuards({}, None))
            try:
                made = inductor.compile_outside(gm, captured.fakes, self._compiler.folded)
            except Exception as error:
                reason = f"compiling it failed ({error!r:.300})"
                raise NotFoldable(reason, "report it as a bug of refold") from error
            return _Variant(state, *made)

    def _folded(self, args: Sequence[Any]) -> fx.GraphModule:
        captured, settings = self._captured, self._settings
        try:
            gm = captured.bind(args)
            original = copy_sharing_tensors(gm)
            result = settings.passes.run(
                gm, Context(settings.costs, exclude=_present(gm, settings.exclude))
            )
            if settings.verify and result.modified:
                program = captured.program(original, args)
                known = references(original, program)
                known.allowed = result.allowed
                verify_widely(original, gm, program, known)
            captured.restore(gm)
        except NotFoldable:
            raise
        except Exception as error:
            # The model runs without refold: it must run with it too.
            reason = str(error) if isinstance(error, RefoldError) else f"{error!r:.300}"
            raise NotFoldable(reason, "report it as a bug of refold") from error
        before, after = len(original.graph.nodes), len(gm.graph.nodes)
        log.info("folded a graph of %d nodes into %d", before, after)
        return gm

    def _shares(self, args: Sequence[Any]) -> bool:
        """Whether an input that the graph writes shares its storage with another argument."""
        stored = [a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)]
        return any(stored.count(args[i].untyped_storage().data_ptr()) > 1 for i in self._written)


def _picker(positions: Sequence[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Picks the items of a tuple at some positions: where they lie in a few runs, by slices."""
    runs: list[slice] = []
    for at in positions:
        if runs and runs[-1].stop == at:
            runs[-1] = slice(runs[-1].start, at + 1)
        else:
            runs.append(slice(at, at + 1))
    if len(runs) <= _RUNS:
        return lambda items: sum([items[run] for run in runs], ())
    return operator.itemgetter(*positions)


def _present(gm: fx.GraphModule, exclude: Sequence[str]) -> tuple[str, ...]:
    """The globs that match here; after a graph break a graph has some of the modules only."""
    paths = {provenance.module_path(n) for n in gm.graph.nodes}
    parts = {".".join(p.split(".")[: i + 1]) for p in paths for i in range(p.count(".") + 1)}
    return tuple(g for g in exclude if any(fnmatch.fnmatchcase(p, g) for p in parts))
