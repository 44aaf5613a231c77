"""What a norm ends with goes into all that reads it; recurrent layers take scales and shifts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from refold.graph import printer
from refold.graph.ops import op_name
from refold.passes.batch_norm.fold_batch_norm import FoldBatchNorm
from refold.passes.scale_shift.absorb_scale_shift import AbsorbScaleShift
from tests import golden
from tests.examples import few
from tests.folding import Net, image, left, run
from tests.tracing import trace

ABSORB = AbsorbScaleShift()


def sequence() -> Tensor:
    return torch.randn(2, 5, 8, dtype=torch.float64)


def affine_parts(gm: fx.GraphModule) -> list[fx.Node]:
    """What the one norm of a graph reads beside its input."""
    (norm,) = (n for n in gm.graph.nodes if n.op == "call_function" and "norm" in op_name(n))
    return [a for a in norm.args[1:] if isinstance(a, fx.Node)]


def test_golden() -> None:
    net = Net(lambda s, x: s.f(s.n(x)), n=nn.LayerNorm(8), f=nn.Linear(8, 4))
    before = printer.render(trace(net, sequence(), dynamic=True))
    after, _ = run(ABSORB, net, sequence())
    golden.check("norm_into_readers", f"{before}\n---\n{printer.render(after)}")


@pytest.mark.parametrize(
    ("norm", "layer", "x"),
    few([
        (nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 1), image()),
        (nn.InstanceNorm2d(4, affine=True), nn.Conv2d(4, 3, 3, stride=2), image()),
        (nn.LayerNorm(8), nn.Linear(8, 3), sequence()),
        (nn.LayerNorm((5, 8), bias=False), nn.Sequential(nn.Flatten(), nn.Linear(40, 3)),
         sequence()),
        (nn.LayerNorm(8), nn.Linear(8, 3, bias=False), sequence()),
        (nn.RMSNorm(8), nn.Linear(8, 3, bias=False), sequence()),
        (nn.LayerNorm(8), nn.LSTM(8, 3, 2, batch_first=True, bidirectional=True), sequence()),
        (nn.LayerNorm(8), nn.LSTM(8, 6, proj_size=3), sequence()),
        (nn.LayerNorm(8), nn.GRU(8, 3, batch_first=True), sequence()),
        (nn.RMSNorm(8), nn.GRU(8, 3, bias=False), sequence()),
        (nn.LayerNorm(8), nn.RNN(8, 3, nonlinearity="relu", batch_first=True), sequence()),
        (nn.LayerNorm(8), nn.GRUCell(8, 3), sequence()[:, 0]),
        (nn.RMSNorm(8), nn.LSTMCell(8, 3, bias=False), sequence()[:, 0]),
    ], 7),
)  # fmt: skip
def test_every_reader_takes_it(norm, layer, x) -> None:
    net = Net(lambda s, x: torch.utils._pytree.tree_leaves(s.f(s.n(x)))[0], n=norm, f=layer)
    after, declined = run(ABSORB, net, x)
    assert not affine_parts(after), after.graph
    assert not declined
    assert not ABSORB.run(after).applied


def test_several_readers_take_it_through_layouts() -> None:
    net = Net(
        lambda s, x: (lambda y: s.f(y) * s.g(y.transpose(0, 1)).transpose(0, 1))(s.n(x)),
        n=nn.LayerNorm(8), f=nn.Linear(8, 4), g=nn.Linear(8, 4),
    )  # fmt: skip
    after, _ = run(ABSORB, net, sequence())
    assert not affine_parts(after)


@pytest.mark.parametrize(
    ("forward", "x"),
    [
        (lambda s, x: (lambda y: s.f(y) + y.sum())(s.n(x)), sequence()),  # another reader
        (lambda s, x: s.c(s.m(x)), image()),  # the shift would reach the zero padding
        (lambda s, x: s.f(s.n(x).sign()), sequence()),  # a threshold would be one call more
        (lambda s, x: s.r(s.n(x))[0], sequence()),  # no bias to take the shift
        (lambda s, x: s.n(x), sequence()),
    ],
)
def test_elsewhere_the_norm_keeps_it(forward, x) -> None:
    net = Net(
        forward, n=nn.LayerNorm(8), m=nn.GroupNorm(2, 4), f=nn.Linear(8, 4),
        c=nn.Conv2d(4, 3, 3, padding=1), r=nn.GRU(8, 3, bias=False, batch_first=True),
    )  # fmt: skip
    before = left(trace(net, x, dynamic=True))
    after, declined = run(AbsorbScaleShift(border_maps=True), net, x)
    assert len(affine_parts(after)) == 2
    assert left(after) == before
    assert not declined


@pytest.mark.parametrize(
    "layer", [nn.GRU(4, 3, batch_first=True), nn.LSTM(4, 3, batch_first=True, bidirectional=True)]
)
def test_a_batch_norm_goes_into_a_recurrence(layer) -> None:
    net = Net(lambda s, x: s.r(s.b(x).transpose(1, 2))[0], b=nn.BatchNorm1d(4), r=layer)
    after, _ = run(FoldBatchNorm(), net, torch.randn(2, 4, 6, dtype=torch.float64))
    assert "batch-norm" not in left(after)


def test_a_scale_that_varies_along_the_steps_stays() -> None:
    net = Net(lambda s, x: s.r(x * s.g)[0], g=torch.randn(5, 1), r=nn.GRU(8, 3, batch_first=True))
    after, declined = run(ABSORB, net, sequence())
    assert left(after)["mul"] == 1
    assert "varies along another axis" in declined[0].reason


def test_what_a_recurrence_starts_from_keeps_its_scale() -> None:
    net = Net(
        lambda s, x: s.r(x, (x[:, :1].transpose(0, 1)[..., :3] * s.g).contiguous())[0],
        g=torch.randn(3), r=nn.GRU(8, 3, batch_first=True),
    )  # fmt: skip
    after, _ = run(ABSORB, net, sequence())
    assert left(after)["mul"] == 1
