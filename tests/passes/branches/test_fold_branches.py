from __future__ import annotations

import re
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from refold.frontends import export
from refold.graph import printer
from refold.passes import PIPELINES
from refold.passes.branches.fold_branches import FoldBranches
from refold.passes.prepare.clean_up import CleanUp
from refold.passes.prepare.fold_constants import FoldConstants
from refold.rewrite.context import Context
from refold.rewrite.pipeline import Pipeline
from tests import golden
from tests.examples import examples
from tests.folding import Net, image, left, run
from tests.tracing import find, trace

FOLD = FoldBranches(prefer="nodes")


def conv(i: int = 4, o: int = 4, k: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, **options)


def bn(c: int = 4) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(c)


def test_golden() -> None:
    net = Net(
        lambda s, x: F.relu(s.a(x) + s.c(x) + s.n(x)), a=conv(padding=1), c=conv(k=1), n=bn()
    )  # fmt: skip
    before = printer.render(trace(net, image(), dynamic=True))
    after, _ = run(FoldBranches(), net, image())
    golden.check("fold_branches", f"{before}\n---\n{printer.render(after)}")


@st.composite
def branches(draw: st.DrawFn):
    """Branches of one 'same' grid: their kernels, dilations and groups differ."""
    stride = draw(st.integers(1, 2))
    parts: list[nn.Module] = []
    for _ in range(draw(st.integers(2, 4))):
        kernel = (draw(st.sampled_from((1, 3, 5))), draw(st.sampled_from((1, 3))))
        dilation = draw(st.integers(1, 2))
        padding = tuple(dilation * (k // 2) for k in kernel)
        groups = draw(st.sampled_from((1, 2, 4)))
        layer = nn.Conv2d(4, 4, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()))
        kind = draw(st.sampled_from(("plain", "norm", "pre", "scaled")))
        if kind == "norm":
            parts.append(nn.Sequential(layer, bn()))
        elif kind == "pre" and kernel == (1, 1):
            parts.append(nn.Sequential(bn(), layer))
        else:
            parts.append(layer)
    if stride == 1:
        extra = draw(st.sampled_from(("none", "identity", "norm", "pool")))
        parts += {
            "none": [], "identity": [nn.Identity()], "norm": [bn()],
            "pool": [nn.AvgPool2d(3, 1, 1)],
        }[extra]  # fmt: skip
    signs = [draw(st.sampled_from((1, 1, -1))) for _ in parts]
    return parts, signs


@given(branches(), st.sampled_from(((7, 6), (8, 9))))
@examples(50)
def test_any_branches_become_one_convolution(drawn, size) -> None:
    parts, signs = drawn

    def forward(s, x):
        total = s.parts[0](x)
        for part, sign in zip(s.parts[1:], signs[1:], strict=True):
            total = total + part(x) if sign > 0 else total - part(x)
        return F.relu(total)

    gm, _ = run(FOLD, Net(forward, parts=nn.ModuleList(parts)), image(4, *size))
    assert left(gm) == {"conv": 1, "relu": 1}, gm.graph


@given(
    first=st.sampled_from((1, 3)),
    second=st.sampled_from((1, 3)),
    pad=st.booleans(),
    bias=st.booleans(),
    g1=st.sampled_from((1, 2, 4)),
    g2=st.sampled_from((1, 2, 4)),
    s1=st.integers(1, 2),
    s2=st.integers(1, 2),
)
@examples(60)
def test_sequences_fold_only_where_borders_allow(first, second, pad, bias, g1, g2, s1, s2) -> None:
    padding = second // 2 if pad else 0
    net = Net(
        lambda s, x: F.relu(s.c(s.a(x))),
        a=nn.Conv2d(4, 8, first, s1, first // 2, groups=g1, bias=bias),
        c=nn.Conv2d(8, 4, second, s2, padding, groups=g2),
    )
    gm, declined = run(FOLD, net, image(4, 12, 11))
    folded = left(gm)["conv"] == 1
    # Zero padding after a bias, or after a kernel that reaches over the border, is not a map.
    safe = padding == 0 or (not bias and first == 1)
    assert folded == safe or (folded and not bias), (gm.graph, declined)
    if not safe and not folded:
        assert any(re.search("pad", d.reason) for d in declined)


@pytest.mark.parametrize(
    ("forward", "parts", "expected"),
    [
        (lambda s, x: s.c(F.pad(x, (1, 0, 2, 1))), {"c": conv()}, {"conv": 1}),
        (lambda s, x: s.c(F.pad(x, (-1, 0, 0, 0))), {"c": conv()}, {"conv": 1}),
        (lambda s, x: s.c(x)[:, :, ::2, ::2], {"c": conv(padding=1)}, {"conv": 1}),
        (lambda s, x: s.c(x)[:, 1:3], {"c": conv()}, {"conv": 1}),
        (
            lambda s, x: F.channel_shuffle(s.c(x), 2) + s.d(x),
            {"c": conv(), "d": conv()},
            {"conv": 1, "add": 0},
        ),
        (lambda s, x: s.c(torch.cat([x, s.d(x)], 1)), {"d": conv(k=1), "c": conv(8)}, {"conv": 1}),
        (
            lambda s, x: s.a(x) + s.b(s.c(x)) * 2,
            {"a": nn.Linear(6, 6), "c": nn.Linear(6, 2), "b": nn.Linear(2, 6)},
            {"linear": 1, "add": 0},
        ),
        (
            lambda s, x: F.avg_pool2d(s.c(x), 3, 1, 1) + s.d(x),
            {"c": conv(k=1, bias=False), "d": conv(padding=1)},
            {"conv": 1, "avg-pool": 0},
        ),
        (
            lambda s, x: s.a(x) + torch.tanh(x) + s.c(x),
            {"a": conv(padding=1), "c": conv(k=1)},
            {"conv": 1, "add": 1},
        ),
    ],
)
def test_folds(forward, parts, expected) -> None:
    gm, _ = run([FOLD, FoldConstants()], Net(forward, **parts), image())
    found = left(gm)
    assert {k: found.get(k, 0) for k in expected} == expected, gm.graph


@pytest.mark.parametrize(
    ("forward", "parts", "reason"),
    [
        (lambda s, x: s.c(s.a(x)), {"a": conv(k=1), "c": conv(padding=1)}, "bias"),
        (
            lambda s, x: s.c(s.a(x)),
            {"a": conv(padding=1, bias=False), "c": conv(padding=1)},
            "hides positions",
        ),
        (
            lambda s, x: s.c(x) + F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
            {"c": conv(padding=1)},
            "count_include_pad",
        ),
        (lambda s, x: s.a(x) + s.c(x), {"a": conv(stride=2, padding=1), "c": conv(k=4)}, "grid"),
    ],
)
def test_declines(forward, parts, reason) -> None:
    gm, declined = run(FOLD, Net(forward, **parts), image(4, 7, 7))
    assert any(re.search(reason, d.reason) for d in declined), (declined, gm.graph)


@pytest.mark.parametrize("pads", [(1, 0, 1, 0), (0, 1, 0, 1), (0, 1, 0, 0), (0, 0, 1, 0)])
def test_a_pad_on_one_side_hides_positions_there(pads) -> None:
    """After a padded convolution, each side's pad on its own must stop the merge."""
    net = Net(
        lambda s, x: s.c(F.pad(s.a(x), pads)), a=conv(padding=1, bias=False), c=conv()
    )  # fmt: skip
    gm, _ = run(FOLD, net, image())
    assert left(gm)["conv"] == 2


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: s.a(F.pad(x, (2, 0))) + s.c(x) + s.d(F.pad(x, (4, 0))) + x,
        lambda s, x: s.a(F.pad(x, (0, 2))) - s.d(F.pad(x, (0, 4))),
    ],
)
def test_branches_that_look_one_way_become_a_pad_and_a_convolution(forward, dynamic) -> None:
    """Causal branches: no width padded on both sides gives the extent of their sum."""
    parts = {
        "a": nn.Conv1d(4, 4, 3),
        "c": nn.Conv1d(4, 4, 1),
        "d": nn.Conv1d(4, 4, 3, dilation=2),
    }
    for pipeline in (FOLD, PIPELINES["default"].passes, PIPELINES["min-nodes"].passes):
        x = torch.randn(2, 4, 12, dtype=torch.float64)
        gm, _ = run(pipeline, Net(forward, **parts), x, dynamic=dynamic)
        assert left(gm) == {"pad": 1, "conv": 1}, gm.graph


