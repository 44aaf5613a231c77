"""Frontend, pipeline, verification, backend, in that order; nothing else happens here."""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from refold import bind as binding
from refold.backends.base import (
    Artifact,
    Runner,
    Target,
)
from refold.backends.registry import find_target, make_options, require
from refold.calibrate.lockstep import divergence, logits
from refold.compilation import Compilation, Kept, weight_origins
from refold.compile_lock import one_at_a_time
from refold.compiled import CompiledModel
from refold.diagnose.axis_collisions import axis_collisions
from refold.diagnose.dead_parameters import DeadParameter, dead_parameters
from refold.errors import (
    ExpectationError,
    MissingDependencyError,
    RefoldError,
    UsageError,
    VerificationError,
    did_you_mean,
)
from refold.frontends.export import fix_ranks, trace
from refold.frontends.functionalise import ranks_matter
from refold.graph import ops, subgraphs
from refold.graph.copies import copy_sharing_tensors
from refold.graph.program import Program, as_call, fresh
from refold.inputs import InputCheck
from refold.passes import find_pipeline
from refold.passes.experts.join import state_expectation
from refold.refit.recipe import Recipe, record
from refold.report.record import GraphRecord, InputRecord, PassRecord, counts, standing
from refold.report.report import Report
from refold.rewrite.context import Context
from refold.rewrite.pipeline import Pipeline
from refold.rewrite.result import Approximation, Declined, failed
from refold.verify import codes
from refold.verify.compare import verify_widely
from refold.verify.randomness import draws
from refold.verify.references import References, outputs, references
from refold.weights.shared import SharedWeights, copy_shared, tensors

Progress = Callable[[str], None]

_ROUNDS = 7  # paired runs behind the time ratio of an approximation


@dataclass(frozen=True)
class _Settings:
    target: Target
    options: Any
    pipeline: Pipeline
    context: Context
    dynamic_shapes: Any = None
    bind: Mapping[str, Any] = field(default_factory=dict)
    verify: bool = True
    consume: bool = False
    copy_weights: bool = False
    recipe: bool = False
    expect: Mapping[str, int] = field(default_factory=dict)
    trust: bool = False
    progress: Progress | None = None


