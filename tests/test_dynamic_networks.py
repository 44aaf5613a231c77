"""Networks that decide on their data what to run: compiled around the decision, or refused.

Chen et al., DyCL: Dynamic Neural Network Compilation Via Program Rewriting and Graph Optimization,
2023 (static parts around a host's control flow). Regol et al., Jointly-Learned Exit and Inference
for a Dynamic Neural Network (JEI-DNN), 2024 (early exits behind learned gates).
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refold
from refold.errors import FrontendError, UsageError
from refold.frontends.export import trace
from refold.graph import ops, subgraphs
from refold.graph.copies import copy_sharing_tensors
from refold.passes import PIPELINES
from tests.compare import EXACT, SINGLE, relative_error
from tests.examples import few
from tests.models.systems.dynamic import (
    EarlyExit,
    ExitPerSample,
    PythonExit,
    SkippedBlocks,
    choose,
    prepared,
    sureness,
)


def images(*signs: tuple[float, float], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Two images each, of which the first two channels' means have these signs."""
    shift = torch.tensor(signs, dtype=dtype).view(-1, 1, 2, 1, 1)
    shift = F.pad(shift, (0, 0, 0, 0, 0, 1))
    return list(torch.randn(len(signs), 2, 3, 8, 9, dtype=dtype) * 0.5 + 2 * shift)


BOTH = ((1.0, 1.0), (-1.0, -1.0))
ALL = ((1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0))


def census(gm: Any) -> dict[str, int]:
    """Calls by kind, branches too."""
    graphs = list(subgraphs.walk(gm))
    return {
        kind: sum(ops.census(g.graph)[kind] for g in graphs)
        for kind in ("conv", "batch-norm", "cond", "linear")
    }


@pytest.mark.parametrize(
    ("build", "signs", "convs", "conds"),
    few([(EarlyExit, BOTH, 3, 1), (SkippedBlocks, ALL, 5, 3)], 1),
)
def test_branches_fold_and_every_outcome_is_equal(
    build: Callable[[], nn.Module], signs: Any, convs: int, conds: int
) -> None:
    model = prepared(build).double()
    inputs = images(*signs)
    folded = refold.fold(deepcopy(model), inputs[0], expect={"batch-norm": convs})
    left = census(folded.graph_module)
    assert (left["batch-norm"], left["conv"], left["cond"]) == (0, convs, conds)
    results = [folded(x) for x in inputs]
    for x, result in zip(inputs, results, strict=True):
        assert relative_error(result, model(x)) <= EXACT
        assert relative_error(folded(x[:1]), model(x[:1])) <= EXACT
    assert any("decided at run time" in note for note in folded.report.notes)


def test_the_outcomes_differ() -> None:
    """The inputs above do take both ways."""
    model = prepared(EarlyExit).double()
    for x, way in zip(images(*BOTH), (model.leave, model.stay), strict=True):
        assert torch.equal(model(x), way(F.relu(model.stem(x))))


@pytest.mark.slow
def test_onnx_if_takes_both_ways(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = prepared(EarlyExit)
    inputs = images(*BOTH, dtype=torch.float32)
    compiled = refold.compile_for_inference(model, inputs[0], target="ort")
    graph = onnx.load(compiled.save(tmp_path / "exit.onnx")).graph
    (decision,) = [node for node in graph.node if node.op_type == "If"]
    ways = [[n.op_type for n in a.g.node].count("Conv") for a in decision.attribute]
    assert sorted(ways) == [0, 2]
    assert "BatchNormalization" not in str(graph)
    for x in inputs:
        assert relative_error(compiled(x), deepcopy(model).double()(x.double())) <= SINGLE


def test_weights_that_both_branches_read_are_stored_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return choose(x.mean() > 0, lambda x: F.relu(self.head(x)), self.head, (x,))

    x = torch.randn(3, 4)
    model = prepared(Shared)
    folded = refold.fold(model, x)
    assert folded.report.after.parameters == 20
    (cond,) = subgraphs.conds(folded.graph_module)
    assert len(cond.args[3]) == 3
    for sign in (-1, 1):
        assert relative_error(folded(x.abs() * sign), model(x.abs() * sign)) <= SINGLE


@pytest.mark.slow
def test_excluded_modules_inside_a_branch_stay() -> None:
    model = prepared(EarlyExit).double()
    (x, y) = images(*BOTH)
    folded = refold.fold(deepcopy(model), x, exclude=["deep.0"])
    assert census(folded.graph_module)["batch-norm"] == 1
    assert relative_error(folded(y), model(y)) <= EXACT
    with pytest.raises(UsageError, match=r"did you mean 'deep\.0"):
        refold.fold(deepcopy(model), x, exclude=["depp.0"])


@pytest.mark.slow
def test_the_caller_s_program_keeps_its_branches() -> None:
    model = prepared(EarlyExit)
    x = images(BOTH[0], dtype=torch.float32)[0]
    program = torch.export.export(model, (x,), strict=False)
    before = census(program.module(check_guards=False))
    refold.fold(program)
    assert census(program.module(check_guards=False)) == before
    assert before["batch-norm"] == 3


@pytest.mark.slow
def test_a_copy_of_the_graph_keeps_its_branches() -> None:
    model = prepared(SkippedBlocks).double()
    inputs = images(*ALL)
    with torch.no_grad():
        gm = trace(model, (inputs[0],), {}).graph_module
        original = copy_sharing_tensors(gm)
        PIPELINES["default"].run(gm)
        for x in inputs:
            assert torch.equal(original(x), model(x))
    assert census(original)["batch-norm"] == 5


@pytest.mark.slow
def test_consumed_weights_inside_branches_are_released() -> None:
    model, kept = prepared(EarlyExit).double(), prepared(EarlyExit).double()
    inputs = images(*BOTH)
    folded = refold.fold(model, inputs[0], consume=True)
    assert model.deep[0][0].weight.numel() == 0
    assert model.late.weight.numel() > 0
    for x in inputs:
        assert relative_error(folded(x), kept(x)) <= EXACT


def test_a_python_branch_on_data_is_refused_with_the_fix() -> None:
    x = images(BOTH[0], dtype=torch.float32)[0]
    with pytest.raises(FrontendError, match=r"torch\.cond"):
        refold.fold(prepared(PythonExit), x)


def test_exits_of_single_samples_are_the_same() -> None:
    """As learned exits are evaluated in a batch: the decision is data, not control flow."""
    model = prepared(ExitPerSample).double()
    x = torch.randn(1000, 3, 4, 4, dtype=torch.float64)
    medians = [sureness(logits).median() for logits in model.exits(x)[:2]]
    model.gates.copy_(torch.stack(medians) + 1e-7)  # no sample lies on the threshold
    folded = refold.fold(deepcopy(model), x[:2], expect={"batch-norm": 3})
    logits, place = model(x)
    assert min(place.bincount(minlength=3)) > 100
    found, taken = folded(x)
    assert torch.equal(taken, place)
    assert relative_error(found, logits) <= EXACT
