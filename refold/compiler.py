"""Frontend, pipeline, verification, backend, in that order; nothing else happens here."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refold.backends.base import (
    Target,
)
from refold.backends.registry import find_target, make_options, require
from refold.compilation import Compilation, Kept
from refold.compile_lock import one_at_a_time
from refold.compiled import CompiledModel
from refold.errors import (
    ExpectationError,
    UsageError,
    did_you_mean,
)
from refold.frontends.export import trace, with_fixed_ranks
from refold.frontends.functionalise import ranks_matter
from refold.graph.program import Program, as_call
from refold.inputs import InputCheck
from refold.passes import find_pipeline
from refold.report.report import Report
from refold.rewrite.context import Context
from refold.rewrite.pipeline import Pipeline
from refold.stages import Clock, Judge, Progress, conditions, fold_program, lower, report_of
from refold.weights.shared import SharedWeights, copy_shared, tensors


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
    _check_flags(
        verify=verify, consume=consume, copy_weights=copy_weights, recipe=recipe, trust=trust
    )
    if recipe and consume:
        raise UsageError("recipe=True needs the weights that consume=True releases: drop one")
    if copy_weights and consume:
        raise UsageError("consume=True leaves no model to change: drop it, or copy_weights=True")
    found = find_target(target)
    settings = _Settings(
        target=found,
        options=make_options(found, target_options, _SETTINGS),
        pipeline=_pipeline(pipeline),
        context=Context(
            found.costs, max_growth, _globs(exclude), complex=found.capabilities.complex_calls
        ),
        dynamic_shapes=dynamic_shapes,
        bind=_bound(bind),
        verify=verify,
        consume=consume,
        copy_weights=copy_weights,
        recipe=recipe,
        expect=_expected(expect),
        trust=trust,
        progress=_told(progress),
    )
    require(found)
    compiled = CompiledModel(lambda args, kwargs: _compile(model, args, kwargs, settings))
    call = _example(model, example_inputs)
    if call is not None:
        compiled.compile(*call)
    return compiled


_SETTINGS = tuple(inspect.signature(compile_for_inference).parameters)


def fold(model: Any, example_inputs: Any = None, **settings: Any) -> CompiledModel:
    """Folds without lowering: :func:`compile_for_inference` for PyTorch itself.

    Args:
        model: as for :func:`compile_for_inference`.
        example_inputs: as for :func:`compile_for_inference`.
        **settings: the other settings of :func:`compile_for_inference`.
    """
    if "target" in settings:
        raise UsageError("fold is for PyTorch itself: compile_for_inference takes a target")
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
    _check_flags(trust=trust)
    clock, bound = Clock(_told(progress)), _bound(bind)
    with clock("trace"):
        program = trace(model, *call, dynamic_shapes=dynamic_shapes, bind=bound, trust=trust)
    folded = fold_program(program, chosen, context, clock)
    return report_of(model, program, folded, chosen, None, clock)


@one_at_a_time
def _compile(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], settings: _Settings
) -> Compilation:
    target, options, consumed = settings.target, settings.options, settings.consume
    clock = Clock(settings.progress)
    with clock("trace"):
        program = _trace(model, args, kwargs, settings)
    check = InputCheck.of(program, model, settings.bind)
    judge = Judge(program, clock, verify=settings.verify)
    folded = fold_program(
        program, settings.pipeline, settings.context, clock,
        consumed=model if consumed else None, recorded=settings.recipe,
    )  # fmt: skip
    gm = folded.graph_module
    report = report_of(
        model, program, folded, settings.pipeline, target.name, clock, judge.failures
    )
    _expect(settings.expect, report)
    judge.judge_folded(folded, report, consumed=consumed)
    report.notes = (*report.notes, *conditions(program))
    theirs = () if isinstance(model, (str, os.PathLike)) else tensors(program.graph_module)
    if settings.copy_weights:
        copy_shared(gm, theirs)
    with clock("lower"):
        lowered = lower(program, gm, target, options, judge, refits=settings.recipe)
    report.artifact = target.stats(lowered.artifact)
    report.notes = (*report.notes, *lowered.artifact.notes)
    judge.judge_lowered(lowered, target, options, report)
    return Compilation(
        gm,
        check,
        target,
        lowered.artifact,
        lowered.runner,
        report,
        lowered.weights,
        SharedWeights(gm, theirs),
        options,
        None if folded.recipe is None else Kept(folded.recipe, program, judge.original),
        settings.copy_weights,
        (Path(model).absolute(),) if isinstance(model, (str, os.PathLike)) else (),
    )


def _trace(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], settings: _Settings
) -> Program:
    can = settings.target.capabilities
    program = trace(
        model,
        args,
        kwargs,
        dynamic_shapes=settings.dynamic_shapes,
        dynamic_batch=not can.static,
        bind=settings.bind,
        trust=settings.trust,
    )
    if can.ranks_follow_sizes and not ranks_matter(program.graph_module):
        return program
    return with_fixed_ranks(program, settings.target.name)


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
    if isinstance(pipeline, str):
        return find_pipeline(pipeline)
    if not isinstance(pipeline, Pipeline):
        raise UsageError(f"pipeline is {pipeline!r}: expected a name or a refold.Pipeline")
    return pipeline


def _check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, (int, np.bool_)):  # a text is true, whatever it says
            raise UsageError(f"{name} is {value!r}: expected True or False")


def _bound(bind: Mapping[str, Any] | None) -> dict[str, Any]:
    found = {} if bind is None else bind
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise UsageError(f"bind is {bind!r}: expected values by name of the input, {{'scale': 2}}")
    return dict(found)


def _told(progress: Any) -> Progress | None:
    if progress is not None and not callable(progress):
        raise UsageError(f"progress is {progress!r}: expected a function of the stage's name")
    told: Progress | None = progress
    return told


def _globs(exclude: Sequence[str]) -> tuple[str, ...]:
    globs = (exclude,) if isinstance(exclude, str) else exclude
    if not isinstance(globs, Sequence) or not all(isinstance(glob, str) for glob in globs):
        raise UsageError(f"exclude is {exclude!r}: expected globs of module paths, ['head.*']")
    return tuple(globs)


def _expected(expect: Mapping[str, int] | None) -> dict[str, int]:
    found = {} if expect is None else expect
    if not isinstance(found, Mapping) or not all(type(n) is int for n in found.values()):
        raise UsageError(f"expect is {expect!r}: expected numbers by kind, {{'batch-norm': 53}}")
    return dict(found)


def _example(model: Any, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if example_inputs is not None:
        return as_call(example_inputs)
    if isinstance(model, (torch.export.ExportedProgram, str, os.PathLike)):
        # The frontend takes the inputs that the program was exported with.
        return (), {}
    return None
