"""The fixpoint driver: runs rules with a worklist until none applies.

Rules are indexed by the operator at their root; after a rewrite only the new nodes, and users as
far up as a pattern can see, are looked at again. The cost grows with the number of matches.

Every rewrite is checked before it takes effect: the replacement has the shape, dtype and device
of what it replaces, no output comes to share storage, no later call depends on strides that would
change, and nothing reads storage that the graph writes. A rewrite that fails a check is rolled
back and declined with the reason: a careless rule costs an opportunity, never a wrong number.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from refold.errors import RefoldError, VerifierError
from refold.graph import aliasing, constants, nodes, provenance
from refold.rewrite.pattern import Decline, Match, root_targets
from refold.rewrite.result import Applied, Declined, PassResult, applied, declined
from refold.rewrite.rule import Builder, RewriteRule

_MATCHES_PER_NODE = 16
_REWRITES_PER_NODE = 8
_REWRITES_AT_LEAST = 200


def apply_rules(gm: fx.GraphModule, rules: Sequence[RewriteRule]) -> PassResult:
    """Applies rules everywhere in a graph until none matches.

    Args:
        gm: the graph module, changed in place; its unused tensors stay until ``constants.sweep``.
        rules: at a node the first one that applies wins.

    Raises:
        VerifierError: the rules undo each other's work without end, or one of them failed.
    """
    return _Driver(gm, rules).run()


class _Driver:
    def __init__(self, gm: fx.GraphModule, rules: Sequence[RewriteRule]) -> None:
        self.gm = gm
        self.graph = gm.graph
        self.index: dict[Any, list[RewriteRule]] = {}
        for rule in rules:
            for target in root_targets([rule.pattern]):
                self.index.setdefault(target, []).append(rule)
        self.levels = max((rule.pattern.depth() for rule in rules), default=0)
        self.constant = constants.constant_nodes(gm.graph)
        self.mutated = aliasing.mutated(gm.graph)
        self.queue: deque[fx.Node] = deque()
        self.queued: set[fx.Node] = set()
        self.declined: dict[tuple[str, fx.Node], Declined] = {}
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

    def attempt(self, rule: RewriteRule, node: fx.Node) -> bool:
        first: Declined | None = None
        for match in islice(rule.pattern.matches(node, self.constant), _MATCHES_PER_NODE):
            reason = self.try_match(rule, match)
            if reason is None:
                self.declined.pop((rule.name, node), None)
                return True
            if first is None:
                first = (
                    reason if isinstance(reason, Declined) else declined(rule.name, node, reason)
                )
        if first is not None:
            self.declined.setdefault((rule.name, node), first)
        return False

    def try_match(self, rule: RewriteRule, match: Match) -> str | Declined | None:
        """Applies a rule to a match; the reason if it was declined."""
        root, mark = match.root, match.root.prev
        build = Builder(self.gm, rule.name, match.nodes)
        try:
            verdict = rule.check(match)
            if verdict is not None:
                return verdict
            with self.graph.inserting_before(root):
                new = rule.rewrite(match, build)
            reason = self.objection(root, new, _between(mark, root))
        except Decline as decline:
            self.roll_back(mark, root)
            return str(decline)
        except RefoldError:
            raise
        except Exception as error:
            raise VerifierError(
                f"rule {rule.name!r} failed at %{root.name} ({provenance.module_path(root)}, "
                f"{provenance.source_line(root)}): {type(error).__name__}: {error}"
            ) from error
        if reason is not None:
            self.roll_back(mark, root)
            return reason
        self.commit(rule, match, new, _between(mark, root))
        return None

    def roll_back(self, mark: fx.Node, root: fx.Node) -> None:
        for node in reversed(_between(mark, root)):
            self.erase(node)

    def erase(self, node: fx.Node) -> None:
        self.constant.discard(node)
        self.graph.erase_node(node)

    def objection(self, root: fx.Node, new: Any, made: list[fx.Node]) -> str | None:
        """Why ``new`` may not take the place of ``root``, or ``None``."""
        if not isinstance(new, fx.Node) or new.graph is not self.graph or new is root:
            return "the rewrite did not return a node that can stand for the root"
        if any(root in node.all_input_nodes for node in made) or not new < root:
            return "the rewrite reads the node that it replaces, or one after it"
        difference = _difference(root.meta.get("val"), new.meta.get("val"))
        if difference is not None:
            return difference
        read = {new} if new not in made else set()
        for node in made:
            read.update(n for n in node.all_input_nodes if n not in made)
        if self.mutated and any(self.mutated & aliasing.roots(n) for n in read):
            return "it reads storage that the graph writes"
        return aliasing.new_sharing(root, new) or aliasing.unsettled_strides(root, new)

    def commit(self, rule: RewriteRule, match: Match, new: fx.Node, made: list[fx.Node]) -> None:
        for node in made:
            if constants.is_get_attr(node) or (
                node.op == "call_function"
                and constants.impurity(node) is None
                and all(n in self.constant for n in node.all_input_nodes)
            ):
                self.constant.add(node)
        nodes.replace(match.root, new)
        dead, survivors = self.sweep([match.root, *reversed(made)], set(match.nodes))
        left = [n for n in made if not n._erased]
        calls = [n for n in reversed(dead) if n.op == "call_function" and n not in made]
        self.applied.append(applied(rule.name, calls, [n for n in left if n.op != "get_attr"]))
        self.guard()
        # What lost a user may now be matched as an inner node of those that still read it.
        for node in (new, *left, *survivors):
            self.climb(node)

    def sweep(
        self, starts: Iterable[fx.Node], covered: set[fx.Node]
    ) -> tuple[list[fx.Node], list[fx.Node]]:
        """Erases dead nodes upwards; returns them and the nodes that lost a user but live.

        Calls that FX takes for impure (``dropout``, even in eval mode) go only where ``covered``.
        """
        dead: list[fx.Node] = []
        survivors: dict[fx.Node, None] = {}
        stack = list(reversed(list(starts)))
        while stack:
            node = stack.pop()
            if node._erased:
                continue
            stays = node.op == "placeholder" or nodes.pinned(node)
            if node.users or stays or (node.is_impure() and node not in covered):
                survivors[node] = None
                continue
            stack.extend(node.all_input_nodes)
            self.erase(node)
            dead.append(node)
        return dead, [n for n in survivors if not n._erased]

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


def _between(mark: fx.Node, root: fx.Node) -> list[fx.Node]:
    """The nodes after ``mark`` and before ``root``: those that a rewrite has just made."""
    found: list[fx.Node] = []
    node = root.prev
    while node is not mark:
        found.append(node)
        node = node.prev
    return found[::-1]


def _difference(old: Any, new: Any) -> str | None:
    before, after = pytree.tree_leaves(old), pytree.tree_leaves(new)
    if len(before) != len(after):
        return f"the result would have {len(after)} values instead of {len(before)}"
    for a, b in zip(before, after, strict=True):
        if isinstance(a, torch.Tensor) != isinstance(b, torch.Tensor):
            return f"the result would be {type(b).__name__}, not {type(a).__name__}"
        if not isinstance(a, torch.Tensor):
            if not nodes.same(a, b):
                return f"the result would be {b}, not {a}"
        elif a.dtype != b.dtype:
            return f"the result would be {b.dtype}, not {a.dtype}"
        elif a.device != b.device:
            return f"the result would be on {b.device}, not {a.device}"
        elif not nodes.same(a.shape, b.shape):
            return f"the result's shape would be {list(b.shape)}, not {list(a.shape)}"
    return None
