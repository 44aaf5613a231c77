"""Comparing a folded model with the original, in float64."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import refold
from refold.rewrite.result import Decline

# A fold in float64 differs from the original by rounding alone: a few hundred additions in another
# order, each 1.1e-16. A dropped bias or a kernel shifted by a tap is at least 1e-3.
EXACT = 1e-12
# The same in float32 for networks of few layers, relative to the output's largest value.
SINGLE = 2e-5


def double(value: Any) -> Any:
    """Floating tensors of a structure in float64; everything else as it is."""

    def convert(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.double() if floating else leaf

    return pytree.tree_map(convert, value)


def call(model: Any, inputs: Sequence[Any] | Mapping[str, Any]) -> Any:
    """The model's output on copies of the inputs."""
    copies = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)
    with torch.no_grad():
        return model(**copies) if isinstance(copies, Mapping) else model(*copies)


def relative_error(actual: Any, expected: Any) -> float:
    """Largest difference over the largest expected value, over all tensors of a structure."""
    left, left_spec = pytree.tree_flatten(actual)
    right, right_spec = pytree.tree_flatten(expected)
    assert left_spec == right_spec, f"output structure {left_spec}, expected {right_spec}"
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        if not isinstance(b, Tensor):
            assert a == b
            continue
        assert a.shape == b.shape, f"shape {tuple(a.shape)}, expected {tuple(b.shape)}"
        if not b.is_floating_point() or not b.numel():
            assert torch.equal(a, b)
            continue
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite), "NaN or infinity in other places"
        a, b = a.double()[finite], b.double()[finite]
        if b.numel():
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)))
    return worst


def fold_double(model: nn.Module, inputs: Sequence[Any], **options: Any) -> Any:
    """Folds a float64 copy and asserts that it equals the original there; returns the fold."""
    original = deepcopy(model).eval().double()
    inputs = double(tuple(inputs))
    expected = call(deepcopy(original), inputs)
    folded = refold.fold(original, inputs, **options)
    error = relative_error(call(folded, inputs), expected)
    assert error <= EXACT, f"relative error {error:.2e}{_listing(folded)}"
    return folded


def declined(folded: Any) -> list[Decline]:
    """Every declined record of a compilation, of nodes that a later pass removed too."""
    return [record for run in folded.report.passes for record in run.declined]


def assert_declined(folded: Any, words: str) -> None:
    """Asserts that some declined record's reason matches a regular expression."""
    records = declined(folded)
    reasons = [f"{record.rule} at {record.node}: {record.reason}" for record in records]
    matches = [r for r in records if re.search(words, r.reason, re.IGNORECASE)]
    assert matches, f"no reason matches {words!r} in {reasons}{_listing(folded)}"
    assert all(record.rule and record.node for record in matches)


def _listing(folded: Any) -> str:
    """The graph, where it is short enough to be read."""
    graph = folded.graph_module.graph
    return f"\n{graph}" if len(graph.nodes) < 80 else ""
