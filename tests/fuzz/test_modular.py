"""The exact judge finds what float64 cannot see, and nothing where a rewrite is an identity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refold
from refold.fuzz.modular import DIFFERENT, EQUAL, UNJUDGED, Judgement, judge, judge_graphs
from refold.graph.copies import copy_sharing_tensors
from refold.refit.tape import StepValue, TapeStep
from tests.examples import few
from tests.folding import Net, image
from tests.models.patterns import PATTERNS
from tests.models.random_graphs import RandomGraph
from tests.randomise import randomise

aten = torch.ops.aten


def compiled(model: nn.Module, *inputs: Tensor, **options: Any) -> refold.CompiledModel:
    return refold.compile_for_inference(
        model, inputs, target="torch", verify=False, recipe=True, **options
    )


def judged(model: nn.Module, *inputs: Tensor, **options: Any) -> Judgement:
    return judge(compiled(model, *inputs, **options)._done, (inputs, {}))


@pytest.mark.parametrize("name", few(PATTERNS, 8))
def test_patterns_fold_to_what_is_equal(name: str) -> None:
    pattern = PATTERNS[name]
    torch.manual_seed(0)
    x = torch.randn(pattern.shape)
    model = randomise(pattern.model(), (x,), 0).double()
    assert judged(model, x.double()) == Judgement(EQUAL)


@pytest.mark.parametrize("seed", few(range(12), 4))
def test_random_graphs_fold_to_what_is_equal(seed: int) -> None:
    model = RandomGraph(seed, steps=6 + seed % 10)
    assert judged(model, model.example) == Judgement(EQUAL)


def conv_norm() -> nn.Module:
    parts = {"conv": nn.Conv2d(4, 4, 3), "norm": nn.BatchNorm2d(4)}
    return Net(lambda s, x: torch.tanh(s.norm(s.conv(x))), **parts)


@pytest.mark.parametrize("factor", [1 + 1e-9, 1 + 2.0**-51])
def test_a_difference_of_1e_9_is_found(factor: float) -> None:
    """In the arithmetic that makes one constant, and in the graph."""
    x = image()
    done = compiled(conv_norm(), x)._done
    assert judge(done, ((x,), {})).kind == EQUAL
    kept = done.kept
    assert kept is not None
    for name, slot in kept.recipe.tape.results.items():
        tape = kept.recipe.tape
        wrong = TapeStep(aten.mul.Tensor, (StepValue(slot), factor), {}, (-1 - slot + 10**6,))
        planted = type(tape)(
            [*tape.steps, wrong], tape.sources, tape.literals,
            {**tape.results, name: wrong.out[0]},
        )  # fmt: skip
        found = judge_graphs(kept.original, done.graph_module, planted, ((x,), {}))
        assert found.kind == DIFFERENT
        assert "output 0 differs in" in found.reason
    gm = copy_sharing_tensors(done.graph_module)
    (tanh,) = gm.graph.find_nodes(op="call_function", target=aten.tanh.default)
    with gm.graph.inserting_before(tanh):
        scaled = gm.graph.call_function(aten.mul.Tensor, (tanh.args[0], factor))
    tanh.replace_input_with(tanh.args[0], scaled)
    assert judge_graphs(kept.original, gm, kept.recipe.tape, ((x,), {})).kind == DIFFERENT


def test_other_sizes_are_compared_too() -> None:
    x = image()
    done = compiled(conv_norm(), x)._done
    for batch in (1, 5):
        assert judge(done, ((x[:1].expand(batch, -1, -1, -1),), {})) == Judgement(EQUAL)


def test_what_no_recipe_makes_is_not_judged() -> None:
    x = image()
    done = refold.compile_for_inference(conv_norm(), (x,), target="torch", verify=False)._done
    assert judge(done, ((x,), {})) == Judgement(
        UNJUDGED, "no recipe says how the constants are made"
    )


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda s, x: x.argmax(1) + s.c(x).sum().long(), "argmax has no formula over residues"),
        (lambda s, x: s.c(x).long(), "an integer is made of a floating value"),
        (lambda s, x: torch.fft.rfft(s.c(x)).real, "fft_rfft has no formula over residues"),
        (lambda s, x: s.c(x) / (x - x), "something is divided by zero"),
        (lambda s, x: torch.frexp(s.c(x)).mantissa, "frexp has no formula over residues"),
    ],
)
def test_what_has_no_residue_is_not_judged(forward: Any, reason: str) -> None:
    model = Net(forward, c=nn.Conv2d(4, 4, 1))
    assert judged(model, image()) == Judgement(UNJUDGED, reason)


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: torch.outer(s.c(x).flatten(), torch.tensor([True, False])),
        lambda s, x: torch.kron(torch.tensor([[2, 3]]), s.c(x)),
        lambda s, x: nn.functional.linear(s.c.bias.softmax(0), s.c.weight[:, :, 0, 0]) + x.sum(),
        lambda s, x: torch.var_mean(s.c(x).sum(), dim=0, correction=0)[1],
    ],
)
def test_integers_and_single_numbers_have_residues(forward: Any) -> None:
    assert judged(Net(forward, c=nn.Conv2d(4, 4, 1)), image()) == Judgement(EQUAL)


def test_a_function_of_numbers_alone_is_not_judged() -> None:
    """What the tape computes apart is rounded there, and was exact beside the weight."""
    net = Net(
        lambda s, x: x * torch.ops.aten.rms_norm(torch.ones(4, dtype=x.dtype), [4], s.p, 1e-5),
        p=torch.randn(4),
    )  # fmt: skip
    assert judged(net, torch.randn(2, 4).double()).kind == UNJUDGED


def test_an_output_that_differs_counts_though_another_is_not_judged() -> None:
    x = image()
    model = Net(lambda s, x: (s.c(x).argmax(1), s.n(s.c(x))), c=nn.Conv2d(4, 4, 1),
                n=nn.BatchNorm2d(4))  # fmt: skip
    done = compiled(model, x)._done
    assert judge(done, ((x,), {})).kind == UNJUDGED
    gm = copy_sharing_tensors(done.graph_module)
    (output,) = gm.graph.find_nodes(op="output")
    places, values = output.args[0]
    output.args = ((places, x_of(gm, values)),)
    kept = done.kept
    assert kept is not None
    found = judge_graphs(kept.original, gm, kept.recipe.tape, ((x,), {}))
    assert found.kind == DIFFERENT
    assert found.reason.startswith("output 1 differs")


def x_of(gm: Any, values: Any) -> Any:
    with gm.graph.inserting_after(values):
        return gm.graph.call_function(aten.neg.default, (values,))
