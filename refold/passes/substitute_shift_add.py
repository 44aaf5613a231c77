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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import fx
from torch.utils import _pytree as pytree

from refold.algebra import compensation
from refold.algebra.binary_coding import BinaryCode, Family, encode
from refold.algebra.compensation import Factor, Hessian, encode_compensated, output_error
from refold.algebra.lazy import Lazy
from refold.errors import MissingDependencyError, UsageError
from refold.graph import constants, records
from refold.graph.kinds import LAYOUT, op_name
from refold.graph.nodes import arguments, aten, call, dtype, is_output, pinned, replace, shape
from refold.inputs import Call, as_call
from refold.ops.bcq_linear import dequantise, pack
from refold.rewrite.allocate_bits import Choice, allocate_bits
from refold.rewrite.calibration import Lockstep, divergence, logits
from refold.rewrite.pipeline import copy_sharing_tensors, matching
from refold.rewrite.result import PassResult, Substitution, applied, declined

WIDTHS = (2, 3, 4)

_ROWS = 1024  # rows of a weight that are one job
_HELD_OUT = 8  # one of so many calibration inputs is held out
_HALF = (2.0**-10, 2.0**14)  # largest entries of a row whose scales float16 holds, with room below


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
        if isinstance(self.calibration, (torch.Tensor, dict)):
            raise UsageError(f"{self.name}: calibration takes a list of inputs: calibration=[x]")
        object.__setattr__(self, "calibration", tuple(self.calibration))  # iterators end

    def _require(self, holds: bool, option: str, expected: str) -> None:
        if not holds:
            raise UsageError(
                f"{self.name}: {option} is {getattr(self, option)!r}, expected {expected}"
            )

    @property
    def exactness(self) -> str:
        return "approximate"

    def run(self, gm: fx.GraphModule) -> PassResult:
        result = PassResult()
        layers = self._layers(gm, result)
        if not layers:
            return result
        constants.materialise_all(gm, forget=False)
        calls, held_out = self._calls(gm, result)
        before = copy_sharing_tensors(gm)
        widths = self._widths(gm, layers, calls, result)
        coded = list(self._code(gm, layers, widths, calls, result))
        replaced: dict[fx.Node, fx.Node] = {}
        for layer, code in coded:
            x = replaced.get(layer.x, layer.x)
            replaced[layer.node] = self._emit(gm, layer, x, code, result)
        result.modified = bool(result.applied)
        if result.modified:
            gm.graph.eliminate_dead_code()
            constants.materialise_all(gm, forget=False)
            gm.graph.lint()
            gm.recompile()
            result.substitution = Substitution(before, copy_sharing_tensors(gm), held_out)
            result.notes.append(_summary(result))
        return result

    # --- which layers ---------------------------------------------------------------------------

    def _layers(self, gm: fx.GraphModule, result: PassResult) -> list[_Layer]:
        included = matching(gm, self.include, f"{self.name}: include")
        excluded = matching(gm, self.exclude, f"{self.name}: exclude")
        found = []
        for node in gm.graph.nodes:
            if pinned(node) or node in excluded or (self.include and node not in included):
                continue
            if op_name(node) == "embedding":
                reason = "an embedding is looked up, not multiplied"
                result.declined.append(declined(self.name, node, reason))
            layer = _linear(node) or self._convolution(node)
            refusal = layer if isinstance(layer, _Refusal) else layer and self._refuse(layer)
            if isinstance(layer, _Layer) and refusal is None:
                found.append(layer)
            elif isinstance(refusal, _Refusal):
                result.declined.append(declined(self.name, node, refusal.reason, refusal.hint))
        return found

    def _convolution(self, node: fx.Node) -> _Layer | _Refusal | None:
        if self.convolutions:
            return _convolution(node)
        if self.include and records.conv(node) is not None:
            return _Refusal("a convolution stays unless asked for", "set convolutions=True")
        return None

    def _refuse(self, layer: _Layer) -> _Refusal | None:
        rows, features = layer.weight.shape
        others = _other_readers(layer)
        if others:
            return _Refusal(
                f"its weight is shared with {', '.join(n.name for n in others)}",
                "a shared weight would be stored twice: untie it first",
            )
        if not self.include and features < self.min_features:
            return _Refusal(
                f"{features} inputs are fewer than min_features={self.min_features}",
                "lower min_features, or name the layer in include",
            )
        if not self.include and _returned(layer.node):
            return _Refusal(
                "its output is the model's own: errors of a head are not made up for",
                "name the layer in include",
            )
        smallest = _coded_bytes(rows, features, self._least(), self.group_size, self.scales, 2)
        if smallest >= layer.bytes:
            return _Refusal(f"its code would take {smallest} bytes, its weight {layer.bytes}")
        return None

    def _least(self) -> int:
        return WIDTHS[0] if self.bits == "auto" else int(self.bits)

    def _calls(self, gm: fx.GraphModule, result: PassResult) -> tuple[list[Call], list[Call]]:
        calls = [as_call(example) for example in self.calibration]
        info = getattr(gm.graph._codegen, "pytree_info", None)
        for given in calls:
            structure = pytree.tree_structure(given)
            if info is not None and structure != info.in_spec:
                raise UsageError(
                    f"{self.name}: a calibration input is given as {structure}, the model was "
                    f"traced with {info.in_spec}: give both alike"
                )
        if calls and any(n.op == "get_attr" for n in constants.written(gm.graph)):
            raise UsageError(
                f"{self.name}: the model writes its own state, so it cannot be calibrated: leave "
                "calibration out"
            )
        held_out = calls[_HELD_OUT - 1 :: _HELD_OUT]
        kept = [c for at, c in enumerate(calls) if at % _HELD_OUT != _HELD_OUT - 1]
        return kept, held_out

    # --- widths ---------------------------------------------------------------------------------

    def _widths(
        self,
        gm: fx.GraphModule,
        layers: Sequence[_Layer],
        calls: Sequence[Call],
        result: PassResult,
    ) -> dict[_Layer, int]:
        if self.bits != "auto":
            return dict.fromkeys(layers, int(self.bits))
        assert self.average_bits is not None
        table: dict[_Layer, dict[int, Choice]] = {}
        for layer, choices in self._losses(gm, layers, calls, result):
            if choices:
                table[layer] = choices
        weights = sum(layer.weight.numel() for layer in table)
        budget = int(self.average_bits * weights / 8)
        chosen = dict(zip(table, allocate_bits(list(table.values()), budget), strict=True))
        taken = sum(table[layer][width].bytes for layer, width in chosen.items())
        counts = ", ".join(f"{list(chosen.values()).count(w)} of {w} bits" for w in WIDTHS)
        result.notes.append(f"{self.name}: {counts}; {taken} of {budget} bytes, scales included")
        return chosen

    def _losses(
        self,
        gm: fx.GraphModule,
        layers: Sequence[_Layer],
        calls: Sequence[Call],
        result: PassResult,
    ) -> Iterator[tuple[_Layer, dict[int, Choice]]]:
        """What each width of each layer costs, every other layer being as it was."""
        wanted = [(layer, width) for layer in layers for width in WIDTHS]
        if not calls:
            coded = dict(zip(wanted, self._encode(wanted, None), strict=True))
            for layer in layers:
                found = {w: coded[layer, w] for w in WIDTHS}
                yield layer, self._choices(layer, found, lambda c: c.weight_error**2, result)
            return
        lockstep, scores = Lockstep(gm, calls), logits(gm)
        expected = lockstep.outputs()
        ready: dict[tuple[_Layer, int], _Code] = {}
        for at, layer in enumerate(layers):
            lockstep.advance(layer.node)
            if (layer, WIDTHS[0]) not in ready:
                group = [other for other in layers[at:] if other.same_input(layer)]
                pairs = [(other, width) for other in group for width in WIDTHS]
                hessian = _hessian(layer, lockstep.values(layer.x))
                ready.update(zip(pairs, self._encode(pairs, hessian), strict=True))

            def loss(code: _Code, layer: _Layer = layer) -> float:
                got = lockstep.outputs(layer.computing(code))
                return max(divergence(expected, got, scores).loss, 0.0)

            found = {width: ready.pop((layer, width)) for width in WIDTHS}
            yield layer, self._choices(layer, found, loss, result)

    def _choices(
        self,
        layer: _Layer,
        found: dict[int, _Code],
        loss: Callable[[_Code], float],
        result: PassResult,
    ) -> dict[int, Choice]:
        choices = {
            width: Choice(loss(code), code.bytes)
            for width, code in found.items()
            if code.error <= self.max_layer_error
        }
        if not choices:
            self._too_far(layer, found[WIDTHS[-1]], result)
        return choices

    # --- codes ----------------------------------------------------------------------------------

    def _code(
        self,
        gm: fx.GraphModule,
        layers: Sequence[_Layer],
        widths: dict[_Layer, int],
        calls: Sequence[Call],
        result: PassResult,
    ) -> Iterator[tuple[_Layer, _Code]]:
        chosen = [layer for layer in layers if layer in widths]
        if not calls:
            yield from self._within(chosen, widths, None, result)
            return
        lockstep = Lockstep(gm, calls)
        ready: dict[_Layer, _Code | None] = {}
        for at, layer in enumerate(chosen):
            lockstep.advance(layer.node)
            if layer not in ready:
                group = [other for other in chosen[at:] if other.same_input(layer)]
                hessian = _hessian(layer, lockstep.values(layer.x))
                ready.update(dict.fromkeys(group))
                ready.update(self._within(group, widths, hessian, result))
            code = ready[layer]
            if code is not None:
                lockstep.step(layer.computing(code))
                yield layer, code

    def _within(
        self,
        layers: Sequence[_Layer],
        widths: dict[_Layer, int],
        hessian: torch.Tensor | None,
        result: PassResult,
    ) -> Iterator[tuple[_Layer, _Code]]:
        """Codes whose errors are allowed, at the widths asked for or the next that are."""
        pending = [(layer, widths[layer]) for layer in layers]
        done: dict[_Layer, _Code] = {}
        while pending:
            wider = []
            for (layer, width), code in zip(pending, self._encode(pending, hessian), strict=True):
                if code.error <= self.max_layer_error:
                    done[layer] = code
                elif self.bits != "auto" and width < WIDTHS[-1]:
                    wider.append((layer, width + 1))
                else:
                    self._too_far(layer, code, result)
            pending = wider
        for layer in layers:
            if layer in done:
                code = done[layer]
                raised = code.bits > widths[layer]
                yield layer, dataclasses.replace(code, raised_from=widths[layer] if raised else 0)

    def _too_far(self, layer: _Layer, code: _Code, result: PassResult) -> None:
        reason = (
            f"its relative error at {code.bits} bits is {code.error:.1e}, past max_layer_error="
            f"{self.max_layer_error:g}"
        )
        hint = "raise max_layer_error, take smaller groups, or give calibration inputs"
        result.declined.append(declined(self.name, layer.node, reason, hint))

    def _encode(
        self, wanted: Sequence[tuple[_Layer, int]], hessian: torch.Tensor | None
    ) -> Iterator[_Code]:
        """Codes of layers at widths; jobs are made as they are taken, in memory a few at a time."""
        factor = None
        if hessian is not None and hessian.any():
            factor = compensation.inverse_factor(hessian, self.damping, self.group_size)
        sizes = [len(range(0, layer.weight.shape[0], _ROWS)) for layer, _ in wanted]
        parts = iter(self._in_parallel(self._jobs_of(wanted, factor)))
        for (layer, width), count in zip(wanted, sizes, strict=True):
            own = [next(parts) for _ in range(count)]
            planes = torch.cat([p for p, _ in own], 1)
            alpha = torch.cat([a for _, a in own], 1)
            yield _Code.of(layer, width, planes, alpha, self.group_size, hessian)

    def _jobs_of(
        self, wanted: Sequence[tuple[_Layer, int]], factor: Factor | None
    ) -> Iterator[_Job]:
        for layer, width in wanted:
            weight = layer.weight.evaluate()
            half = _suits_half(weight)
            for rows in weight.split(_ROWS):
                yield _Job(
                    rows.clone(), factor, width, self.group_size, self.scales, self.rounds, half
                )

    def _in_parallel(self, jobs: Iterable[_Job]) -> Iterable[_Packed]:
        if self.jobs == 1:
            return map(_run_job, jobs)
        try:
            from joblib import Parallel, delayed
        except ImportError:
            raise MissingDependencyError(
                f"{self.name}: jobs={self.jobs} needs joblib: pip install 'refold[shiftadd]'"
            ) from None
        found: list[_Packed] = Parallel(n_jobs=self.jobs)(delayed(_run_job)(job) for job in jobs)
        return found

    # --- rewriting ------------------------------------------------------------------------------

    def _emit(
        self, gm: fx.GraphModule, layer: _Layer, x: fx.Node, code: _Code, result: PassResult
    ) -> fx.Node:
        graph, node = gm.graph, layer.node
        stored = constants.tensor(layer.attribute)
        added: list[fx.Node] = []

        def run(target: Any, *args: Any) -> fx.Node:
            added.append(call(graph, target, args, rule=self.name, sources=[node]))
            return added[-1]

        with graph.inserting_before(node):
            planes = constants.add(gm, f"{layer.label}_planes", code.planes.to(stored.device))
            alpha = constants.add(gm, f"{layer.label}_alpha", code.alpha.to(stored.device))
            bias = layer.bias_node
            if bias is None and layer.bias is not None:
                bias = constants.add(gm, f"{layer.label}_bias", layer.bias, stored)
            op = torch.ops.refold.bcq_linear.default
            layer.around(run, x, lambda v: run(op, v, planes, alpha, bias, self.group_size))
        raised = f" (raised from {code.raised_from})" if code.raised_from else ""
        error = f", output error {code.output_error:.1e}" if code.calibrated else ""
        record = applied(
            self.name,
            [node],
            added,
            f"{code.bits} bits{raised}, {self.scales} scales of {self.group_size}: "
            f"{layer.bytes} -> {code.bytes} bytes, weight error {code.weight_error:.1e}{error}",
        )
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
        result.applied.append(dataclasses.replace(record, figures=figures, labels=labels))
        replace(node, added[-1])
        graph.erase_node(node)
        return added[-1]


