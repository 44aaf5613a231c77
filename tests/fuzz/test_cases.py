"""Cases find what is wrong, say what kind it is, and do not blame rounding on a rule."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

import refold.passes
from refold.errors import VerificationError
from refold.fuzz import cases, graphs, run
from refold.fuzz.cases import Mix
from refold.fuzz.generate import drawn
from refold.fuzz.network import Drawn, DrawnCall, DrawnNetwork, Value
from refold.fuzz.outcome import ALARM, CRASH, UNJUDGED, WRONG, Outcome, Setting
from refold.fuzz.source import code_of
from refold.graph import ops
from refold.rewrite.context import Context
from refold.rewrite.result import PassResult
from tests.examples import examples

aten = torch.ops.aten


@given(st.randoms(use_true_random=False))
@examples(40)
def test_whatever_is_drawn_folds_right(rng: random.Random) -> None:
    network = drawn(rng)
    for setting in (Setting(dynamic=True), Setting(exact=True, pipeline="min-nodes")):
        found = cases.judge(0, network, setting)
        assert found.kind not in run.FAULTS, f"{found.what}\n{code_of(network)}"


@pytest.mark.parametrize("seed", range(30))
def test_seeds_have_no_fault(seed: int) -> None:
    found = cases.run_case(seed, Mix())
    assert found.kind not in run.FAULTS, found.what


@pytest.mark.parametrize("seed", range(8))
def test_modules_have_no_fault(seed: int) -> None:
    found = cases.run_case(seed, Mix(modules=1.0))
    assert found.kind not in run.FAULTS, found.what


@dataclass(frozen=True)
class _Alters:
    """A pass that changes one number of each product."""

    change: Callable[[float], float]
    name: str = "alter"
    exactness: str = "exact"

    def run(self, gm: fx.GraphModule, context: Context = Context()) -> PassResult:
        for node in gm.graph.nodes:
            if ops.op_name(node) == "mul" and isinstance(node.args[1], float):
                node.args = (node.args[0], self.change(node.args[1]))
        gm.recompile()
        return PassResult()


@dataclass(frozen=True)
class _Fails:
    name: str = "alter"
    exactness: str = "exact"

    def run(self, gm: fx.GraphModule, context: Context = Context()) -> PassResult:
        raise KeyError("lost")


@pytest.fixture
def altered(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    def use(made: object) -> None:
        monkeypatch.setitem(refold.passes.PASSES, "alter", lambda: made)

    return use


def products() -> DrawnNetwork:
    """``relu(2 x) + tanh(x)``, and an output that has nothing to do with it."""
    x = Value(0)
    steps = (
        DrawnCall(aten.tanh.default, (x,)),
        DrawnCall(aten.mul.Tensor, (x, 2.0)),
        DrawnCall(aten.relu.default, (Value(2),)),
        DrawnCall(aten.add.Tensor, (Value(3), Value(1))),
        DrawnCall(aten.sin.default, (Value(1),)),
    )
    return DrawnNetwork((Drawn("normal", (2, 4)),), {}, steps, (Value(5), Value(4)), (True,))


ALTERED = Setting(pipeline="alter")


@pytest.mark.parametrize("by", [-1.0, 1 + 1e-6])
def test_a_wrong_pass_is_wrong(by: float, altered: Callable[[object], None]) -> None:
    altered(_Alters(lambda v: v * by))
    found = cases.judge(0, products(), ALTERED)
    assert found.kind == WRONG
    assert "relative error" in found.what


def test_the_exact_judge_sees_what_float64_does_not(altered: Callable[[object], None]) -> None:
    altered(_Alters(lambda v: v + 2.0**-50))
    assert cases.judge(0, products(), ALTERED).kind == ""
    found = cases.judge(0, products(), Setting(pipeline="alter", exact=True))
    assert (found.kind, found.exact) == (WRONG, "different")


def test_an_error_inside_of_a_pass_is_a_crash(
    altered: Callable[[object], None], failures: list[object]
) -> None:
    altered(_Fails())
    found = cases.judge(0, products(), ALTERED)
    assert found.kind == CRASH
    assert "KeyError" in found.what
    failures.clear()


def test_a_refusal_of_what_is_right_is_a_false_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: object, **kwargs: object) -> None:
        raise VerificationError("too far")

    monkeypatch.setattr(graphs.Judge, "judge_folded", refuses)
    found = cases.judge(0, products(), Setting(verified=True))
    assert (found.kind, found.verified) == (ALARM, True)


def test_rounding_is_not_blamed_on_a_rule(altered: Callable[[object], None]) -> None:
    """``2 x - 2 x`` is zero or rounding; what is made of it says nothing of a rule."""
    x = Value(0)
    steps = (
        DrawnCall(aten.mul.Tensor, (x, 3.0)),
        DrawnCall(aten.sub.Tensor, (Value(1), Value(1))),
        DrawnCall(aten.mul.Tensor, (x, 1e-17)),
        DrawnCall(aten.add.Tensor, (Value(1), Value(3))),
        DrawnCall(aten.sub.Tensor, (Value(4), Value(1))),
    )
    network = DrawnNetwork((Drawn("normal", (2, 4)),), {}, steps, (Value(5),), (True,))
    altered(_Alters(lambda v: v * (1 + 2**-52) if v == 3.0 else v))
    assert cases.judge(0, network, ALTERED).kind in ("", UNJUDGED)


def test_a_wrong_network_is_made_smaller(altered: Callable[[object], None]) -> None:
    altered(_Alters(lambda v: -v))
    outcome = Outcome(0, ALTERED, WRONG, "relative error")
    small = run.shrunk(products(), lambda n: cases.judge(0, n, ALTERED).kind == outcome.kind)
    assert small.operators == ["mul"]
    assert len(small.inputs) == 1
    assert "torch.ops.aten.mul.Tensor(v0, 2.0)" in code_of(small)


def test_what_is_applied_and_called_is_counted() -> None:
    steps = (DrawnCall(aten.mul.Tensor, (Value(0), 1.0)), DrawnCall(aten.relu.default, (Value(1),)))
    network = DrawnNetwork((Drawn("normal", (2, 4)),), {}, steps, (Value(2),), (True,))
    found = cases.judge(0, network, Setting())
    assert found.operators == ("mul", "relu")
    assert found.rules == ("clean-up/mul-one",)
