"""Constant tokens leave the layers that treat tokens one by one; what mixes tokens stays whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from refold.graph import printer
from refold.graph.nodes import shape
from refold.graph.ops import kind
from refold.passes import PIPELINES
from refold.passes.prepare.defer_expands import DeferExpands
from refold.passes.prepare.fold_constants import FoldConstants
from refold.passes.prepare.split_constant_tokens import SplitConstantTokens
from refold.rewrite.context import Context
from tests import golden
from tests.examples import examples, few
from tests.folding import Net, left, run
from tests.tracing import trace

SPLIT = SplitConstantTokens()
FOLD = (SPLIT, DeferExpands(), FoldConstants())
OWN, PROMPTS, WIDTH = 40, 56, 64
KNOWN = 56  # rows of a table


def tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, OWN, WIDTH, dtype=torch.float64)


def net(forward, **parts) -> Net:
    made = {
        "prompt": torch.randn(1, PROMPTS, WIDTH), "f": nn.Linear(WIDTH, WIDTH),
        "k": nn.Linear(WIDTH, WIDTH), "v": nn.Linear(WIDTH, WIDTH), "norm": nn.LayerNorm(WIDTH),
        "g": torch.randn(WIDTH), "places": torch.randn(1, PROMPTS + OWN, WIDTH),
    }  # fmt: skip
    return Net(forward, **{**made, **parts})


def prompted(s: Net, x: Tensor) -> Tensor:
    return torch.cat((s.prompt.expand(x.shape[0], -1, -1), x), 1)


def heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], 2, -1).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def products(gm: fx.GraphModule) -> list[tuple[int, ...]]:
    """The sizes behind the batch of what linears give."""
    return [tuple(shape(n)[1:]) for n in gm.graph.nodes if kind(n) == "linear"]


def test_golden() -> None:
    model = net(lambda s, x: s.f(s.norm(prompted(s, x))))
    before = printer.render(trace(model, tokens(), dynamic=True))
    after, _ = run(SPLIT, model, tokens())
    golden.check("split_constant_tokens", f"{before}\n---\n{printer.render(after)}")


@pytest.mark.parametrize(
    "forward",
    few(
        [
            lambda s, x: s.f(prompted(s, x)),
            lambda s, x: s.f(s.norm(prompted(s, x) * s.g)),
            lambda s, x: s.f(prompted(s, x) + s.places),
            lambda s, x: s.f(F.rms_norm(prompted(s, x) + s.places[0], (WIDTH,))).softmax(-1),
            lambda s, x: s.f(
                torch.cat((x[:, :1], s.prompt.expand(x.shape[0], -1, -1), x[:, 1:]), 1)
            ),
            lambda s, x: s.f(torch.cat((x, s.prompt.expand(x.shape[0], -1, -1)), 1) + s.places),
            lambda s, x: prompted(s, x) @ s.k.weight,
            lambda s, x: s.f(prompted(s, x).transpose(0, 1)),
            lambda s, x: s.f(prompted(s, x).unsqueeze(1)).squeeze(1),
            lambda s, x: s.f(prompted(s, x).view(x.shape[0], PROMPTS + OWN, 2, -1).flatten(2)),
            lambda s, x: s.f(prompted(s, x))[:, PROMPTS:].mean(1),
            lambda s, x: s.f(heads(prompted(s, x)).transpose(1, 2).reshape(x.shape[0], -1, WIDTH)),
        ],
        6,
    ),
)
def test_the_product_of_constant_tokens_folds(forward) -> None:
    model = net(forward)
    before = trace(model, tokens(), dynamic=True)
    after, _ = run(FOLD, model, tokens())
    whole = [n for n in after.graph.nodes if kind(n) in ("linear", "matmul")]
    assert sum(kind(n) in ("linear", "matmul") for n in before.graph.nodes) <= len(whole)
    extents = {size for n in whole for size in shape(n) if isinstance(size, int)}
    assert extents <= {OWN, 1, OWN - 1, WIDTH}, "nothing of the prompts"
    again = SPLIT.run(after)
    assert not again.modified
    assert not again.applied


def test_the_embedding_of_known_words_folds() -> None:
    table = nn.Embedding(9, WIDTH)

    def forward(s: Net, x: Tensor) -> Tensor:
        words = (x[..., 0].abs() * 3).long().clamp(max=8)
        return s.f(s.table(torch.cat((s.words.expand(x.shape[0], -1), words), 1)))

    model = net(forward, table=table)
    model.register_buffer("words", torch.tensor([[3, 0, 8] * 9]))
    after, _ = run(FOLD, model, tokens())
    assert products(after) == [(OWN, WIDTH)]


def attend(s: Net, t: Tensor, **options) -> Tensor:
    q, k, v = (heads(p(t)) for p in (s.f, s.k, s.v))
    return merged(F.scaled_dot_product_attention(q, k, v, **options))


def test_queries_that_see_everything_are_split_no_further() -> None:
    model = net(lambda s, x: s.f(attend(s, s.norm(prompted(s, x)))))
    after, _ = run(FOLD, model, tokens())
    assert products(after) == [(OWN, WIDTH)] * 3 + [(PROMPTS + OWN, WIDTH)]
    assert left(after)["attention"] == 1


def test_queries_of_constant_tokens_to_constant_keys_fold() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        q, k, v = s.f(prompted(s, x)), s.k(s.prompt), s.v(s.prompt)
        k, v = (t.expand(x.shape[0], -1, -1) for t in (k, v))
        return s.f(merged(F.scaled_dot_product_attention(heads(q), heads(k), heads(v))))

    after, _ = run(FOLD, net(forward), tokens())
    assert products(after) == [(OWN, WIDTH)] * 2


@pytest.mark.parametrize("spelling", few(["boolean", "additive"], 1))
@pytest.mark.parametrize("own", [False, True])
def test_keys_that_the_mask_hides_are_left_out(spelling: str, own: bool) -> None:
    """A mask of fixed size is looked at: prompts see prompts, the rest them and perhaps itself."""
    count = PROMPTS + OWN
    visible = (torch.arange(count) < PROMPTS).expand(count, count)
    visible = visible | torch.eye(count, dtype=torch.bool) if own else visible
    additive = torch.zeros(count, count, dtype=torch.float64).masked_fill(~visible, -torch.inf)

    def forward(s: Net, x: Tensor) -> Tensor:
        t = prompted(s, x)
        for _ in range(2):
            t = t + s.f(attend(s, t, attn_mask=s.mask))
        return t[:, PROMPTS:].tanh()

    model = net(forward)
    model.register_buffer("mask", visible if spelling == "boolean" else additive)
    after, _ = run(FOLD, model, tokens())
    linears = 8 if own else 4  # nobody sees the keys and values of the rest
    assert products(after) == [(OWN, WIDTH)] * linears
    extents = [tuple(shape(n.args[1])[2:]) for n in after.graph.nodes if kind(n) == "attention"]
    assert extents == [(count if own else PROMPTS, WIDTH // 2)] * 2


ROWS = {
    "first": lambda i, n: (i < KNOWN).expand(n, n),
    "own": lambda i, n: (i < KNOWN) | (i.unsqueeze(1) == i),
    "not": lambda i, n: ~((i >= KNOWN).expand(n, n)),
}


def table(mask) -> Net:
    """Known rows and the input's as one sequence of symbolic length."""

    def forward(s: Net, x: Tensor) -> Tensor:
        t = torch.cat((s.table, x)).unsqueeze(0)
        n = t.shape[1]
        t = t + s.f(attend(s, t, attn_mask=mask(torch.arange(n), n)))
        t = s.f(attend(s, t, attn_mask=mask(torch.arange(n), n)))
        return t[0, KNOWN:]

    return net(forward, table=torch.randn(KNOWN, WIDTH))