def test_one_axis_padded_on_one_side() -> None:
    """Causal in time, centred in frequency; a stride in either."""

    def forward(s, x):
        return s.a(F.pad(x, (1, 1, 4, 0))) + s.c(F.pad(x, (0, 0, 2, 0)))

    for stride in (1, 2):
        parts = {
            "a": nn.Conv2d(4, 4, (5, 3), stride=stride),
            "c": nn.Conv2d(4, 4, (3, 1), stride=stride),
        }
        gm, _ = run(FOLD, Net(forward, **parts), image(), dynamic=True)
        assert left(gm) == {"pad": 1, "conv": 1}, gm.graph


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_that_repeats_pixels_commutes_with_pointwise_layers(mode) -> None:
    net = Net(
        lambda s, x: F.relu(s.c(F.pad(s.a(x), (1, 2, 1, 1), mode))), a=conv(k=1), c=conv()
    )  # fmt: skip
    gm, _ = run(FOLD, net, image())
    assert left(gm) == {"conv": 1, "pad": 1, "relu": 1}
    wider = Net(lambda s, x: s.c(F.pad(s.a(x), (1, 1, 1, 1), mode)), a=conv(padding=1), c=conv())
    gm, _ = run(FOLD, wider, image())
    assert left(gm) == {"conv": 2, "pad": 1}