# --- layers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Refusal:
    reason: str
    hint: str = ""


@dataclass(frozen=True)
class _Window:
    """How a convolution reads its input."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Layer:
    """A dense layer: ``weight`` is ``[N, K]``, over the columns that ``window`` makes of ``x``."""

    node: fx.Node
    x: fx.Node
    weight_node: fx.Node
    attribute: fx.Node
    weight: Lazy
    bias: Lazy | None
    bias_node: fx.Node | None
    window: _Window | None = None

    @property
    def label(self) -> str:
        return str(self.attribute.meta.get("refold_name", self.attribute.target))

    @property
    def bytes(self) -> int:
        return constants.size_in_bytes(self.attribute)

    def same_input(self, other: _Layer) -> bool:
        return self.x is other.x and self.window == other.window

    def around(self, run: Callable[..., Any], x: Any, product: Callable[[Any], Any]) -> Any:
        """The layer, given what multiplies the last axis; ``run`` calls an operator."""
        if self.window is None:
            return product(x)
        columns = self._columns(run, x)
        axes = len(self.window.kernel)
        return run(aten.permute.default, product(columns), [0, axes + 1, *range(1, axes + 1)])

    def columns(self, x: torch.Tensor) -> torch.Tensor:
        """What the weight multiplies, on the last axis."""
        return x if self.window is None else self._columns(_call, x)

    def _columns(self, run: Callable[..., Any], x: Any) -> Any:
        assert self.window is not None
        kernel, stride, padding = self.window.kernel, self.window.stride, self.window.padding
        axes = len(kernel)
        if any(padding):
            x = run(aten.pad.default, x, [p for one in padding[::-1] for p in (one, one)])
        if all(k == 1 for k in kernel):
            for axis, step in enumerate(stride):
                if step > 1:
                    x = run(aten.slice.Tensor, x, axis + 2, None, None, step)
            return run(aten.permute.default, x, [0, *range(2, axes + 2), 1])
        for axis, (size, step) in enumerate(zip(kernel, stride, strict=True)):
            x = run(aten.unfold.default, x, axis + 2, size, step)
        order = [0, *range(2, axes + 2), 1, *range(axes + 2, 2 * axes + 2)]
        x = run(aten.permute.default, x, order)
        return run(aten.flatten.using_ints, x, axes + 1)

    def computing(self, code: _Code) -> Callable[[fx.Node, dict[fx.Node, Any]], torch.Tensor]:
        """The layer with its code's weight, in the model's own dtype."""
        like = self.node.meta["val"].dtype
        weight = code.dense(self.weight.shape[1], like)
        bias = None if self.bias is None else self.bias.evaluate().to(like)

        def compute(node: fx.Node, environment: dict[fx.Node, Any]) -> torch.Tensor:
            x = environment[self.x]
            own = weight.to(x.device)
            shift = None if bias is None else bias.to(x.device)
            out: torch.Tensor = self.around(
                _call, x, lambda v: torch.nn.functional.linear(v, own, shift)
            )
            return out

        return compute


def _call(target: Any, *args: Any) -> Any:
    return target(*args)


def _linear(node: fx.Node) -> _Layer | _Refusal | None:
    linear = records.linear(node)
    if linear is None:
        return None
    attribute = _attribute(linear.weight_node)
    if attribute is None:
        return None
    name = "self" if node.target is aten.addmm.default else "bias"
    given = arguments(node).get(name) if linear.bias is not None else None
    plain = isinstance(given, fx.Node) and constants.is_get_attr(given) and len(shape(given)) == 1
    return _checked(
        _Layer(
            node, linear.x, linear.weight_node, attribute, linear.weight, linear.bias,
            given if plain else None,
        )
    )  # fmt: skip


def _convolution(node: fx.Node) -> _Layer | _Refusal | None:
    conv = records.conv(node)
    if conv is None:
        return None
    attribute = _attribute(conv.weight_node)
    if attribute is None:
        return None
    if conv.groups != 1 or conv.transposed:
        kind = "transposed" if conv.transposed else f"in {conv.groups} groups"
        return _Refusal(f"a convolution {kind} is no product of its windows with one matrix")
    kernel = conv.weight.shape[2:]
    mode = arguments(node)["padding"]
    lopsided = mode == "same" and any(k % 2 == 0 for k in kernel)
    if any(d != 1 for d in conv.dilation) or lopsided:
        return _Refusal("dilated windows and lopsided padding are not supported")
    if dtype(conv.x) != dtype(node):
        return None
    rows = conv.weight.shape[0]
    matrix = conv.weight.map((rows, conv.weight.numel() // rows), lambda w: w.reshape(rows, -1))
    plain = conv.bias_node is not None and constants.is_get_attr(conv.bias_node)
    return _checked(
        _Layer(
            node, conv.x, conv.weight_node, attribute, matrix, conv.bias,
            conv.bias_node if plain else None, _Window(kernel, conv.stride, conv.padding),
        )
    )  # fmt: skip


def _checked(layer: _Layer) -> _Layer | _Refusal:
    if not constants.tensor(layer.attribute).isfinite().all():
        return _Refusal("its weight is not finite")
    return layer


def _attribute(node: fx.Node) -> fx.Node | None:
    """The stored tensor behind a weight, through what only lays it out."""
    while not constants.is_get_attr(node):
        if len(node.all_input_nodes) != 1:
            return None
        node = node.all_input_nodes[0]
    return node


def _other_readers(layer: _Layer) -> list[fx.Node]:
    found: list[fx.Node] = []
    reader, node = layer.node, layer.weight_node
    while True:
        found.extend(u for u in node.users if u is not reader)
        if node is layer.attribute:
            return found
        reader, node = node, node.all_input_nodes[0]


def _returned(node: fx.Node) -> bool:
    """True if the model returns the value, but for its layout and dtype."""
    pending = [node]
    while pending:
        current = pending.pop()
        if is_output(current):
            return True
        pending += [u for u in current.users if op_name(u) in LAYOUT or op_name(u) == "_to_copy"]
    return False


def _hessian(layer: _Layer, inputs: Iterable[torch.Tensor]) -> torch.Tensor:
    total = Hessian(layer.weight.shape[1])
    for x in inputs:
        total.add(layer.columns(x))
    return total.mean()


# --- codes ----------------------------------------------------------------------------------------


_Packed = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class _Job:
    """Rows of a weight to quantise, alone or for their inputs."""

    rows: torch.Tensor
    factor: Factor | None
    bits: int
    group_size: int
    family: Family
    rounds: int
    half: bool


@dataclass(frozen=True)
class _Code:
    """A quantised weight, and how far it is from what it stands for."""

    bits: int
    planes: torch.Tensor
    alpha: torch.Tensor
    group_size: int
    weight_error: float
    output_error: float
    calibrated: bool
    raised_from: int = 0

    @classmethod
    def of(
        cls,
        layer: _Layer,
        bits: int,
        planes: torch.Tensor,
        alpha: torch.Tensor,
        group_size: int,
        hessian: torch.Tensor | None,
    ) -> _Code:
        weight = layer.weight.evaluate()
        error = dequantise(planes, alpha, weight.shape[1], group_size, torch.float64) - weight
        relative = float(error.norm() / weight.norm().clamp_min(1e-300))
        of_outputs = math.nan
        if hessian is not None:
            size = output_error(weight, hessian)
            of_outputs = math.sqrt(max(output_error(error, hessian), 0.0) / size) if size else 0.0
        return cls(bits, planes, alpha, group_size, relative, of_outputs, hessian is not None)

    @property
    def error(self) -> float:
        return self.output_error if self.calibrated else self.weight_error

    @property
    def bytes(self) -> int:
        return self.planes.numel() + self.alpha.numel() * self.alpha.element_size()

    def dense(self, features: int, dtype: torch.dtype) -> torch.Tensor:
        """The weight, formed as the operator forms it."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return dequantise(self.planes, self.alpha, features, self.group_size, wide).to(dtype)


