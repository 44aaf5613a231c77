"""Models whose rounding moves their discrete choices are compared with these held."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refold
from refold.errors import VerificationError
from refold.frontends.export import trace
from refold.graph.copies import copy_sharing_tensors
from refold.passes import PIPELINES
from refold.rewrite.rule import rule_from_functions
from refold.verify import compare
from refold.verify.references import references
from tests.examples import few
from tests.folding import Net


def selecting() -> tuple[nn.Module, Tensor]:
    """A detector's head: the best 300 of 8,000 places; float32 picks others than float64."""
    torch.manual_seed(0)

    def select(s: Net, x: Tensor) -> Tensor:
        f = s.f(x)
        best = (s.s(f).squeeze(-1) * 1e-3 + 1).topk(300, dim=1).indices
        return s.h(torch.gather(f, 1, best.unsqueeze(-1).expand(-1, -1, 16))).tanh()

    score = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
    net = Net(select, f=nn.Linear(32, 16), s=score, h=nn.Linear(16, 4))
    return net.float(), torch.randn(2, 8000, 32)


def rounding() -> tuple[nn.Module, Tensor]:
    """An activation quantiser of a steep score: float32 rounds others than float64."""
    torch.manual_seed(0)
    net = Net(lambda s, x: s.h(torch.round(s.f(x) * 3e4) / 3).sin(), f=nn.Linear(32, 16),
              h=nn.Linear(16, 4))  # fmt: skip
    return net.float(), torch.randn(2, 8000, 32)


def test_an_honest_fold_passes_and_says_how_it_was_compared() -> None:
    report = refold.compile_for_inference(*selecting()).report.numerics
    assert report["passed"]
    assert any("held to the same discrete choices" in note for note in report["notes"])
    assert report["tolerance"] < 1e-3


PLANTED: list[tuple[Callable, Callable, Callable]] = [
    (selecting, lambda x: torch.tanh(x), lambda x: torch.sin(x)),
    (selecting, lambda x: torch.tanh(x), lambda x: torch.sigmoid(x * 2.002) * 2 - 1),
    (selecting, lambda x: F.relu(x), lambda x: torch.clamp(-x, min=0.0)),
    (rounding, lambda x: torch.sin(x), lambda x: torch.cos(x - 1.6)),
]


@pytest.mark.parametrize("case", few(range(len(PLANTED)), 1))
def test_a_wrong_rewrite_is_refused(case: int) -> None:
    build, before, after = PLANTED[case]
    bug = rule_from_functions("planted", before=before, after=after, exactness="reassociates")
    model, x = build()
    with pytest.raises(refold.RefoldError):
        refold.compile_for_inference(model, x, pipeline=PIPELINES["default"].with_(bug))


def test_a_wrong_choice_is_not_held_to_the_right_one() -> None:
    model, x = selecting()
    program = trace(model, (x,))
    original = copy_sharing_tensors(program.graph_module)
    gm = program.graph_module
    known = references(original, program)
    assert compare.verify(original, gm, known, folded_gm=gm).passed
    topk = next(n for n in gm.graph.nodes if "topk" in str(n.target))
    topk.args = (*topk.args[:3], False)
    gm.recompile()
    with pytest.raises(VerificationError):
        compare.verify(original, gm, known, folded_gm=gm)
