"""Pads that the next call makes by itself, and those that stay."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import nn

from refold.passes import PIPELINES
from refold.passes.prepare.clean_up import CleanUp
from tests.examples import few
from tests.folding import Net, image, left, run


@pytest.mark.parametrize(
    ("forward", "calls"),
    few([
        (lambda s, x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1), {"avg-pool": 1}),
        (lambda s, x: F.avg_pool2d(F.pad(x, (1, 1)), 4, 2, padding=1), {"avg-pool": 1}),
        (lambda s, x: F.avg_pool2d(F.pad(x, (1, 1)), 3, 2, divisor_override=5), {"avg-pool": 1}),
        (lambda s, x: F.avg_pool2d(F.pad(x, (1, 1)), 3, count_include_pad=False), {"avg-pool": 1}),
        (lambda s, x: F.avg_pool1d(F.pad(x.flatten(2), (1, 1)), 2, 1), {"avg-pool": 1}),
        (lambda s, x: F.pad(F.pad(x, (1, 1)), (0, 2, 3, 0)), {"pad": 1}),
        (lambda s, x: F.pad(F.pad(x, (1, 0), value=2.0), (0, 2), value=2.0), {"pad": 1}),
        (lambda s, x: F.avg_pool2d(F.pad(F.pad(x, (1, 0)), (0, 1)), 3), {"avg-pool": 1}),
    ], 5),
)  # fmt: skip
def test_one_call_pads(forward, calls) -> None:
    after, _ = run(CleanUp(), Net(forward), image())
    assert left(after) == calls
    assert not CleanUp().run(after).applied


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: F.avg_pool2d(F.pad(x, (1, 0, 1, 0)), 3, 1),  # one side alone
        lambda s, x: F.avg_pool2d(F.pad(x, (2, 2)), 3, 1),  # more than half of the window
        lambda s, x: F.avg_pool2d(F.pad(x, (1, 1)), 4, 1, padding=2),
        lambda s, x: F.avg_pool2d(F.pad(x, (1, 1), value=1.0), 3, 1),
        lambda s, x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), "replicate"), 3, 1),
        lambda s, x: F.avg_pool2d(F.pad(x, (1, 1)), 3, 2, ceil_mode=True),
        lambda s, x: F.avg_pool2d(F.pad(x, (1, 1)), 3, 2, padding=1, count_include_pad=False),
        lambda s, x: F.avg_pool2d(F.pad(x, (0, 0, 0, 0, 1, 1)), 3),  # channels
        lambda s, x: F.pad(F.pad(x, (1, 1)), (1, 1), value=1.0),
        lambda s, x: F.pad(F.pad(x, (1, 1)), (1, 1, 1, 1), "reflect"),
        lambda s, x: F.pad(F.pad(x, (1, 1)), (-2, 1)),  # cuts what was put
        lambda s, x: F.pad(F.pad(x, (-1, 2)), (1, 1)),  # puts zeros where it cut
        lambda s, x: (lambda y: F.avg_pool2d(y, 3) + y.sum())(F.pad(x, (1, 1))),
    ],
)
def test_other_pads_stay(forward) -> None:
    after, _ = run(CleanUp(), Net(forward), image())
    kinds = left(after)
    assert kinds["pad"] == (2 if "avg-pool" not in kinds else 1)


@pytest.mark.parametrize(
    ("forward", "layer"),
    [
        (lambda s, x: s.c(F.pad(x.tanh(), (0, 0, 1, 1, 1, 1)).permute(0, 3, 1, 2)),
         nn.Conv2d(6, 3, 3)),
        (lambda s, x: s.c(F.pad(x.tanh().flatten(2), (0, 0, 1, 1)).transpose(1, 2)),
         nn.Conv1d(42, 3, 3)),
        (lambda s, x: s.c(F.pad(x.tanh().flatten(2), (0, 0, 2, 1)).mT), nn.Conv1d(42, 3, 3)),
    ],
)  # fmt: skip
def test_a_pad_before_a_permutation_reaches_the_convolution(forward, layer) -> None:
    after, _ = run(PIPELINES["default"].passes, Net(forward, c=layer), image())
    assert left(after) == {"tanh": 1, "conv": 1}


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: F.pad(x, (0, 0, 1, 1)).permute(0, 3, 1, 2).relu(),  # no convolution
        lambda s, x: s.c(F.pad(x, (1, 1)).permute(0, 3, 1, 2)),  # its channels
        lambda s, x: (lambda y: s.d(y) + y.sum())(F.pad(x, (0, 0, 1, 1)).permute(0, 3, 1, 2)),
    ],
)
def test_other_pads_before_a_permutation_stay(forward) -> None:
    net = Net(forward, c=nn.Conv2d(8, 3, 3), d=nn.Conv2d(6, 3, 3))
    after, _ = run(CleanUp(), net, image())
    order = [n.target.__name__ for n in after.graph.nodes if n.op == "call_function"]
    assert order.index("pad.default") < order.index("permute.default")