def compile_for_inference(
    model: Any,
    example_inputs: Any = None,
    *,
    target: str = "torch",
    dynamic_shapes: Any = None,
    bind: Mapping[str, Any] | None = None,
    pipeline: str | Pipeline = "default",
    max_growth: float | None = None,
    verify: bool = True,
    consume: bool = False,
    copy_weights: bool = False,
    recipe: bool = False,
    expect: Mapping[str, int] | None = None,
    exclude: Sequence[str] = (),
    trust: bool = False,
    progress: Progress | None = None,
    **target_options: Any,
) -> CompiledModel:
    """Folds a trained model into the smallest equal one and lowers it to a target.

    The model is compiled with eval semantics and is never changed. The compiled model is one of the
    weights as they are now. It shares those that are not folded: when they are changed later, its
    calls, and ``save``, raise :class:`UsageError`.

    Args:
        model: an ``nn.Module``, ``ExportedProgram``, FX ``GraphModule``, or a path to a ``.pt2``.
        example_inputs: a tuple of positional inputs, a dict of keyword inputs, or a single input.
            Omitted: an exported program brings its own; any other model is compiled at the first
            call, with what that call brings.
        target: a runtime's name; ``refold targets`` lists them, with registered ones.
        dynamic_shapes: as for ``torch.export.export``; by default the batch is dynamic.
        bind: values of inputs that are constant from now on, by name of the parameter of
            ``forward``. ``example_inputs`` and calls leave these inputs out.
        pipeline: a name (``default``, ``min-nodes``), names with options (``shift-add{bits=2}``,
            ``default,my-pass``: ``refold passes`` lists them) or a :class:`Pipeline`.
        max_growth: how many times larger the stored constants may become; ``math.inf`` folds a
            weight generator whatever it stores. By default each pass has a bound of its own.
        verify: compare the results with the unfolded model in float64, before and after lowering.
        consume: release the weights of ``model`` that were folded away, one by one as they are
            replaced, so that the two copies never exist at once. Destructive: the model cannot be
            used, or compiled, again.
        copy_weights: copy the weights that are not folded, instead of sharing them: whatever
            happens to ``model`` later, the compiled model stays what it is.
        recipe: record how each constant is made, so that :meth:`CompiledModel.refit` takes new
            weights. Folding takes about three times as long, and the weights of ``model`` live as
            long as the compiled model.
        expect: the least number of calls that must go, by kind, e.g. ``{"batch-norm": 53}``.
        exclude: globs of module paths that no pass touches.
        trust: load a ``.pt2`` whose own settings ask for pickle.
        progress: called with the name of each stage as it starts.
        **target_options: options of the target (``opset=``, ``threads=``).

    Returns:
        A callable with the model's own signature.

    Raises:
        UsageError: an unknown target, pipeline, option or module path.
        FrontendError: the model cannot be traced.
        VerificationError: the numbers are past the tolerance.
        ExpectationError: fewer calls went than ``expect`` says.
        BackendError: the target cannot lower or load the graph.
    """
    if recipe and consume:
        raise UsageError("recipe=True needs the weights that consume=True releases: drop one")
    if copy_weights and consume:
        raise UsageError("consume=True leaves no model to change: drop it, or copy_weights=True")
    found = find_target(target)
    settings = _Settings(
        target=found,
        options=make_options(found, target_options),
        pipeline=_pipeline(pipeline),
        context=Context(
            found.costs, max_growth, _globs(exclude), complex=found.capabilities.complex_calls
        ),
        dynamic_shapes=dynamic_shapes,
        bind=dict(bind or {}),
        verify=verify,
        consume=consume,
        copy_weights=copy_weights,
        recipe=recipe,
        expect=dict(expect or {}),
        trust=trust,
        progress=progress,
    )
    require(found)
    compiled = CompiledModel(lambda args, kwargs: _compile(model, args, kwargs, settings))
    call = _example(model, example_inputs)
    if call is not None:
        compiled.compile(*call)
    return compiled


def fold(model: Any, example_inputs: Any = None, **settings: Any) -> CompiledModel:
    """Folds without lowering: :func:`compile_for_inference` for PyTorch itself.

    Args:
        model: as for :func:`compile_for_inference`.
        example_inputs: as for :func:`compile_for_inference`.
        **settings: the other settings of :func:`compile_for_inference`.
    """
    return compile_for_inference(model, example_inputs, target="torch", **settings)


@one_at_a_time
def explain(
    model: Any,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    bind: Mapping[str, Any] | None = None,
    pipeline: str | Pipeline = "default",
    max_growth: float | None = None,
    exclude: Sequence[str] = (),
    trust: bool = False,
    progress: Progress | None = None,
) -> Report:
    """A dry run: what would be folded, and what is declined, where and why.

    Args:
        model: as for :func:`compile_for_inference`.
        example_inputs: as for :func:`compile_for_inference`, not optional for an ``nn.Module``.
        dynamic_shapes: as for :func:`compile_for_inference`.
        bind: as for :func:`compile_for_inference`.
        pipeline: as for :func:`compile_for_inference`.
        max_growth: as for :func:`compile_for_inference`.
        exclude: as for :func:`compile_for_inference`.
        trust: as for :func:`compile_for_inference`.
        progress: as for :func:`compile_for_inference`.
    """
    chosen, context = _pipeline(pipeline), Context(growth=max_growth, exclude=_globs(exclude))
    call = _example(model, example_inputs)
    if call is None:
        raise UsageError("explain needs example_inputs: a tuple, a dict of keywords, or a tensor")
    clock = _Clock(progress)
    with clock("trace"):
        program = trace(model, *call, dynamic_shapes=dynamic_shapes, bind=bind, trust=trust)
    folded = _fold(program, chosen, context, clock)
    return _report(model, program, folded, chosen, None, clock)


