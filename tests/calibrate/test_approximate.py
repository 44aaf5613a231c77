"""A pass that replaces dense layers one by one is one file: it says what becomes of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import refold
from refold.calibrate import approximate
from refold.calibrate.approximate import Replacement
from refold.errors import Declined, UsageError, VerificationError
from refold.graph.nodes import aten
from refold.passes import PIPELINES
from refold.rewrite.context import Context
from refold.rewrite.pipeline import Pipeline
from refold.rewrite.result import PassResult
from tests.compare import EXACT
from tests.tracing import ops, trace


@dataclass(frozen=True)
class RoundWeights:
    """Rounds each row of a weight to a grid."""

    name: str = "round-weights"
    exactness: str = "approximate"
    bits: int = 8
    include: str | Sequence[str] = ()
    exclude: str | Sequence[str] = ()
    calibration: Iterable[Any] = field(default=(), repr=False)

    def run(self, gm, context: Context = Context()) -> PassResult:
        return approximate.layers(
            gm, self.name, self._rounded,
            include=self.include, exclude=self.exclude, calibration=self.calibration,
        )  # fmt: skip

    def _rounded(self, layer, inputs) -> Replacement:
        if layer.weight.shape[0] == 1:
            raise Declined("it has one row", hint="name another layer")
        rounded = on_grid(layer.weight.evaluate(), self.bits)
        error = approximate.error(layer, rounded, inputs)
        columns = {"bits": str(self.bits), "error": f"{error:.1e}"}
        return Replacement(rounded, columns, figures={"error": error, "inputs": len(inputs)})


def on_grid(weight: Tensor, bits: int) -> Tensor:
    step = weight.double().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (weight.double() / step).round() * step


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 12), nn.Linear(12, 8, bias=False)
        self.last = nn.Linear(8, 1)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.b(F.relu(self.a(x)))))


def x(rows: int = 3) -> Tensor:
    return torch.randn(rows, 16, dtype=torch.float64)


def by_hand(net: Net, given: Tensor, bits: int) -> Tensor:
    a, b = on_grid(net.a.weight, bits), on_grid(net.b.weight, bits)
    return net.last(F.relu(F.relu(given @ a.T + net.a.bias) @ b.T))


def test_layers_have_other_weights_and_the_rest_is_as_it_was() -> None:
    net, given = Net(), x()
    gm = trace(net, given)
    with torch.no_grad():
        result = Pipeline("test", (RoundWeights(bits=3),)).run(gm, debug=True).runs[0].result
        got, expected, exact = gm(given), by_hand(net, given, 3), net(given)
    assert float((got - expected).abs().max()) < EXACT * float(expected.abs().max())
    assert float((got - exact).abs().max()) > 1e-3
    assert ops(gm) == {"linear": 3, "relu": 2}
    assert [a.modules for a in result.applied] == [("a",), ("b",)]
    (kept,) = result.declined
    assert (kept.module, kept.reason, kept.hint) == ("last", "it has one row", "name another layer")


def test_a_layer_is_calibrated_on_what_the_layers_before_it_leave() -> None:
    net, given = Net(), [x() for _ in range(9)]
    seen: list[Tensor] = []

    class Watching(RoundWeights):
        def _rounded(self, layer, inputs):
            if layer.weight.shape == (8, 12):
                seen.extend(inputs)
            return super()._rounded(layer, inputs)

    gm = trace(net, given[0])
    result = Watching(bits=3, calibration=given).run(gm)
    kept = given[:7] + given[8:]  # of eight or more the eighth is held out
    a = on_grid(net.a.weight, 3)
    for got, one in zip(seen, kept, strict=True):
        torch.testing.assert_close(got, F.relu(one @ a.T + net.a.bias))
    first = result.applied[0].figures
    with torch.no_grad():
        apart = [(one @ (a - net.a.weight).T).square().sum() for one in kept]
        whole = [(one @ net.a.weight.T).square().sum() for one in kept]
    assert first["error"] == pytest.approx(float((sum(apart) / sum(whole)) ** 0.5))
    assert first["inputs"] == len(kept) == 8
    assert len(result.approximation.held_out) == 1


def test_weights_that_are_not_finite_decline() -> None:
    class Broken(RoundWeights):
        def run(self, gm, context: Context = Context()) -> PassResult:
            nan = lambda layer, inputs: Replacement(layer.weight.evaluate() * torch.nan)
            return approximate.layers(gm, self.name, nan)

    net, given = Net(), x()
    gm = trace(net, given)
    result = Pipeline("test", (Broken(),)).run(gm, debug=True).runs[0].result
    assert not result.applied
    assert {d.reason for d in result.declined} == {"what it would multiply by is not finite"}
    assert torch.equal(gm(given), net(given))


def test_the_report_has_the_columns_that_the_pass_names() -> None:
    net, given = Net().float(), x().float()
    chosen = RoundWeights(bits=4, calibration=[x().float() for _ in range(8)], include=["a", "b"])
    done = refold.fold(net, given, pipeline=PIPELINES["default"].with_(chosen))
    table = str(done.report).splitlines()
    (at,) = [i for i, line in enumerate(table) if line.split() == ["layer", "bits", "error"]]
    errors = [f"{a.figures['error']:.1e}" for a in done.report.applied if a.columns]
    names = [line.split() for line in table[at + 1 : at + 3]]
    assert [(n[0], n[1], n[2]) for n in names] == [("a", "4", errors[0]), ("b", "4", errors[1])]
    assert done.report.divergence["inputs"] == 1
    assert done.report.divergence["held_out"]
    assert 0 < done.report.divergence["error"] < 0.5
    assert done.report.numerics["passed"]


def test_what_is_written_may_be_another_operator() -> None:
    """Two products of half the weight each."""

    class Halves(RoundWeights):
        def _rounded(self, layer, inputs):
            weight = layer.weight.evaluate()

            def product(edit, run):
                half = edit.constant(f"{layer.label}_half", weight / 2)
                bias = approximate.bias(edit, layer)
                return lambda v: run(
                    aten.add.Tensor,
                    run(aten.linear.default, v, half, bias),
                    run(aten.linear.default, v, half),
                )

            return Replacement(weight, product=product)

    net, given = Net(), x()
    gm = trace(net, given)
    result = Halves(include="a").run(gm)
    torch.testing.assert_close(gm(given), net(given))
    assert ops(gm) == {"linear": 4, "add": 1, "relu": 2}
    assert result.approximation.after is not gm


def test_a_shared_weight_stays_and_globs_choose() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.last.weight = nn.Parameter(torch.randn(12, 8, dtype=torch.float64))
            self.b.weight = nn.Parameter(self.last.weight.data)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.a(x))
            return F.linear(F.relu(F.linear(y, self.last.weight.t())), self.last.weight)

    result = RoundWeights().run(trace(Tied(), x()))
    assert [a.modules for a in result.applied] == [("a",)]
    assert all("shared with" in d.reason for d in result.declined)
    result = RoundWeights(exclude="*").run(trace(Net(), x()))
    assert not result.modified
    assert result.approximation is None
    with pytest.raises(UsageError, match=r"round-weights: include: no module matches 'c'"):
        RoundWeights(include="c").run(trace(Net(), x()))
    with pytest.raises(UsageError, match="a calibration input does not fit"):
        RoundWeights(calibration=[torch.randn(3, 15).double()]).run(trace(Net(), x()))


def test_what_comes_before_the_pass_is_judged_by_the_original() -> None:
    class Wrong:
        name, exactness = "wrong", "exact"

        def run(self, gm, context):
            for node in gm.graph.find_nodes(op="call_function", target=aten.relu.default):
                node.target = aten.gelu.default
            gm.recompile()
            return PassResult(modified=True)

    for order in ((Wrong(), RoundWeights()), (RoundWeights(), Wrong())):
        with pytest.raises(VerificationError):
            refold.fold(Net(), x(), pipeline=Pipeline("test", order))
