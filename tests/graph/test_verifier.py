from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from refold.errors import VerifierError
from refold.graph import constants, printer
from refold.graph.verifier import signature, verify
from tests.tracing import find, trace

aten = torch.ops.aten
T = torch.randn(2, 4, 3, 3)


def broken(graph, change, message: str, **options) -> None:
    contract = signature(graph)
    verify(graph, contract, repropagate=True)
    change(graph)
    with pytest.raises(VerifierError, match=message):
        verify(graph, contract, **options)


def retarget(name, target, **meta):
    def change(gm):
        node = find(gm, name)
        node.target = target
        node.meta.update(meta)

    return change


def return_(pick):
    def change(gm):
        (old,) = gm.graph.output_node().args
        gm.graph.output_node().args = (type(old)(pick(gm, *old)),)

    return change


def test_a_missing_fake_value_is_shown_with_its_lines() -> None:
    graph = trace(lambda v: torch.relu(torch.sigmoid(v)) + 1, T)
    contract = signature(graph)
    del find(graph, "relu").meta["val"]
    with pytest.raises(VerifierError) as caught:
        verify(graph, contract)
    text = str(caught.value)
    assert "%relu: has no fake value" in text
    assert "> %relu : none = relu(%sigmoid)" in text
    assert "  %sigmoid :" in text


def test_a_missing_or_stale_constant() -> None:
    broken(trace(nn.Linear(3, 3), T), lambda gm: delattr(gm, "weight"), "does not have")

    def shrink(gm):
        gm.weight = nn.Parameter(torch.ones(2, 3))

    broken(trace(nn.Linear(3, 3), T), shrink, "its fake value says")


def test_changed_outputs() -> None:
    def model(v):
        return torch.relu(v), torch.sigmoid(v)

    for pick, message in (
        (lambda gm, a, b: (a,), "structure"),
        (lambda gm, a, b: (a, 3), "output 1 changed"),
    ):
        broken(trace(model, T), return_(pick), message)

    def other(value):
        return lambda gm: find(gm, "relu").meta.update(val=value)

    broken(trace(model, T), other(torch.empty(2, 4, device="meta")), "output 0 was")
    broken(trace(model, T), other(torch.empty(T.shape).double()), "float64")


def test_new_sharing_of_outputs() -> None:
    def model(v, w):
        return torch.relu(v), torch.sigmoid(w)

    first = return_(lambda gm, a, b: (a, a))
    broken(trace(model, T, T), first, "output 0 now shares storage with output 1")
    to_input = return_(lambda gm, a, b: (next(iter(gm.graph.nodes)), b))
    broken(trace(model, T, T), to_input, "output 0 now shares storage with input args_0")

    def viewed(gm):
        with gm.graph.inserting_before(gm.graph.output_node()):
            a, _ = gm.graph.output_node().args[0]
            made = gm.graph.call_function(aten.view.default, (a, list(T.shape)))
            made.meta["val"] = a.meta["val"].view(T.shape)
        gm.graph.output_node().args = ((a, made),)

    broken(trace(model, T, T), viewed, "output 0 now shares storage with output 1")

    def constant(gm):
        with gm.graph.inserting_before(gm.graph.output_node()):
            made = constants.add(gm, "answer", torch.ones(T.shape))
        gm.graph.output_node().args = ((made, gm.graph.output_node().args[0][1]),)

    broken(trace(model, T, T), constant, "shares storage with a constant")


def test_sharing_that_was_there_is_allowed() -> None:
    for model in (
        lambda v: (v, v.transpose(1, 2)),
        lambda v: (lambda r: (r, r.view(2, -1)))(torch.relu(v)),
        lambda v: torch.chunk(torch.relu(v), 2, 1),
    ):
        graph = trace(model, T)
        contract = signature(graph)
        assert contract.sharing
        verify(graph, contract, repropagate=True)


def test_copies_do_not_count_as_sharing() -> None:
    graph = trace(
        lambda v: (v, v.transpose(1, 2).contiguous(), v.transpose(1, 2).reshape(2, -1)), T
    )
    assert signature(graph).sharing == {("output 0", "input args_0")}


def test_writes_stay_in_number_and_order() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(3))

        def forward(self, v):
            self.count.add_(1)
            return v + 1

    graph = trace(Counter(), torch.ones(3))
    contract = signature(graph)
    (write,) = [n for n in graph.graph.nodes if constants.is_mutation(n)]
    write.replace_all_uses_with(write.args[0])
    graph.graph.erase_node(write)
    with pytest.raises(VerifierError, match="the graph wrote"):
        verify(graph, contract)


def test_malformed_graphs_and_changed_inputs() -> None:
    def use_before_definition(gm):
        find(gm, "sigmoid").prepend(find(gm, "relu"))

    broken(trace(lambda v: torch.relu(torch.sigmoid(v)), T), use_before_definition, "malformed")

    def extra_input(gm):
        gm.graph.inserting_before(next(iter(gm.graph.nodes)))
        gm.graph.placeholder("extra").meta["val"] = None

    broken(trace(lambda v: torch.relu(v), T), extra_input, "inputs changed")


def test_propagation_finds_stale_values_and_calls_that_do_not_run() -> None:
    def model(v):
        return torch.relu(v).sum(1) * 2

    graph = trace(model, T)
    contract = signature(graph)
    find(graph, "sum").args = (find(graph, "relu"), [2])
    verify(graph, contract)  # the cheap checks do not look inside
    with pytest.raises(VerifierError, match="%sum_1: its fake value is stale"):
        verify(graph, contract, repropagate=True)
    find(graph, "sum").args = (find(graph, "relu"), [7])
    with pytest.raises(VerifierError, match="%sum_1: does not run on its inputs"):
        verify(graph, contract, repropagate=True)


def test_dynamic_sizes() -> None:
    graph = trace(lambda v: torch.relu(v).flatten(1), T, dynamic=True)
    verify(graph, signature(graph), repropagate=True)


@pytest.mark.slow
def test_the_cheap_checks_are_cheap() -> None:
    def model(v):
        for _ in range(400):
            v = torch.relu(v).transpose(1, 2)
        return v

    graph = trace(model, T)
    contract = signature(graph)
    best = min(_timed(lambda: verify(graph, contract)) for _ in range(5))
    assert best < 0.1  # about 6 ms for 800 nodes on an idle core


def _timed(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def test_higher_order_calls_are_passed_over() -> None:
    class Branching(nn.Module):
        def forward(self, v):
            return torch.cond(v.sum() > 0, lambda t: t * 2, lambda t: t * 3, (torch.relu(v),)) + 1

    graph = trace(Branching(), T)
    verify(graph, signature(graph), repropagate=True)
    assert "cond(" in printer.render(graph)