class _Clock:
    """Times the stages, and says when one starts."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if self._progress is not None:
            self._progress(stage)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = time.perf_counter() - start


@dataclass(frozen=True)
class _Folded:
    before: GraphRecord
    after: GraphRecord
    passes: tuple[PassRecord, ...]
    notes: tuple[str, ...]
    allowed: float
    bound: tuple[binding.BoundInput, ...]
    dead: tuple[DeadParameter, ...]
    warnings: tuple[str, ...]
    approximations: tuple[Approximation, ...]
    recipe: Recipe | None = None


@one_at_a_time
def _compile(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], settings: _Settings
) -> Compilation:
    clock = _Clock(settings.progress)
    with clock("trace"):
        program = trace(
            model,
            args,
            kwargs,
            dynamic_shapes=settings.dynamic_shapes,
            dynamic_batch=not settings.target.capabilities.static,
            bind=settings.bind,
            trust=settings.trust,
        )
    program.recorded = settings.recipe
    if not settings.target.capabilities.ranks_follow_sizes or ranks_matter(program.graph_module):
        fix_ranks(program, settings.target.name)
    if settings.verify and program.apart:
        raise VerificationError(
            f"{program.apart}\n  fix: switch the other path off "
            "(torch.backends.mha.set_fastpath_enabled(False) for PyTorch's transformers), or fold "
            "the traced program unverified with verify=False"
        )
    check = InputCheck.of(program, model, settings.bind)
    known = References()
    original = copy_sharing_tensors(program.graph_module)
    traced = copy_sharing_tensors(original) if draws(original) else original
    stated: tuple[str, ...] = ()
    failures: list[Declined] = []
    if settings.verify:
        with clock("reference"):
            stated = _analysed("expectation", lambda: state_expectation(original), failures)
            known = references(original, program, module=program.module)
    owner = model if settings.consume else None
    folded = _fold(
        program, settings.pipeline, settings.context, clock, owner, failures,
        recorded=settings.recipe,
    )  # fmt: skip
    gm, target = program.graph_module, settings.target
    report = _report(model, program, folded, settings.pipeline, target.name, clock)
    _expect(settings.expect, report)
    known.allowed = folded.allowed
    if stated and draws(gm):
        known = References(
            notes=["the folded model still draws random numbers: two runs cannot be compared"]
        )
        stated = ()
    report.notes = (*report.notes, *stated, *_conditions(program))
    if settings.verify:
        with clock("verify"):
            whole = None if settings.consume else original
            for approximation in folded.approximations:
                whole, known = _rebased(approximation, whole, known, program, report)
            result, known = verify_widely(whole, gm, program, known)
        report.numerics = result.to_dict()
        if folded.allowed and not settings.consume:
            with clock("time"):
                report.notes = (*report.notes, _time_ratio(traced, gm, program))
    theirs = () if isinstance(model, (str, os.PathLike)) else tensors(original)
    if settings.copy_weights:
        copy_shared(gm, theirs)
    with clock("lower"), torch.no_grad():
        artifact = target.lower(program, gm, settings.options)
        weights = weight_origins(gm, original)
        known = target.record(artifact, known, weights)
        runner, missing = _load(target, artifact, settings.options)
    report.artifact = target.stats(artifact)
    report.notes = (*report.notes, *artifact.notes)
    if missing:
        report.notes = (*report.notes, f"the artifact was not run here: {missing}")
    elif settings.verify and runner is not gm:
        with clock("verify artifact"):
            checked = target.check(artifact, gm, known, settings.options)
            report.notes = (*report.notes, *checked.notes)
            if checked.known is not None:
                whole, known = None, checked.known
            if artifact.leaves_inputs:
                known = known.leaving_inputs()
            result, known = verify_widely(whole, runner, program, known)
        report.artifact_numerics = result.to_dict()
    kept = None if folded.recipe is None else Kept(folded.recipe, program, original)
    return Compilation(
        gm,
        check,
        target,
        artifact,
        runner,
        report,
        weights,
        SharedWeights(gm, theirs),
        settings.options,
        kept,
        settings.copy_weights,
    )


def _conditions(program: Program) -> list[str]:
    """What the user's own lines make of sizes, for whoever takes a file elsewhere."""
    asked = [str(guard) for guard in program.guards.conditions if guard.source]
    return [f"it holds for {c}: calls check that, a saved file does not" for c in asked]


