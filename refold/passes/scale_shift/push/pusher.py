"""Pushes a constant scale and shift into what produces or consumes the tensor.

    y = s * f(x) + t    ->    y = f'(x)          (up: f takes the scale and shift into its weights)
    y = f(s * x + t)    ->    y = f'(x)          (down: every consumer takes them)

On its way it passes operations that commute with it: layouts, concatenation, sums, unpadded
averages, resizing, and, for a positive scale without shift, ReLU-like activations. A whole path is
planned before anything changes: one node that cannot take its part, and nothing happens.

``fold-batch-norm`` and ``absorb-scale-shift`` are this mechanism, seen by kind of node.
"""

from __future__ import annotations

import torch
from torch import fx

from refold.errors import Declined
from refold.graph import constants, layout, nodes
from refold.graph.nodes import aten
from refold.graph.ops import kind
from refold.graph.records import scale_shifts
from refold.passes.scale_shift.push.down import Downward
from refold.passes.scale_shift.push.factor import Factor, Plan
from refold.passes.scale_shift.push.up import Upward
from refold.passes.scale_shift.push.walk import (
    operand,
    widens,
)
from refold.rewrite.result import Applied, PassResult, applied, declined


class Pusher(Upward, Downward):
    """Pushes every affine operation of one family in a graph; see the module docstring.

    Args:
        gm: the graph module.
        rule: id for the records.
        wants: which affine records to push.
        max_growth: how much larger the stored constants may become by un-sharing weights.
        costs: what calls cost where the graph will run.
        border_maps: let a shift that a convolution cannot take as a bias become a map of its
            values, one for each position of the output, where that is cheaper.
    """

    def run(self) -> PassResult:
        result = self.editor.result
        changed = True
        while changed:
            changed = False
            for node in list(self.graph.nodes):
                if node.op != "call_function" or not node.users or nodes.pinned(node):
                    continue  # erased nodes have no users
                if node in self.editor.failed:
                    continue
                with self.editor.candidate(node):
                    changed |= self.push_at(node)
            if changed:
                constants.drop_dead_code(self.graph)
        result.modified = bool(result.applied)
        alive = set(self.graph.nodes)
        result.declined += [
            declined(self.rule, node, reason, hint)
            for node, (reason, hint) in self.refusals.items()
            if node in alive
        ]
        return result

    def push_at(self, node: fx.Node) -> bool:
        """Pushes the affine operation at a node, if it is one that is wanted."""
        record = scale_shifts.affine(node) or scale_shifts.widening_affine(node)
        if record is None or not self.wants(record):
            return False
        done = self.push(record)
        if done is None:
            return False
        self.editor.result.applied.append(done)
        self.refusals.pop(node, None)
        return True

    def push(self, record: scale_shifts.Affine) -> Applied | None:
        """Tries up, then down; records why when neither works."""
        factor = Factor(record.scale.get(), record.shift.get())
        if factor.is_identity:
            return None  # clean-up removes it, where no output would come to share storage
        self.escapes, self.record = layout.escapes(record.node), record
        if not bool(torch.isfinite(factor.scale).all() & torch.isfinite(factor.shift).all()):
            self.refusals[record.node] = (
                "its constant is not finite (a mask, zero variance without eps, NaN weights)",
                "if that is not meant, check the weights and statistics of this layer",
            )
            return None
        upward = ""
        for self.joins in (True, False):
            if not self.joins and not self.joined:
                break  # the same plan as before
            self.joined = False
            plan = Plan()
            try:
                self._plan_up(record, factor, plan)
                return self._commit(record, plan)
            except Declined as refusal:
                upward = str(refusal)
        plan = Plan()
        try:
            self._down(record.node, factor, plan)
            return self._commit(record, plan)
        except Declined as refusal:
            downward = str(refusal)
        self.refusals[record.node] = (f"into its input: {upward}; into its users: {downward}", "")
        return None

    def _plan_up(self, record: scale_shifts.Affine, factor: Factor, plan: Plan) -> None:
        if widens(record):
            raise Declined("its input is an integer tensor")
        self._up(record.x, record.reader, factor, plan)
        while plan.parts or plan.shared:
            # the last in the graph first: its path may lead to an earlier one
            source = max([*plan.parts, *(u for u, _ in plan.shared)])
            if source in plan.parts:
                self._up_shared(source, *plan.parts.pop(source), plan)
            else:
                self._up_joint(source, plan)

    def _commit(self, record: scale_shifts.Affine, plan: Plan) -> Applied:
        """Carries a plan out, as one step."""
        done = applied(
            self.rule,
            [record.node, *plan.removed],
            plan.touched,
            f"{kind(record.node)} into {', '.join(sorted({kind(t) for t in plan.touched}))}",
        )
        with self.editor.edit() as self.edit:
            for node in plan.touched:
                value: fx.Node | None = None  # upward, what lies between has a value of its own
                if node is record.x:
                    value = record.node
                elif plan.keeps_value(node):
                    value = node
                self.edit.stamp(node, [record.node, node], value=value)
            current = operand(record.reader, record.x)
            for make in plan.edits:
                make()
            new = current()
            if widens(record):
                with self.edit.before(record.node):
                    args = (new, nodes.dtype(record.node))
                    new = self.edit.call(aten.to.dtype, args, sources=[record.node])
                self.edit.stamp(new, [record.node], value=None)
            self.edit.replace(record.node, new)
            self.edit.remove((record.node, record.reader))
        return done
