"""What every pass shares that puts something else in the place of dense layers, one by one.

A pass says what becomes of one layer; which layers those are, the calibration inputs, the order,
the rewrite, and what it is judged by, are here::

    @dataclass(frozen=True)
    class RoundWeights:
        name: str = "round-weights"
        exactness: str = "approximate"
        bits: int = 8
        include: str | Sequence[str] = ()
        exclude: str | Sequence[str] = ()
        calibration: Iterable[Any] = field(default=(), repr=False)

        def run(self, gm, context=Context()):
            return approximate.layers(
                gm, self.name, self._rounded,
                include=self.include, exclude=self.exclude, calibration=self.calibration,
            )

        def _rounded(self, layer, inputs):
            weight = layer.weight.evaluate()
            step = weight.abs().amax(1, keepdim=True) / (2 ** (self.bits - 1) - 1)
            rounded = (weight / step).round() * step
            error = approximate.error(layer, rounded, inputs)
            return Replacement(rounded, columns={"bits": str(self.bits), "error": f"{error:.1e}"})

The graph before it is verified against the original, what comes after it against its result, and
the report has a row for each layer, with the columns that the pass names, and how far the outputs
of the model are apart on inputs that were held out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx

from refold.calibrate.inputs import read_and_hold_out
from refold.calibrate.layers import Layer, linear, other_readers
from refold.calibrate.lockstep import Lockstep
from refold.errors import Declined
from refold.graph import constants
from refold.graph.copies import copy_sharing_tensors
from refold.graph.nodes import aten, pinned
from refold.graph.program import Call
from refold.rewrite.edit import Edit, Editor
from refold.rewrite.result import (
    Applied,
    Approximation,
    PassResult,
    StoredCode,
    applied,
    declined,
)
from refold.rewrite.selection import matching

Run = Callable[..., fx.Node]  # writes a call of an operator
Product = Callable[[fx.Node], fx.Node]  # writes what stands for a product with the weight


@dataclass(frozen=True)
class Replacement:
    """What becomes of a layer.

    Attributes:
        weight: the matrix ``[N, K]`` that the layer multiplies by from now on; later layers are
            calibrated on what it gives.
        columns: what the report's table says of it, by heading.
        detail: the same for people, in a line.
        figures: the same as numbers.
        product: writes it, where that is not a product with ``weight``: given the edit and what
            calls operators it makes its constants, and returns what writes the product of a node.
    """

    weight: torch.Tensor
    columns: Mapping[str, str] = field(default_factory=dict)
    detail: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    product: Callable[[Edit, Run], Product] | None = None


Replace = Callable[[Layer, Sequence[torch.Tensor]], Replacement]


def layers(
    gm: fx.GraphModule,
    rule: str,
    replace: Replace,
    *,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    calibration: Iterable[Any] = (),
) -> PassResult:
    """Replaces dense layers in the order of the graph; see the module docstring.

    Args:
        gm: the graph module, changed in place.
        rule: id of the pass.
        replace: what becomes of a layer, or raises why it stays. It gets the layer, and for each
            calibration input what its weight multiplies, after the layers before it are replaced.
        include: globs of module paths; only these layers are replaced.
        exclude: globs of module paths that stay as they are.
        calibration: inputs of the model.
    """
    result = PassResult()
    candidates = []
    for node in allowed(gm, rule, include, exclude):
        try:
            layer = linear(node)
            if layer is not None:
                check_unshared(layer)
                candidates.append(layer)
        except Declined as reason:
            result.declined.append(declined(rule, node, reason))
    if not candidates:
        return result
    constants.materialise_all(gm, forget=False)
    calls, held_out = read_and_hold_out(gm, calibration, rule)
    before = copy_sharing_tensors(gm)
    chosen = _in_order(gm, rule, candidates, replace, calls, result)
    editor = Editor(gm, rule, result)
    for layer in reversed(chosen):  # what reads a layer says whether its strides count
        with editor.candidate(layer.node):
            result.applied.append(_written(editor, layer, chosen[layer]))
    result.applied.reverse()
    finish(gm, before, result, calls, held_out)
    return result


def _in_order(
    gm: fx.GraphModule,
    rule: str,
    candidates: Sequence[Layer],
    replace: Replace,
    calls: Sequence[Call],
    result: PassResult,
) -> dict[Layer, Replacement]:
    """What becomes of each layer, on what those before it leave."""
    lockstep, chosen = Lockstep(gm, calls), dict[Layer, Replacement]()
    for layer in candidates:
        inputs: list[torch.Tensor] = []
        if calls:
            lockstep.advance(layer.node)
            inputs = [layer.columns(x) for x in lockstep.values(layer.x)]
        try:
            found = replace(layer, inputs)
            if not bool(found.weight.isfinite().all()):
                raise Declined("what it would multiply by is not finite")
        except Declined as reason:
            result.declined.append(declined(rule, layer.node, reason))
            continue
        chosen[layer] = found
        weight = found.weight.to(constants.tensor(layer.attribute))
        lockstep.instead[layer.node] = layer.computing(partial(torch.Tensor.detach, weight))
    return chosen


def allowed(
    gm: fx.GraphModule, rule: str, include: str | Sequence[str], exclude: str | Sequence[str]
) -> Iterator[fx.Node]:
    """The nodes that a user lets an approximate pass replace.

    Raises:
        UsageError: a glob matches no module.
    """
    included = matching(gm, include, f"{rule}: include")
    excluded = matching(gm, exclude, f"{rule}: exclude")
    for node in gm.graph.nodes:
        if not (pinned(node) or node in excluded or (include and node not in included)):
            yield node


def check_unshared(layer: Layer) -> None:
    """Refuses a layer whose weight something else reads, too."""
    others = other_readers(layer)
    if not others:
        return
    raise Declined(
        f"its weight is shared with {', '.join(n.name for n in others)}",
        hint="a shared weight would be stored twice: untie it first",
    )


def error(layer: Layer, weight: torch.Tensor, inputs: Sequence[torch.Tensor]) -> float:
    """How far a layer with another weight is off: its outputs on the inputs, relative L2.

    Without inputs, how far the weight is.
    """
    own = layer.weight.evaluate()
    wrong = weight.to(own) - own
    if not inputs:
        return float(wrong.norm() / own.norm().clamp_min(1e-300))
    rows = [x.detach().reshape(-1, x.shape[-1]).to(own) for x in inputs]
    apart = sum(float((x @ wrong.T).square().sum()) for x in rows)
    whole = sum(float((x @ own.T).square().sum()) for x in rows)
    return float((apart / max(whole, 1e-300)) ** 0.5)


# --- writing --------------------------------------------------------------------------------------


def write(
    editor: Editor, layer: Layer, product: Callable[[Edit, Run], Product], detail: str
) -> Applied:
    """Writes something else in a layer's place, as one edit, and returns its record."""
    node = layer.node
    added: list[fx.Node] = []
    with editor.edit() as edit:

        def run(target: Any, *args: Any) -> fx.Node:
            added.append(edit.call(target, args, sources=[node]))
            return added[-1]

        with edit.before(node):
            layer.around(run, layer.x, product(edit, run))
            if edit.objection(node, added[-1]) is not None:  # a convolution's strides count
                run(aten.contiguous.default, added[-1])
        edit.replace(node, added[-1])
        record = applied(edit.rule, [node], added, detail)
        edit.sweep([node])
    return record


