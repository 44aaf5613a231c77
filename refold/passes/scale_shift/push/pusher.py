"""Pushes a constant scale and shift into what produces or consumes the tensor.

    y = s * f(x) + t    ->    y = f'(x)          (up: f takes the scale and shift into its weights)
    y = f(s * x + t)    ->    y = f'(x)          (down: every consumer takes them)

On its way it passes operations that commute with it: layouts, concatenation, sums, unpadded
averages, resizing, and, for a positive scale without shift, ReLU-like activations. A whole path is
planned before anything changes: one node that cannot take its part, and nothing happens.

``fold-batch-norm`` and ``absorb-scale-shift`` say what they read as a scale and shift; this is
where it goes.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from refold.errors import Declined
from refold.graph import constants, nodes
from refold.graph.nodes import aten
from refold.graph.ops import kind, op_name
from refold.graph.records.scale_shifts import Affine
from refold.passes.scale_shift.push import carry, weights
from refold.passes.scale_shift.push.down import Downward
from refold.passes.scale_shift.push.factor import Factor
from refold.passes.scale_shift.push.plan import Plan
from refold.passes.scale_shift.push.region import Copies, Region
from refold.passes.scale_shift.push.up import Upward
from refold.rewrite.cost import CostModel
from refold.rewrite.edit import Editor
from refold.rewrite.result import Applied, PassResult, applied, declined

_SHOWN = 4  # kinds of calls that a record's line names


class Pusher:
    """Pushes every affine operation of one family in a graph; see the module docstring.

    Args:
        gm: the graph module.
        rule: id for the records.
        read: a node as the affine operation that is to be pushed, if it is one.
        max_growth: how much larger the stored constants may become by un-sharing weights.
        costs: what calls cost where the graph will run.
        border_maps: let a shift that a convolution cannot take as a bias become a map of its
            values, one for each position of the output, where that is cheaper.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        rule: str,
        read: Callable[[fx.Node], Affine | None],
        max_growth: float,
        costs: CostModel,
        *,
        border_maps: bool = False,
    ) -> None:
        self._graph, self._rule, self._read = gm.graph, rule, read
        self._costs, self._border_maps = costs, border_maps
        self._editor = Editor(gm, rule)
        self._budget = (max_growth - 1.0) * constants.stored_bytes(gm)
        self._refusals: dict[fx.Node, Declined] = {}
        self._folded: dict[Any, Copies] = {}

    def run(self) -> PassResult:
        result = self._editor.result
        changed = True
        while changed:
            changed = False
            for node in list(self._graph.nodes):
                if node.op != "call_function" or not node.users or nodes.pinned(node):
                    continue  # erased nodes have no users
                if node in self._editor.failed:
                    continue
                with self._editor.candidate(node):
                    changed |= self._push_at(node)
            if changed:
                constants.drop_dead_code(self._graph)
        result.modified = bool(result.applied)
        alive = set(self._graph.nodes)
        result.declined += [
            declined(self._rule, node, reason.reason, reason.hint)
            for node, reason in self._refusals.items()
            if node in alive
        ]
        return result

    def _push_at(self, node: fx.Node) -> bool:
        """Pushes the affine operation at a node, if it is one that is wanted."""
        record = self._read(node)
        if record is None:
            return False
        factor = Factor(record.scale.get(), record.shift.get())
        if factor.is_identity:
            return False  # clean-up removes it, where no output would come to share storage
        try:
            done = self._push(record, factor)
        except Declined as reason:
            if record.ends is None:  # the affine part of a norm costs nothing where it is
                self._refusals[node] = reason
            return False
        self._editor.result.applied.append(done)
        self._refusals.pop(node, None)
        return True

    def _push(self, record: Affine, factor: Factor) -> Applied:
        """Tries up, then down.

        Raises:
            Declined: neither works.
        """
        if not bool(torch.isfinite(factor.scale).all() & torch.isfinite(factor.shift).all()):
            raise Declined(
                "its constant is not finite (a mask, zero variance without eps, NaN weights)",
                hint="if that is not meant, check the weights and statistics of this layer",
            )
        region = Region.of(
            self._graph, record, factor, self._budget, self._costs,
            border_maps=self._border_maps, folded=self._folded,
        )  # fmt: skip
        if record.ends is not None:
            return self._commit(record, Downward(region).plan())
        try:
            return self._push_up(region)
        except Declined as reason:
            upward = _as_far_as(region, reason)
        try:
            return self._commit(record, Downward(region).plan())
        except Declined as reason:
            downward = _as_far_as(region, reason)
        raise Declined(f"into its input: {upward}; into its users: {downward}")

    def _push_up(self, region: Region) -> Applied:
        way = Upward(region)
        try:
            return self._commit(region.record, way.plan())
        except Declined:
            if not way.joined:
                raise
        return self._commit(region.record, Upward(region, joins=False).plan())

    def _commit(self, record: Affine, plan: Plan) -> Applied:
        """Carries a plan out, as one step."""
        gone, kept = ([record.node], []) if record.ends is None else ([], [record.node])
        done = applied(
            self._rule, [*gone, *plan.removed], [*kept, *plan.touched], _told(record, plan)
        )
        path = [record.node, *(step.node for step in plan.steps)]
        done = dataclasses.replace(
            done,
            path=tuple(n.name for n in path),
            path_kinds=tuple(map(kind, path)),
            crossed=tuple(n.name for n in plan.crossed),
        )
        with self._editor.edit() as edit:
            for step in plan.steps:
                if not step.stays:
                    continue
                value: fx.Node | None = None  # upward, what lies between has a value of its own
                if step.node is record.x:
                    value = record.node
                elif step.keeps:
                    value = step.node
                edit.stamp(step.node, [record.node, step.node], value=value)
            current = carry.operand(record.reader, record.x)
            for write in plan.writes:
                write(edit)
            if record.ends is not None:
                weights.drop_norm_affine(edit, record.ends)
                self._budget -= plan.spent
                return done
            new = current()
            if nodes.dtype(record.x) != nodes.dtype(record.node):
                with edit.before(record.node):
                    args = (new, nodes.dtype(record.node))
                    new = edit.call(aten.to.dtype, args, sources=[record.node])
                edit.stamp(new, [record.node], value=None)
            edit.replace(record.node, new)
            edit.remove((record.node, record.reader))
        self._budget -= plan.spent
        return done


def _told(record: Affine, plan: Plan) -> str:
    """A plan in one line: ``batch-norm into conv, across 2 calls: view, permute``."""
    part = "" if record.ends is None else "the scale and shift of "
    line = f"{part}{kind(record.node)} into {', '.join(sorted({_kind(t) for t in plan.takers}))}"
    crossed = [n for n in plan.crossed if n.target is not operator.getitem]
    if not crossed:
        return line
    names = list(dict.fromkeys(op_name(n) for n in crossed))
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"{line}, across {len(crossed)} call{'s' if len(crossed) > 1 else ''}: {shown}"


def _kind(taker: fx.Node) -> str:
    return kind(taker) if taker.op == "call_function" else "a constant"


def _as_far_as(region: Region, reason: Declined) -> str:
    """Why a way ends, and where, if the scale and shift would have crossed calls on it."""
    if reason.node is None or reason.node in region.ends:
        return reason.reason
    return f"came as far as %{reason.node.name}: {reason.reason}"
