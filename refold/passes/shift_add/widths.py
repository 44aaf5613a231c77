"""Chooses the widths of layers: the least damage to the model's outputs within a budget of bytes.

Let ``D(w)`` be how far the model's outputs on the calibration inputs are from its own once each
layer l is coded at the width ``w_l``: the Kullback-Leibler divergence for scores, else the squared
relative error. ``D`` is no sum over layers, but near an allocation w its change is one, but for
products of two layers' changes:

    D(v) - D(w) ~ sum over l of D(w, but l at v_l) - D(w)

Each term is measured where it matters: with the layers before l coded at w, l coded at ``v_l`` for
the inputs that these leave, and the layers after l as they are at w. An integer program finds the v
with the smallest sum. It is coded and measured in turn, and takes the place of w if ``D(v)`` is
smaller; w stands otherwise.

The first w gives all layers the largest width that the budget has for all of them, and to as many
as possible one bit more, in the order of the graph: what the first layers lose passes through all
others. So on the calibration inputs the choice is never worse than that.

Without calibration inputs the loss of a layer is the squared relative error of its weights, and the
sum of these is what the integer program minimises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from refold.calibrate.layers import Layer
from refold.calibrate.lockstep import Compute, Lockstep, divergence, logits
from refold.graph.program import Call
from refold.passes.shift_add.allocate import WidthCost, allocate_bits, require_budget
from refold.passes.shift_add.codes import WIDTHS, Code, Coded, Coder, in_order

_ROUNDS = 2  # allocations that are looked for, each around the one before


def choose_widths(
    gm: fx.GraphModule,
    layers: Sequence[Layer],
    calls: Sequence[Call],
    coder: Coder,
    average_bits: float,
) -> Coded:
    """Codes layers at the widths that cost the outputs least.

    Args:
        gm: the graph module, which stays as it is.
        layers: the layers in the order of the graph.
        calls: inputs to calibrate on.
        coder: how they are coded.
        average_bits: the budget: bits for each weight of the layers that get a code.
    """
    return _Search(gm, layers, calls, coder, average_bits).run()


def budget_of(layers: Sequence[Layer], average_bits: float) -> int:
    """Bytes for the codes of layers."""
    return int(average_bits * sum(layer.weight.numel() for layer in layers) / 8)


_Table = dict[Layer, dict[int, WidthCost]]
_Measured = tuple[Layer, Mapping[int, Code], Callable[[Code], float]]


@dataclass(frozen=True)
class _Point:
    """An allocation that is coded and measured."""

    coded: Coded
    loss: float
    fits: bool

    @property
    def widths(self) -> dict[Layer, int]:
        return {layer: code.bits for layer, code in self.coded.codes.items()}

    def better_than(self, other: _Point) -> bool:
        """More layers have a code; or it fits the budget, the other not; or it costs less."""
        own, others = len(self.coded.codes), len(other.coded.codes)
        return (-own, not self.fits, self.loss) < (-others, not other.fits, other.loss)


class _Search:
    def __init__(
        self,
        gm: fx.GraphModule,
        layers: Sequence[Layer],
        calls: Sequence[Call],
        coder: Coder,
        average_bits: float,
    ) -> None:
        self._gm, self._layers, self._calls, self._coder = gm, layers, calls, coder
        self._average = average_bits
        self._expected: list[list[Any]] = []
        self._scores = logits(gm)
        self._too_far: dict[Layer, Code] = {}

    def run(self) -> Coded:
        first = self._in_order()
        if not self._calls:
            return self._coded(self._allocated(self._by_weights()))
        self._expected = Lockstep(self._gm, self._calls).outputs()
        point = self._point(first)
        for _ in range(_ROUNDS):
            widths = self._allocated(self._around(point))
            if widths == point.widths:
                break
            found = self._point(widths)
            if not found.better_than(point):
                break
            point = found
        return point.coded

    def _in_order(self) -> dict[Layer, int]:
        """The widest for all that fits, and one bit more for the first layers while they fit."""
        sizes = {layer: [self._coder.bytes(layer, w) for w in WIDTHS] for layer in self._layers}
        left = budget_of(self._layers, self._average)
        require_budget(sum(own[0] for own in sizes.values()), left)
        left -= sum(own[0] for own in sizes.values())
        steps = dict.fromkeys(self._layers, 0)
        for step in range(1, len(WIDTHS)):
            for layer, own in sizes.items():
                more = own[step] - own[step - 1]
                if more <= left:
                    steps[layer], left = step, left - more
            if min(steps.values()) < step:
                break
        return {layer: WIDTHS[step] for layer, step in steps.items()}

    # --- what widths cost -------------------------------------------------------------------------

    def _by_weights(self) -> _Table:
        pairs = [(layer, width) for layer in self._layers for width in WIDTHS]
        codes = dict(zip(pairs, self._coder.encode(pairs, None), strict=True))
        return self._table(
            (layer, {w: codes[layer, w] for w in WIDTHS}, lambda code: code.weight_error**2)
            for layer in self._layers
        )

    def _around(self, point: _Point) -> _Table:
        """What each width of each layer changes at a point."""
        self._too_far.clear()
        lockstep = Lockstep(self._gm, self._calls, _instead(point.coded))
        codes = point.coded.codes

        def other_widths(
            layers: Sequence[Layer], hessian: torch.Tensor | None
        ) -> dict[Layer, dict[int, Code]]:
            known = {x: {codes[x].bits: codes[x]} if x in codes else {} for x in layers}
            pairs = [(x, w) for x in layers for w in WIDTHS if w not in known[x]]
            for (layer, width), code in zip(pairs, self._coder.encode(pairs, hessian), strict=True):
                known[layer][width] = code
            return known

        def measured() -> Iterator[_Measured]:
            for layer, found in in_order(lockstep, self._layers, other_widths):

                def change(code: Code, layer: Layer = layer) -> float:
                    if code is codes.get(layer):
                        return 0.0
                    return self._loss(lockstep, {layer.node: code.computing(layer)}) - point.loss

                yield layer, found, change

        return self._table(measured())

    def _table(self, measured: Iterable[_Measured]) -> _Table:
        table: _Table = {}
        for layer, found, loss in measured:
            choices = {
                width: WidthCost(loss(code), code.bytes)
                for width, code in sorted(found.items())
                if code.error <= self._coder.limit
            }
            if choices:
                table[layer] = choices
            else:
                self._too_far[layer] = found[WIDTHS[-1]]
        return table

    def _allocated(self, table: _Table) -> dict[Layer, int]:
        budget = budget_of(list(table), self._average)
        return dict(zip(table, allocate_bits(list(table.values()), budget), strict=True))

    # --- what an allocation costs -----------------------------------------------------------------

    def _point(self, widths: Mapping[Layer, int]) -> _Point:
        coded = self._coded(widths)
        lockstep = Lockstep(self._gm, self._calls, _instead(coded))
        taken = sum(code.bytes for code in coded.codes.values())
        fits = taken <= budget_of(list(coded.codes), self._average)
        return _Point(coded, self._loss(lockstep), fits)

    def _coded(self, widths: Mapping[Layer, int]) -> Coded:
        coded = self._coder.code(self._gm, widths, self._calls)
        return Coded(coded.codes, {**self._too_far, **coded.too_far})

    def _loss(self, lockstep: Lockstep, but: Mapping[fx.Node, Compute] | None = None) -> float:
        return divergence(self._expected, lockstep.outputs(but), self._scores).loss


def _instead(coded: Coded) -> dict[fx.Node, Compute]:
    return {layer.node: code.computing(layer) for layer, code in coded.codes.items()}
