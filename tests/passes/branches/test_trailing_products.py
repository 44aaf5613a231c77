"""Einsums of a tensor with constants are matrices over the last axes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from refold.graph.records import products
from refold.passes.branches.fold_branches import FoldBranches
from refold.passes.prepare.fold_constants import FoldConstants
from refold.rewrite import cost
from tests.examples import examples
from tests.folding import Net, left, run
from tests.tracing import trace

D, H, E = 6, 5, 3


def tokens() -> torch.Tensor:
    return torch.randn(2, 4, D, dtype=torch.float64)


def net(forward) -> Net:
    return Net(
        forward, w=torch.randn(E, D, H), b=torch.randn(E, H), u=torch.randn(E, H, H),
        a=torch.rand(E), g=torch.randn(3, 2, 4), p=torch.randn(D, D), l=nn.Linear(D, H),
        l12=nn.Linear(12, H),
    )  # fmt: skip


FOLDED = {
    "experts, averaged at the end": lambda s, x: torch.einsum(
        "e,bteh->bth", s.a, torch.einsum("btd,edh->bteh", x, s.w) + s.b
    ),
    "experts, averaged inside": lambda s, x: torch.einsum("btd,edh,e->bth", x, s.w, s.a) + s.l(x),
    "the constant first, an ellipsis": lambda s, x: torch.einsum(
        "edh, e, ...d -> ...h", s.w, s.a, s.l(x) @ s.u[0, :, :1] @ s.p[:1]
    ).flatten(1),  # as it comes its axes lie otherwise, which the caller of the model would see
    "blocks before a linear": lambda s, x: s.l12(
        torch.einsum("...gi,gio->...go", x.unflatten(-1, (3, 2)), s.g).flatten(-2)
    ),
    "blocks of scaled and shifted rows": lambda s, x: s.l12(
        (torch.einsum("btgi,gio->btgo", x.unflatten(-1, (3, 2)), s.g) * s.g[:, 0] + 1).flatten(2)
    ),
    "experts one after the other": lambda s, x: torch.einsum(
        "bteh,ehk->btk", torch.einsum("btd,edh->bteh", x, s.w), s.u
    ),
    "rows turned back": lambda s, x: torch.einsum(
        "bthe,e->bth", torch.einsum("btd,edh->bthe", x, s.w), s.a
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_one_linear_is_left(name) -> None:
    gm, _ = run((FoldConstants(), FoldBranches()), net(FOLDED[name]), tokens())
    assert left(gm) == {"linear": 1}


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: torch.einsum("btd,bsd,de->bts", x, x, s.p),  # two tensors
        lambda s, x: torch.einsum("btd,tdh->bth", x, s.w[[0, 1, 2, 0]]),  # other ones for each row
        lambda s, x: torch.einsum("btd,dh->hbt", x, s.p),  # the rows do not come first
        lambda s, x: torch.einsum("btd,dh->bth", x, s.p[:1]),  # the constant broadcasts
        lambda s, x: torch.einsum("btd,eh->bteh", x, s.p),  # summed without a partner: no product
        lambda s, x: torch.einsum("btt->bt", x[:, :, :4]),
    ],
)
def test_other_einsums_keep_their_numbers(forward) -> None:
    model = net(lambda s, x: forward(s, x) + forward(s, x))
    run((FoldConstants(), FoldBranches(prefer="nodes")), model, tokens())


def test_blocks_alone_stay() -> None:
    """Written out as a dense matrix they would take longer."""
    model = net(lambda s, x: torch.einsum("btgi,gio->btgo", x.unflatten(-1, (3, 2)), s.g))
    gm, _ = run(FoldBranches(), model, tokens())
    assert left(gm) == {"matmul": 1}


@st.composite
def equations(draw: st.DrawFn) -> str:
    letters = draw(st.permutations("uvw"))
    ours = "".join(letters[: draw(st.integers(1, 3))])
    constant = "".join(draw(st.permutations("uvwxy"))[: draw(st.integers(1, 4))])
    kept = sorted({*ours, *constant})
    out = "".join(draw(st.permutations(kept))[: draw(st.integers(1, len(kept)))])
    rows = draw(st.sampled_from(("b", "...", "bt")))
    return f"{rows}{ours},{constant}->{rows}{out}"


@examples(40)
@given(equations(), st.booleans())
def test_the_matrix_is_that_of_any_equation(equation, swapped) -> None:
    sizes = dict(b=2, t=3, u=2, v=3, w=4, x=2, y=3)
    inputs, out = equation.split("->")
    ours, constant = inputs.split(",")
    x = torch.randn([sizes[c] for c in ours.replace("...", "bt")], dtype=torch.float64)
    w = torch.randn([sizes[c] for c in constant], dtype=torch.float64)
    if swapped:
        equation = f"{constant},{ours}->{out}"
    model = Net(lambda s, v: torch.einsum(equation, *((s.w, v) if swapped else (v, s.w))), w=w)
    node = next(n for n in trace(model, x).graph.nodes if "einsum" in n.name)
    product = products.trailing_product(node)
    assert product is not None
    rows, columns = product.weight.shape
    found = (x.reshape(-1, columns) @ product.weight.get().t()).reshape(model(x).shape)
    torch.testing.assert_close(found, model(x), rtol=1e-12, atol=1e-12)
    assert found.numel() == rows * x.numel() // columns


def test_the_cost_of_an_einsum_is_that_of_its_contractions() -> None:
    model = Net(
        lambda s, x: torch.einsum("btd,dh,hk->btk", x, s.a, s.b),
        a=torch.randn(64, 512), b=torch.randn(512, 64),
    )  # fmt: skip
    node = next(
        n for n in trace(model, torch.randn(8, 128, 64).double()).graph.nodes if "einsum" in n.name
    )
    costs = cost.reference()
    both = (costs.matrix(1024, 512, 64, 8) + costs.matrix(1024, 64, 512, 8)).total
    assert 0.8 * both < costs.of(node).total < 1.01 * both