def test_dearer_merges_are_left_and_both_costs_are_said() -> None:
    """Depthwise then pointwise is nine times the operations as one dense convolution."""
    net = Net(
        lambda s, x: s.p(s.d(x)), d=conv(64, 64, groups=64, padding=1), p=conv(64, 64, 1)
    )  # fmt: skip
    x = image(64, 28, 28)
    gm, declined = run(FoldBranches(), net, x)
    assert left(gm)["conv"] == 2
    assert any(
        re.search(r"cost [\d.]+ us instead of [\d.]+ us|larger than", d.reason) for d in declined
    )
    gm, _ = run(FOLD, net, x)
    assert left(gm)["conv"] == 1


def test_nothing_is_computed_twice() -> None:
    """The inner convolution has another reader, so merging it into its user saves nothing."""
    net = Net(
        lambda s, x: (lambda y: (s.c(y), torch.tanh(y)))(s.a(x)), a=conv(), c=conv(k=1)
    )  # fmt: skip
    with torch.no_grad():
        gm = trace(net, image())
        assert not FOLD.run(gm).modified


@pytest.mark.parametrize(
    ("forward", "parts", "products"),
    [
        (lambda s, x: s.a(s.p(x)).sin() + s.b(s.p(x)).cos(),
         {"p": conv(k=1), "a": conv(), "b": conv()}, 2),
        (lambda s, x: s.a(s.p(x)).sin() + s.b(s.p(x).transpose(0, 1)).transpose(0, 1),
         {"p": nn.Linear(6, 6), "a": nn.Linear(6, 6), "b": nn.Linear(6, 6)}, 3),
        (lambda s, x: s.a(s.p(x)).sin() + s.b(s.p(x).flatten(1, 2)).unflatten(1, (4, 7)),
         {"p": nn.Linear(6, 6), "a": nn.Linear(6, 6), "b": nn.Linear(6, 6)}, 2),
        (lambda s, x: s.a(s.p(x)).sin() + s.p(x).exp(),
         {"p": nn.Linear(6, 6), "a": nn.Linear(6, 6)}, 2),  # its value is needed
        (lambda s, x: s.a(s.p(x)).sin() + s.b(s.p(x))[:, :, 1:-1, 1:-1].cos(),
         {"p": conv(k=1), "a": conv(), "b": conv(padding=1)}, 3),  # one of them pads its bias
    ],
)  # fmt: skip
def test_a_layer_that_only_layers_read_goes_into_each(forward, parts, products) -> None:
    net = Net(forward, **parts)
    after, _ = run((CleanUp(), FoldBranches()), net, image())
    counts = left(after)
    assert counts.get("conv", 0) + counts.get("linear", 0) == products


def test_a_bottleneck_that_layers_read_stays() -> None:
    net = Net(
        lambda s, x: s.a(s.p(x)).sin() + s.b(s.p(x)).cos(),
        p=nn.Linear(256, 16), a=nn.Linear(16, 256), b=nn.Linear(16, 256),
    )  # fmt: skip
    x = torch.randn(2, 256, 256, dtype=torch.float64)
    after, _ = run((CleanUp(), FoldBranches()), net, x)
    assert left(after)["linear"] == 3