@pytest.mark.parametrize(("spelling", "linears"), [
    ("first", 4), ("own", 8), ("not", 4),
])  # fmt: skip
def test_a_mask_of_symbolic_size_is_reasoned_about(spelling: str, linears: int) -> None:
    x = torch.randn(30, WIDTH, dtype=torch.float64)
    after, _ = run(FOLD, table(ROWS[spelling]), x)
    assert left(after)["linear"] == linears
    found = [shape(n)[-2] for n in after.graph.nodes if kind(n) == "linear"]
    assert len({str(size) for size in found}) == 1, "the input's rows alone"


@pytest.mark.parametrize(
    "mask",
    few([
        lambda i, n: (i < KNOWN + 1).expand(n, n),  # shows one of the input's rows
        lambda i, n: (i < n - 1).expand(n, n),
        lambda i, n: (i >= n - KNOWN).expand(n, n),
        lambda i, n: i.unsqueeze(1) <= i,
        lambda i, n: i.unsqueeze(1) >= i,  # the part that hides has a symbolic size itself
        lambda i, n: i.unsqueeze(1) + 1 >= i,
        lambda i, n: i.unsqueeze(1) % 30 >= i % 30,
        lambda i, n: (i.unsqueeze(1) != i) | (i == 0),
        lambda i, n: (i < KNOWN) & (i.unsqueeze(1) < 0) | (i.unsqueeze(1) == i) | (i == KNOWN + 1),
    ], 2),
)  # fmt: skip
def test_a_mask_that_shows_the_input_to_constant_rows_keeps_their_attention(mask) -> None:
    model = table(mask)
    x = torch.randn(30, WIDTH, dtype=torch.float64)
    before = trace(model, x, dynamic=True)
    after, _ = run(FOLD, model, x)
    sizes = [
        [str(shape(n)[-2]) for n in gm.graph.nodes if kind(n) == "linear"][-1]
        for gm in (before, after)
    ]
    assert sizes[0] == sizes[1], "the last layer computes every row"


