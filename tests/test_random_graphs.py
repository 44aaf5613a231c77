"""Differential test: random networks, folded by every pipeline, against themselves in float64."""

from __future__ import annotations

import pytest
import torch

import refold
from tests.compare import EXACT, relative_error
from tests.examples import few
from tests.models.random_graphs import RandomGraph


def check(seed: int, pipeline: str) -> None:
    model = RandomGraph(seed, steps=6 + seed % 10)
    folded = refold.fold(model, (model.example,), pipeline=pipeline, verify=False)
    with torch.no_grad():
        for batch in (1, 2, 3):
            x = torch.randn(batch, *model.example.shape[1:], dtype=torch.float64)
            error = relative_error(folded(x), model(x))
            assert error <= 10 * EXACT, (seed, error, "\n".join(model.log))


@pytest.mark.parametrize("seed", few(range(20), 8))
def test_random_graphs(seed: int) -> None:
    check(seed, "default")


@pytest.mark.sweep
@pytest.mark.parametrize("pipeline", ["default", "min-nodes"])
@pytest.mark.parametrize("seed", range(100, 180))
def test_more_random_graphs(seed: int, pipeline: str) -> None:
    check(seed, pipeline)
