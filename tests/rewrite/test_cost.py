"""What is cheaper: by a table where calls were measured, in every measure where nobody did."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import refold
from refold.backends.base import Target
from refold.backends.registry import find_target, target_names
from refold.passes.branches.fold_branches import FoldBranches
from refold.rewrite.context import Context
from refold.rewrite.cost import FREE, CostModel, Price, reference
from tests.folding import Net, image, run
from tests.tracing import trace

NOWHERE = Context(CostModel("somewhere"))


def test_a_price_of_several_measures_is_less_where_none_grows() -> None:
    now = Price((4.0, 2.0, 1.0))
    assert now.over(Price((3.0, 2.0, 1.0))) == 1.0
    assert now.over(Price((3.0, 2.0, 0.0))) == 2.0
    assert now.over(now) == 0.0
    assert now.over(Price((0.0, 0.0, 1.5))) == -0.5
    assert (FREE + now).parts == now.parts
    assert (2 * now).total == 14.0


def test_rounding_of_a_sum_is_no_growth() -> None:
    assert Price((0.1 + 0.2, 1.0)).over(Price((0.3, 0.5))) > 0
    assert Price((0.3, 1.0)).over(Price((0.1 + 0.2, 0.5))) > 0


def test_a_table_is_for_the_cpu_in_single_precision() -> None:
    costs = reference()
    for device, dtype, words in (
        ("cpu", torch.float32, None),
        ("cpu", torch.float64, None),
        ("cpu", torch.float16, "half precision"),
        ("cpu", torch.bfloat16, "half precision"),
        ("meta", torch.float32, "the CPU alone"),
    ):
        gm = trace(torch.relu, torch.ones(2, 3, dtype=dtype, device=device))
        (node,) = (n for n in gm.graph.nodes if n.op == "call_function")
        found = costs.at(node)
        assert (found.rates is None) == (found.layers is None) == (words is not None)
        assert words is None or (words in found.unmeasured and words in found.apart)
        assert len(found.of(node).parts) == (1 if words is None else 3)


def test_branches_of_one_input_are_one_anywhere() -> None:
    """Less arithmetic, traffic and calls: no table has to say so."""
    parts = {"a": nn.Conv2d(4, 4, 3, padding=1), "b": nn.Conv2d(4, 4, 1)}
    gm, declined = run(
        FoldBranches(), Net(lambda s, x: s.a(x) + s.b(x) + x, **parts), image(), context=NOWHERE
    )
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [
        torch.ops.aten.conv2d.default
    ]
    assert not declined


def narrow() -> Net:
    """A bottleneck: merged, it is one call of more operations."""
    return Net(lambda s, x: s.b(s.a(x)), a=nn.Conv2d(64, 4, 1), b=nn.Conv2d(4, 64, 3))


def test_more_arithmetic_for_fewer_calls_needs_a_table() -> None:
    gm, declined = run(FoldBranches(), narrow(), image(64), context=NOWHERE)
    assert sum(n.op == "call_function" for n in gm.graph.nodes) == 2
    (record,) = declined
    assert record.reason.endswith(
        "would take more arithmetic and memory traffic, and what calls cost on somewhere is not "
        "measured"
    )


def test_a_model_in_half_precision_is_not_folded_by_the_table_of_single() -> None:
    gm = trace(narrow().half(), image(64).half())
    (record,) = FoldBranches().run(gm).declined
    assert record.reason.endswith("what calls cost is not measured in half precision")


@pytest.mark.parametrize("name", target_names())
def test_each_target_says_what_calls_cost_on_it(name: str) -> None:
    costs = find_target(name).costs
    unmeasured = name in ("trt", "coreml")
    assert (costs.rates is None) == unmeasured, "give costs=cost.on_cpu(...), or list it here"
    assert (costs.layers is not None) == (name in ("torch", "inductor", "ort", "ort-format"))


def test_a_target_of_somebody_else_was_never_measured() -> None:
    class Mine(Target):
        name, suffix = "mine", ".mine"
        lower = load = save = stats = None

    assert Mine().costs == CostModel("mine")


@pytest.mark.slow
def test_the_target_hands_its_costs_to_the_passes() -> None:
    report = refold.compile_for_inference(
        narrow().float(), image(64).float(), target="trt", build=False
    ).report
    (record,) = (d for d in report.declined if d.rule == "fold-branches")
    assert "what calls cost on TensorRT is not measured" in record.reason
