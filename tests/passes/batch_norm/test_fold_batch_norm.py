from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from refold.graph import printer
from refold.passes.batch_norm.fold_batch_norm import FoldBatchNorm
from refold.passes.branches.fold_branches import FoldBranches
from refold.rewrite.context import Context
from tests import golden
from tests.examples import examples
from tests.folding import Net, image, left, run
from tests.tracing import trace


def conv(i: int = 4, o: int = 4, k: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, **options)


def test_golden() -> None:
    net = Net(lambda s, x: F.relu(s.b(s.c(x))), c=conv(bias=False, padding=1), b=nn.BatchNorm2d(4))
    before = printer.render(trace(net, image(), dynamic=True))
    after, _ = run(FoldBatchNorm(), net, image())
    golden.check("fold_batch_norm", f"{before}\n---\n{printer.render(after)}")


@given(
    groups=st.sampled_from((1, 2, 4)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    affine=st.booleans(),
    transposed=st.booleans(),
    dims=st.integers(1, 3),
)
@examples(40)
def test_into_any_convolution(
    groups, kernel, stride, padding, dilation, bias, affine, transposed, dims
) -> None:
    name = ("ConvTranspose" if transposed else "Conv") + f"{dims}d"
    layer = getattr(nn, name)(
        4, 8, kernel, stride, padding, dilation=dilation, groups=groups, bias=bias
    )
    norm = getattr(nn, f"BatchNorm{dims}d")(8, affine=affine)
    x = torch.randn(2, 4, *(9, 8, 7)[:dims], dtype=torch.float64)
    gm, _ = run(FoldBatchNorm(), Net(lambda s, x: s.b(s.c(x)), c=layer, b=norm), x)
    assert left(gm) == {"conv-transpose" if transposed else "conv": 1}


@pytest.mark.parametrize(
    ("forward", "parts", "expected"),
    [
        (lambda s, x: s.b(s.c(x).flatten(2)).flatten(1), {"c": conv(), "b": nn.BatchNorm1d(4)}, 0),
        (lambda s, x: s.b(F.avg_pool2d(s.c(x), 2)), {"c": conv(), "b": nn.BatchNorm2d(4)}, 0),
        (
            lambda s, x: s.b(F.pixel_shuffle(s.c(x), 2)),
            {"c": conv(4, 8), "b": nn.BatchNorm2d(2)},
            0,
        ),
        (lambda s, x: s.b(F.channel_shuffle(s.c(x), 2)), {"c": conv(), "b": nn.BatchNorm2d(4)}, 0),
        (
            lambda s, x: s.b(torch.cat([s.c(x), s.d(x)], 1)),
            {"c": conv(), "d": conv(4, 2), "b": nn.BatchNorm2d(6)},
            0,
        ),
        (
            lambda s, x: s.b(F.interpolate(s.c(x), scale_factor=2, mode="bilinear")),
            {"c": conv(), "b": nn.BatchNorm2d(4)},
            0,
        ),
        (
            lambda s, x: s.b(s.c(x) + torch.tanh(s.d(x))),
            {"c": conv(), "d": conv(), "b": nn.BatchNorm2d(4)},
            1,
        ),
        (lambda s, x: s.c(s.b(x)), {"c": conv(), "b": nn.BatchNorm2d(4)}, 0),
        (
            lambda s, x: s.c(s.b(x)) + s.d(s.b(x)),
            {"c": conv(), "d": conv(), "b": nn.BatchNorm2d(4)},
            0,
        ),
        (
            lambda s, x: s.c(s.b(x).mean((2, 3))),
            {"c": nn.Linear(4, 3), "b": nn.BatchNorm2d(4)},
            0,
        ),
        (lambda s, x: s.c(s.b(x)), {"c": nn.Linear(6, 3), "b": nn.BatchNorm2d(4)}, 1),
        (
            lambda s, x: s.c(s.b(x)),
            {"c": nn.ConvTranspose2d(4, 4, 2, 2), "b": nn.BatchNorm2d(4)},
            1,
        ),
    ],
)
def test_through_and_into(forward, parts, expected) -> None:
    gm, declined = run(FoldBatchNorm(), Net(forward, **parts), image())
    assert left(gm).get("batch-norm", 0) == expected, gm.graph
    assert bool(declined) == bool(expected)


@pytest.mark.parametrize(
    ("forward", "parts", "reason"),
    [
        (
            lambda s, x: s.b(F.relu(s.c(x))),
            {"c": conv(), "b": nn.BatchNorm2d(4)},
            "scale does not pass relu",
        ),
        (
            lambda s, x: s.b(F.gelu(s.c(x))),
            {"c": conv(), "b": nn.BatchNorm2d(4)},
            "gelu is not linear",
        ),
        (
            lambda s, x: s.c(s.b(x)),
            {"c": conv(padding=1), "b": nn.BatchNorm2d(4)},
            "pads with zeros",
        ),
        (
            lambda s, x: (lambda y: (y, s.b(y)))(s.c(x)),
            {"c": conv(), "b": nn.BatchNorm2d(4)},
            "has other users",
        ),
        (
            lambda s, x: s.b(F.avg_pool2d(s.c(x), 3, 1, 1)),
            {"c": conv(), "b": nn.BatchNorm2d(4)},
            "zero padding",
        ),
        (
            lambda s, x: s.b(x),
            {"b": nn.BatchNorm2d(4, track_running_stats=False)},
            "statistics of the batch",
        ),
    ],
)
def test_declines(forward, parts, reason) -> None:
    import re

    gm, declined = run(FoldBatchNorm(), Net(forward, **parts), image())
    assert left(gm)["batch-norm"] >= 1
    assert any(re.search(reason, d.reason) for d in declined), declined


def test_zero_variance_without_eps_declines() -> None:
    net = Net(lambda s, x: s.b(s.c(x)), c=conv(), b=nn.BatchNorm2d(4, eps=0.0))
    net.b.running_var.zero_()
    net.b.weight.data.fill_(1.0)
    with torch.no_grad():
        gm = trace(net, image())
        result = FoldBatchNorm().run(gm)
    assert not result.modified
    assert "not finite" in result.declined[0].reason


def test_the_owner_of_the_weights_keeps_them() -> None:
    net = Net(lambda s, x: s.b(s.c(x)), c=conv(), b=nn.BatchNorm2d(4))
    kept = {k: v.clone() for k, v in net.state_dict().items()}
    run(FoldBatchNorm(), net, image())
    assert all(torch.equal(v, kept[k]) for k, v in net.state_dict().items())


def test_a_fold_upon_a_fold_rounds_once() -> None:
    """Through two batch norms and a merge, fp16 weights are the float64 ones, rounded once."""
    net = Net(
        lambda s, x: s.b2(s.b(s.c(x))) + s.d(x),
        c=conv(padding=1), d=conv(k=1), b=nn.BatchNorm2d(4), b2=nn.BatchNorm2d(4),
    )  # fmt: skip
    single = Net(net.function, c=net.c, d=net.d, b=net.b, b2=net.b2)
    single.load_state_dict(net.state_dict())
    for p in single.parameters():
        p.data = p.data.half().double()
    for b in single.buffers():
        if b.is_floating_point():
            b.copy_(b.half().double())
    exact, _ = run([FoldBatchNorm(), FoldBranches()], single, image())
    half, x = single.half(), image().half()
    with torch.no_grad():
        gm = trace(half, x)
        from refold.rewrite.pipeline import Pipeline

        Pipeline("test", (FoldBatchNorm(), FoldBranches())).run(gm)
    (name,) = [n for n, _ in gm.named_buffers() if n.endswith("weight")]
    (reference,) = [b for n, b in exact.named_buffers() if n.endswith("weight")]
    assert torch.equal(gm.get_buffer(name), reference.half())


def test_sharing_a_large_weight_is_not_undone_past_the_budget() -> None:
    big = nn.Conv2d(64, 64, 3)
    net = Net(
        lambda s, x: s.b(F.relu(s.c(F.relu(s.c(x))))) if False else s.b(s.c(F.relu(s.c(x)))),
        c=big, b=nn.BatchNorm2d(64),
    )  # fmt: skip
    gm, declined = run(FoldBatchNorm(), net, image(64))
    assert left(gm)["batch-norm"] == 1
    assert any("shared by 2 layers" in d.reason for d in declined)
    gm, _ = run(FoldBatchNorm(max_growth=3.0), net, image(64))
    assert "batch-norm" not in left(gm)
    gm, _ = run(FoldBatchNorm(), net, image(64), context=Context(growth=3.0))
    assert "batch-norm" not in left(gm)


def test_fp16_overflow_declines() -> None:
    net = Net(lambda s, x: s.b(s.c(x)), c=conv(), b=nn.BatchNorm2d(4))
    net.b.running_var.fill_(1e-6)
    net.b.weight.data.fill_(200.0)
    net.c.weight.data.fill_(10.0)
    net.half()
    with torch.no_grad():
        gm = trace(net, image().half())
        result = FoldBatchNorm().run(gm)
    assert not result.modified
    assert "overflow float16" in result.declined[0].reason


@pytest.mark.parametrize("affine", [True, False])
def test_an_instance_norm_with_tracked_statistics_is_a_batch_norm(affine: bool) -> None:
    norm = nn.InstanceNorm2d(4, affine=affine, track_running_stats=True)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    gm, _ = run(FoldBatchNorm(), Net(lambda s, x: s.b(s.c(x)), c=conv(padding=1), b=norm), image())
    assert left(gm) == {"conv": 1}


def test_an_instance_norm_of_its_input_stays() -> None:
    norm = nn.InstanceNorm2d(4, affine=True)
    gm, _ = run(FoldBatchNorm(), Net(lambda s, x: s.b(s.c(x)), c=conv(padding=1), b=norm), image())
    assert left(gm) == {"conv": 1, "instance-norm": 1}


@pytest.mark.parametrize(("growth", "folds"), [(1.6, False), (2.2, True)])
def test_all_readers_of_a_norm_share_what_weights_may_grow(growth: float, folds: bool) -> None:
    """Two weights of 40 kB, each read a second time elsewhere: a copy of one is not enough."""
    net = Net(
        lambda s, x: (lambda y: s.c(y) + s.d(y).tanh() + s.c(x).sin() + s.d(x).cos())(
            s.b(x.tanh())
        ),
        b=nn.BatchNorm2d(70), c=nn.Conv2d(70, 70, 1), d=nn.Conv2d(70, 70, 1),
    )  # fmt: skip
    gm, declined = run(FoldBatchNorm(max_growth=growth), net, image(70))
    assert ("batch-norm" not in left(gm)) is folds
    assert any("past max_growth" in d.reason for d in declined) is not folds
