from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from refold.calibrate.lockstep import Lockstep, divergence, logits
from tests.compare import EXACT, relative_error
from tests.tracing import find, trace


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return x + self.second(self.first(x).relu()), x.sum()


def calls(count: int = 3):
    return [((torch.randn(at + 2, 6),), {}) for at in range(count)]


def zero_of(node):
    return lambda environments: [torch.zeros_like(e[node.args[0]]) for e in environments]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_all_inputs_are_there_before_a_node_runs() -> None:
    model, given = Residual(), calls()
    gm = trace(model, given[0][0][0], dynamic=True)
    lockstep, second = Lockstep(gm, given), find(gm, "linear")
    lockstep.advance(second)
    with torch.no_grad():
        expected = [model.first(args[0]).relu() for args, _ in given]
    for value, want in zip(lockstep.values(second.args[0]), expected, strict=True):
        assert torch.equal(value, want)


def test_what_no_later_node_reads_is_gone() -> None:
    gm = trace(Residual(), calls()[0][0][0], dynamic=True)
    lockstep, second = Lockstep(gm, calls()), find(gm, "linear")
    lockstep.advance(second)
    relu = second.args[0]
    with pytest.raises(KeyError):
        lockstep.values(relu.args[0])  # the first linear's output


def test_outputs_with_another_layer_leave_the_lockstep_as_it_is() -> None:
    model, given = Residual(), calls()
    gm = trace(model, given[0][0][0], dynamic=True)
    lockstep, second = Lockstep(gm, given), find(gm, "linear")
    whole = lockstep.outputs()
    lockstep.advance(second)

    without = lockstep.outputs({second: zero_of(second)})
    again = lockstep.outputs()
    for (args, _), full, none, same in zip(given, whole, without, again, strict=True):
        with torch.no_grad():
            assert torch.equal(full[0], model(*args)[0])
        assert torch.equal(none[0], args[0])
        assert torch.equal(same[0], full[0])


def test_what_computes_a_node_instead_is_seen_by_all_after_it() -> None:
    given = calls()
    gm = trace(Residual(), given[0][0][0], dynamic=True)
    first, second = (n for n in gm.graph.nodes if "linear" in str(n.target))
    lockstep = Lockstep(gm, given, {first: zero_of(first)})
    lockstep.advance(second)
    assert all(not value.any() for value in lockstep.values(second.args[0]))
    lockstep.instead[second] = zero_of(second)
    for (args, _), out in zip(given, lockstep.outputs(), strict=True):
        assert torch.equal(out[0], args[0])


def test_inputs_that_the_graph_writes_are_copied() -> None:
    def net(x):
        x.add_(1.0)
        return x * 2

    x = torch.ones(3, 6)
    gm = trace(net, x)
    out = Lockstep(gm, [((x,), {})]).outputs()
    assert torch.equal(out[0][-1], torch.full((3, 6), 4.0))
    assert torch.equal(x, torch.ones(3, 6))


def test_divergence_of_scores() -> None:
    want, have = torch.randn(4, 7), torch.randn(4, 7)
    found = divergence([[want]], [[have]], [True])
    p, q = want.double().softmax(-1), have.double().softmax(-1)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-9)
    equal = (want.argmax(-1) == have.argmax(-1)).double().mean()
    assert found.top1 == pytest.approx(float(equal))
    assert found.error == pytest.approx(float((have - want).norm() / want.norm()), rel=1e-5)
    assert found.loss == found.kl


def test_divergence_of_features_has_no_scores() -> None:
    want = torch.randn(4, 7)
    found = divergence([[want, 3]], [[want * 1.1, 3]], [False, False])
    assert math.isnan(found.kl)
    assert math.isnan(found.top1)
    assert found.error == pytest.approx(0.1, rel=1e-5)
    assert found.loss == pytest.approx(0.01, rel=1e-4)


def test_a_shift_of_all_scores_does_not_matter() -> None:
    want = torch.randn(4, 7, dtype=torch.float64)
    found = divergence([[want]], [[want + 3.0]], [True])
    assert abs(found.kl) < 1e-12
    assert found.top1 == 1.0
    assert relative_error(want, want) <= EXACT


def test_scores_are_what_a_dense_layer_returns() -> None:
    weight = torch.randn(3, 6)

    def net(x, weight):
        scores = torch.nn.functional.linear(x, weight)
        return scores, scores[:, :2].double(), scores.softmax(-1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight)

        def forward(self, x):
            return net(x, self.weight)

    assert logits(trace(Net(), torch.randn(2, 6))) == [True, True, False]