def test_dynamic_height_and_width_fold_too() -> None:
    net = Net(
        lambda s, x: F.relu(s.n(s.a(x)) + s.c(x) + x), a=conv(padding=1), c=conv(k=1), n=bn()
    )  # fmt: skip
    auto = torch.export.Dim.AUTO
    with torch.no_grad():
        program = torch.export.export(
            net, (image(),), strict=False, dynamic_shapes=({0: auto, 2: auto, 3: auto},)
        )
        gm = program.module(check_guards=False)
        PIPELINES["default"].run(gm)
        assert left(gm) == {"conv": 1, "relu": 1}
        for size in ((1, 4, 5, 5), (3, 4, 8, 11)):
            x = torch.randn(*size, dtype=torch.float64)
            assert torch.allclose(gm(x), net(x), rtol=0, atol=1e-12)


def test_a_second_run_changes_nothing() -> None:
    net = Net(
        lambda s, x: F.relu(s.a(x) + s.c(x)) + s.d(F.relu(x)), a=conv(padding=1), c=conv(k=1),
        d=conv(padding=1),
    )  # fmt: skip
    with torch.no_grad():
        gm = trace(net, image())
        assert PIPELINES["default"].run(gm).modified
        assert not any(r.result.applied for r in PIPELINES["default"].run(gm).runs)


def test_outputs_never_come_to_share_storage() -> None:
    """A crop is copied by the flatten after it; the convolution that it merges into is not."""
    net = Net(
        lambda s, x: (lambda y: (y, y.flatten(1)))(s.c(x)[:, :, 1::2, 1:]),
        c=conv(k=(3, 1), padding=1),
    )
    after, _ = run(FoldBranches(), net, image(height=4))
    crop, flat = after(image(height=4))
    assert crop.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr()


def test_nothing_merges_across_an_excluded_layer() -> None:
    net = Net(
        lambda s, x: s.d(s.c(s.a(x))), a=conv(bias=False), c=conv(k=1), d=conv(k=1)
    )  # fmt: skip
    with torch.no_grad():
        gm = trace(net, image())
        Pipeline("test", (FOLD,)).run(gm, Context(exclude=("a",)))
        assert left(gm)["conv"] == 2
        x = image()
        assert torch.allclose(gm(x), net(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_branches_beside_padding_that_repeats_pixels(mode) -> None:
    """x is the inside of its padded self, so pointwise branches join the padded kernel."""
    net = Net(
        lambda s, x: F.relu(s.a(x) + s.c(x) + s.n(x)), a=conv(padding=1, padding_mode=mode),
        c=conv(k=1), n=bn(),
    )  # fmt: skip
    gm, _ = run(FOLD, net, image())
    assert left(gm) == {"conv": 1, "pad": 1, "relu": 1}


def test_a_ladder_of_skips_costs_its_rungs() -> None:
    """Each rung reads the one below twice: 2**30 paths, if nothing were shared."""

    def forward(s, x):
        for rung in s.rungs:
            x = x + rung(x) * 0.3
        return x

    net = Net(forward, rungs=nn.ModuleList(conv(k=1) for _ in range(30)))
    gm, _ = run(FOLD, net, image())
    assert left(gm) == {"conv": 1}


def test_dynamic_borders_of_the_bias_fold_too() -> None:
    def forward(s, x):
        y = F.pad(s.a(x), (1, 1, 1, 1))
        border = s.a.bias.view(1, -1, 1, 1)
        y[:, :, 0:1, :] = border
        y[:, :, -1:, :] = border
        y[:, :, :, 0:1] = border
        y[:, :, :, -1:] = border
        return s.c(y)

    net = Net(forward, a=conv(k=1), c=conv())
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 2: auto, 3: auto},)
    with torch.no_grad():
        gm = export.trace(net, (image(),), {}, dynamic_shapes=shapes).graph_module
        PIPELINES["default"].run(gm)
        assert left(gm) == {"conv": 1}
        x = image(4, 9, 11)
        assert torch.allclose(gm(x), net(x), rtol=0, atol=1e-12)


