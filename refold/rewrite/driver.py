"""The fixpoint driver: runs rules with a worklist until none applies.

Rules are indexed by the operator at their root; after a rewrite only the new nodes, and users as
far up as a pattern can see, are looked at again. The cost grows with the number of matches.

Every rewrite is an :mod:`edit <refold.rewrite.edit>`, checked before it takes effect. One that
fails a check, or raises, is rolled back and declined with the reason: a careless rule costs an
opportunity, never a wrong number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import fx

from refold.errors import Declined, RefoldError, VerifierError
from refold.graph import constants, nodes
from refold.rewrite.build import Builder
from refold.rewrite.edit import Edit, Editor
from refold.rewrite.pattern import Match, Pattern, root_targets
from refold.rewrite.result import Applied, Decline, PassResult, declined, failed

Objection = str | Decline | None  # why a match stays as it is

_MATCHES_PER_NODE = 16
_REWRITES_PER_NODE = 8
_REWRITES_AT_LEAST = 200


class Rule(Protocol):
    """What the driver runs; see :class:`refold.rewrite.rule.RewriteRule`."""

    name: str

    @property
    def pattern(self) -> Pattern:
        """What it looks for."""

    def check(self, match: Match) -> Objection:
        """Why this match must stay as it is, or ``None``."""

    def rewrite(self, match: Match, build: Builder) -> fx.Node:
        """Makes (or picks) the node that takes the place of ``match.root``."""


def apply_rules(gm: fx.GraphModule, rules: Sequence[Rule]) -> PassResult:
    """Applies rules everywhere in a graph until none matches.

    Args:
        gm: the graph module, changed in place; its unused tensors stay until ``constants.sweep``.
        rules: at a node the first one that applies wins.

    Raises:
        VerifierError: the rules undo each other's work without end.
    """
    return _Driver(gm, rules).run()


class _Driver:
    def __init__(self, gm: fx.GraphModule, rules: Sequence[Rule]) -> None:
        self.gm = gm
        self.graph = gm.graph
        self.index: dict[Any, list[Rule]] = {}
        for rule in rules:
            for target in root_targets([rule.pattern]):
                self.index.setdefault(target, []).append(rule)
        self.levels = max((rule.pattern.depth() for rule in rules), default=0)
        self.constant = constants.constant_nodes(gm.graph)
        self.editor = Editor(gm, "")
        self.queue: deque[fx.Node] = deque()
        self.queued: set[fx.Node] = set()
        self.declined: dict[tuple[str, fx.Node], Decline] = {}
        self.applied: list[Applied] = []
        self.limit = _REWRITES_PER_NODE * len(gm.graph.nodes) + _REWRITES_AT_LEAST

    def run(self) -> PassResult:
        for node in self.graph.nodes:
            self.enqueue(node)
        while self.queue:
            node = self.queue.popleft()
            self.queued.discard(node)
            if node._erased or not node.users:
                continue
            for rule in self.index[_key(node)]:
                if self.attempt(rule, node):
                    break
        # A reason stands only for nodes that are still there when all is done.
        kept = [d for (_, node), d in self.declined.items() if not node._erased]
        return PassResult(bool(self.applied), self.applied, kept)

    def enqueue(self, node: fx.Node) -> None:
        if _key(node) in self.index and node not in self.queued:
            self.queue.append(node)
            self.queued.add(node)

    def attempt(self, rule: Rule, node: fx.Node) -> bool:
        first: Decline | None = None
        try:
            for match in islice(rule.pattern.matches(node, self.constant), _MATCHES_PER_NODE):
                reason = self.try_match(rule, match)
                if reason is None:
                    self.declined.pop((rule.name, node), None)
                    return True
                if first is None:
                    first = (
                        reason if isinstance(reason, Decline) else declined(rule.name, node, reason)
                    )
        except RefoldError:
            raise
        except Declined as reason:
            first = declined(rule.name, node, reason)
        except Exception as error:  # of the pattern, the check or the rewrite: it costs this match
            first = failed(rule.name, node, error)
        if first is not None:
            self.declined.setdefault((rule.name, node), first)
        return False

    def try_match(self, rule: Rule, match: Match) -> Objection:
        """Applies a rule to a match; the reason if it was declined."""
        root = match.root
        try:
            objection = rule.check(match)
            if objection is not None:
                return objection
            with self.editor.edit(rule.name) as edit:
                with edit.before(root):
                    new = rule.rewrite(match, Builder(self.gm, rule.name, match.nodes))
                self.stand_in(edit, root, new)
                edit.replace(root, new)
                edit.sweep([root, *reversed(edit.made)], match.nodes)
        except Declined as reason:
            return declined(rule.name, root, reason)
        self.took_effect(edit, new)
        return None

    def stand_in(self, edit: Edit, root: fx.Node, new: Any) -> None:
        """Refuses what is no node before the root, or one made of the root."""
        if not isinstance(new, fx.Node) or new.graph is not self.graph or new is root:
            raise Declined("the rewrite did not return a node that can stand for the root")
        if any(root in node.all_input_nodes for node in edit.made) or not new < root:
            raise Declined("the rewrite reads the node that it replaces, or one after it")

    def took_effect(self, edit: Edit, new: fx.Node) -> None:
        self.constant.difference_update(edit.gone)
        left = [n for n in edit.made if not n._erased]
        for node in left:
            if constants.is_get_attr(node) or (
                node.op == "call_function"
                and constants.impurity(node) is None
                and all(n in self.constant for n in node.all_input_nodes)
            ):
                self.constant.add(node)
        self.applied.append(edit.record())
        self.guard()
        # What lost a user may now be matched as an inner node of those that still read it.
        for node in (new, *left, *edit.survivors):
            self.climb(node)

    def climb(self, start: fx.Node) -> None:
        """Queues a node and its users as far up as a pattern can look down to it."""
        self.enqueue(start)
        seen, frontier = {start}, [start]
        for _ in range(self.levels):
            above: list[fx.Node] = []
            for node in frontier:
                above += [u for u in self.users_through_sums(node) if u not in seen]
            seen.update(above)
            for node in above:
                self.enqueue(node)
            frontier = above

    def users_through_sums(self, node: fx.Node) -> list[fx.Node]:
        """The users of a node; a chain of additions counts as one level, as in ``Sum``."""
        found: list[fx.Node] = []
        stack = list(node.users)
        seen = set(stack)
        while stack:
            user = stack.pop()
            found.append(user)
            if nodes.is_call(user, torch.ops.aten.add) and len(user.users) == 1:
                above = next(iter(user.users))
                if nodes.is_call(above, torch.ops.aten.add) and above not in seen:
                    seen.add(above)
                    stack.append(above)
        return found

    def guard(self) -> None:
        if len(self.applied) <= self.limit:
            return
        looping = sorted({record.rule for record in self.applied[-_REWRITES_AT_LEAST // 2 :]})
        raise VerifierError(
            f"rules loop without end: {', '.join(looping)} (after {len(self.applied)} rewrites of "
            f"a graph of {len(self.graph.nodes)} nodes); a rule must not match what it, or another "
            "of them, makes"
        )


def _key(node: fx.Node) -> Any:
    return (
        getattr(node.target, "overloadpacket", node.target) if node.op == "call_function" else None
    )
