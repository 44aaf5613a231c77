from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from refold.graph import printer
from refold.passes import PIPELINES
from refold.passes.scale_shift.fold_attention_biases import FoldAttentionBiases
from refold.rewrite.context import Context
from tests import golden
from tests.compare import EXACT, relative_error
from tests.examples import examples, few
from tests.folding import Net, left, run
from tests.tracing import trace

FOLD = FoldAttentionBiases()
C, HEADS, WIDTH, TOKENS = 16, 4, 4, 5
HIDDEN = torch.zeros(TOKENS, TOKENS, dtype=torch.float64)
HIDDEN[1, 2:] = HIDDEN[3, :2] = -math.inf
PER_ROW = torch.rand(TOKENS, 1, dtype=torch.float64)
PER_KEY = torch.rand(TOKENS, dtype=torch.float64)
ROW = HIDDEN.clone()
ROW[2] = -math.inf


class Attention(nn.Module):
    """Projections (``qkv``, ``kv`` or separate ones) around ``core(self, q, k, v)``."""

    def __init__(self, core, projections: str = "qkv-separate", groups: int = HEADS) -> None:
        super().__init__()
        self.core, self.projections, self.groups = core, projections, groups
        self.q = nn.Linear(C, C)
        self.k, self.v = nn.Linear(C, groups * WIDTH), nn.Linear(C, groups * WIDTH)
        self.kv, self.qkv = nn.Linear(C, 2 * C), nn.Linear(C, 3 * C)
        self.out = nn.Linear(C, 7)
        self.double().eval()

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, WIDTH)).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x)
        if self.projections == "qkv":
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.projections == "kv":
            q, (k, v) = self.heads(self.q(x)), map(self.heads, self.kv(x).chunk(2, -1))
        else:
            q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        return self.out(self.core(self, q, k, v).transpose(1, 2).flatten(2)).tanh()


def tokens() -> torch.Tensor:
    return torch.randn(2, TOKENS, C, dtype=torch.float64)


def fused(**options):
    return lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


def softmax(s, q, k, v):
    return (q @ k.transpose(-2, -1) / 2.0).softmax(-1) @ v


def biases(gm: fx.GraphModule) -> list[bool]:
    """Whether each linear has a bias, in order."""
    linears = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    return [len(n.args) > 2 and n.args[2] is not None for n in linears]


def test_golden() -> None:
    model = Attention(fused())
    before = printer.render(trace(model, tokens(), dynamic=True))
    after, _ = run(FOLD, model, tokens())
    golden.check("fold_attention_biases", f"{before}\n---\n{printer.render(after)}")


BOTH, KEYS, NEITHER = [True, False, False, True], [True, False, True, True], [True] * 4


def rotary(s, q, k, v):
    angle = torch.arange(TOKENS, dtype=q.dtype)[:, None] * torch.ones(WIDTH, dtype=q.dtype)
    return F.scaled_dot_product_attention(q * angle.cos(), k * angle.cos() + k.flip(-1), v)


@pytest.mark.parametrize(
    ("equation", "size"),
    [
        ("bnc,n->bnc", (TOKENS,)),
        ("bnc,c->bnc", (C,)),
        ("bnc,bnd->cd", (2, TOKENS, 3)),
        ("bnc,bnc->", (2, TOKENS, C)),
    ],
)
def test_products_that_are_no_attention(equation: str, size: tuple[int, ...]) -> None:
    """An axis that is scaled and not summed, one that only the right side has, no axis left."""
    factor = torch.randn(size, dtype=torch.float64)
    net = Net(lambda s, x: torch.einsum(equation, torch.softmax(x, -1), s.factor), factor=factor)
    gm, _ = run(FOLD, net, tokens(), dynamic=False)
    assert left(gm)["matmul"] == 1