def test_known_rows_may_be_cut_out_of_the_sequence() -> None:
    """The context is the known rows, every layer's queries are all of them."""

    def forward(s: Net, x: Tensor) -> Tensor:
        t = torch.cat((s.table, x)).unsqueeze(0)
        for _ in range(2):
            c = t[:, :KNOWN]
            q, k, v = heads(s.f(t)), heads(s.k(c)), heads(s.v(c))
            t = t + s.f(merged(F.scaled_dot_product_attention(q, k, v)))
        return t[0, KNOWN:]

    model = net(forward, table=torch.randn(KNOWN, WIDTH))
    after, _ = run(FOLD, model, torch.randn(30, WIDTH, dtype=torch.float64))
    found = [str(shape(n)[1]) for n in after.graph.nodes if kind(n) == "linear"]
    assert len(found) == 4
    assert len(set(found)) == 1, "the input's rows alone"


def test_a_concatenation_of_what_is_split_is_split_by_all_parts() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        t = s.f(prompted(s, x))
        other = s.other.expand(x.shape[0], -1, -1)
        return s.k(torch.cat((t, other), 1)) + s.v(torch.cat((other, t), 1)).flip(1)

    after, _ = run(FOLD, net(forward, other=torch.randn(1, 48, WIDTH)), tokens())
    assert products(after) == [(OWN, WIDTH)] * 3


def test_what_is_constant_as_a_whole_is_left_to_others() -> None:
    model = net(lambda s, x: x @ s.f(torch.cat((s.prompt, s.places), 1)).transpose(1, 2))
    after, declined = run(SPLIT, model, tokens())
    assert [n.meta["val"].shape[1] for n in after.graph.nodes if kind(n) == "linear"] == [
        2 * PROMPTS + OWN
    ]
    assert not declined


def test_one_token_keeps_the_axis_that_a_squeeze_would_drop() -> None:
    model = net(
        lambda s, x: s.f(torch.cat((x, s.c.expand(x.shape[0], -1, -1)), 1).squeeze(1)),
        c=torch.randn(1, 1, WIDTH),
    )
    run(SPLIT, model, tokens())


