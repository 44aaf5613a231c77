"""One scale-shift that is to be pushed, and what holds for every path that it may take."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from refold.errors import Declined
from refold.graph import constants, layout, nodes
from refold.graph.records import scale_shifts
from refold.passes.scale_shift.push.factor import Factor
from refold.rewrite.cost import CostModel

LONGEST = 80  # calls on a path; a plan takes some frames of Python's stack for each
SMALL = 1 << 13  # bytes below which un-sharing a weight is never refused


@dataclass(frozen=True)
class Region:
    """What both directions read of a scale-shift and of where it stands.

    Attributes:
        graph: that it stands in.
        record: the scale-shift.
        factor: its values.
        escapes: whether the caller may get its result as a view, so that storage counts.
        budget: bytes by which un-sharing weights may still grow the constants.
        costs: what calls cost where the graph will run.
        border_maps: whether a shift that a convolution cannot take as a bias may become a map.
    """

    graph: fx.Graph
    record: scale_shifts.Affine
    factor: Factor
    escapes: bool
    budget: float
    costs: CostModel
    border_maps: bool

    @classmethod
    def of(
        cls, graph: fx.Graph, record: scale_shifts.Affine, factor: Factor,
        budget: float, costs: CostModel, *, border_maps: bool,
    ) -> Region:  # fmt: skip
        escapes = layout.escapes(record.node)
        return cls(graph, record, factor, escapes, budget, costs, border_maps)

    @property
    def ends(self) -> tuple[fx.Node, fx.Node]:
        """The calls that the scale-shift is: one, or the tuple form of a norm and its first."""
        return self.record.node, self.record.reader

    @property
    def widens(self) -> bool:
        """True if the scale-shift casts integers, too."""
        return nodes.dtype(self.record.x) != nodes.dtype(self.record.node)

    def growth(self, weight: fx.Node, spent: float) -> int:
        """Bytes that another copy of a weight adds, after a plan spent some already.

        Raises:
            Declined: they are more than may be added.
        """
        readers = len(weight.users)
        size = constants.size_in_bytes(weight)
        held = constants.compact(weight) if weight.op == "call_function" else None
        repeats = held is not None and held.numel() < weight.meta["val"].numel()
        if (readers < 2 and not repeats) or size <= SMALL:
            return 0
        if size > self.budget - spent:
            why = f"is shared by {readers} layers, and storing it once more"
            if readers < 2:
                why = "repeats what it stores, and storing it in full"
            raise Declined(f"{weight.name} {why} would grow the constants past max_growth")
        return size
