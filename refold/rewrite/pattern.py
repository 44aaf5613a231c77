"""A pattern language over FX nodes, written with the IR's own operators.

    x = Var("x")
    Call(aten.add, Call(aten.mul, x, Const("g")), Const("h"))

matches ``x * g + h`` in every order of its operands. Arguments are given in schema order or by
schema name. An argument that the pattern does not mention must have its default value, so that a
careless pattern cannot overlook an ``alpha=2``; a trailing ``...`` says that the others may be
anything. Inner calls must have no users outside the match unless ``.shared()`` says otherwise,
because rewriting them away would compute them twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

import torch
from torch import fx

from refold.errors import Declined, RefoldError
from refold.graph import constants, nodes, ops

aten = torch.ops.aten


@dataclass(frozen=True)
class _Partial:
    """What a partial match has found: bindings by name, and the calls it would replace."""

    bindings: dict[str, Any] = field(default_factory=dict)
    calls: tuple[fx.Node, ...] = ()
    exclusive: tuple[fx.Node, ...] = ()

    def bind(self, name: str, value: Any) -> _Partial | None:
        if name in self.bindings:
            return self if _same_value(self.bindings[name], value) else None
        return replace(self, bindings={**self.bindings, name: value})


class Pattern:
    """Base of all patterns. Combine with ``a | b``, ``.named``, ``.where``."""

    def match(self, value: Any, state: _Partial, constant: set[fx.Node]) -> Iterator[_Partial]:
        """Yields every way in which ``value`` matches, extending ``state``."""
        raise NotImplementedError

    def targets(self) -> set[Any] | None:
        """Operators that a node must call to match, or ``None`` if any value may match."""
        return None

    def depth(self) -> int:
        """How many calls deep the pattern looks."""
        return 0

    def __or__(self, other: Any) -> Pattern:
        return Either((self, to_pattern(other)))

    def __ror__(self, other: Any) -> Pattern:
        return Either((to_pattern(other), self))

    def named(self, name: str) -> Pattern:
        """Binds the matched value to ``name`` too."""
        return Named(name, self)

    def where(self, predicate: Callable[[Any], bool]) -> Pattern:
        """Matches only values for which ``predicate(value)`` is true."""
        return Where(self, predicate)

    def matches(self, root: fx.Node, constant: set[fx.Node]) -> Iterator[Match]:
        """Yields the matches whose replaced calls end in ``root``.

        Args:
            root: the node whose value a rewrite would replace.
            constant: the constant nodes of the graph (``constants.constant_nodes``).
        """
        for state in self.match(root, _Partial(), constant):
            inside = set(state.calls)
            if all(inside.issuperset(node.users) for node in state.exclusive if node is not root):
                yield Match(root, state.bindings, tuple(dict.fromkeys(state.calls)))


@dataclass(frozen=True)
class Match:
    """One match: its root, what the names are bound to, and the calls it covers, root first."""

    root: fx.Node
    bindings: dict[str, Any]
    nodes: tuple[fx.Node, ...]

    def __getitem__(self, name: str) -> Any:
        return self.bindings[name]

    def get(self, name: str, default: Any = None) -> Any:
        """What ``name`` is bound to, or ``default`` where an alternative left it unbound."""
        return self.bindings.get(name, default)

    def tensor(self, name: str) -> torch.Tensor:
        """The values of a constant: the caller's own tensor, never to be written.

        Raises:
            Declined: the constant is still computed in the graph.
        """
        value = self.bindings[name]
        if isinstance(value, (bool, int, float)):
            return torch.tensor(value)
        if not constants.is_fixed(value):
            raise Declined(f"{name} is computed in the graph; fold-constants did not fold it")
        return constants.tensor(value)


@dataclass(frozen=True)
class Var(Pattern):
    """Any tensor value; the same name again must be the same node."""

    name: str

    def match(self, value: Any, state: _Partial, constant: set[fx.Node]) -> Iterator[_Partial]:
        if nodes.is_tensor(value):
            bound = state.bind(self.name, value)
            if bound is not None:
                yield bound


@dataclass(frozen=True)
class Const(Pattern):
    """A constant: a node that depends on parameters and literals alone, or a Python number."""

    name: str

    def match(self, value: Any, state: _Partial, constant: set[fx.Node]) -> Iterator[_Partial]:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number or (nodes.is_tensor(value) and value in constant):
            bound = state.bind(self.name, value)
            if bound is not None:
                yield bound


@dataclass(frozen=True)
class Attr(Pattern):
    """Any argument that is not a tensor: a number, a list, a dtype, a symbolic size, ``None``."""

    name: str

    def match(self, value: Any, state: _Partial, constant: set[fx.Node]) -> Iterator[_Partial]:
        leaves = value if isinstance(value, (list, tuple)) else (value,)
        if not any(nodes.is_tensor(leaf) for leaf in leaves):
            bound = state.bind(self.name, value)
            if bound is not None:
                yield bound


@dataclass(frozen=True)
class Literal(Pattern):
    """Exactly this Python value."""

    value: Any

    def match(self, value: Any, state: _Partial, constant: set[fx.Node]) -> Iterator[_Partial]:
        if _same_value(self.value, value):
            yield state


@dataclass(frozen=True)
class Either(Pattern):
    """The first alternative that fits, then the others."""

    alternatives: tuple[Pattern, ...]

    def match(self, value: Any, state: _Partial, constant: set[fx.Node]) -> Iterator[_Partial]:
        for alternative in self.alternatives:
            yield from alternative.match(value, state, constant)

    def targets(self) -> set[Any] | None:
        union: set[Any] = set()
        for alternative in self.alternatives:
            own = alternative.targets()
            if own is None:
                return None
            union |= own
        return union

    def depth(self) -> int:
        return max(a.depth() for a in self.alternatives)


@dataclass(frozen=True)
class Named(Pattern):
    """A pattern whose value is bound to a name."""

    name: str
    pattern: Pattern

    def match(self, value: Any, state: _Partial, constant: set[fx.Node]) -> Iterator[_Partial]:
        if self.name in state.bindings:
            # Bound before: the same value needs no second look, another one cannot match.
            if _same_value(state.bindings[self.name], value):
                yield state
            return
        for found in self.pattern.match(value, state, constant):
            bound = found.bind(self.name, value)
            if bound is not None:
                yield bound

    def targets(self) -> set[Any] | None:
        return self.pattern.targets()

    def depth(self) -> int:
        return self.pattern.depth()


@dataclass(frozen=True)
class Where(Pattern):
    """A pattern with a predicate on its value."""

    pattern: Pattern
    predicate: Callable[[Any], bool]

    def match(self, value: Any, state: _Partial, constant: set[fx.Node]) -> Iterator[_Partial]:
        # The predicate may read the whole constant: ask it last, and once.
        found = list(self.pattern.match(value, state, constant))
        if found and self.predicate(value):
            yield from found

    def targets(self) -> set[Any] | None:
        return self.pattern.targets()

    def depth(self) -> int:
        return self.pattern.depth()


class Many(Pattern):
    """Any number of list elements (of a ``cat``) or terms (of a :class:`Sum`), bound as a tuple.

    Args:
        name: bound to the tuple of values.
        element: what each must match (its own names are local to the element), by default any.
    """

    def __init__(self, name: str, element: Pattern | None = None) -> None:
        self.name = name
        self.element = element

    def match_all(
        self, values: Sequence[Any], state: _Partial, constant: set[fx.Node]
    ) -> _Partial | None:
        """Matches every one of ``values``, each against a fresh copy of the element pattern."""
        if self.element is not None:
            for value in values:
                fresh = _Partial(calls=state.calls, exclusive=state.exclusive)
                found = next(self.element.match(value, fresh, constant), None)
                if found is None:
                    return None
                state = replace(state, calls=found.calls, exclusive=found.exclusive)
        return state.bind(self.name, tuple(values))

    def depth(self) -> int:
        return self.element.depth() if self.element is not None else 0


@dataclass(frozen=True)
class Listing(Pattern):
    """A list argument, element by element; at most one :class:`Many` takes any number of them."""

    elements: tuple[Pattern, ...]

    def match(self, value: Any, state: _Partial, constant: set[fx.Node]) -> Iterator[_Partial]:
        if not isinstance(value, (list, tuple)):
            return
        at = next((i for i, e in enumerate(self.elements) if isinstance(e, Many)), None)
        if at is None:
            if len(value) == len(self.elements):
                yield from _match_each(
                    list(zip(self.elements, value, strict=True)), state, constant
                )
            return
        many, tail = self.elements[at], len(self.elements) - at - 1
        assert isinstance(many, Many)
        middle = len(value) - tail
        if middle < at:
            return
        fixed = list(zip(self.elements[:at], value[:at], strict=True))
        fixed += list(zip(self.elements[at + 1 :], value[middle:], strict=True))
        for found in _match_each(fixed, state, constant):
            bound = many.match_all(value[at:middle], found, constant)
            if bound is not None:
                yield bound

    def depth(self) -> int:
        return max((e.depth() for e in self.elements), default=0)


class Call(Pattern):
    """A call of an operator.

    Args:
        target: an ATen operator (``aten.add``, every overload, or ``aten.add.Tensor``), or a
            tuple of them.
        *args: patterns or literal values for the arguments in schema order; a trailing ``...``
            leaves those not mentioned unconstrained.
        **kwargs: the same by schema name.
    """

    def __init__(self, target: Any, *args: Any, **kwargs: Any) -> None:
        self._targets = target if isinstance(target, tuple) else (target,)
        self._open = bool(args) and args[-1] is ...
        self._args = tuple(to_pattern(a) for a in (args[:-1] if self._open else args))
        self._kwargs = {name: to_pattern(p) for name, p in kwargs.items()}
        self._exclusive = True
        self._users: int | None = None

    def shared(self) -> Call:
        """Lets the call have users outside the match (it stays then)."""
        copy = self._copy()
        copy._exclusive = False
        return copy

    def users(self, count: int) -> Call:
        """Demands exactly ``count`` users, inside the match or outside."""
        copy = self.shared()
        copy._users = count
        return copy

    def _copy(self) -> Call:
        copy = Call.__new__(Call)
        copy.__dict__.update(self.__dict__)
        return copy

    def targets(self) -> set[Any] | None:
        return set(self._targets)

    def depth(self) -> int:
        inner = [*self._args, *self._kwargs.values()]
        return 1 + max((p.depth() for p in inner), default=0)

    def match(self, value: Any, state: _Partial, constant: set[fx.Node]) -> Iterator[_Partial]:
        if not nodes.is_call(value, *self._targets):
            return
        if nodes.pinned(value) or constants.is_mutation(value):
            return
        if self._users is not None and len(value.users) != self._users:
            return
        exclusive = (*state.exclusive, value) if self._exclusive else state.exclusive
        state = replace(state, calls=(*state.calls, value), exclusive=exclusive)
        for pairs in self._pairings(value):
            yield from _match_each(pairs, state, constant)

    def _pairings(self, node: fx.Node) -> Iterator[list[tuple[Pattern, Any]]]:
        """The ways to lay the pattern's arguments over the call's."""
        if not isinstance(node.target, torch._ops.OpOverload):
            if len(node.args) == len(self._args) and not node.kwargs and not self._kwargs:
                yield list(zip(self._args, node.args, strict=True))
            return
        schema = node.target._schema.arguments
        names = [a.name for a in schema if not a.kwarg_only][: len(self._args)]
        if len(names) < len(self._args):
            return
        patterns = dict(zip(names, self._args, strict=True))
        if any(n in patterns or all(n != a.name for a in schema) for n in self._kwargs):
            return
        patterns.update(self._kwargs)
        bound = nodes.arguments(node)
        if not self._open:
            for argument in schema:
                if argument.name not in patterns and not (
                    argument.has_default_value()
                    and _same_value(argument.default_value, bound[argument.name])
                ):
                    return
        yield [(p, bound[n]) for n, p in patterns.items()]
        if len(names) >= 2 and commutes(node):
            first, second = names[:2]
            swapped = {**bound, first: bound[second], second: bound[first]}
            yield [(p, swapped[n]) for n, p in patterns.items()]


class Sum(Pattern):
    """A tree of additions, flattened: its terms in any order.

    The tree takes in every ``add`` of the same shape and dtype without ``alpha`` that has no
    other user.

    Args:
        *terms: patterns for distinct terms; a :class:`Many` takes the remaining ones (without it
            there must be none).
    """

    def __init__(self, *terms: Any) -> None:
        self._terms = tuple(to_pattern(t) for t in terms if not isinstance(t, Many))
        self._rest = next((t for t in terms if isinstance(t, Many)), None)

    def targets(self) -> set[Any] | None:
        return {aten.add.Tensor}

    def depth(self) -> int:
        inner = [*self._terms, *([self._rest] if self._rest is not None else [])]
        return 1 + max((t.depth() for t in inner), default=0)

    def match(self, value: Any, state: _Partial, constant: set[fx.Node]) -> Iterator[_Partial]:
        if not nodes.is_call(value, aten.add.Tensor) or nodes.pinned(value) or not commutes(value):
            return
        adds, leaves = flatten_sum(value)
        missing = len(leaves) - len(self._terms)
        if missing and self._rest is None:
            return
        # Inner additions have one user, which is in the tree: they need no check at the end.
        state = replace(state, calls=(*state.calls, *adds))
        for chosen in permutations(range(len(leaves)), len(self._terms)):
            rest = [leaf for i, leaf in enumerate(leaves) if i not in chosen]
            picked = [(t, leaves[i]) for t, i in zip(self._terms, chosen, strict=True)]
            for found in _match_each(picked, state, constant):
                bound = found if self._rest is None else self._rest.match_all(rest, found, constant)
                if bound is not None:
                    yield bound


def maybe(call: Call) -> Pattern:
    """An optional call: itself, or its first argument alone (``maybe(Call(aten.relu, x))``)."""
    return Either((call, call._args[0]))


def to_pattern(value: Any) -> Pattern:
    """A pattern as it is; a list of patterns; anything else as a literal."""
    if isinstance(value, Pattern):
        return value
    if isinstance(value, (list, tuple)) and any(isinstance(v, Pattern) for v in value):
        return Listing(tuple(to_pattern(v) for v in value))
    return Literal(value)


def commutes(node: fx.Node) -> bool:
    """True if the first two operands of a call may change places."""
    if not ops.has(node, ops.COMMUTATIVE):
        return False
    return _same_value(nodes.arguments(node).get("alpha", 1), 1)


def flatten_sum(root: fx.Node) -> tuple[list[fx.Node], list[Any]]:
    """The additions of the tree below ``root``, root first, and its terms from left to right."""
    adds, leaves = [root], []
    stack: list[Any] = list(reversed(root.args[:2]))
    while stack:
        value = stack.pop()
        if (
            nodes.is_call(value, aten.add.Tensor)
            and commutes(value)
            and len(value.users) == 1
            and not nodes.pinned(value)
            and nodes.dtype(value) == nodes.dtype(root)
            and nodes.same(nodes.shape(value), nodes.shape(root))
        ):
            adds.append(value)
            stack.extend(reversed(value.args[:2]))
        else:
            leaves.append(value)
    return adds, leaves


def _match_each(
    pairs: Sequence[tuple[Pattern, Any]], state: _Partial, constant: set[fx.Node]
) -> Iterator[_Partial]:
    if not pairs:
        yield state
        return
    (pattern, value), rest = pairs[0], pairs[1:]
    for found in pattern.match(value, state, constant):
        yield from _match_each(rest, found, constant)


def _same_value(a: Any, b: Any) -> bool:
    """Equality of argument values: nodes by identity, numbers by value, ``True`` is not ``1``."""
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same_value(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.memory_format) or isinstance(b, torch.memory_format):
        # Schemas give the default of a memory format as its enumerator.
        return a is b or {a, b} == {torch.contiguous_format, 0}
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    return type(a) is type(b) and a == b if isinstance(a, str) else bool(a == b)


def root_targets(patterns: Iterable[Pattern]) -> set[Any]:
    """The operators (packets or functions) at which any of the patterns can match."""
    found: set[Any] = set()
    for pattern in patterns:
        targets = pattern.targets()
        if not targets:
            raise RefoldError("a pattern needs an operator at its root, as in Call(aten.add, ...)")
        found |= {getattr(t, "overloadpacket", t) for t in targets}
    return found
