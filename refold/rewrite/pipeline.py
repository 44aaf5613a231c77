"""Ordered passes, with the verifier, timing and a census between them."""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import fx, nn

from refold.errors import RefoldError, UsageError, VerifierError, did_you_mean
from refold.graph import constants, subgraphs
from refold.graph.copies import copy_sharing_tensors
from refold.graph.ops import census
from refold.graph.verifier import Invariants, signature, verify
from refold.rewrite.context import Context
from refold.rewrite.edit import GraphSnapshot
from refold.rewrite.result import Pass, PassResult, failed
from refold.rewrite.selection import pin

_EXACTNESS = ("exact", "reassociates", "approximate")

Compare = Callable[[fx.GraphModule, fx.GraphModule, str], None]


@dataclass(frozen=True)
class PassRun:
    """One run of one pass.

    Attributes:
        name: id of the pass.
        result: what it did and declined.
        seconds: its own time, without the verifier's.
        before: calls by kind before it ran.
        after: calls by kind after it ran.
    """

    name: str
    result: PassResult
    seconds: float
    before: Counter[str]
    after: Counter[str]


@dataclass
class PipelineResult:
    """The runs of a pipeline, in order."""

    runs: list[PassRun] = field(default_factory=list)

    @property
    def modified(self) -> bool:
        """Whether any pass changed the graph."""
        return any(run.result.modified for run in self.runs)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the passes have to say."""
        return tuple(note for run in self.runs for note in run.result.notes)

    @property
    def allowed(self) -> float:
        """The error that the user accepts for what approximate passes did."""
        return max((run.result.allowed for run in self.runs), default=0.0)


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order in which they run; the same pass may be listed several times.

    Attributes:
        name: what reports call it.
        passes: the passes.
    """

    name: str
    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        if isinstance(self.passes, str) or not isinstance(self.passes, Iterable):
            raise UsageError(f"pipeline {self.name!r}: {self.passes!r} is no list of passes")
        object.__setattr__(self, "passes", tuple(self.passes))
        for item in self.passes:
            if isinstance(item, type) or not isinstance(item, Pass):
                raise UsageError(
                    f"pipeline {self.name!r}: {item!r} is not a pass; a pass has a name, an "
                    "exactness and run(graph_module, context) (did you forget the parentheses?)"
                )
            if not _takes_context(item):
                raise UsageError(
                    f"pass {item.name!r}: write run(self, gm, context), it is called with a graph "
                    "module and a refold.Context"
                )
            if item.exactness not in _EXACTNESS:
                raise UsageError(
                    f"pass {item.name!r}: exactness is {item.exactness!r}, expected one of "
                    f"{', '.join(_EXACTNESS)}"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The ids of the passes, in order."""
        return tuple(item.name for item in self.passes)

    def with_(
        self, pass_: Pass, *, before: str | None = None, after: str | None = None
    ) -> Pipeline:
        """A pipeline with one more pass: before the first pass so named, after the last, or last.

        Behind the last place stays what closes a pipeline (an attribute ``closing`` of the pass).

        Raises:
            UsageError: no pass has that name, or both places are given.
        """
        if before is not None and after is not None:
            raise UsageError("give before= or after=, not both")
        at = len(self.passes)
        while at > 0 and getattr(self.passes[at - 1], "closing", False):
            at -= 1
        if before is not None:
            self._known(before)
            at = self.names.index(before)
        elif after is not None:
            self._known(after)
            at = len(self.passes) - self.names[::-1].index(after)
        return replace(self, passes=(*self.passes[:at], pass_, *self.passes[at:]))

    def without(self, name: str) -> Pipeline:
        """A pipeline without the passes of that name."""
        self._known(name)
        return replace(self, passes=tuple(p for p in self.passes if p.name != name))

    def only(self, *names: str) -> Pipeline:
        """A pipeline of the passes with these names alone, in the pipeline's order."""
        for name in names:
            self._known(name)
        return replace(self, passes=tuple(p for p in self.passes if p.name in names))

    def _known(self, name: str) -> None:
        if name not in self.names:
            raise UsageError(
                f"no pass {name!r} in pipeline {self.name!r}{did_you_mean(name, set(self.names))}"
            )

    def run(
        self,
        gm: fx.GraphModule,
        context: Context = Context(),
        *,
        debug: bool = False,
        progress: Callable[[str], None] | None = None,
        compare: Compare | None = None,
        consumed: nn.Module | None = None,
    ) -> PipelineResult:
        """Runs the passes on a graph, in place, and verifies what each leaves.

        Args:
            gm: the graph module.
            context: the policies that every pass runs under. A glob of its ``exclude`` also covers
                what lies inside the modules that it names.
            debug: after each pass also run the whole graph on fake tensors, and ``compare``.
            progress: called with the id of each pass before it runs.
            compare: in debug mode called with the graph before a pass, the graph after it, and
                the pass's id; it raises where their numbers differ.
            consumed: the module whose folded weights are released as they are replaced.

        Raises:
            UsageError: a glob matches no module.
            VerifierError: in debug mode, a pass failed or left an invalid graph; the message names
                the pass. Otherwise it is undone and recorded.
        """
        subgraphs.own(gm)
        pin(gm, context.exclude)
        whole = [GraphSnapshot(graph) for graph in subgraphs.walk(gm)]
        result = self._run(gm, context, whole[0], debug=debug, progress=progress, compare=compare)
        try:
            self._run_branches(gm, context, result, debug=debug)
            if result.modified or subgraphs.conds(gm):
                constants.sweep(gm)
                if consumed is not None:
                    whole.clear()  # what is released here nobody brings back
                    constants.release(gm, consumed)
                constants.materialise_all(gm, largest_first=consumed is None)
                gm.recompile()
        except RefoldError:
            raise
        except Exception as error:
            if debug:
                raise
            return _unfolded(gm, whole, result, error)
        return result

    def _run(
        self,
        gm: fx.GraphModule,
        context: Context,
        snapshot: GraphSnapshot,
        *,
        debug: bool,
        progress: Callable[[str], None] | None = None,
        compare: Compare | None = None,
    ) -> PipelineResult:
        result = PipelineResult()
        before, contract = census(gm.graph), signature(gm)
        for item in self.passes:
            if progress is not None:
                progress(item.name)
            run, contract = _run_pass(
                item, gm, context, before, contract, snapshot, debug=debug, compare=compare
            )
            if run.result.modified:
                snapshot = GraphSnapshot(gm)
            result.runs.append(run)
            before = run.after
        return result

    def _run_branches(
        self, gm: fx.GraphModule, context: Context, result: PipelineResult, *, debug: bool
    ) -> None:
        for cond in subgraphs.conds(gm):
            subgraphs.sink(cond)
            for branch in subgraphs.branches(cond):
                inner = self._run(branch, context, GraphSnapshot(branch), debug=debug)
                self._run_branches(branch, context, inner, debug=debug)
                constants.sweep(branch)
                constants.materialise_all(branch)
                result.runs = [_joined(*pair) for pair in zip(result.runs, inner.runs, strict=True)]
            subgraphs.lift(gm, cond)


def _takes_context(item: Pass) -> bool:
    try:
        inspect.signature(item.run).bind(None, None)
    except TypeError:
        return False
    return True


def _unfolded(
    gm: fx.GraphModule, whole: Sequence[GraphSnapshot], result: PipelineResult, error: Exception
) -> PipelineResult:
    """Makes a graph what it was before all passes, where what they left cannot be computed."""
    if not whole:
        raise RefoldError(
            f"the constants of the folded graph could not be computed ({type(error).__name__}: "
            f"{error}), and the weights that they are made of are released\n"
            "  fix: load the model again, and compile it without consume=True"
        ) from error
    for snapshot in whole:
        snapshot.restore()
    for graph in subgraphs.walk(gm):
        graph.recompile()
    calls = sum((census(graph.graph) for graph in subgraphs.walk(gm)), Counter())
    lost = PassRun("constants", PassResult(declined=[failed("constants", None, error)]), 0.0,
                   calls, calls)  # fmt: skip
    runs = [PassRun(run.name, PassResult(), run.seconds, calls, calls) for run in result.runs]
    return PipelineResult([*runs, lost])


def _joined(outer: PassRun, inner: PassRun) -> PassRun:
    """One record of a pass that ran on a graph and on a branch of it."""
    left, right = outer.result, inner.result
    result = PassResult(
        left.modified or right.modified,
        left.applied + right.applied,
        left.declined + right.declined,
        left.notes + right.notes,
        left.approximation if left.allowed >= right.allowed else right.approximation,
    )
    return PassRun(
        outer.name,
        result,
        outer.seconds + inner.seconds,
        outer.before + inner.before,
        outer.after + inner.after,
    )


def _run_pass(
    item: Pass,
    gm: fx.GraphModule,
    context: Context,
    before: Counter[str],
    contract: Invariants,
    snapshot: GraphSnapshot,
    *,
    debug: bool,
    compare: Compare | None,
) -> tuple[PassRun, Invariants]:
    """Runs one pass; ``before``, ``contract`` and ``snapshot`` are what the last left.

    A pass that raises, or leaves an invalid graph, is undone as a whole, and recorded. In debug
    mode it raises, as what fails at one candidate does.
    """
    copy = copy_sharing_tensors(gm) if debug and compare is not None else None
    started = time.perf_counter()
    try:
        result = item.run(gm, context)
        seconds = time.perf_counter() - started
        after = census(gm.graph)
        if result.modified:
            contract = verify(gm, contract, repropagate=debug)
        elif before != after:
            raise VerifierError("it says that it changed nothing, but the calls are not the same")
    except VerifierError as error:
        blamed = VerifierError(f"after pass {item.name!r}: {error}")
        if debug:
            raise blamed from error
        return _undone(item, snapshot, blamed, before, started), contract
    except RefoldError:
        raise
    except Exception as error:
        if debug:
            raise
        return _undone(item, snapshot, error, before, started), contract
    broken = next((d for d in result.declined if d.failed), None)
    if debug and broken is not None:
        raise VerifierError(f"pass {item.name!r} failed at %{broken.node}: {broken.reason}")
    if copy is not None and compare is not None and result.modified:
        constants.materialise_all(gm, forget=False)
        gm.recompile()
        compare(copy, gm, item.name)
    return PassRun(item.name, result, seconds, before, after), contract


def _undone(
    item: Pass, snapshot: GraphSnapshot, error: Exception, before: Counter[str], started: float
) -> PassRun:
    """The record of a pass that failed as a whole: the graph is what it was before it."""
    snapshot.restore()
    result = PassResult(declined=[failed(item.name, None, error)])
    return PassRun(item.name, result, time.perf_counter() - started, before, before)
