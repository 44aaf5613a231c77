"""One layer that is applied often stays one: its calls read one folded weight, or none folds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import refold
from refold.graph import constants
from refold.passes import PIPELINES
from refold.passes.batch_norm.fold_batch_norm import FoldBatchNorm
from refold.passes.branches.fold_branches import FoldBranches
from tests.folding import Net, left, run

TIMES = 5


def repeated(step: Callable) -> Callable:
    def forward(s: Net, x: torch.Tensor) -> torch.Tensor:
        for _ in range(TIMES):
            x = step(s, x).tanh()
        return x

    return forward


def weights(gm: fx.GraphModule) -> int:
    """How many stored tensors with two axes or more the graph reads."""
    read = [n for n in gm.graph.find_nodes(op="get_attr") if n.users]
    return len({n.target for n in read if constants.tensor(n).dim() > 1})


@pytest.mark.parametrize(
    ("step", "parts", "x"),
    [
        (lambda s, x: s.n(s.c(x)), {"c": nn.Conv2d(32, 32, 3, padding=1), "n": nn.BatchNorm2d(32)},
         torch.randn(2, 32, 6, 5)),
        (lambda s, x: s.c(s.n(x)), {"c": nn.Conv2d(32, 32, 1), "n": nn.BatchNorm2d(32)},
         torch.randn(2, 32, 6, 5)),
        (lambda s, x: s.f(s.n(x)) * s.g,
         {"f": nn.Linear(64, 64), "n": nn.LayerNorm(64), "g": torch.randn(64)},
         torch.randn(2, 5, 64)),
        (lambda s, x: s.n(s.c(x)) + s.m(s.d(x)) + x,
         {"c": nn.Conv2d(32, 32, 3, padding=1), "d": nn.Conv2d(32, 32, 1),
          "n": nn.BatchNorm2d(32), "m": nn.BatchNorm2d(32)}, torch.randn(2, 32, 6, 5)),
        (lambda s, x: s.g(s.f(x)), {"f": nn.Linear(64, 64), "g": nn.Linear(64, 64)},
         torch.randn(2, 5, 64)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("pipeline", ["default", "min-nodes"])
def test_one_folded_weight_serves_all_calls(step, parts, x, pipeline) -> None:
    after, _ = run(PIPELINES[pipeline].passes, Net(repeated(step), **parts), x.double())
    kinds = left(after)
    assert kinds.get("conv", 0) + kinds.get("linear", 0) == TIMES
    assert not {"add", "mul", "batch-norm"} & kinds.keys()
    assert weights(after) == 1


@pytest.mark.parametrize("rule", [FoldBatchNorm(), FoldBranches()])
def test_what_only_some_calls_take_does_not_grow_the_constants(rule) -> None:
    def forward(s: Net, x: torch.Tensor) -> torch.Tensor:
        for i in range(TIMES):
            x = (s.c(x) if i % 2 else s.n(s.c(x))).tanh()
        return x

    net = Net(forward, c=nn.Conv2d(32, 32, 3, padding=1), n=nn.BatchNorm2d(32))
    after, declined = run(rule, net, torch.randn(2, 32, 6, 5).double())
    assert weights(after) == 1
    assert any("is shared by 5 layers" in d.reason for d in declined)


def test_calls_beside_other_layers_do_not_merge_with_each() -> None:
    """The merged weights would be as many as the calls, and each as large as the shared one."""

    def forward(s: Net, x: torch.Tensor) -> torch.Tensor:
        for layer in s.own:
            x = (s.c(x) + layer(x)).tanh()
        return x

    own = nn.ModuleList(nn.Conv2d(32, 32, 1) for _ in range(TIMES))
    net = Net(forward, c=nn.Conv2d(32, 32, 3, padding=1), own=own)
    after, declined = run(FoldBranches(), net, torch.randn(2, 32, 6, 5).double())
    assert weights(after) == 1 + TIMES
    assert any("is shared by" in d.reason for d in declined)


def test_an_embedding_that_is_read_often_is_one_table() -> None:
    def forward(s: Net, x: torch.Tensor) -> torch.Tensor:
        at = x.abs().long() % 99
        return sum((s.e(at + i) * s.g).sin() for i in range(TIMES))

    net = Net(forward, e=nn.Embedding(200, 32), g=torch.randn(32))
    after, _ = run(PIPELINES["default"].passes, net, torch.randn(2, 5).double() * 50)
    assert "mul" not in left(after)
    assert weights(after) == 1


def test_a_recurrence_that_runs_often_keeps_its_weights() -> None:
    """It shares no copies, so each is counted."""

    def forward(s: Net, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = s.r(s.n(x))[0].tanh()
        return x

    net = Net(forward, n=nn.LayerNorm(32), r=nn.GRU(32, 32, batch_first=True))
    after, _ = run(PIPELINES["default"].passes, net, torch.randn(2, 5, 32).double())
    assert weights(after) == 2


def test_calls_with_other_constants_have_other_weights() -> None:
    """Small ones, which are never refused: what looks alike is not taken for the same."""
    net = Net(
        lambda s, x: s.n(s.c(x)).tanh() + s.m(s.c(x.sin())).tanh() + (s.c(x.cos()) * s.g).tanh(),
        c=nn.Conv2d(4, 4, 3), n=nn.BatchNorm2d(4), m=nn.BatchNorm2d(4), g=torch.randn(4, 1, 1),
    )  # fmt: skip
    after, _ = run(PIPELINES["default"].passes, net, torch.randn(2, 4, 6, 5).double())
    assert left(after)["conv"] == 3
    assert weights(after) == 3


def test_other_weights_reach_all_calls() -> None:
    """A recipe knows that one constant serves several calls."""

    def make() -> nn.Module:
        net = Net(
            repeated(lambda s, x: s.n(s.c(x))), c=nn.Conv2d(32, 32, 3, padding=1),
            n=nn.BatchNorm2d(32),
        )  # fmt: skip
        return net

    x, other = torch.randn(2, 32, 6, 5).double(), make()
    done = refold.compile_for_inference(make(), (x,), recipe=True)
    with torch.no_grad():
        torch.testing.assert_close(done.refit(other.state_dict())(x), other(x))
