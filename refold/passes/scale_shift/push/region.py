"""One scale-shift that is to be pushed, and what holds for every path that it may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from refold.errors import Declined
from refold.graph import constants, layout, nodes
from refold.graph.records import scale_shifts
from refold.passes.scale_shift.push.factor import Factor
from refold.rewrite.cost import CostModel

LONGEST = 80  # calls on a path; a plan takes some frames of Python's stack for each
SMALL = 1 << 13  # bytes below which un-sharing a weight is never refused


Copies = dict[int, fx.Node]


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
        folded: the constants of layers that took what they had in common, by what that was: where
            one layer is applied often, one copy serves all.
    """

    graph: fx.Graph
    record: scale_shifts.Affine
    factor: Factor
    escapes: bool
    budget: float
    costs: CostModel
    border_maps: bool
    folded: dict[Any, Copies]

    @classmethod
    def of(
        cls, graph: fx.Graph, record: scale_shifts.Affine, factor: Factor, budget: float,
        costs: CostModel, *, border_maps: bool, folded: dict[Any, Copies],
    ) -> Region:  # fmt: skip
        escapes = layout.escapes(record.node)
        return cls(graph, record, factor, escapes, budget, costs, border_maps, folded)

    @property
    def ends(self) -> tuple[fx.Node, fx.Node]:
        """The calls that the scale-shift is: one, or the tuple form of a norm and its first."""
        return self.record.node, self.record.reader

    @property
    def widens(self) -> bool:
        """True if the scale-shift casts integers, too."""
        return nodes.dtype(self.record.x) != nodes.dtype(self.record.node)

    def copies(self, layer: fx.Node, factor: Factor) -> Copies:
        """What other calls of one layer read since they took the same part of a scale and shift.

        By the position of the argument; what this call makes of it belongs there, too.
        """
        pair = self._pair(layer)
        return {} if pair is None else self.folded.setdefault((pair, factor.shifts), {})

    def _pair(self, layer: fx.Node) -> Any:
        """The layer and the scale-shift beside it, but for the data; ``None`` at a distance."""
        if self.record.x is layer:
            return "up", _call(layer, layer.args[0]), _call(self.record.reader, layer)
        if layer.args and layer.args[0] is self.record.node:
            return "down", _call(layer, layer.args[0]), _call(self.record.reader, self.record.x)
        return None

    def _all_take_it(self, weight: fx.Node, layer: fx.Node) -> bool:
        """True if all calls of a layer have the same scale-shift beside them."""
        pair = self._pair(layer)
        return pair is not None and all(
            pair[1:] == found for user in weight.users for found in _pairs(user, pair[0])
        )

    def growth(
        self, weight: fx.Node, factor: Factor, spent: float, layer: fx.Node | None = None
    ) -> int:
        """Bytes that another copy of a weight adds, after a plan spent some already.

        None where one copy serves all calls of a ``layer``, which shares its copies.

        Raises:
            Declined: they are more than may be added.
        """
        readers = len(weight.users)
        size = constants.size_in_bytes(weight)
        held = constants.compact(weight) if weight.op == "call_function" else None
        repeats = held is not None and held.numel() < weight.meta["val"].numel()
        if (readers < 2 and not repeats) or size <= SMALL:
            return 0
        shares = layer is not None and not repeats
        if shares and (self.copies(layer, factor) or self._all_take_it(weight, layer)):  # type: ignore[arg-type]
            return 0
        if size > self.budget - spent:
            why = f"is shared by {readers} layers, and storing it once more"
            if readers < 2:
                why = "repeats what it stores, and storing it in full"
            raise Declined(f"{weight.name} {why} would grow the constants past max_growth")
        return size


def _pairs(layer: fx.Node, way: str) -> list[Any]:
    """The call beside a layer as :meth:`Region._pair` has it; several readers are as many."""
    data = layer.args[0] if layer.op == "call_function" and layer.args else None
    if not isinstance(data, fx.Node):
        return [None]
    own = _call(layer, data)
    if way == "up":
        return [(own, _call(user, layer)) for user in layer.users]
    read = [n for n in data.all_input_nodes if n.op != "get_attr"]
    return [(own, _call(data, read[0]))] if len(read) == 1 else [None]


def _call(node: fx.Node, data: Any) -> Any:
    return nodes.but_for(node, {data: "data"})
