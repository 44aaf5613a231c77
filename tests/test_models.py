"""Training-form networks of many papers fold at least as far as their authors' own form."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

import refold
from refold.graph.constants import constant_nodes
from tests.compare import SINGLE, call, double, fold_double, relative_error
from tests.examples import few
from tests.models import MODELS, counts


@pytest.mark.parametrize("name", few(MODELS, 18))
def test_float64_equality_and_counts(name: str) -> None:
    case = MODELS[name]
    folded = fold_double(case.model(), case.inputs())
    found = counts(folded.graph_module)
    more = {k: found.get(k, 0) for k, most in case.expected.items() if found.get(k, 0) > most}
    assert not more, f"left {more}, expected at most {dict(case.expected)}: {found}"
    computed = [n for n in constant_nodes(folded.graph_module.graph) if n.op == "call_function"]
    assert not computed, "computation of parameters alone is left"


@pytest.mark.parametrize("name", few(MODELS, 6))
def test_float32_verified_and_the_original_untouched(name: str) -> None:
    case = MODELS[name]
    model, inputs = case.model(), case.inputs()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    oracle = call(deepcopy(model).double(), double(inputs))
    folded = refold.fold(model, inputs)
    assert relative_error(call(folded, inputs), oracle) <= SINGLE
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), f"{key} was written"