def _rebased(
    approximation: Approximation,
    whole: fx.GraphModule | None,
    known: References,
    program: Program,
    report: Report,
) -> tuple[fx.GraphModule, References]:
    """Judges what came before a substitution, measures it, and makes it the reference."""
    before, after = approximation.before, approximation.after
    assert before is not None
    assert after is not None
    calls, expected = known.calls, known.own
    held_out = bool(approximation.held_out) and whole is not None
    if whole is None:  # the weights that it replaced were released
        notes = ["what was folded before the substitution is not verified: consume released it"]
    else:
        result, known = verify_widely(whole, before, program, known)
        notes = [f"before the substitution: {result.summary}"]
        if approximation.codes:
            notes.append(codes.judge(approximation, whole, known, program))
    report.notes = (*report.notes, *notes)
    if held_out:
        calls = list(approximation.held_out)
        expected = outputs(before, calls)
    if calls:
        got = outputs(after, calls)
        found = divergence(expected, got, logits(before))
        report.divergence = {
            **dataclasses.asdict(found),
            "inputs": len(calls),
            "held_out": held_out,
        }
    return after, references(after, program)


def _time_ratio(original: fx.GraphModule, gm: fx.GraphModule, program: Program) -> str:
    """What an approximation gains, as a sentence: both graphs in turn on the example, in torch."""
    seconds: dict[fx.GraphModule, list[float]] = {original: [], gm: []}
    for _ in range(_ROUNDS + 1):  # the first round warms up
        for graph, taken in seconds.items():
            args, kwargs = fresh(program.example)
            start = time.perf_counter()
            with torch.no_grad():
                graph(*args, **kwargs)
            taken.append(time.perf_counter() - start)
    before, after = (statistics.median(taken[1:]) for taken in seconds.values())
    return (
        f"time on the example, before / after: {before / after:.2f} "
        f"({1e3 * before:.2f} ms, {1e3 * after:.2f} ms; torch, median of {_ROUNDS} paired runs)"
    )


def _load(target: Target, artifact: Artifact, options: Any) -> tuple[Runner, str]:
    """The callable artifact; where its runtime is missing, a callable that says so, and why."""
    try:
        return target.load(artifact, options), ""
    except MissingDependencyError as error:
        reason = str(error)

    def unavailable(*args: Any, **kwargs: Any) -> Any:
        raise MissingDependencyError(reason)

    return unavailable, reason


def _fold(
    program: Program,
    pipeline: Pipeline,
    context: Context,
    clock: _Clock,
    consumed: Any = None,
    failures: Sequence[Declined] = (),
    *,
    recorded: bool = False,
) -> _Folded:
    gm = program.graph_module
    before = _graph_record(gm)
    failures = [*failures]
    bound = _analysed("bound-inputs", lambda: binding.records(gm, program.bound), failures)
    served = _analysed(
        "bound-inputs", lambda: binding.generator(gm, program.bound).items(), failures
    )
    serving: dict[str, int] = dict(served)
    dead = _analysed("dead-parameters", lambda: dead_parameters(gm), failures)
    warnings = _analysed("axis-collisions", lambda: axis_collisions(gm.graph), failures)
    with clock("fold"):
        run_passes = functools.partial(pipeline.run, gm, context, consumed=consumed)
        if recorded:
            result, recipe = record(program, lambda label: run_passes(progress=label))
        else:
            result, recipe = run_passes(), None
    if result.allowed:
        recipe = None  # what an approximation may do is judged on the weights at hand
    passes = tuple(
        PassRecord(
            run.name,
            run.seconds,
            sum(run.before.values()),
            sum(run.after.values()),
            tuple(run.result.applied),
            tuple(run.result.declined),
        )
        for run in result.runs
    )
    if failures:
        calls = sum(before.census.values())
        passes = (PassRecord("analyses", 0.0, calls, calls, (), tuple(failures)), *passes)
    notes = result.notes
    if serving:
        read = {str(n.target) for n in gm.graph.find_nodes(op="get_attr") if n.users}
        gone = {name: size for name, size in serving.items() if name not in read}
        notes = (
            f"{len(gone)} of {len(serving)} tensors that only serve the bound inputs are gone "
            f"({sum(gone.values())} of {sum(serving.values())} bytes)",
            *notes,
        )
    approximations = tuple(
        run.result.approximation
        for run in result.runs
        if run.result.approximation is not None and run.result.approximation.before is not None
    )
    return _Folded(
        before,
        _graph_record(gm),
        passes,
        notes,
        result.allowed,
        bound,
        dead,
        warnings,
        approximations,
        recipe,
    )


