"""Layers of an expanded constant run on one copy, and fold away; what mixes the copies stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from refold.graph import printer
from refold.passes import PIPELINES
from refold.passes.prepare.defer_expands import DeferExpands
from refold.passes.prepare.fold_constants import FoldConstants
from refold.rewrite.context import Context
from tests import golden
from tests.examples import examples, few
from tests.folding import Net, left, run
from tests.tracing import find, trace

DEFER = DeferExpands()
FOLD = (DEFER, FoldConstants())


def tokens(batch: int = 2, count: int = 3, width: int = 8) -> Tensor:
    return torch.randn(batch, count, width, dtype=torch.float64)


def net(forward, query=(1, 5, 8), **parts) -> Net:
    """A model that attends to its input with what it makes of a constant."""

    def attend(s: Net, x: Tensor) -> Tensor:
        return (forward(s, x) @ x.transpose(1, 2)).softmax(-1)

    layers = {"norm": nn.LayerNorm(8), "f": nn.Linear(8, 8), **parts}
    return Net(attend, q=torch.randn(query), **layers)


def expanded(s: Net, x: Tensor) -> Tensor:
    return s.q.expand(x.shape[0], -1, -1)


def test_golden() -> None:
    model = net(lambda s, x: s.f(s.norm(expanded(s, x))))
    before = printer.render(trace(model, tokens(), dynamic=True))
    after, _ = run(DEFER, model, tokens())
    golden.check("defer_expands", f"{before}\n---\n{printer.render(after)}")


@pytest.mark.parametrize(
    ("forward", "query"),
    few([
        (lambda s, x: s.f(s.norm(expanded(s, x))), (1, 5, 8)),
        (lambda s, x: s.f(expanded(s, x)), (5, 8)),
        (lambda s, x: s.f(s.q.repeat(x.shape[0], 1, 1)), (5, 8)),
        (lambda s, x: s.f(s.q.expand_as(x)), (1, 1, 8)),
        (lambda s, x: s.f(s.q.unsqueeze(1).repeat(1, x.shape[0], 1)).transpose(0, 1), (5, 8)),
        (lambda s, x: s.f(F.gelu(expanded(s, x) * s.g + 1)), (1, 5, 8)),
        (lambda s, x: s.f(torch.zeros_like(expanded(s, x)) + s.q), (1, 5, 8)),
        (lambda s, x: (expanded(s, x) @ s.f.weight).softmax(1), (1, 5, 8)),
        (lambda s, x: s.mix @ s.f(expanded(s, x)), (1, 5, 8)),
        (lambda s, x: s.f(expanded(s, x))[:, 1:4].flip(0), (1, 5, 8)),
        (lambda s, x: s.conv(expanded(s, x)), (1, 5, 8)),
        (lambda s, x: s.batch(s.conv(expanded(s, x))), (1, 5, 8)),
        (lambda s, x: s.table(s.index.expand(x.shape[0], -1)).tanh(), (1, 5, 8)),
        (
            lambda s, x: F.scaled_dot_product_attention(
                *(heads(p(expanded(s, x))) for p in (s.f, s.k, s.f))
            ).transpose(1, 2).flatten(2),
            (1, 5, 8),
        ),
    ], 7),
)  # fmt: skip
def test_layers_of_an_expanded_constant_fold(forward, query) -> None:
    model = net(
        forward, query, g=torch.randn(8), mix=torch.randn(4, 5), conv=nn.Conv1d(5, 6, 3, padding=1),
        batch=nn.BatchNorm1d(6), table=nn.Embedding(7, 8), k=nn.Linear(8, 8),
    )  # fmt: skip
    model.register_buffer("index", torch.tensor([[3, 0, 6]]))
    after, _ = run(FOLD, model, tokens())
    found = left(after)
    found.pop("flip", None)
    assert found == {"matmul": 1, "softmax": 1}
    again = DEFER.run(after)
    assert not again.modified
    assert not again.applied


@pytest.mark.parametrize(
    "forward",
    few([
        lambda s, x: s.f(torch.ones(x.shape[0], 5, 8, dtype=x.dtype)),
        lambda s, x: s.f(torch.full((x.shape[0], 5, 8), 0.5, dtype=x.dtype)),
        lambda s, x: s.f(x.new_zeros(x.shape[0], 5, 8)).tanh(),
        lambda s, x: s.f(x.new_full((x.shape[0], 1, 8), 2.0) + s.q),
        lambda s, x: s.f(torch.ones_like(x).cumsum(1) / 3),
        lambda s, x: s.f(torch.ones_like(x).bool().logical_not().cumsum(1).to(x.dtype)),
        lambda s, x: s.f(torch.stack([torch.ones_like(x), x.new_zeros(x.shape)], 1).flatten(1, 2)),
        lambda s, x: s.f(torch.cat([expanded(s, x), expanded(s, x).sin()], 1)),
        lambda s, x: s.f(torch.einsum("bij,bkj->bik", expanded(s, x), expanded(s, x)) @ s.mix),
        lambda s, x: s.f(F.pad(expanded(s, x), (0, 0, 1, 1))),
        lambda s, x: s.f(expanded(s, x)[:, [0, 2, 1]].roll(1, 1)),
        lambda s, x: s.f(F.interpolate(expanded(s, x)[:, None], scale_factor=(2.0, 1.0))[:, 0]),
        lambda s, x: s.f(expanded(s, x).repeat_interleave(2, 1).amax(1, keepdim=True)),
    ], 5),
)  # fmt: skip
def test_what_depends_on_the_batch_alone_is_a_constant(forward) -> None:
    after, _ = run(FOLD, net(forward, mix=torch.randn(5, 8)), tokens())
    assert left(after) == {"matmul": 1, "softmax": 1}


@pytest.mark.parametrize(
    ("forward", "kept"),
    [
        (lambda s, x: s.f(torch.ones_like(x).sum(0)), "sum"),
        (lambda s, x: s.f(torch.ones_like(x).cumsum(0)), "cumsum"),
        (lambda s, x: s.f(torch.cat([expanded(s, x), expanded(s, x)])[: x.shape[0]]), "linear"),
        (lambda s, x: torch.einsum("bij->ij", s.one.expand(x.shape[0], 5, 8)), "matmul"),
        (lambda s, x: torch.einsum("bij,bkj->ik", expanded(s, x), expanded(s, x)), "matmul"),
        (lambda s, x: s.f(torch.einsum("bij,ckj->bik", expanded(s, x), expanded(s, x)) @ s.mix),
         "matmul"),
        (lambda s, x: s.f(F.pad(expanded(s, x), (0, 0, 0, 0, 1, 0))), "linear"),
        (lambda s, x: s.f(F.pad(s.f(expanded(s, x)), (0, 0, 0, 0, 1, -1))), "linear"),
        (lambda s, x: s.f(expanded(s, x)[[0, 0]]), "linear"),
        (lambda s, x: s.f(s.one.expand(x.shape[0], 5, 8).sin()[:, [2, 3]]), "linear"),
        (lambda s, x: s.f(expanded(s, x).expand(x.shape[0], 5, 8).roll(1)), "linear"),
    ],
)  # fmt: skip
def test_what_mixes_the_samples_keeps_its_size(forward, kept) -> None:
    model = Net(
        lambda s, x: forward(s, x) * x.mean(), f=nn.Linear(8, 8), q=torch.randn(1, 5, 8),
        mix=torch.randn(5, 8), one=torch.randn(1, 1, 8),
    )  # fmt: skip
    before = trace(model, tokens(), dynamic=True)
    after, _ = run(DEFER, model, tokens())
    assert left(after)[kept] == left(before)[kept]


def test_a_tensor_that_is_asked_for_its_shape_alone_is_not_computed() -> None:
    model = Net(lambda s, x: x + torch.zeros_like(s.f(x).sin()), f=nn.Linear(8, 8))
    after, _ = run(PIPELINES["default"].passes, model, tokens())
    assert left(after) == {"add": 1}  # the caller's own memory


def test_one_number_that_a_recurrence_starts_from_is_stored_in_full() -> None:
    model = Net(
        lambda s, x: s.gru(x, x.new_zeros(1, x.shape[0], 8))[0], gru=nn.GRU(8, 8, batch_first=True)
    )
    after, _ = run(PIPELINES["default"].passes, model, tokens())
    assert left(after) == {"new-zeros": 1, "gru": 1}


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 4)).transpose(1, 2)


def test_views_that_merge_the_batch_with_heads_read_what_is_expanded() -> None:
    model = net(
        lambda s, x: s.f(s.q.unsqueeze(1).repeat(1, x.shape[0], 1))
        .view(5, x.shape[0] * 2, 4).transpose(0, 1).reshape(x.shape[0], 2, 5, 4).flatten(1, 2)
        .mean(1, keepdim=True).tile(1, 1, 2),
        (5, 8),
    )  # fmt: skip
    after, _ = run(FOLD, model, tokens())
    assert "linear" not in left(after)


def test_a_static_batch_stores_one_copy() -> None:
    model = net(lambda s, x: s.f(expanded(s, x)), (1, 600, 8))
    after, _ = run(FOLD, model, tokens(), dynamic=False)
    assert "linear" not in left(after)
    stored = [b for n, b in after.named_buffers() if n.startswith("folded_")]
    assert [tuple(b.shape) for b in stored] == [(1, 600, 8)]


def test_a_constant_for_each_sample_fills_the_axis() -> None:
    model = net(lambda s, x: s.f(expanded(s, x)) + s.each, each=torch.randn(2, 1, 8))
    after, _ = run(DEFER, model, tokens(), dynamic=False)
    assert tuple(find(after, "linear").meta["val"].shape) == (1, 5, 8)


@pytest.mark.slow
def test_what_the_policy_of_growth_refuses_still_runs_on_one_copy() -> None:
    wide = nn.Linear(8, 4096)
    model = Net(
        lambda s, x: (s.wide(s.q.expand(x.shape[0], -1, -1)) * x.mean()).sigmoid(),
        q=torch.randn(1, 256, 8),
        wide=wide,
    )
    after, declined = run(FOLD, model, tokens())
    assert tuple(find(after, "linear").meta["val"].shape) == (1, 256, 4096)
    assert any("it stays factored" in d.reason for d in declined)


@pytest.mark.parametrize(
    ("forward", "kind"),
    few(
        [
            (lambda s, x: s.f(x + expanded(s, x)[:, :1]), "linear"),  # each sample has its own
            (
                lambda s, x: s.f(s.q[:, :, :1].expand(x.shape[0], -1, 8)),
                "linear",
            ),  # mixes the copies
            (lambda s, x: row(s, x) @ row(s, x).transpose(1, 2) @ s.mix, "matmul"),
            (lambda s, x: s.norm(s.q[:, :, :1].expand(x.shape[0], -1, 8) + x[:, :1]), "layer-norm"),
            (lambda s, x: expanded(s, x).softmax(0), "softmax"),
            (lambda s, x: expanded(s, x).cumsum(0), "cumsum"),
            (lambda s, x: s.plane(s.q.expand(x.shape[0], -1, -1).flatten(0, 1)[None]), "linear"),
            (lambda s, x: s.f(s.q.repeat(1, 2, 1).expand(x.shape[0], -1, -1) * x.sum()), "linear"),
        ],
        4,
    ),
)
def test_what_differs_or_mixes_the_copies_stays(forward, kind) -> None:
    model = net(forward, plane=nn.Linear(8, 8), mix=torch.randn(5, 8))
    before = trace(model, tokens(), dynamic=True)
    after, _ = run(DEFER, model, tokens())
    assert left(after)[kind] == left(before)[kind]
    size, other = (find(gm, kind.replace("-", "_")).meta["val"].shape for gm in (after, before))
    assert [str(s) for s in size] == [str(s) for s in other]


def row(s: Net, x: Tensor) -> Tensor:
    """The same number along what a product of two of them sums over."""
    return s.q[:, :, :1].expand(x.shape[0], -1, 8)


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: F.scaled_dot_product_attention(*(row(s, x) * s.mix for _ in "qkv")),
        lambda s, x: F.scaled_dot_product_attention(*(row(s, x) + 1 for _ in "qkv")),
        lambda s, x: s.f(expanded(s, x)).reshape(5, 2, 8).transpose(0, 1),
    ],
)
def test_a_static_batch_keeps_its_numbers(forward) -> None:
    run(DEFER, net(forward, mix=torch.randn(5, 8)), tokens(), dynamic=False)


def test_a_norm_of_batch_statistics_mixes_the_copies() -> None:
    norm = nn.BatchNorm1d(5, track_running_stats=False)
    model = net(lambda s, x: s.norm1(expanded(s, x)), norm1=norm)
    after, _ = run(DEFER, model, tokens(), dynamic=False)
    assert find(after, "batch_norm").meta["val"].shape[0] == 2


def test_a_convolution_without_a_batch_mixes_the_copies() -> None:
    model = Net(
        lambda s, x: s.conv(s.q.expand(4, 8)) + x, q=torch.randn(1, 8), conv=nn.Conv1d(4, 4, 1)
    )
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    after, _ = run(DEFER, model, x)
    assert [n.meta["val"].shape[0] for n in after.graph.nodes if "expand" in n.name] == [4]


def test_the_caller_gets_memory_of_its_own() -> None:
    model = Net(
        lambda s, x: (s.f(s.q.expand(x.shape[0], -1, -1)), x + 1),
        q=torch.randn(1, 5, 8), f=nn.Linear(8, 8),
    )  # fmt: skip
    after, declined = run(FOLD, model, tokens())
    assert [d.reason for d in declined] == ["the caller gets its result, in memory of its own"]
    result, _ = after(tokens(3))
    assert result.is_contiguous()
    result[0] = 0
    assert result[1].abs().sum() > 0


def test_a_reader_of_strides_keeps_them() -> None:
    model = net(lambda s, x: s.f(expanded(s, x)).as_strided((2, 5, 8), (40, 8, 1)))
    after, declined = run(DEFER, model, tokens(), dynamic=False)
    assert [d.reason for d in declined] == ["as_strided depends on the strides that it reads"]
    assert find(after, "linear").meta["val"].shape[0] == 2


def test_an_excluded_layer_stays() -> None:
    model = net(lambda s, x: s.f(s.norm(expanded(s, x)))).eval()
    gm = trace(model, tokens(), dynamic=True)
    PIPELINES["default"].run(gm, Context(exclude=("f",)))
    assert {k: n for k, n in left(gm).items() if k in ("linear", "layer-norm")} == {"linear": 1}
    x = tokens(3)
    torch.testing.assert_close(gm(x), model(x), rtol=1e-12, atol=1e-13)


@pytest.mark.slow
def test_multi_head_attention_loses_the_projection_of_its_queries() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    model = Net(
        lambda s, x: s.m(s.q.unsqueeze(0).repeat(x.shape[0], 1, 1), x, x, need_weights=False)[0],
        q=torch.randn(5, 8), m=layer,
    )  # fmt: skip
    after, _ = run(PIPELINES["default"].passes, model, tokens())
    assert left(after)["linear"] == 2  # keys with values, and the output


LAYERS = {
    "linear": lambda s, q: s.f(q),
    "norm": lambda s, q: s.norm(q),
    "gelu": lambda s, q: F.gelu(q),
    "shift": lambda s, q: q + s.g,
    "rows": lambda s, q: s.mix @ q,
    "heads": lambda s, q: heads(q).transpose(1, 2).flatten(2),
    "there": lambda s, q: q.transpose(0, 1).flatten(2).transpose(0, 1),
    "slice": lambda s, q: q[:, -5:],
}


@examples(10)
@given(
    names=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=5),
    rank=st.sampled_from([2, 3]),
    dynamic=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_chain_of_layers_keeps_its_numbers(names, rank, dynamic, seed) -> None:
    torch.manual_seed(seed)

    def forward(s: Net, x: Tensor) -> Tensor:
        q = expanded(s, x)
        for name in names:
            q = LAYERS[name](s, q)
        return q

    query = (1, 5, 8)[3 - rank :]
    model = net(forward, query, g=torch.randn(8), mix=torch.randn(5, 5))
    after, _ = run(FOLD, model, tokens(), dynamic=dynamic)
    assert left(after) == {"matmul": 1, "softmax": 1}
