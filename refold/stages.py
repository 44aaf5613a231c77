"""What a compilation goes through: trace, fold, judge, lower, judge. Each stage takes values.

A stage reads what the ones before it made and changes none of it: the traced program stays what it
is, so that every later graph can be compared with it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from refold.backends.base import (
    Artifact,
    Runner,
    Target,
)
from refold.calibrate.lockstep import divergence, logits
from refold.compilation import weight_origins
from refold.diagnose.axis_collisions import axis_collisions
from refold.diagnose.dead_parameters import DeadParameter, dead_parameters
from refold.errors import (
    BackendError,
    FrontendError,
    MissingDependencyError,
    RefoldError,
    VerificationError,
    first_line,
)
from refold.frontends import bind as binding
from refold.graph import aliasing, ops, subgraphs
from refold.graph.copies import copy_sharing_tensors
from refold.graph.program import BoundInput, Program, fresh
from refold.passes.experts.join import state_expectation
from refold.refit.recipe import Recipe, record
from refold.report.record import GraphRecord, InputRecord, PassRecord, counts, standing
from refold.report.report import Report
from refold.rewrite.context import Context
from refold.rewrite.pipeline import PassRun, Pipeline
from refold.rewrite.result import Approximation, Decline, failed
from refold.verify import codes
from refold.verify.compare import verify_widely
from refold.verify.randomness import draws
from refold.verify.references import References, outputs, references

Progress = Callable[[str], None]

_ROUNDS = 7  # paired runs behind the time ratio of an approximation


class Clock:
    """Times the stages, and says when one starts."""

    def __init__(self, progress: Progress | None = None) -> None:
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


# --- fold -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folded:
    """A folded graph, and what the report says of it."""

    graph_module: fx.GraphModule
    before: GraphRecord
    after: GraphRecord
    passes: tuple[PassRecord, ...]
    notes: tuple[str, ...]
    allowed: float
    bound: tuple[BoundInput, ...]
    dead: tuple[DeadParameter, ...]
    warnings: tuple[str, ...]
    approximations: tuple[Approximation, ...]
    recipe: Recipe | None = None


def fold_program(
    program: Program,
    pipeline: Pipeline,
    context: Context,
    clock: Clock,
    *,
    consumed: Any = None,
    recorded: bool = False,
) -> Folded:
    """Runs a pipeline on a copy of a program's graph.

    Args:
        program: the traced program; it stays as it is.
        pipeline: the passes.
        context: what they reckon with.
        clock: times the passes.
        consumed: the module whose folded weights are released.
        recorded: record how each constant is made, for new weights.
    """
    gm = copy_sharing_tensors(program.graph_module)
    before = _graph_record(gm)
    failures: list[Decline] = []
    bound = _analysed("bound-inputs", lambda: binding.records(program), failures)
    serving = dict[str, int](
        _analysed("bound-inputs", lambda: binding.generator(gm, program.bound).items(), failures)
    )
    dead = _analysed("dead-parameters", lambda: dead_parameters(gm), failures)
    warnings = _analysed("axis-collisions", lambda: axis_collisions(gm.graph), failures)
    with clock("fold"):
        run_passes = functools.partial(pipeline.run, gm, context, consumed=consumed)
        if recorded:
            result, recipe = record(program, gm, lambda label: run_passes(progress=label))
        else:
            result, recipe = run_passes(), None
    if result.allowed:
        recipe = None  # what an approximation may do is judged on the weights at hand
    passes = tuple(map(_pass_record, result.runs))
    if failures:
        calls = sum(before.census.values())
        passes = (PassRecord("analyses", 0.0, calls, calls, (), tuple(failures)), *passes)
    approximations = [run.result.approximation for run in result.runs]
    return Folded(
        graph_module=gm,
        before=before,
        after=_graph_record(gm),
        passes=passes,
        notes=(*_served(gm, serving), *result.notes),
        allowed=result.allowed,
        bound=bound,
        dead=dead,
        warnings=warnings,
        approximations=tuple(a for a in approximations if a and a.before is not None),
        recipe=recipe,
    )


def _pass_record(run: PassRun) -> PassRecord:
    return PassRecord(
        run.name,
        run.seconds,
        sum(run.before.values()),
        sum(run.after.values()),
        tuple(run.result.applied),
        tuple(run.result.declined),
    )


def _served(gm: fx.GraphModule, serving: Mapping[str, int]) -> list[str]:
    """What became of the tensors that only serve bound inputs, as a sentence."""
    if not serving:
        return []
    read = {str(n.target) for n in gm.graph.find_nodes(op="get_attr") if n.users}
    gone = {name: size for name, size in serving.items() if name not in read}
    return [
        f"{len(gone)} of {len(serving)} tensors that only serve the bound inputs are gone "
        f"({sum(gone.values())} of {sum(serving.values())} bytes)"
    ]


def _analysed(
    name: str, analyse: Callable[[], Iterable[Any]], failures: list[Decline]
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


# --- judge ----------------------------------------------------------------------------------------


def _refuse_what_fails(program: Program, error: RuntimeError) -> None:
    """Raises if the traced program itself fails on the example inputs: shapes alone let it pass."""
    try:
        with torch.no_grad():
            program.graph_module(*fresh(program.args), **fresh(program.kwargs))
    except RuntimeError as own:
        raise FrontendError(
            f"the model raises on the example inputs: {first_line(own)}\n  fix: check that "
            "model(*args, **kwargs) runs on these inputs: their number, shapes and dtypes"
        ) from error


class Judge:
    """Compares each graph with what the traced program computes, and says so in a report.

    An approximation that the user asked for by name becomes the reference of what follows it, once
    what came before it is found right.
    """

    def __init__(self, program: Program, clock: Clock, *, verify: bool) -> None:
        """Runs the original, if it is to be compared with.

        Raises:
            VerificationError: the trace is not the model.
        """
        if verify and program.apart:
            raise VerificationError(
                f"{program.apart}\n  fix: switch the other path off "
                "(torch.backends.mha.set_fastpath_enabled(False) for PyTorch's transformers), or "
                "fold the traced program unverified with verify=False"
            )
        self._program, self._clock, self._verify = program, clock, verify
        self.known = References()
        self.original = program.graph_module  # what everything is compared with
        self.failures: list[Decline] = []
        self._stated: tuple[str, ...] = ()
        self._whole: fx.GraphModule | None = self.original  # as long as its weights are there
        if not verify:
            return
        with clock("reference"):
            if draws(program.graph_module):
                self._state_expectation()
            try:
                self.known = references(self.original, program, module=program.module)
            except RuntimeError as error:
                _refuse_what_fails(program, error)
                raise

    def _state_expectation(self) -> None:
        """Compares with the mean of what the program draws, where that is known."""
        stated = copy_sharing_tensors(self._program.graph_module)
        self._stated = _analysed("expectation", lambda: state_expectation(stated), self.failures)
        if self._stated:
            self.original = self._whole = stated

    def judge_folded(self, folded: Folded, report: Report, *, consumed: bool) -> None:
        """Judges a folded graph.

        Raises:
            VerificationError: its numbers are past the tolerance.
        """
        gm, program = folded.graph_module, self._program
        self.known.allowed = folded.allowed
        if self._stated and draws(gm):
            self.known = References(
                notes=["the folded model still draws random numbers: two runs cannot be compared"]
            )
            self._stated = ()
        report.notes = (*report.notes, *self._stated)
        if consumed:
            self._whole = None
        if not self._verify:
            return
        with self._clock("verify"):
            for approximation in folded.approximations:
                self._rebase(approximation, report)
            result, self.known = verify_widely(self._whole, gm, program, self.known)
        report.numerics = result.to_dict()
        if folded.allowed and not consumed:
            with self._clock("time"):
                report.notes = (*report.notes, _time_ratio(program, gm))

    def judge_lowered(self, lowered: Lowered, target: Target, options: Any, report: Report) -> None:
        """Judges what runs in the target, unless that is the folded graph itself.

        Raises:
            VerificationError: its numbers are past the tolerance.
        """
        gm, artifact = lowered.graph_module, lowered.artifact
        if lowered.missing:
            report.notes = (*report.notes, f"the artifact was not run here: {lowered.missing}")
            return
        if not self._verify or lowered.runner is gm:
            return
        with self._clock("verify artifact"):
            checked = target.check(artifact, gm, self.known, options)
            report.notes = (*report.notes, *checked.notes)
            if checked.known is not None:
                self._whole, self.known = None, checked.known
            if artifact.leaves_inputs:
                self.known = self.known.leaving_inputs()
            result, self.known = verify_widely(
                self._whole, lowered.runner, self._program, self.known
            )
        report.artifact_numerics = result.to_dict()

    def _rebase(self, approximation: Approximation, report: Report) -> None:
        """Judges what came before a substitution, measures it, and makes it the reference."""
        before, after = approximation.before, approximation.after
        assert before is not None
        assert after is not None
        calls, expected = self.known.calls, self.known.own
        held_out = bool(approximation.held_out) and self._whole is not None
        if self._whole is None:  # the weights that it replaced were released
            notes = ["what came before the approximation is not verified: consume released it"]
        else:
            result, self.known = verify_widely(self._whole, before, self._program, self.known)
            notes = [f"before the approximation: {result.summary}"]
            if approximation.codes:
                notes.append(codes.judge(approximation, self._whole, self.known, self._program))
        report.notes = (*report.notes, *notes)
        if held_out:
            calls = list(approximation.held_out)
            expected = outputs(before, calls)
        if calls:
            found = divergence(expected, outputs(after, calls), logits(before))
            report.divergence = {
                **dataclasses.asdict(found),
                "inputs": len(calls),
                "held_out": held_out,
            }
        self._whole, self.known = after, references(after, self._program)


def _time_ratio(program: Program, gm: fx.GraphModule) -> str:
    """What an approximation gains, as a sentence: both graphs in turn on the example, in torch."""
    seconds: dict[fx.GraphModule, list[float]] = {program.graph_module: [], gm: []}
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


# --- lower ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lowered:
    """What a target made of a folded graph; ``missing`` says why it cannot run here."""

    graph_module: fx.GraphModule
    artifact: Artifact
    runner: Runner
    weights: dict[str, dict[str, Any]]
    missing: str = ""


def lower(
    program: Program,
    gm: fx.GraphModule,
    target: Target,
    options: Any,
    judge: Judge,
    *,
    refits: bool = False,
) -> Lowered:
    """Lowers a folded graph to a target and loads it.

    Args:
        program: what was traced.
        gm: the folded graph.
        target: the target.
        options: its options.
        judge: has what the original computes, for targets that write it into their artifact.
        refits: lower such that the artifact takes new weights.

    Raises:
        BackendError: the target cannot, or the graph takes or gives what it does not have.
    """
    _refuse_complex(gm, target)
    with torch.no_grad():
        make = target.lower_to_refit if refits else target.lower
        artifact = make(program, gm, options)
        weights = weight_origins(gm, program.graph_module)
        judge.known = target.record(artifact, judge.known, weights)
        runner, missing = _load(target, artifact, options)
    return Lowered(gm, artifact, runner, weights, missing)


def _refuse_complex(gm: fx.GraphModule, target: Target) -> None:
    """Refuses complex inputs and outputs where a target has none: it would give pairs of numbers.

    Complex numbers inside may be written as pairs.
    """
    if target.capabilities.complex_calls:
        return
    inputs = {f"input {n.name}": n for n in gm.graph.find_nodes(op="placeholder")}
    outputs = {f"output {i}": n for i, n in enumerate(aliasing.outputs(gm.graph))}
    for name, node in {**inputs, **outputs}.items():
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_complex():
            dtype = str(value.dtype).removeprefix("torch.")
            raise BackendError(
                f"{target.name} has no complex numbers, and {name} is {dtype}\n  fix: take and "
                "return pairs of numbers (torch.view_as_complex, torch.view_as_real)"
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


# --- report ---------------------------------------------------------------------------------------


def report_of(
    model: Any,
    program: Program,
    folded: Folded,
    pipeline: Pipeline,
    target: str | None,
    clock: Clock,
    failures: Sequence[Decline] = (),
) -> Report:
    """The report of a fold; what is judged and lowered later is added to it.

    Args:
        model: what the user gave.
        program: what was traced.
        folded: what the passes made of it.
        pipeline: the passes.
        target: name of the target, if there is one.
        clock: the seconds of each stage.
        failures: analyses that failed, beside those of the fold.
    """
    from refold._version import __version__

    graphs = [g.graph for g in subgraphs.walk(folded.graph_module)]
    remaining = {n.name for g in graphs for n in g.nodes}
    passes = folded.passes
    if failures:
        calls = sum(folded.before.census.values())
        passes = (PassRecord("analyses", 0.0, calls, calls, (), tuple(failures)), *passes)
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
        passes=passes,
        declined=standing(passes, remaining),
        unknown=dict(sorted(ops.unknown(graphs).items())),
        specialised=tuple(program.specialised),
        bound=folded.bound,
        dead=folded.dead,
        warnings=folded.warnings,
        notes=(*program.notes, *folded.notes),
        timings=clock.seconds,
    )


def conditions(program: Program) -> list[str]:
    """What the user's own lines make of sizes, for whoever takes a file elsewhere."""
    asked = [str(guard) for guard in program.guards.conditions if guard.source]
    return [f"it holds for {c}: calls check that, a saved file does not" for c in asked]


def _model_name(model: Any) -> str:
    if isinstance(model, (str, os.PathLike)):
        return os.path.basename(os.fspath(model))
    return type(model).__name__