WEIGHTS = torch.rand(4, 1, 1, dtype=torch.float64)
PIXELS = torch.rand(7, 6, dtype=torch.float64)
SHARES = torch.tensor([0.5, -1.5, 0.25], dtype=torch.float64).view(3, 1, 1, 1, 1)
INDEX = torch.tensor([2, 0, 1, 1, -1])


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: torch.stack([s.a(x), s.c(x), x]).sum(0),
        lambda s, x: torch.stack([s.a(x), s.c(x), x], dim=2).mean(2),
        lambda s, x: torch.stack([s.a(x), s.n(s.c(x))], -1).sum(dim=-1),
        lambda s, x: torch.lerp(s.a(x), s.c(x), 0.3),
        lambda s, x: torch.lerp(s.a(x), s.n(x), WEIGHTS),
        lambda s, x: torch.addcmul(s.a(x), s.c(x), WEIGHTS, value=-2),
        lambda s, x: torch.addcmul(s.a(x), WEIGHTS, x),
        lambda s, x: (SHARES * torch.stack([s.a(x), s.c(x), x])).sum(0),
        lambda s, x: (torch.stack([s.a(x), s.c(x), x]) * WEIGHTS).mean(0),
        lambda s, x: (torch.stack([s.a(x), s.c(x), x], -1) * SHARES.view(3)).sum(-1),
    ],
)
def test_sums_in_other_spellings(forward) -> None:
    net = Net(
        lambda s, x: F.relu(forward(s, x)), a=conv(padding=1), c=conv(k=1), n=bn()
    )  # fmt: skip
    after, _ = run(FoldBranches(), net, image())
    assert left(after) == {"conv": 1, "relu": 1}


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: torch.lerp(s.a(x), s.c(x), PIXELS),
        lambda s, x: torch.lerp(s.a(x), s.c(x), x.sigmoid()),
        lambda s, x: torch.addcmul(s.a(x), s.c(x), x),
        lambda s, x: torch.stack([s.a(x), s.c(x)]).sum(1),
        lambda s, x: torch.stack([s.a(x), s.c(x)]).sum((0, 1)),
        lambda s, x: torch.stack([s.a(x), s.c(x)]).sum(0, keepdim=True),
        lambda s, x: torch.stack([s.a(x), s.c(x)]).amax(0),
        lambda s, x: torch.stack([s.a(x), s.c(F.relu(x))]).sum(0),
        lambda s, x: (torch.stack([s.a(x), s.c(x)]) * x.sigmoid()).sum(0),
        lambda s, x: (torch.stack([s.a(x), s.c(x)]) * PIXELS).sum(0),
        lambda s, x: (torch.stack([s.a(x)]) * SHARES[:2]).sum(0) + s.c(x).relu(),
        lambda s, x: (torch.stack([s.a(x), s.c(x)]) * SHARES[:2]).sum(1),
    ],
)
def test_what_only_looks_like_a_sum_of_branches_stays(forward) -> None:
    net = Net(lambda s, x: forward(s, x), a=conv(padding=1), c=conv(k=1))
    after, _ = run(FoldBranches(prefer="nodes"), net, image())
    assert left(after)["conv"] == 2


@pytest.mark.parametrize(
    ("forward", "outputs"),
    [
        (lambda s, x: s.a(x) + x.repeat(1, 2, 1, 1), 8),
        (lambda s, x: s.a(x) + x.repeat_interleave(2, 1), 8),
        (lambda s, x: s.a(x) - s.c(x).flip(1), 4),
        (lambda s, x: s.a(x) + s.c(x).index_select(1, INDEX.abs()), 5),
        (lambda s, x: s.a(x) + s.c(x)[:, INDEX], 5),
    ],
)
def test_channels_repeated_reversed_or_picked(forward, outputs) -> None:
    """An image repeated for a pixel shuffle is an identity branch (ABPN, Du et al., 2021)."""
    net = Net(
        lambda s, x: F.relu(forward(s, x)), a=conv(4, outputs, padding=1), c=conv(k=1)
    )  # fmt: skip
    after, _ = run([FoldConstants(), CleanUp(), FOLD], net, image())
    assert left(after) == {"conv": 1, "relu": 1}


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: s.a(x) + s.c(x).flip(2),
        lambda s, x: s.a(x) + s.c(x).flip(1, 3),
        lambda s, x: s.a(x) + s.c(x)[:, :, 3:4].repeat(1, 1, 7, 1),
        lambda s, x: s.a(x) + s.c(x)[..., :3].repeat_interleave(2, 3),
        lambda s, x: s.a(x)[:, :, :5] + s.c(x)[:, :, INDEX],
        lambda s, x: s.a(x)[:1, 0, 0] + s.c(x)[:1, INDEX[:1], INDEX[:1]],
        lambda s, x: s.a(x)[:, : len(x)] + s.c(x)[:, x.flatten(1).argmax(1) % 4],
    ],
)
def test_rearranged_pixels_or_unknown_channels_stay(forward) -> None:
    net = Net(lambda s, x: forward(s, x), a=conv(padding=1), c=conv(k=1))
    passes = [FoldConstants(), CleanUp(), FOLD]
    after, _ = run(passes, net, image(), dynamic=False)
    assert left(after)["conv"] == 2