def bias(edit: Edit, layer: Layer) -> fx.Node | None:
    """The bias of a layer as a node: the stored one, or a constant of what it computes."""
    if layer.bias_node is not None or layer.bias is None:
        return layer.bias_node
    return edit.constant(f"{layer.label}_bias", layer.bias, constants.tensor(layer.attribute))


def _written(editor: Editor, layer: Layer, found: Replacement) -> Applied:
    stored = constants.tensor(layer.attribute)

    def dense(edit: Edit, run: Run) -> Product:
        weight = edit.constant(f"{layer.label}_weight", found.weight.to(stored))
        own = bias(edit, layer)
        return lambda x: run(aten.linear.default, x, weight, own)

    record = write(editor, layer, found.product or dense, found.detail)
    return dataclasses.replace(record, columns=found.columns, figures=found.figures)


def finish(
    gm: fx.GraphModule,
    before: fx.GraphModule,
    result: PassResult,
    calls: Sequence[Call],
    held_out: Sequence[Call],
    codes: Sequence[StoredCode] = (),
) -> None:
    """Closes a pass: makes the graph run, and states what it is judged by.

    Args:
        gm: the graph as the pass left it.
        before: a copy of what it was before.
        result: of the pass.
        calls: the calibration inputs.
        held_out: those that it did not look at.
        codes: what it stores for weights, where that is to be decoded and judged apart.
    """
    result.modified = bool(result.applied)
    if not result.modified:
        return
    constants.materialise_all(gm, forget=False)
    gm.graph.lint()
    gm.recompile()
    after = copy_sharing_tensors(gm)
    result.approximation = Approximation(
        before, after, held_out=held_out, codes=codes, calibration=calls
    )
