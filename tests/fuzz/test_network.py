"""A drawn network is one thing: as it runs, as a graph, and as the module that is printed."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

from refold.fuzz.contract import copied, relative_error
from refold.fuzz.generate import network_of
from refold.fuzz.network import Drawn, DrawnCall, DrawnNetwork, Held, Value
from refold.fuzz.program import Unsuited, program_of
from refold.fuzz.source import code_of, module_of
from refold.graph import ops

aten = torch.ops.aten


def eager(network: DrawnNetwork) -> object:
    return network.run(network.example(), network.weights())


@pytest.mark.parametrize("seed", range(12))
def test_the_printed_module_computes_the_same(seed: int) -> None:
    network = network_of(seed, effects=True)
    try:
        want = eager(network)
    except RuntimeError:
        pytest.fail("what is drawn runs")
    got = module_of(network)(*network.arguments(network.example()))
    pytree.tree_map(torch.testing.assert_close, got, want)


def test_graphs_compute_the_same() -> None:
    written = 0
    for seed in range(24):
        network = network_of(seed)
        for dynamic in (False, True):
            try:
                program = program_of(network, dynamic=dynamic)
            except Unsuited:  # no shape function, or a size that a call fixes
                continue
            written += 1
            got = program.graph_module(*copied(network.example()))
            assert relative_error(tuple(got), tuple(pytree.tree_leaves(eager(network)))) <= 1e-12
    assert written >= 30, "most networks can be written as a graph"


def reshaping(sizes: list[int]) -> DrawnNetwork:
    steps = (DrawnCall(aten.reshape.default, (Value(0), sizes)),)
    return DrawnNetwork((Drawn("normal", (2, 4)),), {}, steps, (Value(1),), (True,))


def test_a_fixed_batch_is_no_dynamic_graph() -> None:
    with pytest.raises(Unsuited):
        program_of(reshaping([2, 2, 2]), dynamic=True)
    program = program_of(reshaping([-1, 2, 2]), dynamic=True)
    assert isinstance(program.inputs[0].sizes[0], str)
    assert program.graph_module(torch.ones(5, 4))[0].shape == (5, 2, 2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_size_that_does_not_vary_is_a_number(dynamic: bool) -> None:
    steps = (
        DrawnCall(aten.sym_size.int, (Value(0), 0)),
        DrawnCall(aten.ones.default, ([Value(1), 3],)),
    )
    network = DrawnNetwork((Drawn("normal", (2, 4)),), {}, steps, (Value(2),), (True,))
    graph = program_of(network, dynamic=dynamic).graph_module.graph
    assert [ops.op_name(n) for n in graph.nodes if n.op == "call_function"] == [
        *(["sym_size"] if dynamic else []), "ones"
    ]  # fmt: skip


def test_what_writes_is_no_graph() -> None:
    steps = (DrawnCall(aten.relu_.default, (Value(0),)),)
    with pytest.raises(Unsuited):
        program_of(
            DrawnNetwork((Drawn("normal", (2,)),), {}, steps, (Value(1),), (True,)), dynamic=False
        )


def test_pruning_keeps_writes_and_drops_what_nothing_reads() -> None:
    x = Value(0)
    steps = (
        DrawnCall(aten.mul.Tensor, (x, 2.0)),  # nothing reads it
        DrawnCall(aten.add_.Tensor, (x, Held("w"))),
        DrawnCall(aten.neg.default, (x,)),
    )
    held = {"w": Drawn("normal", (4,)), "lost": Drawn("normal", (9,))}
    network = DrawnNetwork((Drawn("normal", (2, 4)),), held, steps, (Value(3),), (True,))
    pruned = network.pruned()
    assert pruned.operators == ["add_", "neg"]
    assert list(pruned.held) == ["w"]
    assert pruned.outputs == (Value(2),)
    torch.testing.assert_close(eager(pruned), eager(network))


@pytest.mark.parametrize(
    "kind", ["normal", "positive", "unit", "sparse", "full", "integers", "mask", "complex"]
)
def test_printed_tensors_are_the_same(kind: str) -> None:
    dtype = {"integers": torch.int64, "complex": torch.complex128}.get(kind, torch.float64)
    drawn = Drawn(kind, (3, 4), dtype, 7, 3 if kind in ("full", "integers") else 0)
    scope: dict[str, object] = {}
    exec(code_of(DrawnNetwork((drawn,), {}, (), (Value(0),), (True,))), scope)
    (printed,) = scope["inputs"]  # type: ignore[misc]
    assert torch.equal(printed, drawn.make())


def test_a_seed_draws_the_same_whatever_ran_before() -> None:
    """The catalogue of calls keeps data that operators are tried on, and some write into theirs."""
    first = code_of(network_of(77))
    for seed in range(60, 76):
        network_of(seed)
    torch.manual_seed(1)
    assert code_of(network_of(77)) == first