def _run_job(job: _Job) -> _Packed:
    """One job, on one thread: parallel runs give the same bits as this one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rounding = _to_half if job.half else _to_single
        if job.factor is None:
            code = encode(
                job.rows, job.bits, job.group_size, job.family,
                rounds=job.rounds, rounding=rounding,
            )  # fmt: skip
        else:
            code = encode_compensated(
                job.rows, job.factor, job.bits, job.group_size, job.family,
                rounds=job.rounds, rounding=rounding,
            )  # fmt: skip
        return _packed(code, torch.float16 if job.half else torch.float32)
    finally:
        torch.set_num_threads(threads)


def _packed(code: BinaryCode, stored: torch.dtype) -> _Packed:
    return pack(code.signs), code.alpha.to(stored)


def _to_half(alpha: torch.Tensor) -> torch.Tensor:
    return alpha.half().double()


def _to_single(alpha: torch.Tensor) -> torch.Tensor:
    return alpha.float().double()


def _suits_half(weight: torch.Tensor) -> bool:
    """True if every row's scales are normal numbers of float16."""
    largest = weight.abs().amax(1)
    low, high = _HALF
    return bool(((largest == 0) | ((largest >= low) & (largest <= high))).all())


def _coded_bytes(
    rows: int, features: int, bits: int, group_size: int, family: Family, scale: int
) -> int:
    planes = bits * rows * math.ceil(features / 8)
    kinds = 1 if family in ("uniform", "pot") else bits
    return planes + kinds * rows * math.ceil(features / group_size) * scale


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
