"""Layouts that are known without executing them move a scale and shift as those executed do."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from refold.graph import layout
from refold.passes.scale_shift.absorb_scale_shift import AbsorbScaleShift
from refold.rewrite.pipeline import Pipeline
from tests.tracing import trace

aten = torch.ops.aten
CASES = [
    (aten.reshape.default, (6, 8), ([2, 3, 4, 2],), (1, 8)),
    (aten.reshape.default, (2, 3, 4, 2), ([6, 8],), (1, 1, 4, 2)),
    (aten.reshape.default, (2, 3, 4), ([2, 12],), (1, 3, 1)),
    (aten.reshape.default, (2, 12), ([2, 3, 4],), (1, 12)),
    (aten.flatten.using_ints, (2, 3, 4), (), (2, 1, 4)),
    (aten.unsqueeze.default, (2, 3), (1,), (1, 3)),
    (aten.permute.default, (2, 3, 4), ([2, 0, 1],), (1, 3, 4)),
    (aten.transpose.int, (2, 3, 4), (-1, 0), (2, 1, 1)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_known_layouts_agree_with_executed_ones(
    case: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, sizes, arguments, varying = case
    graph = fx.Graph()
    source = graph.placeholder("x")
    source.meta["val"] = torch.empty(sizes, device="meta")
    node = graph.call_function(target, (source, *arguments))
    node.meta["val"] = target(source.meta["val"], *arguments)
    pair = (torch.rand(varying).double(), torch.ones((1,) * len(sizes)).double())

    assert layout._known(node, source, node, pair) is not None
    pushed = layout.push(node, source, pair, graph)
    pulled = layout.pull(node, source, pushed, False, graph)
    monkeypatch.setattr(layout, "_known", lambda *_: None)
    executed = layout.push(node, source, pair, graph)
    for known, other in zip(pushed, executed, strict=True):
        assert torch.equal(known, other)
    for known, other in zip(pulled, layout.pull(node, source, executed, False, graph), strict=True):
        assert torch.equal(known, other)
    assert torch.equal(pulled[0], pair[0])


def test_a_view_of_other_bits_is_no_layout() -> None:
    graph = fx.Graph()
    source = graph.placeholder("x")
    assert layout.is_layout(graph.call_function(aten.view.default, (source, [2])))
    assert not layout.is_layout(graph.call_function(aten.view.dtype, (source, torch.bfloat16)))


def test_an_empty_part_takes_any_scale() -> None:
    """A split gives an empty part where two of its places are one."""
    for sizes in ((0, 3), (2, 0), (0,)):
        found = layout.reduce(torch.empty(sizes), None, 0.0)
        assert found.shape == (1,) * len(sizes)
    scaled = lambda v: torch.vsplit(v * torch.arange(1.0, 4.0), (1, 1))[1].sum()
    split = trace(scaled, torch.ones(2, 3))
    (run,) = Pipeline("test", (AbsorbScaleShift(),)).run(split, debug=True).runs
    assert not any(d.failed for d in run.result.declined)