@pytest.mark.slow
def test_a_causal_attention_keeps_its_prompt_constant() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        t = prompted(s, x)
        for _ in range(2):
            t = t + s.f(attend(s, s.norm(t), is_causal=True, scale=0.3))
        return t

    after, _ = run(FOLD, net(forward), tokens())
    assert products(after) == [(OWN, WIDTH)] * 8


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_causal_attention_of_symbolic_length(place: str) -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        t = torch.cat((s.table, x) if place == "first" else (x, s.table)).unsqueeze(0)
        return s.f(s.norm(attend(s, t, is_causal=True)))

    model = net(forward, table=torch.randn(KNOWN, WIDTH))
    after, _ = run(FOLD, model, torch.randn(30, WIDTH, dtype=torch.float64))
    sizes = [str(shape(n)[1]) for n in after.graph.nodes if kind(n) == "linear"]
    assert (str(KNOWN) in sizes[-1]) == (place == "last"), "what comes last sees the input"


MIXING = {
    "conv": lambda s, x: s.conv(prompted(s, x).transpose(1, 2)).transpose(1, 2),
    "linear": lambda s, x: s.mix(prompted(s, x).transpose(1, 2)),
    "softmax": lambda s, x: prompted(s, x).softmax(1) @ s.k.weight,
    "norm": lambda s, x: F.layer_norm(prompted(s, x), (PROMPTS + OWN, WIDTH)) @ s.k.weight,
    "batch norm": lambda s, x: s.tokens(prompted(s, x)) @ s.k.weight,
    "mean": lambda s, x: (prompted(s, x) - prompted(s, x).mean(1, keepdim=True)) @ s.k.weight,
    "cumsum": lambda s, x: prompted(s, x).cumsum(1) @ s.k.weight,
    "merged": lambda s, x: s.wide(prompted(s, x).flatten(1)),
    "paired": lambda s, x: s.pair(prompted(s, x).reshape(x.shape[0], -1, 2 * WIDTH)),
    "repeated": lambda s, x: s.pair(prompted(s, x).repeat(1, 1, 2)),
    "flip": lambda s, x: prompted(s, x).flip(1) @ s.k.weight,
    "roll": lambda s, x: prompted(s, x).roll(1, 1) @ s.k.weight,
    "weights of a sample": lambda s, x: prompted(s, x) @ x[0, :WIDTH].t(),
    "part": lambda s, x: prompted(s, x)[:, PROMPTS - 1 :] @ s.k.weight,
    "other cut": lambda s, x: (
        prompted(s, x) + torch.cat((x, s.prompt.expand(x.shape[0], -1, -1)), 1)
    ) @ s.k.weight,
    "each sample": lambda s, x: (prompted(s, x) * x[:, :1]) @ s.k.weight,
    "all tokens": lambda s, x: (prompted(s, x) + s.pad(x)) @ s.k.weight,
    "weights": lambda s, x: prompted(s, x) @ x.transpose(1, 2),
    "keys": lambda s, x: (x @ prompted(s, x).transpose(1, 2)).softmax(-1) @ prompted(s, x),
}  # fmt: skip


@pytest.mark.parametrize("name", few(MIXING, 9))
def test_what_mixes_tokens_stays(name: str) -> None:
    count = PROMPTS + OWN
    model = net(
        MIXING[name], conv=nn.Conv1d(WIDTH, WIDTH, 3, padding=1), mix=nn.Linear(count, count),
        tokens=nn.BatchNorm1d(count), wide=nn.Linear(count * WIDTH, 4),
        pair=nn.Linear(2 * WIDTH, 4), pad=nn.ZeroPad2d((0, 0, PROMPTS, 0)),
    )  # fmt: skip
    after, _ = run(SPLIT, model, tokens())
    assert left(after) == left(trace(model, tokens(), dynamic=True))


