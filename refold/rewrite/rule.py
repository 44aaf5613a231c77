"""Rewrite rules: a pattern, a check that declines with a reason, and a rewrite."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from refold.errors import Declined, UsageError
from refold.rewrite.build import Builder
from refold.rewrite.context import Context
from refold.rewrite.driver import Objection, apply_rules
from refold.rewrite.pattern import Call, Const, Literal, Match, Pattern, Var
from refold.rewrite.result import PassResult


class RewriteRule:
    """A rule by class: set ``name`` and ``pattern``, write ``rewrite``, and ``check`` if needed.

    A rule is also a pass: ``Pipeline.with_(MyRule())`` runs it to its fixpoint.

    Attributes:
        name: id of the rule, in kebab-case.
        pattern: what it replaces.
        exactness: ``exact``, ``reassociates`` or ``approximate``.
    """

    name: str
    pattern: Pattern
    exactness: str = "exact"

    def check(self, match: Match) -> Objection:
        """Why this match must stay as it is, or ``None``."""
        return None

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        """Makes (or picks) the node that takes the place of ``match.root``."""
        raise NotImplementedError

    def run(self, gm: fx.GraphModule, context: Context = Context()) -> PassResult:
        """Applies the rule everywhere in the graph, to its fixpoint."""
        return apply_rules(gm, (self,))

    def __repr__(self) -> str:
        return f"<rule {self.name}>"


class _ExampleRule(RewriteRule):
    def __init__(
        self,
        name: str,
        pattern: Pattern,
        template: fx.Graph,
        check: Callable[[Match], Objection] | None,
        exactness: str,
    ) -> None:
        self.name = name
        self.pattern = pattern
        self.exactness = exactness
        self._template = template
        self._check = check

    def check(self, match: Match) -> Objection:
        return self._check(match) if self._check is not None else None

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        made: dict[fx.Node, Any] = {}
        for node in self._template.nodes:
            if node.op == "placeholder":
                made[node] = match.get(node.name)
            elif node.op == "output":
                result = node.args[0]
                value = made[result] if isinstance(result, fx.Node) else result
                if not isinstance(value, fx.Node):
                    raise Declined("the replacement is a number here, not a tensor")
                return value
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: made[n])
                made[node] = build(node.target, *args, **kwargs)
        raise AssertionError("a traced function has an output")


def rule_from_functions(
    name: str,
    before: Callable[..., torch.Tensor],
    after: Callable[..., torch.Tensor],
    check: Callable[[Match], Objection] | None = None,
    *,
    examples: Mapping[str, torch.Tensor] | None = None,
    exactness: str = "exact",
) -> RewriteRule:
    """Makes a rule by example, from two functions of tensors.

    ``before`` becomes the pattern and ``after`` the replacement. Positional parameters match any
    tensor; keyword-only parameters (after ``*``) match constants only. ``after`` takes the same
    parameters, or some of them::

        rule_from_functions(
            "scale-then-shift",
            before=lambda x, *, g, h: (x + h) * g,
            after=lambda x, *, g, h: torch.addcmul(h * g, x, g),
        )

    Args:
        name: id of the rule.
        before: what to replace.
        after: what to put in its place.
        check: why a match must stay as it is, or ``None``.
        examples: tensors to trace with, by parameter, where four-dimensional floats do not fit.
        exactness: ``exact``, ``reassociates`` or ``approximate``.

    Returns:
        The rule, which is also a pass.
    """
    kinds = {n: p.kind for n, p in _parameters(before, name).items()}
    unknown = sorted(set(_parameters(after, name)) - set(kinds))
    if unknown:
        raise UsageError(f"rule {name!r}: `after` takes {unknown}, which `before` does not bind")
    source = _trace(before, examples or {}, name)
    constant = {n for n, kind in kinds.items() if kind is inspect.Parameter.KEYWORD_ONLY}
    pattern = _pattern_of(source, constant, name)
    return _ExampleRule(name, pattern, _trace(after, examples or {}, name), check, exactness)


def _parameters(function: Callable[..., Any], rule: str) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError as error:
        raise UsageError(
            f"rule {rule!r}: {function!r} does not tell its parameters; write it as lambda x: ..."
        ) from error


def _trace(
    function: Callable[..., Any], examples: Mapping[str, torch.Tensor], rule: str
) -> fx.Graph:
    parameters = _parameters(function, rule)
    keywords = [n for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    values = [examples.get(n, torch.ones(4, 4, 4, 4)) for n in parameters]

    def flat(*tensors: torch.Tensor) -> Any:
        named = dict(zip(parameters, tensors, strict=True))
        keyed = {n: named.pop(n) for n in keywords}
        return function(*named.values(), **keyed)

    try:
        with torch.no_grad():
            graph: fx.Graph = make_fx(flat, tracing_mode="fake", pre_dispatch=True)(*values).graph
    except Exception as error:
        raise UsageError(
            f"rule {rule!r}: cannot trace {getattr(function, '__name__', function)}: {error}; "
            "give tensors that fit with examples={name: tensor}"
        ) from error
    if not isinstance(graph.output_node().args[0], fx.Node):
        raise UsageError(f"rule {rule!r}: each function must return one tensor")
    for node, parameter in zip(graph.find_nodes(op="placeholder"), parameters, strict=True):
        node.name = parameter
    return graph


def _pattern_of(graph: fx.Graph, constant: set[str], rule: str) -> Pattern:
    made: dict[fx.Node, Pattern] = {}

    def of(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return made[value]
        if isinstance(value, (list, tuple)):
            return [of(v) for v in value]
        return Literal(value)

    for node in graph.nodes:
        if node.op == "placeholder":
            if not node.users:
                raise UsageError(f"rule {rule!r}: `before` does not use {node.name!r}")
            made[node] = Const(node.name) if node.name in constant else Var(node.name)
        elif node.op == "call_function":
            args = [of(a) for a in node.args]
            call: Pattern = Call(node.target, *args, **{k: of(v) for k, v in node.kwargs.items()})
            # A value that is read twice must be one node, not two alike; and is matched once.
            made[node] = call.named(f"%{node.name}") if len(node.users) > 1 else call
        elif node.op == "get_attr":
            raise UsageError(f"rule {rule!r}: tensors made inside `before` cannot be matched")
    result = made[graph.output_node().args[0]]  # type: ignore[index]
    if result.targets() is None:
        raise UsageError(f"rule {rule!r}: `before` must compute something, it returns a parameter")
    return result