def embedded(forward, width: int = 6, **parts: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    table = nn.Embedding(11, width)
    return Net(lambda s, i: torch.tanh(forward(s, i)), e=table, **parts), torch.randint(
        0, 11, (2, 5)
    )


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, i: s.e(i) + 2 * s.up(s.down(i)),  # a low-rank branch on a table
        lambda s, i: s.up(s.down(i)),
        lambda s, i: s.e(i) * 6**0.5 + s.h,
        lambda s, i: s.e(i) - s.f(i),
        lambda s, i: s.n(s.e(i) + s.f(i)),
    ],
)
def test_tables_are_maps_too(forward) -> None:
    model, index = embedded(
        forward, down=nn.Embedding(11, 2), up=nn.Linear(2, 6), f=nn.Embedding(11, 6),
        n=nn.Linear(6, 3, bias=False), h=nn.Parameter(torch.randn(6)),
    )  # fmt: skip
    with torch.no_grad():
        gm = trace(model, index)
        PIPELINES["default"].run(gm)
        assert left(gm) == {"embedding": 1, "tanh": 1}
        assert torch.allclose(gm(index), model(index), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, i: s.e(i) + s.f(i.flip(1)),
        lambda s, i: s.e(i) + s.f.weight[:5],  # a position's own row
        lambda s, i: s.e(i) * s.e(i),
    ],
)
def test_tables_of_other_rows_stay(forward) -> None:
    model, index = embedded(forward, f=nn.Embedding(11, 6))
    with torch.no_grad():
        gm = trace(model, index)
        before = left(gm).get("embedding")
        PIPELINES["default"].run(gm)
        assert left(gm).get("embedding") in (before, 1)
        assert torch.allclose(gm(index), model(index), rtol=0, atol=1e-12)


def test_a_tied_table_is_not_copied() -> None:
    """The heads still read the tables: a merged one would be one more constant of their size."""

    def forward(s, i):
        y = torch.tanh(s.e(i) + s.f(i))
        return F.linear(y, s.e.weight) * F.linear(y.sigmoid(), s.f.weight)

    model = Net(forward, e=nn.Embedding(4096, 64), f=nn.Embedding(4096, 64))
    with torch.no_grad():
        gm = trace(model, torch.randint(0, 4096, (2, 5)))
        PIPELINES["default"].run(gm)
        assert left(gm)["embedding"] == 2


STRAIGHT = {
    "x + (q - x)": lambda s, x: x + (F.silu(x) - x),
    "(q - x) + x": lambda s, x: (F.silu(x) - x).detach() + x,
    "x - (x - q)": lambda s, x: x - (x - F.silu(x)),
    "scaled": lambda s, x: torch.add(torch.sub(F.silu(x), x, alpha=3), x, alpha=3),
    "a tensor that others read": lambda s, x: (lambda y: y + (F.silu(y) - y))(x.tanh()),
}


@pytest.mark.parametrize("name", STRAIGHT)
def test_terms_that_cancel_go(name) -> None:
    net = Net(lambda s, x: STRAIGHT[name](s, x.clamp(-2, 2)) * 2)
    gm, _ = run((CleanUp(), FOLD, CleanUp()), net, image())
    found = left(gm)
    found.pop("tanh", 0)
    assert found == {"clamp": 1, "silu": 1, "mul": 1}
    _check_beyond_numbers(gm, net)