@pytest.mark.parametrize(
    ("core", "expected"),
    few([
        (fused(), BOTH),
        (fused(is_causal=True), BOTH),
        (fused(scale=0.3), BOTH),
        (fused(attn_mask=HIDDEN), BOTH),
        (fused(attn_mask=HIDDEN == 0), BOTH),
        (fused(attn_mask=ROW), KEYS),
        (fused(attn_mask=ROW == 0), KEYS),
        (softmax, BOTH),
        (lambda s, q, k, v: ((q * 0.5) @ k.mT + HIDDEN).softmax(-1) @ v, BOTH),
        (lambda s, q, k, v: (q @ k.mT).masked_fill(HIDDEN < 0, -math.inf).softmax(-1) @ v, BOTH),
        (lambda s, q, k, v: (q @ k.mT + q @ q.mT).softmax(-1) @ v, BOTH),
        (lambda s, q, k, v: (q @ k.mT).reshape(-1, TOKENS).softmax(-1).view(-1, HEADS, TOKENS,
                                                                            TOKENS) @ v, NEITHER),
        (lambda s, q, k, v: torch.einsum(
            "bhij,bhjd->bhid", torch.einsum("bhid, bhjd -> bhij", q, k).softmax(-1), v), BOTH),
        (lambda s, q, k, v: ((q @ k.mT) * PER_ROW).softmax(-1) @ v, BOTH),
        # what must stay
        (lambda s, q, k, v: ((q @ k.mT) * PER_KEY).softmax(-1) @ v, [True, True, False, True]),
        (lambda s, q, k, v: (q @ k.mT).masked_fill(HIDDEN < 0, -1.0).softmax(-1) @ v,
         [True, True, False, True]),
        (lambda s, q, k, v: (q @ k.mT).relu().softmax(-1) @ v, [True, True, False, True]),
        (lambda s, q, k, v: (q @ k.mT).softmax(-2) @ v, NEITHER),
        (lambda s, q, k, v: (q @ k.mT).sigmoid() @ v, NEITHER),
        (lambda s, q, k, v: (q @ k.mT).softmax(-1).masked_fill(HIDDEN < 0, 0.0) @ v, NEITHER),
        (lambda s, q, k, v: (lambda a: a.softmax(-1) @ v + a.sum())(q @ k.mT),
         NEITHER),
        (lambda s, q, k, v: softmax(s, q, k, v).relu(), KEYS),
        (lambda s, q, k, v: softmax(s, q, k, v) + v, KEYS),
        (lambda s, q, k, v: softmax(s, q, k, v) + k, NEITHER),
        (rotary, [True, True, False, True]),
        (lambda s, q, k, v: softmax(s, q, F.normalize(k, dim=-1), v), [True, True, False, True]),
        (lambda s, q, k, v: softmax(s, q, F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0))), NEITHER),
        (lambda s, q, k, v: softmax(s, q, *(t.transpose(1, 2).reshape(k.shape) for t in (k, v))),
         NEITHER),
        (lambda s, q, k, v: F.scaled_dot_product_attention(q, k, k) + v, [True] * 4),
        (lambda s, q, k, v: softmax(s, k, k, v), [False, True]),
    ], 6),
)  # fmt: skip
def test_cores(core, expected) -> None:
    after, _ = run(FOLD, Attention(core), tokens())
    found = biases(after)
    if len(expected) == 2:  # the queries' projection is not read
        assert found == [True, False, True]
    else:
        assert found == expected


@pytest.mark.slow
def test_keys_and_values_of_one_layer() -> None:
    after, _ = run(FOLD, Attention(softmax, "kv"), tokens())
    assert biases(after) == [True, False, True]
    _, declined = run(
        FOLD, Attention(lambda s, q, k, v: softmax(s, q, k, v).relu(), "kv"), tokens()
    )
    assert any("serves more than keys" in d.reason for d in declined)


def test_a_bias_that_serves_queries_stays_and_says_what_is_dead() -> None:
    after, declined = run(FOLD, Attention(softmax, "qkv"), tokens())
    assert biases(after) == [True, True]
    assert "16 elements of it, qkv.bias[16:32], the keys', change nothing" in declined[0].reason
    model, x = Attention(softmax, "qkv"), tokens()
    with torch.no_grad():
        expected = model(x)
        model.qkv.bias[16:32] += 3.0
        assert relative_error(model(x), expected) <= EXACT
        model.qkv.bias[15:16] += 3.0
        assert relative_error(model(x), expected) > 1e-6