def _analysed(
    name: str, analyse: Callable[[], Iterable[Any]], failures: list[Declined]
) -> tuple[Any, ...]:
    """What an analysis for the report finds; where it fails, the report goes without."""
    try:
        return tuple(analyse())
    except RefoldError:
        raise
    except Exception as error:
        failures.append(failed(name, None, error))
        return ()


def _graph_record(gm: fx.GraphModule) -> GraphRecord:
    # Buffers that no node reads (num_batches_tracked) are not part of the program.
    read = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr" and n.users}
    named = [
        *gm.named_parameters(remove_duplicate=False),  # of the names of a tied tensor one is read
        *gm.named_buffers(remove_duplicate=False),
    ]
    tensors = list({id(t): t for name, t in named if name in read}.values())
    return GraphRecord(
        counts(sum((ops.census(g.graph) for g in subgraphs.walk(gm)), Counter())),
        sum(t.numel() for t in tensors),
        sum(t.numel() * t.element_size() for t in tensors),
    )


def _report(
    model: Any,
    program: Program,
    folded: _Folded,
    pipeline: Pipeline,
    target: str | None,
    clock: _Clock,
) -> Report:
    from refold._version import __version__

    graphs = subgraphs.walk(program.graph_module)
    remaining = {n.name for g in graphs for n in g.graph.nodes}
    return Report(
        model=_model_name(model),
        target=target,
        pipeline=pipeline.name,
        versions={"refold": __version__, "torch": str(torch.__version__)},
        inputs=tuple(
            InputRecord(s.name, tuple(s.sizes), str(s.dtype).removeprefix("torch."), s.batch)
            for s in program.inputs
            if s.dtype is not None
        ),
        before=folded.before,
        after=folded.after,
        passes=folded.passes,
        declined=standing(folded.passes, remaining),
        specialised=tuple(program.specialised),
        bound=folded.bound,
        dead=folded.dead,
        warnings=folded.warnings,
        notes=(*program.notes, *folded.notes),
        timings=clock.seconds,
    )


def _expect(expect: Mapping[str, int], report: Report) -> None:
    missing = []
    for kind, least in expect.items():
        before, after = report.before.census.get(kind, 0), report.after.census.get(kind, 0)
        if before - after < least:
            hint = (
                "" if before else f"; the model has none{did_you_mean(kind, report.before.census)}"
            )
            missing.append(
                f"expected at least {least} {kind} to go, {before - after} of {before} went{hint}"
            )
    if not missing:
        return
    reasons = [
        f"  declined {d.module or d.node}: {d.reason}" + (f" ({d.source})" if d.source else "")
        for d in report.declined
    ]
    if len(reasons) > 10:
        reasons = [*reasons[:10], f"  ... and {len(reasons) - 10} more, see explain"]
    raise ExpectationError("\n".join(["; ".join(missing), *reasons]))


def _pipeline(pipeline: str | Pipeline) -> Pipeline:
    return find_pipeline(pipeline) if isinstance(pipeline, str) else pipeline


def _globs(exclude: Sequence[str]) -> tuple[str, ...]:
    return (exclude,) if isinstance(exclude, str) else tuple(exclude)


def _example(model: Any, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if example_inputs is not None:
        return as_call(example_inputs)
    if isinstance(model, (torch.export.ExportedProgram, str, os.PathLike)):
        # The frontend takes the inputs that the program was exported with.
        return (), {}
    return None


def _model_name(model: Any) -> str:
    if isinstance(model, (str, os.PathLike)):
        return os.path.basename(os.fspath(model))
    return type(model).__name__
