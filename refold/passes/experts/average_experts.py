"""Makes one network of a mixture of experts whose gates are constant, or that is averaged anyway.

A mixture ``y = g_1 E(x; W_1) + ... + g_N E(x; W_N)`` holds N copies of one network ``E`` with
weights of their own. Where all ``W_i`` are equal it is ``(g_1 + ... + g_N) E(x; W)``, which is
folded without asking. Otherwise the experts' weights may be averaged, ``W = sum of g_i W_i`` (for
gates that add up to 1). With ``W_i = W + d_i`` the first order of the error cancels,

    y - E(x; W) = 1/2 sum of g_i E''(x; W)[d_i, d_i] + ...,

so it falls with the square of the experts' spread. A partition of the tokens at random has the
mean of the experts as its expectation, and that is what conversions of it are compared with.

Before::

    a = linear(x, v_1, c_1);  y_1 = linear(gelu(a), w_1, b_1)
    a = linear(x, v_2, c_2);  y_2 = linear(gelu(a), w_2, b_2)
    y = div(add(y_1, y_2), 2)

After::

    a = linear(x, (v_1 + v_2) / 2, (c_1 + c_2) / 2)
    y = linear(gelu(a), (w_1 + w_2) / 2, (b_1 + b_2) / 2)  # mode="average"

``mode="concat"`` is exact instead, with all hidden units side by side::

    a = linear(x, [v_1; v_2], [c_1; c_2])
    y = linear(gelu(a), [w_1 / 2, w_2 / 2], (b_1 + b_2) / 2)

Averaging is approximate and never runs unless asked for; each layer is measured before, and kept
where the error is past the tolerance. Gates that depend on the data do not average to a constant:
such layers are kept unless ``routed`` says how to weigh their experts, which is a compression and
needs calibration inputs. Huang et al., Experts Weights Averaging (2023), arXiv:2308.06093.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import fx

from refold.calibrate import inputs
from refold.errors import Declined, UsageError
from refold.graph import constants, provenance
from refold.graph.evaluate import Oracle
from refold.graph.nodes import aten, dtype, hints, is_tensor, pinned
from refold.graph.ops import op_name
from refold.passes.experts import join as join_experts
from refold.passes.experts.join import Network
from refold.passes.experts.read import Mixture
from refold.rewrite.context import Context
from refold.rewrite.edit import Edit, Editor
from refold.rewrite.result import Approximation, PassResult, declined

Mode = Literal["keep", "average", "concat"]
Routed = Literal["keep", "uniform", "frequency"]

_TOKENS = 256  # standard normal tokens that a layer is measured on without calibration inputs
_PROBE = 2.0**-4  # step of the second difference, in units of the experts' deviations


@dataclass(frozen=True)
class AverageExperts:
    """Joins the experts of a mixture.

    Attributes:
        mode: ``keep`` folds equal experts and explains the others; ``average`` averages weights;
            ``concat`` puts hidden units side by side, exactly, where the gates are constant.
        tolerance: the error of a layer, and of the model's outputs, that ``average`` may make,
            relative to the largest value.
        routed: what ``average`` does with gates that depend on the data: ``keep`` the layer, weigh
            its experts alike (``uniform``), or by the gates that they get over the calibration
            inputs (``frequency``).
        calibration: inputs of the model (a tuple of positional arguments, a dict of keyword
            arguments, or one tensor each) that layers are measured on; without them, layers with
            constant gates are measured on standard normal tokens.
    """

    name: str = "average-experts"
    mode: Mode = "keep"
    tolerance: float = 0.01
    routed: Routed = "keep"
    calibration: Sequence[Any] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for option, value, known in (
            ("mode", self.mode, get_args(Mode)),
            ("routed", self.routed, get_args(Routed)),
        ):
            if value not in known:
                raise UsageError(
                    f"{self.name}: {option} is {value!r}, expected one of {', '.join(known)}"
                )
        if not self.tolerance >= 0:
            raise UsageError(f"{self.name}: tolerance is {self.tolerance}, expected 0 or more")
        object.__setattr__(self, "calibration", inputs.given(self.calibration, self.name))

    @property
    def exactness(self) -> str:
        return "approximate" if self.mode == "average" else "reassociates"

    def run(self, gm: fx.GraphModule, context: Context = Context()) -> PassResult:
        editor = Editor(gm, self.name)
        result = editor.result
        found = list(join_experts.find(gm.graph))
        mixtures = [m for m in found if isinstance(m, Mixture) and self._concerns(m)]
        samples = self._samples(gm, mixtures)
        for item in found:
            if isinstance(item, Declined):
                assert item.node is not None
                result.declined.append(declined(self.name, item.node, item))
        for mixture in mixtures:
            with editor.candidate(mixture.root):
                self._join(editor, mixture, samples)
        result.modified = bool(result.applied)
        if result.modified:
            gm.graph.lint()
            gm.recompile()
        return result

    def _concerns(self, mixture: Mixture) -> bool:
        """Branches that are merely added are experts only for somebody who says so."""
        return self.mode != "keep" or not mixture.plain_sum

    def _samples(self, gm: fx.GraphModule, mixtures: Sequence[Mixture]) -> _Samples:
        watched: dict[str, list[torch.Tensor]] = {}
        if self.mode != "average" or not mixtures or not self.calibration:
            return _Samples(watched)
        names = {n.name for m in mixtures for n in (m.root, m.x)}
        names |= {n.name for m in mixtures if m.routing for n in m.routing.watch}

        def watch(node: fx.Node, value: Any) -> None:
            if node.name in names:
                watched.setdefault(node.name, []).append(value)

        constants.materialise_all(gm, forget=False)
        oracle = Oracle(gm)
        for args, kwargs in inputs.read(gm, self.calibration, self.name):
            oracle.run(args, kwargs, watch=watch)
        return _Samples(watched)

    # --- one mixture ------------------------------------------------------------------------------

    def _join(self, editor: Editor, mixture: Mixture, samples: _Samples) -> None:
        if pinned(mixture.root):
            return
        count = len(mixture.operands)
        if mixture.gates is not None and join_experts.equal(mixture):
            network = join_experts.expert(mixture, 0)
            detail = f"{count} experts of equal weights are one"
            figures = _figures(mixture, network, runs=_runs(mixture))
            _replace(editor, mixture, network, sum(mixture.gates), detail, figures)
            return
        if self.mode == "keep":
            raise _kept(mixture)
        if self.mode == "concat":
            if mixture.gates is None:
                raise _kept(mixture)
            network = join_experts.side_by_side(mixture)
            detail = f"{count} experts side by side"
            figures = _figures(mixture, network, runs=_runs(mixture))
            _replace(editor, mixture, network, 1.0, detail, figures)
            return
        self._average(editor, mixture, samples)

    def _average(self, editor: Editor, mixture: Mixture, samples: _Samples) -> None:
        if mixture.gates is None:
            if self.routed == "keep":
                raise _kept(mixture)
            weights, factor, runs = self._routed_weights(mixture, samples)
        else:
            factor, runs = sum(mixture.gates), _runs(mixture)
            if abs(factor) < 1e-6 * sum(map(abs, mixture.gates)):
                raise Declined("the gates cancel: there is no mean of the experts")
            weights = [g / factor for g in mixture.gates]
        network = join_experts.average(mixture, weights)
        certificate = _measure(mixture, network, weights, factor, samples)
        if not certificate.measured <= self.tolerance:
            raise Declined(
                f"averaging {len(weights)} experts: {certificate}, past the tolerance of "
                f"{self.tolerance:g}",
                hint="raise the tolerance, train on with a larger share rate, or keep the experts",
            )
        figures = {
            **_figures(mixture, network, runs=runs),
            "spread": certificate.spread,
            "predicted_error": certificate.predicted,
            "measured_error": certificate.measured,
            "tolerance": self.tolerance,
        }
        detail = f"{len(weights)} experts ({mixture.form}) averaged: {certificate}"
        _replace(editor, mixture, network, factor, detail, figures)
        result = editor.result
        result.approximation = Approximation(allowed=self.tolerance)
        where = provenance.module_path(mixture.root) or mixture.root.name
        result.notes.append(
            f"{where}: {detail}; parameters {figures['parameters_before']:.0f} -> "
            f"{figures['parameters_after']:.0f}, FLOPs per token {figures['flops_before']:.0f} -> "
            f"{figures['flops_after']:.0f}"
        )

    def _routed_weights(
        self, mixture: Mixture, samples: _Samples
    ) -> tuple[list[float], float, float]:
        """(weights, what a token's gates add up to, expert evaluations per token)."""
        assert mixture.routing is not None
        totals, evaluations, tokens = torch.zeros(len(mixture.operands)).double(), 0, 0
        for values in samples.of(mixture, *mixture.routing.watch):
            total, count = mixture.routing.read(values)
            totals += total.double().cpu()
            evaluations += count
            tokens += values[mixture.x].shape[:-1].numel()
        if not tokens:
            raise Declined(
                "the router is measured on calibration inputs alone",
                hint="give calibration=[inputs]",
            )
        factor = float(totals.sum()) / tokens
        if self.routed == "uniform":
            weights = [1.0 / len(totals)] * len(totals)
        else:
            weights = (totals / totals.sum()).tolist()
        return weights, factor, evaluations / tokens


# --- the certificate ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Samples:
    """Values of nodes over the calibration inputs, by the nodes' names."""

    watched: Mapping[str, Sequence[torch.Tensor]]

    def of(self, mixture: Mixture, *more: fx.Node) -> Iterator[dict[fx.Node, torch.Tensor]]:
        nodes = {mixture.x, mixture.root, *more}
        each = [self.watched.get(n.name, ()) for n in nodes]
        for values in zip(*each, strict=True):
            yield dict(zip(nodes, values, strict=True))


@dataclass(frozen=True)
class _Certificate:
    """How far the experts are apart, and what averaging them costs.

    Attributes:
        spread: root mean square of the weights' deviations from their mean, relative to it.
        predicted: the second-order error; NaN where the router makes one of first order.
        measured: the error on the samples, relative to the largest value.
        samples: what it was measured on.
    """

    spread: float
    predicted: float
    measured: float
    samples: str

    def __str__(self) -> str:
        predicted = "" if math.isnan(self.predicted) else f", predicted error {self.predicted:.1e}"
        return (
            f"spread {self.spread:.1e}{predicted}, measured {self.measured:.1e} on {self.samples}"
        )


def _measure(
    mixture: Mixture,
    network: Network,
    weights: Sequence[float],
    factor: float,
    samples: _Samples,
) -> _Certificate:
    given = [(v[mixture.x], v[mixture.root]) for v in samples.of(mixture)]
    inputs = [x.to("cpu", torch.float64) for x, _ in given]
    said = f"{len(given)} calibration inputs"
    if not given:
        inputs = [_normal_tokens(mixture)]
        said = f"{inputs[0].shape[:-1].numel()} standard normal tokens"
    center = [c.value.evaluate() for c in network.constants]
    middle = [join_experts.evaluate(mixture.steps, center, x) for x in inputs]
    expected = [torch.zeros_like(m) for m in middle]
    bends = [torch.zeros_like(m) for m in middle]
    apart = 0.0
    # One expert after the other: all of them in float64 may not fit in memory.
    for index, weight in enumerate(weights):
        own = [o.value.get() for o in mixture.operands[index]]
        moved = [o - c for o, c in zip(own, center, strict=True)]
        apart += abs(weight) * sum(float(d.square().sum()) for d in moved)
        if mixture.gates is None:
            continue
        for at, x in enumerate(inputs):
            value = join_experts.evaluate(mixture.steps, own, x)
            expected[at].add_(value, alpha=mixture.gates[index])
            bend = _bend(mixture, center, moved, x, middle[at])
            bends[at].add_(bend, alpha=weight * factor)
    if mixture.gates is None:
        expected = [y.to("cpu", torch.float64) for _, y in given]
    scale = _largest(expected) or 1.0
    errors = [m * factor - e for m, e in zip(middle, expected, strict=True)]
    size = sum(float(c.square().sum()) for c in center)
    return _Certificate(
        spread=math.sqrt(apart / size) if size else math.inf,
        predicted=math.nan if mixture.gates is None else _largest(bends) / scale,
        measured=_largest(errors) / scale,
        samples=said,
    )


def _largest(values: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([v.abs().max() for v in values]).max())


def _bend(
    mixture: Mixture,
    center: Sequence[torch.Tensor],
    moved: Sequence[torch.Tensor],
    x: torch.Tensor,
    middle: torch.Tensor,
) -> torch.Tensor:
    """``1/2 E''[d, d]`` around the mean of the weights, by second differences."""
    total = -2 * middle
    for step in (_PROBE, -_PROBE):
        shifted = [c + step * d for c, d in zip(center, moved, strict=True)]
        total += join_experts.evaluate(mixture.steps, shifted, x)
    return total / (2 * _PROBE**2)


def _normal_tokens(mixture: Mixture) -> torch.Tensor:
    sizes = list(hints(mixture.x))
    if len(sizes) == 2:
        sizes[0] = _TOKENS
    generator = torch.Generator().manual_seed(0)
    return torch.randn(sizes, generator=generator, dtype=torch.float64)


# --- what is said ---------------------------------------------------------------------------------


def _kept(mixture: Mixture) -> Declined:
    """Why experts that are not equal stay unless asked otherwise."""
    count = len(mixture.operands)
    if mixture.gates is None:
        return Declined(
            f"{count} experts {mixture.form}: the gates depend on the data, so no one network "
            "equals them",
            hint='AverageExperts(mode="average", routed="frequency", calibration=...) '
            "compresses them",
        )
    if mixture.form == "random partition":
        return Declined(
            f"{count} experts on a random partition of the tokens: two runs differ; their weights "
            "are not equal",
            hint='AverageExperts(mode="average") makes one of them, mode="concat" computes the '
            "mean of their outputs",
        )
    return Declined(
        f"{count} experts with constant gates are not equal",
        hint='AverageExperts(mode="average") makes one of them, approximately; mode="concat" puts '
        "their hidden units side by side, exactly",
    )


def _runs(mixture: Mixture) -> float:
    """Expert evaluations per token."""
    return 1.0 if mixture.form == "random partition" else float(len(mixture.operands))


def _figures(mixture: Mixture, network: Network, *, runs: float) -> dict[str, float]:
    own = [join_experts.expert(mixture, i) for i in range(len(mixture.operands))]
    return {
        "experts": len(own),
        "parameters_before": sum(e.parameters for e in own),
        "parameters_after": network.parameters,
        "flops_before": runs * own[0].flops,
        "flops_after": network.flops,
    }


# --- rewriting ------------------------------------------------------------------------------------


def _replace(
    editor: Editor,
    mixture: Mixture,
    network: Network,
    factor: float,
    detail: str,
    figures: dict[str, float],
) -> None:
    root = mixture.root
    # Gates that are a rounded softmax add up to 1 within rounding.
    count = len(mixture.operands)
    if abs(factor - 1.0) <= 4 * count * torch.finfo(dtype(root)).eps:
        factor = 1.0
    within = join_experts.scaled(network, factor) if factor != 1.0 else network
    network = within or network
    with editor.edit() as edit:
        with edit.before(root):
            operands = [_constant(edit, c) for c in network.constants]
            steps = network.steps
            added = join_experts.emit(edit.graph, steps, operands, mixture.x, rule=edit.rule)
            new = added[-1]
            if within is None:
                new = edit.call(aten.mul.Tensor, (new, factor), sources=[root])
        edit.stamp(new, [new, root])
        inside = join_experts.between(root, mixture.x)
        edit.replace(root, new)
        edit.remove(_dead(edit.graph, inside))
    editor.result.applied.append(dataclasses.replace(edit.record(detail), figures=figures))


def _constant(edit: Edit, constant: join_experts.Constant) -> fx.Node:
    if constant.kept:
        return constant.like
    like = constant.like.meta["val"]
    name = str(constant.like.target) if constant.like.op == "get_attr" else constant.like.name
    empty = torch.empty(0, dtype=like.dtype, device=like.device)
    return edit.constant(name, constant.value, empty)


def _dead(graph: fx.Graph, inside: set[fx.Node]) -> list[fx.Node]:
    """What nothing needs any more.

    A random order of the mixture goes with it, and so do checks that its chosen rows are not
    negative in number, which the tracer leaves behind.
    """
    checks = {
        n
        for n in graph.nodes
        if op_name(n) == "_assert_scalar" and any(s in inside for s in _measured_by(n))
    }
    live: set[fx.Node] = set()
    stack = [
        n
        for n in graph.nodes
        if n.op in ("placeholder", "output")
        or (n.is_impure() and n not in checks and n not in inside)
        or (n in inside and constants.is_mutation(n))
    ]

    def spread() -> None:
        while stack:
            node = stack.pop()
            if node not in live:
                live.add(node)
                stack.extend(node.all_input_nodes)

    spread()
    stack += [n for n in checks if all(s in live for s in _measured_by(n))]
    spread()
    return [n for n in graph.nodes if n not in live]


def _measured_by(check: fx.Node) -> set[fx.Node]:
    """The tensors whose sizes a check reads."""
    found: set[fx.Node] = set()
    stack = list(check.all_input_nodes)
    while stack:
        node = stack.pop()
        if is_tensor(node):
            found.add(node)
        else:
            stack.extend(node.all_input_nodes)
    return found