def _check_beyond_numbers(gm, net) -> None:
    x = image()
    x[0, 0, 0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    with torch.no_grad():
        torch.testing.assert_close(gm(x), net(x), rtol=1e-12, atol=1e-12, equal_nan=True)


UNBOUNDED = {
    "any tensor": lambda s, x: x + (F.silu(x) - x),
    "a quantiser without a clamp": lambda s, x: x + (x.round() - x),
    "twice and back": lambda s, x: x + x - x + F.silu(x),
    "a code of NaN": lambda s, x: (lambda y: y + (y.sign() - y))(x.tanh()),
    "another tensor": lambda s, x: (lambda y: y + (s.g.expand_as(x).relu() + y.abs().amax() - y))(
        x.tanh()
    ),
    "a clamp on one side": lambda s, x: (lambda y: y + (y.round() - y))(x.clamp(min=0)),
    "scaled past all bounds": lambda s, x: (lambda y: y + (y.round() - y))(x.tanh() / 1e-300),
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_terms_that_may_be_infinite_do_not_cancel(name) -> None:
    net = Net(lambda s, x: UNBOUNDED[name](s, x) * 2, g=torch.randn(4, 7, 6))
    before = left(trace(net, image(), dynamic=True))
    gm, declined = run(FOLD, net, image())
    assert left(gm) == before
    assert any("infinity minus infinity is NaN" in d.reason for d in declined)
    _check_beyond_numbers(gm, net)


@pytest.mark.parametrize("bound", ["tanh", "sigmoid", "hardtanh", "relu6", "sin"])
def test_a_straight_through_quantiser_of_a_bounded_tensor_goes(bound) -> None:
    def forward(s, x):
        y = (getattr(torch, bound, None) or getattr(F, bound))(x) * 3.5
        return (y + (y.round() - y).detach()) * s.g

    net = Net(forward, g=torch.randn(4, 1, 1))
    gm, _ = run((CleanUp(), FOLD, CleanUp()), net, image())
    assert left(gm) == {bound: 1, "mul": 2, "round": 1}
    _check_beyond_numbers(gm, net)


def test_what_is_left_of_a_sum_goes_on_merging() -> None:
    net = Net(
        lambda s, x: s.a(x) + (x.tanh() + (s.c(x) - x.tanh())) + s.n(x) - x.tanh(),
        a=conv(padding=1), c=conv(k=1), n=bn(),
    )  # fmt: skip
    gm, _ = run((CleanUp(), FOLD, CleanUp()), net, image())
    assert left(gm) == {"conv": 1, "tanh": 1, "sub": 1}


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: x + (F.silu(x) - 2 * x),
        lambda s, x: x.tanh() - x.tanh(),
        lambda s, x: (lambda y: (y, x + y))(F.silu(x) - x),
        lambda s, x: x + (s.g - x),
        lambda s, x: (lambda q: (q, x + (q - x)))(F.silu(x)),
        lambda s, x: (lambda q: (F.group_norm(q, 2), x + (q - x)))(
            F.silu(x).contiguous(memory_format=torch.channels_last)
        ),
    ],
)
def test_sums_whose_term_cannot_stand_for_them_stay(forward) -> None:
    net = Net(lambda s, x: forward(s, x.clamp(-2, 2)), g=torch.randn(4, 7, 6))
    before = left(trace(net, image(), dynamic=True))
    gm, _ = run(FOLD, net, image())
    assert left(gm) == before


def test_a_term_that_is_written_later_is_no_sum() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("last", torch.randn(2, 4, 7, 6, dtype=torch.float64))

        def forward(self, x):
            y = x + (self.last - x)
            self.last.copy_(x)
            return y * 2

    x = image()
    gm = trace(Counting(), x)
    write = next(n for n in gm.graph.nodes if "copy" in n.name)
    write.append(find(gm, "mul"))  # its operand was computed before the write
    gm.recompile()
    twin = deepcopy(gm)
    FOLD.run(gm)
    gm.recompile()
    torch.testing.assert_close(gm(x), twin(x), rtol=1e-12, atol=1e-12)