@pytest.mark.slow
def test_what_is_dead_of_a_bias_need_not_be_one_block() -> None:
    class PerHead(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            parts = self.qkv(torch.tanh(x)).unflatten(-1, (HEADS, 3, WIDTH)).transpose(1, 2)
            return self.out(softmax(self, *parts.unbind(3)).transpose(1, 2).flatten(2))

    _, declined = run(FOLD, PerHead(softmax), tokens())
    assert any("16 elements of it, the keys', change nothing" in d.reason for d in declined)


@pytest.mark.parametrize(
    ("core", "reason"),
    few(
        [
            (lambda s, q, k, v: softmax(s, q, k, v) + k, "add reads what the bias is added to"),
            (lambda s, q, k, v: softmax(s, q, k, k), "matmul_1 reads what the bias is added to"),
            (lambda s, q, k, v: softmax(s, k, k, v), "matmul reads what the bias is added to"),
            (lambda s, q, k, v: fused()(s, q, k, k), "read more than once"),
            (lambda s, q, k, v: softmax(s, q, k, k.flip(2)), "reads what the bias is added to"),
            (
                lambda s, q, k, v: softmax(s, q, k.transpose(1, 2).reshape(k.shape), v),
                "differs from key to key",
            ),
        ],
        3,
    ),
)
def test_of_a_bias_that_others_read_nothing_is_called_dead(core, reason) -> None:
    _, declined = run(FOLD, Attention(core, "qkv"), tokens())
    assert any(re.search(reason, d.reason) for d in declined), declined
    assert not any("change nothing" in d.reason for d in declined), declined


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
def test_grouped_queries(groups) -> None:
    def repeat(x: torch.Tensor) -> torch.Tensor:
        times = HEADS // groups
        return x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)

    for core in (
        lambda s, q, k, v: softmax(s, q, repeat(k), repeat(v)),
        lambda s, q, k, v: softmax(
            s, q, *(t.repeat_interleave(HEADS // groups, 1) for t in (k, v))
        ),
        fused(enable_gqa=True),
    ):
        after, _ = run(FOLD, Attention(core, groups=groups), tokens())
        assert biases(after) == BOTH


def test_a_mask_that_is_an_input_may_hide_a_row() -> None:
    class Masked(Attention):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            self.mask = mask
            return super().forward(x)

    model = Masked(lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, s.mask))
    with torch.no_grad():
        gm = trace(model, tokens(), HIDDEN)
        result = FOLD.run(gm)
        assert biases(gm) == KEYS
        assert "hides every key" in result.declined[0].reason
        x = tokens()
        for mask in (HIDDEN, ROW):
            assert relative_error(gm(x, mask), model(x, mask)) <= EXACT


def test_a_key_that_is_an_output_stays() -> None:
    class Cached(Attention):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            kept = {}

            def core(s, q, k, v):
                kept["k"] = k
                return softmax(s, q, k, v)

            self.core = core
            return super().forward(x), kept["k"]

    gm = trace(Cached(softmax), tokens())
    FOLD.run(gm)
    assert biases(gm) == [True, True, False, True]


def test_the_reader_of_one_attention_projects_for_the_next() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(C, C) for _ in range(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v, p, w, o = self.layers
            y = F.scaled_dot_product_attention(q(x), k(x), v(x))
            z = w(y)  # reads one attention, is the value of the next
            return o(F.scaled_dot_product_attention(p(x), q(x.cos()), z)).tanh()

    after, _ = run(FOLD, Two().double().eval(), tokens())
    assert biases(after).count(True) == 4 - 1


def test_attention_of_convolutions() -> None:
    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Conv2d(C, C, 1) for _ in range(3))
            self.out = nn.Linear(C, C)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (f(x).flatten(2) for f in (self.q, self.k, self.v))
            y = v @ (q.mT @ k).softmax(-1).mT  # the values are on the left
            z = (q.mT @ k).softmax(-1) @ v.mT
            return y, self.out(z)

    x = torch.randn(2, C, 4, 3, dtype=torch.float64)
    after, _ = run(FOLD, Pixels().double().eval(), x)
    assert left(after)["conv"] == 3


@st.composite
def attentions(draw: st.DrawFn):
    core = draw(st.sampled_from([
        fused(), fused(is_causal=True), softmax, fused(attn_mask=HIDDEN),
        lambda s, q, k, v: ((q @ k.mT) * 0.3 + HIDDEN.clamp(-2)).softmax(-1) @ v,
    ]))  # fmt: skip
    dead = draw(st.sampled_from(["k.bias", "v.bias", "kv.bias", "out.bias", None]))
    return core, draw(st.sampled_from(["qkv", "kv", "separate"])), dead


@given(attentions())
@examples(10)
def test_any_attention(drawn) -> None:
    core, projections, dead = drawn
    model = Attention(core, projections)
    if dead is not None:
        model.get_parameter(dead).data.zero_()
    after, _ = run(FOLD, model, tokens())
    kept = {"qkv": [True, True], "kv": [True, False, True], "separate": BOTH}
    assert biases(after) == kept[projections]


def test_dead_parameters_are_named() -> None:
    with torch.no_grad():
        result = FOLD.run(trace(Attention(fused()), tokens()))
    assert [a.detail for a in result.applied] == [
        "k.bias changes nothing: it adds one number to every score of a row",
        "v.bias into the bias of linear_3",
    ]


def test_excluded_layers_stay() -> None:
    for name, expected in (("k", [True, True, False, True]), ("v", KEYS), ("out", KEYS)):
        with torch.no_grad():
            gm = trace(Attention(fused()), tokens())
            PIPELINES["default"].without("merge-parallel-layers").run(gm, Context(exclude=(name,)))
        assert biases(gm) == expected


def test_the_scale_of_attention_goes_into_a_projection() -> None:
    for projections in ("qkv", "separate"):
        after, _ = run(PIPELINES["default"].passes, Attention(softmax, projections), tokens())
        assert not {"mul", "div"} & set(left(after))
