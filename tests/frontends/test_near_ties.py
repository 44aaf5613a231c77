"""A choice between near ties is no other path: float64 decides whether a batch of one is traced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import refold
from refold.frontends.export import trace


class Selects(nn.Module):
    """Keeps the best tokens by a score that is almost a tie; a trace rounds the score otherwise.

    So do two runs of one kernel whose memory is aligned differently.
    """

    def __init__(self, step: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.score = nn.Linear(32, 1)
        self.head = nn.Linear(32, 4)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        score = self.score(x).squeeze(-1)
        if torch.compiler.is_exporting():
            score = self.score(x / 3).squeeze(-1) * 3 - 2 * self.score.bias
        if x.shape[0] == 1:
            score = score * (1 - self.step) + self.step * score.flip(1)
        best = score.topk(8, dim=1).indices
        return torch.gather(self.head(x), 1, best.unsqueeze(-1).expand(-1, -1, 4))


def near_ties() -> Tensor:
    """Tokens of almost one score in the first row; a second row whose values are far larger."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 200, 32, generator=generator)
    normal = Selects().score.weight[0].detach()
    x[0] -= (x[0] @ normal / (normal @ normal))[:, None] * normal
    x[1] *= 1e4
    return x


def flips(x: Tensor) -> bool:
    """Whether the two roundings choose other tokens of the first row."""
    model = Selects().eval()
    rows, other = x[:1], model.score(x[:1] / 3).squeeze(-1) * 3 - 2 * model.score.bias
    chosen = [s.topk(8, dim=1).indices for s in (model.score(rows).squeeze(-1), other)]
    return not torch.equal(*chosen)


@pytest.mark.slow
@torch.no_grad()
def test_flipped_ties_leave_the_batch_dynamic() -> None:
    x = near_ties()
    assert flips(x)
    program = trace(Selects().eval(), (x,))
    assert program.specialised == ()
    assert program.inputs[0].batch == 0
    compiled = refold.compile_for_inference(Selects().eval(), x)
    assert compiled(x[:1]).shape == (1, 8, 4)


@torch.no_grad()
def test_another_path_at_batch_one_is_still_seen() -> None:
    program = trace(Selects(step=1.0).eval(), (near_ties(),))
    assert "another path at batch 1" in program.specialised[0]
    assert program.inputs[0].batch is None


@pytest.mark.parametrize("batch", [1, 2])
def test_ordinary_choices_have_a_dynamic_batch(batch: int) -> None:
    x = torch.randn(batch, 50, 32, generator=torch.Generator().manual_seed(1))
    model = Selects().eval()
    compiled = refold.compile_for_inference(model, x)
    for rows in (1, 3):
        x = torch.randn(rows, 50, 32, generator=torch.Generator().manual_seed(rows))
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