CROPS = {
    "the end": lambda x: x[..., :-1],
    "the start": lambda x: x[..., 1:],
    "both": lambda x: x[..., 1:-1],
    "every other": lambda x: x[..., ::2],
    "a step from the second on": lambda x: x[..., 1::2],
    "another axis": lambda x: x[..., :-1, :],
    "a narrow": lambda x: x.narrow(-1, 0, 4),
    "a crop by a pad": lambda x: F.pad(x, (0, -1)),
    "a padded one": lambda x: F.pad(x, (1, 0)),
    "nothing": lambda x: x,
}


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular", "constant"])
@pytest.mark.parametrize(
    ("name", "dims"),
    [(n, dims) for n in CROPS for dims in (1, 2, 3) if dims > 1 or n != "another axis"],
)
def test_pads_of_crops_repeat_what_the_crop_has_left(name, mode, dims) -> None:
    layer = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1]
    net = Net(
        lambda s, x: s.c(F.pad(CROPS[name](s.p(x)), (1, 1) * dims, mode=mode)),
        p=layer(4, 4, 1), c=layer(4, 4, 3),
    )  # fmt: skip
    gm, _ = run((CleanUp(), FOLD, CleanUp()), net, torch.randn(2, 4, *(6,) * dims).double())
    if name == "nothing" and mode != "constant":
        assert left(gm) == {"pad": 1, "conv": 1}


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_pads_of_pads_and_of_strided_layers(mode) -> None:
    pad = lambda x: F.pad(x, (1, 1, 1, 1), mode=mode)
    for forward in (
        lambda s, x: s.c(pad(pad(s.p(x)))),
        lambda s, x: s.c(pad(F.pad(s.p(x), (1, 1, 1, 1)))),
        lambda s, x: s.c(F.pad(pad(s.p(x)), (1, 1, 1, 1))),
        lambda s, x: s.c(pad(s.q(x))) + s.c(pad(s.p(x)[..., ::2, ::2])),
        lambda s, x: s.c(pad(x)) + s.p(x),
        lambda s, x: s.c(pad(x))[..., :-1, :] + s.p(x)[..., :-1, :],
        lambda s, x: s.c(pad(x[..., :-1])) + s.p(x)[..., :-1],
        lambda s, x: s.c(pad(x[..., 1:])) + s.p(x)[..., 1:],
    ):
        net = Net(forward, p=conv(k=1), q=conv(k=1, stride=2), c=conv())
        run((CleanUp(), FOLD, CleanUp()), net, image(4, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rest", [0.05, 1e-3, 0.0])
def test_a_bias_is_zero_only_if_it_is(dtype, rest) -> None:
    """What half precision would round away beside the parts of a bias is all of a border."""
    net = Net(lambda s, x: s.c(s.p(x) - s.b), p=conv(k=1), c=conv(padding=1), b=torch.ones(4, 1, 1))
    with torch.no_grad():
        net.p.bias.copy_(1 + 2 * torch.rand(4))
        net.to(dtype)
        net.b.copy_((net.p.bias.double() * (1 + rest))[:, None, None].to(dtype))
        gm = trace(net, image().to(dtype), dynamic=True)
        PIPELINES["default"].run(gm)
        exact = deepcopy(net).double()
        x = image().to(dtype)
        own = (net(x).double() - exact(x.double())).abs().max()
        got = (gm(x).double() - exact(x.double())).abs().max()
    assert got <= max(4 * own, 4 * torch.finfo(dtype).eps), (float(got), float(own))
    if bool((net.b.flatten() == net.p.bias).all()):
        assert left(gm) == {"conv": 1}
    else:
        assert left(gm)["conv"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_bias_of_a_norm_is_folded_to_its_last_digit(dtype) -> None:
    """``(b - mean) * s`` is small beside ``b * s``, and all that the layer's output is."""
    torch.manual_seed(1)
    net = nn.Sequential(conv(16, 16, padding=1), nn.BatchNorm2d(16), nn.ReLU()).eval()
    with torch.no_grad():
        net[0].weight.mul_(0.05), net[0].bias.normal_()
        net[1].running_mean.copy_(net[0].bias + 0.05 * torch.randn(16))
        net[1].running_var.uniform_(0.01, 0.02)
        net.to(dtype)
        x = torch.randn(2, 16, 8, 8).to(dtype)
        exact = deepcopy(net).double()(x.double())
        gm = trace(net, x, dynamic=True)
        PIPELINES["default"].run(gm)
        own, got = ((f(x).double() - exact).abs().max() for f in (net, gm))
    assert left(gm) == {"conv": 1, "relu": 1}
    assert got <= own
