"""Replaces the weights of dense layers by sums of scaled signs: shifts and additions.

Every group of a weight's row becomes q signs for each entry and at most q scales,

    W ~ alpha_1 b_1 + ... + alpha_q b_q,   b_i in {-1, +1},

so a product is q signed sums of the inputs and q multiplications for each group, by powers of two
where the scales are. A weight takes q bits for each entry and 16 for each scale. Nothing is
trained.

Before::

    y = linear(x, weight, bias)                     # weight [N, K]

After::

    y = bcq_linear(x, planes, alpha, bias, gs)      # planes [q, N, K / 8], alpha [q, N, K / gs]

Without ``calibration`` each group is as near to its weights as its scales can make it. With it, the
layers are quantised in the order of the graph, on the inputs that the layers before them leave once
they are quantised, and the columns of a weight make up for each other's errors, so that its outputs
are near (see :mod:`refold.algebra.compensation`). A convolution, where asked for, is the same
product over its windows.

The pass is approximate and never runs unless asked for by name. The model before it is verified
against the original, what comes after it against its result, and the report says how far the two
are apart. You et al., ShiftAddLLM (2024), arXiv:2406.05981.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import fx

from refold.algebra.binary_coding import Family
from refold.calibrate import approximate, inputs
from refold.calibrate import layers as dense_layers
from refold.calibrate.layers import Layer
from refold.errors import Declined, UsageError
from refold.graph import constants
from refold.graph.copies import copy_sharing_tensors
from refold.graph.ops import op_name
from refold.graph.program import Call
from refold.graph.records import convolutions
from refold.passes.shift_add.codes import WIDTHS, Code, Coder
from refold.passes.shift_add.widths import budget_of, choose_widths
from refold.rewrite.context import Context
from refold.rewrite.edit import Edit, Editor
from refold.rewrite.result import Applied, PassResult, StoredCode, declined, in_bytes


@dataclass(frozen=True)
class SubstituteShiftAdd:
    """Replaces the weights of linear layers, and of convolutions where asked, by binary codes.

    Attributes:
        bits: signs for each weight, 2, 3 or 4; ``auto`` chooses for each layer by the measured loss
            of each width, with ``average_bits`` as its budget.
        average_bits: for ``auto``: bits for each weight on average, scales included.
        group_size: columns that share scales.
        scales: ``uniform`` (an even grid without a zero, which every runtime has), ``bcq`` (any
            scales: the smallest error), ``apot3`` (sums of three powers of two) or ``pot`` (an even
            grid whose step is a power of two).
        calibration: inputs of the model, as :func:`refold.compile_for_inference` takes them. Of
            eight or more, every eighth is held out, and the report's divergence is measured on it.
        include: globs of module paths; only these layers are replaced, small ones and the last too.
        exclude: globs of module paths that stay as they are.
        convolutions: replace convolutions of one group as well.
        min_features: layers with fewer inputs stay.
        max_layer_error: the error of a layer's outputs on the calibration inputs (without them: of
            its weights), relative to their norm; past it more bits are taken, and past it at 4 bits
            the layer stays.
        damping: what the calibration inputs leave undetermined costs this share of the mean.
        rounds: rounds of alternation between signs and scales.
        jobs: processes, as ``joblib`` counts them (-1: all cores); a surrounding
            ``joblib.parallel_config(...)`` chooses the backend, such as a cluster. The result does
            not depend on it.
    """

    name: str = "substitute-shift-add"
    bits: int | Literal["auto"] = 3
    average_bits: float | None = None
    group_size: int = 128
    scales: Family = "uniform"
    calibration: Iterable[Any] = field(default=(), repr=False)
    include: str | Sequence[str] = ()
    exclude: str | Sequence[str] = ()
    convolutions: bool = False
    min_features: int = 256
    max_layer_error: float = math.inf
    damping: float = 0.01
    rounds: int = 15
    jobs: int = 1

    def __post_init__(self) -> None:
        self._require(self.bits in (*WIDTHS, "auto"), "bits", "2, 3, 4 or 'auto'")
        self._require(self.scales in get_args(Family), "scales", ", ".join(get_args(Family)))
        size = self.group_size
        self._require(size >= 16 and size % 8 == 0, "group_size", "a multiple of 8 from 16 on")
        self._require(self.damping > 0, "damping", "more than 0")
        self._require(self.rounds >= 1, "rounds", "1 or more")
        self._require(self.jobs != 0, "jobs", "a number of processes, or -1 for all cores")
        self._require(self.max_layer_error > 0, "max_layer_error", "more than 0")
        if (self.bits == "auto") != (self.average_bits is not None):
            raise UsageError(f"{self.name}: bits='auto' and average_bits=2.5 belong together")
        object.__setattr__(self, "calibration", inputs.given(self.calibration, self.name))

    def _require(self, holds: bool, option: str, expected: str) -> None:
        if not holds:
            raise UsageError(
                f"{self.name}: {option} is {getattr(self, option)!r}, expected {expected}"
            )

    @property
    def exactness(self) -> str:
        return "approximate"

    def run(self, gm: fx.GraphModule, context: Context = Context()) -> PassResult:
        result = PassResult()
        layers = self._layers(gm, result)
        if not layers:
            return result
        constants.materialise_all(gm, forget=False)
        calls, held_out = inputs.read_and_hold_out(gm, self.calibration, self.name)
        before = copy_sharing_tensors(gm)
        editor = Editor(gm, self.name, result)
        coded = self._coded(gm, layers, calls, result)
        stored: list[StoredCode] = []
        for layer in reversed(coded):  # what reads a layer says whether its strides count
            with editor.candidate(layer.node):
                stored.append(self._emit(editor, layer, coded[layer]))
        result.applied.reverse()
        approximate.finish(gm, before, result, calls, held_out, stored[::-1])
        if result.modified:
            result.notes.append(_summary(result))
        return result

    # --- which layers ---------------------------------------------------------------------------

    def _layers(self, gm: fx.GraphModule, result: PassResult) -> list[Layer]:
        found = []
        for node in approximate.allowed(gm, self.name, self.include, self.exclude):
            if op_name(node) == "embedding":
                reason = "an embedding is looked up, not multiplied"
                result.declined.append(declined(self.name, node, reason))
            try:
                layer = dense_layers.linear(node) or self._convolution(node)
                if layer is not None:
                    self._check(layer)
                    found.append(layer)
            except Declined as reason:
                result.declined.append(declined(self.name, node, reason))
        return found

    def _convolution(self, node: fx.Node) -> Layer | None:
        if self.convolutions:
            return dense_layers.convolution(node)
        if self.include and convolutions.conv(node) is not None:
            raise Declined("a convolution stays unless asked for", hint="set convolutions=True")
        return None

    def _check(self, layer: Layer) -> None:
        """Raises why a layer stays, if it does."""
        features = layer.weight.shape[1]
        approximate.check_unshared(layer)
        if not self.include and features < self.min_features:
            raise Declined(
                f"{features} inputs are fewer than min_features={self.min_features}",
                hint="lower min_features, or name the layer in include",
            )
        if not self.include and dense_layers.returned(layer.node):
            raise Declined(
                "its output is the model's own: no later layer makes up for its error",
                hint="name the layer in include",
            )
        smallest = self._coder.bytes(layer, WIDTHS[0] if self.bits == "auto" else int(self.bits))
        if smallest >= layer.bytes:
            raise Declined(f"its code would take {smallest} bytes, its weight {layer.bytes}")

    # --- codes ----------------------------------------------------------------------------------

    def _coded(
        self, gm: fx.GraphModule, layers: Sequence[Layer], calls: Sequence[Call], result: PassResult
    ) -> dict[Layer, Code]:
        """The codes of the layers that get one, at the width asked for or chosen."""
        if self.bits == "auto":
            assert self.average_bits is not None
            coded = choose_widths(gm, layers, calls, self._coder, self.average_bits)
            result.notes.append(self._spent(coded.codes))
        else:
            widths = dict.fromkeys(layers, int(self.bits))
            coded = self._coder.code(gm, widths, calls, raising=True)
        for layer, code in coded.too_far.items():
            reason = (
                f"its relative error at {code.bits} bits is {code.error:.1e}, past max_layer_error="
                f"{self.max_layer_error:g}"
            )
            hint = "raise max_layer_error, take smaller groups, or give calibration inputs"
            result.declined.append(declined(self.name, layer.node, reason, hint))
        return coded.codes

    def _spent(self, codes: Mapping[Layer, Code]) -> str:
        assert self.average_bits is not None
        chosen = [code.bits for code in codes.values()]
        counts = ", ".join(f"{chosen.count(width)} of {width} bits" for width in WIDTHS)
        taken = sum(code.bytes for code in codes.values())
        budget = budget_of(list(codes), self.average_bits)
        return f"{self.name}: {counts}; {taken} of {budget} bytes, scales included"

    @property
    def _coder(self) -> Coder:
        return Coder(
            self.group_size, self.scales, self.rounds, self.damping, self.jobs,
            self.max_layer_error,
        )  # fmt: skip

    # --- rewriting ------------------------------------------------------------------------------

    def _emit(self, editor: Editor, layer: Layer, code: Code) -> StoredCode:
        stored = constants.tensor(layer.attribute)
        op = torch.ops.refold.bcq_linear.default
        reader: list[fx.Node] = []

        def product(edit: Edit, run: approximate.Run) -> approximate.Product:
            planes = edit.constant(f"{layer.label}_planes", code.planes.to(stored.device))
            alpha = edit.constant(f"{layer.label}_alpha", code.alpha.to(stored.device))
            bias = approximate.bias(edit, layer)

            def multiply(v: fx.Node) -> fx.Node:
                reader.append(run(op, v, planes, alpha, bias, self.group_size))
                return reader[-1]

            return multiply

        record = approximate.write(editor, layer, product, self._detail(layer, code))
        editor.result.applied.append(self._measured(record, layer, code))
        return StoredCode(
            reader[-1].name, layer.weight, code.weight_error, code.output_error,
            self.scales == "pot", self.max_layer_error,
        )  # fmt: skip

    def _detail(self, layer: Layer, code: Code) -> str:
        raised = f" (raised from {code.raised_from})" if code.raised_from else ""
        error = f", output error {code.output_error:.1e}" if code.calibrated else ""
        return (
            f"{code.bits} bits{raised}, {self.scales} scales of {self.group_size}: "
            f"{layer.bytes} -> {code.bytes} bytes, weight error {code.weight_error:.1e}{error}"
        )

    def _measured(self, record: Applied, layer: Layer, code: Code) -> Applied:
        """A record with the figures of a code."""
        figures = {
            "bits": code.bits,
            "bits_asked": code.raised_from or code.bits,
            "group_size": self.group_size,
            "bytes_before": layer.bytes,
            "bytes_after": code.bytes,
            "weight_error": code.weight_error,
        }
        if code.calibrated:
            figures["output_error"] = code.output_error
        labels = {
            "family": self.scales,
            "scales_dtype": str(code.alpha.dtype).removeprefix("torch."),
            "exactness": "bit-exact planes",
        }
        columns = {
            "bits": str(code.bits),
            "scales": f"{self.scales} / {self.group_size}",
            "bytes": f"{in_bytes(layer.bytes)} -> {in_bytes(code.bytes)}",
            "weights": f"{code.weight_error:.1e}",
        }
        if code.calibrated:
            columns["outputs"] = f"{code.output_error:.1e}"
        return dataclasses.replace(record, figures=figures, labels=labels, columns=columns)


# --- what is said ---------------------------------------------------------------------------------


def _summary(result: PassResult) -> str:
    figures = [a.figures for a in result.applied]
    before = sum(f["bytes_before"] for f in figures)
    after = sum(f["bytes_after"] for f in figures)
    raised = sum(f["bits"] > f["bits_asked"] for f in figures)
    single = sum(a.labels["scales_dtype"] == "float32" for a in result.applied)
    text = (
        f"{len(figures)} weights as binary codes: {before:.0f} -> {after:.0f} bytes "
        f"({before / after:.1f}x)"
    )
    if raised:
        text += f"; {raised} took more bits than asked for"
    if single:
        text += f"; {single} have float32 scales, their weights do not suit float16"
    return text
