"""What a pass did and what it declined, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import fx

from refold.algebra.lazy import Lazy
from refold.errors import Declined
from refold.graph import provenance
from refold.graph.program import Call
from refold.rewrite.context import Context


@dataclass(frozen=True)
class Applied:
    """One rewrite that happened.

    Attributes:
        rule: id of the rule.
        removed: names of the source nodes that the rewrite made unnecessary.
        kinds: operator kinds of those nodes (``batch-norm``, ``conv``, ``add``, ...), in parallel.
        added: names of the new nodes.
        modules: module paths the removed nodes came from.
        detail: one line for people.
        figures: what the rewrite was judged by, as numbers (parameters, errors, ...).
        labels: what it is, in the field's words (family of scales, class of exactness, ...).
        columns: what the report's table shows of it, by heading; a row for each layer.
        path: names of what was pushed, of what it crossed and of what took it, in that order.
        path_kinds: the kinds of those, in parallel.
        crossed: names of those on the path that it crossed.
    """

    rule: str
    removed: tuple[str, ...]
    kinds: tuple[str, ...]
    added: tuple[str, ...]
    modules: tuple[str, ...] = ()
    detail: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    path: tuple[str, ...] = ()
    path_kinds: tuple[str, ...] = ()
    crossed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decline:
    """One rewrite that did not happen, and why.

    Attributes:
        rule: id of the rule.
        node: name of the node at which the rule declined.
        reason: why, in one sentence without a full stop.
        module: module path of the node.
        source: the user's own ``file.py:line``.
        hint: what the user can do about it, or ``""``.
        failed: true for an error inside of refold, which cost this rewrite and nothing else.
    """

    rule: str
    node: str
    reason: str
    module: str = ""
    source: str = ""
    hint: str = ""
    failed: bool = False


@dataclass(frozen=True)
class StoredCode:
    """A weight that a substitution stores as a code, and what is said of it.

    Attributes:
        node: name of the call, in the graph with it, that reads the code.
        weight: the matrix ``[N, K]`` that it stands for.
        weight_error: how far it is from that, relative L2.
        output_error: how far the layer's outputs on the calibration inputs are; NaN without these.
        powers: whether its scales are powers of two.
        limit: how far the user lets the outputs, or without calibration the weight, be.
    """

    node: str
    weight: Lazy
    weight_error: float
    output_error: float
    powers: bool
    limit: float


@dataclass(frozen=True)
class Approximation:
    """What a pass changed on purpose, and how it is judged.

    Either its error is bounded: ``allowed`` says by how much, and the folded model is held against
    the original within that. Or it is reported: with ``before`` and ``after`` the graph before the
    pass is judged by the original, what comes after it by what the pass left, and the report says
    how far the two are apart.

    Attributes:
        before: the graph without it.
        after: the graph with it.
        allowed: the error of the model's outputs, relative to their scale, that the user accepts.
        held_out: calls of the model that the pass did not look at, to measure the difference on.
        codes: what it stores for weights, in the order of the graph.
        calibration: the calls that the pass looked at.
    """

    before: fx.GraphModule | None = None
    after: fx.GraphModule | None = None
    allowed: float = 0.0
    held_out: Sequence[Call] = ()
    codes: Sequence[StoredCode] = ()
    calibration: Sequence[Call] = ()


@dataclass
class PassResult:
    """Outcome of one pass: whether the graph changed, and its records.

    Attributes:
        modified: whether the graph changed.
        applied: the rewrites that happened.
        declined: those that did not.
        notes: sentences for the report.
        approximation: how what an approximate pass did is judged; ``None`` if everything is exact
            up to rounding.
    """

    modified: bool = False
    applied: list[Applied] = field(default_factory=list)
    declined: list[Decline] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    approximation: Approximation | None = None

    @property
    def allowed(self) -> float:
        """The error of the model's outputs that is accepted for it; 0 where it is exact."""
        return 0.0 if self.approximation is None else self.approximation.allowed


@runtime_checkable
class Pass(Protocol):
    """A pass: a frozen dataclass whose fields are its options.

    ``exactness`` is ``exact``, ``reassociates`` or ``approximate``. ``run`` changes the graph in
    place, under the policies of the compilation; they have defaults, so that a pass runs alone.
    """

    @property
    def name(self) -> str: ...

    @property
    def exactness(self) -> str: ...

    def run(self, gm: fx.GraphModule, context: Context = ..., /) -> PassResult: ...


def applied(
    rule: str, removed: Iterable[fx.Node], added: Iterable[fx.Node], detail: str = ""
) -> Applied:
    """Makes an :class:`Applied` record from nodes (call it before the nodes are erased)."""
    from refold.graph.ops import kind

    nodes = list(removed)
    paths: dict[str, None] = {}
    for node in nodes:
        paths.update(dict.fromkeys(provenance.of(node)["modules"]))
    return Applied(
        rule,
        tuple(n.name for n in nodes),
        tuple(kind(n) for n in nodes),
        tuple(n.name for n in added),
        tuple(paths),
        detail,
    )


_watchers: list[Callable[[Decline], None]] = []


@contextmanager
def watch_failures(watcher: Callable[[Decline], None]) -> Iterator[None]:
    """Shows each failure to ``watcher`` while the block runs: tests and tools must not miss one."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def failed(rule: str, node: fx.Node | None, error: Exception) -> Decline:
    """Makes the record of an error that cost a rewrite: ``node`` is where, if that is known."""
    lines = str(error).splitlines()
    reason = f"internal error: {type(error).__name__}" + (f": {lines[0]}" if lines else "")
    hint = "it is kept as it is and right; please report this line"
    if node is None:
        record = Decline(rule, "", reason, hint=hint, failed=True)
    else:
        record = dataclasses.replace(declined(rule, node, reason, hint), failed=True)
    for watcher in _watchers:
        watcher(record)
    return record


def in_bytes(number: int) -> str:
    """A number of bytes, for people."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number} B"


def declined(rule: str, node: fx.Node, reason: str | Declined, hint: str = "") -> Decline:
    """Makes a :class:`Decline` record at a node, of a sentence or of what was raised there."""
    if isinstance(reason, Declined):
        node, hint, reason = reason.node or node, reason.hint, reason.reason
    return Decline(
        rule, node.name, reason, provenance.module_path(node), provenance.source_line(node), hint
    )