def test_a_class_token_does_not_pay_for_another_concatenation() -> None:
    """The residual reads the tokens too, so they would be put together twice."""
    model = net(
        lambda s, x: (t := torch.cat((s.c.expand(x.shape[0], -1, -1), x), 1)) + attend(s, t),
        c=torch.randn(1, 1, WIDTH),
    )
    after, declined = run(SPLIT, model, tokens())
    assert products(after) == [(1 + OWN, WIDTH)] * 3
    (record,) = declined
    assert record.reason.startswith("putting the tokens together behind the products would cost ")


@pytest.mark.slow
def test_prompts_of_every_layer_pay_at_real_sizes() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        for prompt in (s.first, s.second):
            t = torch.cat((x[:, :1], prompt.expand(x.shape[0], -1, -1), x[:, 1:]), 1)
            t = t + attend(s, s.norm(t))
            x = torch.cat((t[:, :1], t[:, 1 + 20 :]), 1)
        return x

    width = 192
    parts = {name: nn.Linear(width, width) for name in "fkv"}
    prompts = {name: torch.randn(1, 20, width) for name in ("first", "second")}
    model = Net(forward, norm=nn.LayerNorm(width), **parts, **prompts)
    after, _ = run(FOLD, model, torch.randn(2, 197, width, dtype=torch.float64))
    assert {size for size, _ in products(after)} == {1, 196}


def test_what_the_caller_gets_keeps_its_strides_and_memory() -> None:
    model = net(lambda s, x: s.f(prompted(s, x).transpose(0, 1)).transpose(0, 1)[..., :4])
    _, declined = run(SPLIT, model, tokens())
    assert not declined, "the layouts stay, and read what is put together"
    x = tokens()
    gm = trace(net(lambda s, x: (s.f(t := prompted(s, x)), t[:, PROMPTS:])), x)
    assert SPLIT.run(gm).modified
    _, own = gm(x)
    own.zero_()
    assert x.abs().min() > 0


def test_a_part_that_is_written_later_stays_in_its_concatenation() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.randn(2, OWN, WIDTH, dtype=torch.float64))
            self.prompt = nn.Parameter(torch.randn(2, PROMPTS, WIDTH, dtype=torch.float64))
            self.f = nn.Linear(WIDTH, WIDTH).double()

        def forward(self, x: Tensor) -> Tensor:
            t = torch.cat((self.prompt, self.state), 1)
            self.state.add_(x)
            return self.f(t)

    gm = trace(Writes(), tokens())
    assert not SPLIT.run(gm).modified


def test_an_excluded_layer_stays() -> None:
    gm = trace(net(lambda s, x: s.f(s.norm(prompted(s, x)))), tokens(), dynamic=True)
    PIPELINES["default"].run(gm, Context(exclude=("f",)))
    assert products(gm) == [(PROMPTS + OWN, WIDTH)]


LAYERS = {
    "linear": lambda s, t: s.f(t),
    "norm": lambda s, t: s.norm(t),
    "gelu": lambda s, t: F.gelu(t),
    "scale": lambda s, t: t * s.g,
    "there": lambda s, t: s.k(t.transpose(0, 1)).transpose(0, 1),
    "heads": lambda s, t: merged(heads(t).tanh()),
    "places": lambda s, t: t - s.places[:, : t.shape[1]],
    "residual": lambda s, t: t + s.v(t),
    "causal": lambda s, t: attend(s, t, is_causal=True),
    "attend": lambda s, t: attend(s, t),
    "scaled": lambda s, t: attend(s, t, is_causal=True, scale=0.3),
    "mean": lambda s, t: t - t.mean(1, keepdim=True),
}


@examples(12)
@given(
    names=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=5),
    first=st.booleans(),
    dynamic=st.booleans(),
    ends=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_chain_of_layers_keeps_its_numbers(names, first, dynamic, ends, seed) -> None:
    torch.manual_seed(seed)

    def forward(s: Net, x: Tensor) -> Tensor:
        prompt = s.prompt.expand(x.shape[0], -1, -1)
        t = torch.cat((prompt, x) if first else (x, prompt), 1)
        for name in names:
            t = LAYERS[name](s, t)
        return t[:, PROMPTS:] if ends else t

    run(FOLD, net(forward), tokens(), dynamic=dynamic)
