"""Merge linears that read one tensor: queries, keys and values; a gate and what it gates; heads.

    [W_1; W_2] x + [b_1; b_2] = [W_1 x + b_1; W_2 x + b_2]

The rows of one matrix are the rows of all, and its result is cut into theirs (horizontal fusion).
Nothing is computed less: what goes is the calls. So it gains where a call takes about as long as
its product (many narrow layers of few rows), and how much is a matter of the backend: what a call
takes there, and a part of its result, is measured (``tools/measure_costs.py``). Layers are merged
where that saves a tenth of their time. A layer whose own product outweighs its call stays out.

Exact when the weights are constants of one dtype and nothing between the layers writes what they
read. A weight that something else reads too would be stored twice, and stays. Parts are views of
one tensor: what the caller gets keeps its memory and its strides, and whoever needs other strides
than a part has (a ``view``) keeps its layer.

Before::

    %q = linear(%x, @wq, @bq)
    %k = linear(%x, @wk)

After::

    %both = linear(%x, @folded_weight, @folded_bias)
    %parts = split_with_sizes(%both, [Oq, Ok], -1)
    %q = getitem(%parts, 0)
    %k = getitem(%parts, 1)

Where nothing is merged: in OpenVINO merged layers are slower (0.64 to 1.06 times, ``python -m
bench.horizontal_merge``); TensorRT merges products of one input itself (NVIDIA, developer forum,
thread 238187); a file for any ONNX runtime has no costs of its own; convolutions gain where they
are smaller than networks have them, and lose in ONNX Runtime, which keeps channels in blocks.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from refold.algebra.lazy import Lazy
from refold.graph import aliasing, nodes, provenance
from refold.graph.nodes import aten, hints
from refold.graph.records import products
from refold.passes.scale_shift.push.weights import constant_name
from refold.rewrite.context import Context
from refold.rewrite.cost import CostModel, LayerCosts
from refold.rewrite.edit import Edit, Editor
from refold.rewrite.result import Applied, PassResult, applied, declined

_MARGIN = 0.1  # of the layers' time; the rates' own error is no larger
_SHOWN = 6  # names in a line for people; the record has all


@dataclass(frozen=True)
class MergeParallelLayers:
    """Merges linears of one input where the backend gains; see the module docstring.

    Attributes:
        closing: passes that are added to a pipeline run before this one, which leaves them no
            layer that they would know.
    """

    closing: ClassVar[bool] = True
    name: str = "merge-parallel-layers"
    exactness: str = "reassociates"

    def run(self, gm: fx.GraphModule, context: Context = Context()) -> PassResult:
        return _Merger(gm, self.name, context.costs).run()


@dataclass
class _Merger:
    gm: fx.GraphModule
    rule: str
    costs: CostModel
    result: PassResult = field(default_factory=PassResult)

    def __post_init__(self) -> None:
        self.editor = Editor(self.gm, self.rule, self.result)

    def run(self) -> PassResult:
        groups = self._groups()
        reason = self._no_costs(groups)
        if reason is not None:
            self._decline(groups[0][0], f"{_count(groups)} stay apart: {reason}")
            return self.result
        for group in groups:
            with self.editor.candidate(group[0].node):
                self._merge(self._unshared(group))
        self.result.modified = bool(self.result.applied)
        return self.result

    def _groups(self) -> list[list[products.Linear]]:
        """The layers of each tensor that several read."""
        readers: dict[fx.Node, list[products.Linear]] = {}
        for node in self.gm.graph.nodes:
            layer = None if nodes.pinned(node) else products.linear(node)
            if layer is not None:
                readers.setdefault(layer.x, []).append(layer)
        return [group for group in readers.values() if len(group) > 1]

    def _no_costs(self, groups: list[list[products.Linear]]) -> str | None:
        """Why nothing is known of what merging gains, or ``None``."""
        models = [self.costs.at(group[0].node) for group in groups]
        return next((model.apart for model in models if model.layers is None), None)

    def _unshared(self, group: list[products.Linear]) -> list[products.Linear]:
        """Those whose constants nothing else reads."""
        left = []
        for layer in group:
            shared = _shared_constant(layer)
            if shared is None:
                left.append(layer)
            else:
                self._decline(layer, f"{_name(shared)} is read elsewhere too")
        return left

    def _merge(self, group: list[products.Linear]) -> None:
        chosen, before, saved = self._choose(group)
        if len(chosen) < 2:
            return
        refused = self._replace(chosen, before, saved)
        if not refused:
            return
        for layer in chosen:
            if layer.node in refused:
                self._decline(layer, refused[layer.node])
        self._merge([layer for layer in group if layer.node not in refused])

    def _replace(
        self, layers: Sequence[products.Linear], before: float, saved: float
    ) -> dict[fx.Node, str]:
        """Makes layers one; where some of them may not be parts of it, says why, and makes none."""
        with self.editor.edit() as edit:
            parts = self._make(edit, layers)
            together = dict(zip([layer.node for layer in layers], parts, strict=True))
            refused = {
                old: reason
                for old in together
                if (reason := _refusal(edit, old, together)) is not None
            }
            if refused:
                edit.roll_back()
                return refused
            record = self._record(layers, parts, before, saved)
            for old, part in together.items():
                edit.replace(old, part, beside=together)
            edit.remove(together)
        self.result.applied.append(record)
        return {}

    def _choose(self, group: list[products.Linear]) -> tuple[list[products.Linear], float, float]:
        """The layers that gain by being one, what they take now, and what that saves."""
        gains = [(layer, *self._gain(layer)) for layer in group]
        chosen = [found for found in gains if found[2] >= _MARGIN * found[1]]
        before, saved = self._total(chosen)
        if len(chosen) > 1 and saved >= _MARGIN * before:
            return [layer for layer, _, _ in chosen], before, saved
        if len(group) > 1:
            before, saved = self._total(gains)
            reason = (
                f"on {self.costs.name} one layer instead of {len(group)} would save "
                f"{max(saved, 0.0):.1f} of {before:.1f} us: no tenth, of some of them neither"
            )
            self._decline(group[0], reason)
        return [], 0.0, 0.0

    def _gain(self, layer: products.Linear) -> tuple[float, float]:
        """What a layer takes, and what that is less as a part of a larger one."""
        costs = self._layers
        call = costs.call + (costs.bias if layer.bias is not None else 0.0)
        return call + self._product(layer), call - costs.part - self._copy(layer)

    def _total(self, gains: list[tuple[products.Linear, float, float]]) -> tuple[float, float]:
        """What layers take, and what one instead of them saves: its own call is not saved."""
        costs = self._layers
        biased = any(layer.bias is not None for layer, _, _ in gains)
        own = costs.call + (costs.bias if biased else 0.0)
        return sum(found[1] for found in gains), sum(found[2] for found in gains) - own

    @property
    def _layers(self) -> LayerCosts:
        assert self.costs.layers is not None
        return self.costs.layers

    @property
    def _launch(self) -> float:
        assert self.costs.rates is not None
        return self.costs.rates.launch

    def _product(self, layer: products.Linear) -> float:
        """Microseconds of the product alone."""
        return self.costs.of(layer.node).total - self._launch

    def _copy(self, layer: products.Linear) -> float:
        """Microseconds of copying a part: a backend cuts it out, or a reader packs it."""
        value = layer.node.meta["val"]
        copied = self.costs.elementwise(hints(layer.node), 1, value.element_size())
        return copied.total - self._launch

    def _make(self, edit: Edit, layers: Sequence[products.Linear]) -> list[fx.Node]:
        """Makes constants, the merged layer and its cut; returns a part for each layer."""
        old = [layer.node for layer in layers]
        sizes = [layer.weight.shape[0] for layer in layers]
        like = layers[0].node.meta["val"]
        with edit.before(min(old)):
            name = f"{layers[0].node.name}_to_{layers[-1].node.name}"
            operands = [edit.constant(f"{name}.weight", _stacked_weights(layers), like)]
            if any(layer.bias is not None for layer in layers):
                operands.append(edit.constant(f"{name}.bias", _stacked_biases(layers), like))
            merged = edit.call(aten.linear.default, (layers[0].x, *operands), sources=old)
            cut = edit.call(aten.split_with_sizes.default, (merged, sizes, -1), sources=old)
            for node in (merged, cut):
                provenance.derive(node, old, self.rule, value=None)
            return [
                edit.call(operator.getitem, (cut, i), sources=[node]) for i, node in enumerate(old)
            ]

    def _record(
        self, layers: Sequence[products.Linear], parts: list[fx.Node], before: float, saved: float
    ) -> Applied:
        old = [layer.node for layer in layers]
        names = [provenance.module_path(node) or node.name for node in old]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        shown = ", ".join(names[:_SHOWN]) + more
        detail = f"{len(old)} layers of {layers[0].x.name} are one: {shown}"
        record = applied(self.rule, old, parts, detail)
        figures = {"predicted us before": before, "predicted us after": before - saved}
        return Applied(**{**vars(record), "figures": figures})

    def _decline(self, layer: products.Linear, reason: str) -> None:
        self.result.declined.append(declined(self.rule, layer.node, reason))


def _count(groups: list[list[products.Linear]]) -> str:
    layers = sum(map(len, groups))
    tensors = "one tensor" if len(groups) == 1 else f"{len(groups)} tensors"
    return f"{layers} layers that read {tensors}"


def _name(constant: fx.Node) -> str:
    return constant_name(constant) if constant.op == "get_attr" else constant.name


def _shared_constant(layer: products.Linear) -> fx.Node | None:
    """A constant behind a layer that something else reads too."""
    stack = [n for n in layer.node.all_input_nodes if n is not layer.x]
    while stack:
        node = stack.pop()
        if len(node.users) > 1:
            return node
        stack.extend(node.all_input_nodes)
    return None


def _stacked_weights(layers: Sequence[products.Linear]) -> Lazy:
    weights = [layer.weight for layer in layers]
    size = (sum(w.shape[0] for w in weights), weights[0].shape[1])
    return Lazy(
        size,
        lambda: torch.cat([w.get() for w in weights]),
        fresh=True,
        parents=weights,
        channels_last=all(w.channels_last for w in weights),
    )


def _stacked_biases(layers: Sequence[products.Linear]) -> Lazy:
    """The biases one behind the other; zeros for a layer without."""
    biases = [
        layer.bias or Lazy.of(torch.zeros(layer.weight.shape[0], dtype=torch.float64))
        for layer in layers
    ]
    size = (sum(b.shape[0] for b in biases),)
    return Lazy(size, lambda: torch.cat([b.get() for b in biases]), fresh=True, parents=biases)


def _refusal(edit: Edit, old: fx.Node, parts: Mapping[fx.Node, fx.Node]) -> str | None:
    """Why a part may not take the place of a layer's result, all parts being in place."""
    if aliasing.reached_outputs(old):
        return "the caller gets its result, in memory of its own"
    return edit.objection(old, parts[old], beside=parts)
