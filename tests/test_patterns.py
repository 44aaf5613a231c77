"""Each one-pattern net folds to its optimum, and to the same numbers."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

import refold
from tests.compare import SINGLE, call, double, fold_double, relative_error
from tests.examples import few
from tests.models.patterns import PATTERNS, Pattern, compute_nodes
from tests.randomise import randomise

# Patterns whose optimum costs more than the original: `default` declines, `min-nodes` reaches it.
DEARER: frozenset[str] = frozenset()


def _model(pattern: Pattern, seed: int = 0) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(seed)
    inputs = (torch.randn(pattern.shape),)
    return randomise(pattern.model(), inputs, seed), inputs


@pytest.mark.parametrize("name", PATTERNS)
def test_folds_to_the_optimum_in_float64(name: str) -> None:
    pattern = PATTERNS[name]
    model, inputs = _model(pattern)
    pipeline = "min-nodes" if name in DEARER else "default"
    folded = fold_double(model, inputs, pipeline=pipeline)
    left = compute_nodes(folded.graph_module)
    assert left <= pattern.optimum, (
        f"{left} nodes left, {pattern.optimum} are enough\n{folded.graph_module.graph}"
    )


@pytest.mark.parametrize("name", few(PATTERNS, 12))
def test_float32_stays_at_the_rounding_of_the_original(name: str) -> None:
    model, inputs = _model(PATTERNS[name], seed=1)
    oracle = call(deepcopy(model).double(), double(inputs))
    folded = refold.fold(model, inputs)  # verifies, and raises past the tolerance
    assert compute_nodes(folded.graph_module) <= PATTERNS[name].optimum or name in DEARER
    assert relative_error(call(folded, inputs), oracle) <= SINGLE
    for batch in (1, 5):
        x = torch.randn(batch, *inputs[0].shape[1:])
        assert relative_error(call(folded, (x,)), call(model, (x,))) <= SINGLE
