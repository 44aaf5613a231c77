"""Smooth resizes by a factor are exported where their sizes say the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import refold
from refold.errors import BackendError


class Resize(nn.Module):
    def __init__(self, **settings) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, mode="bicubic", antialias=True, **self.settings)


@pytest.mark.parametrize(
    "settings", [{"scale_factor": 1.7}, {"scale_factor": (2.0, 0.6)}], ids=["one", "two"]
)
def test_a_factor_that_is_not_that_of_the_sizes_is_refused(settings) -> None:
    with pytest.raises(BackendError, match=r"resizes 4 elements by [\d.]+ with antialias=True"):
        refold.compile_for_inference(Resize(**settings), (torch.rand(2, 3, 4, 4),), target="ort")


@pytest.mark.parametrize(
    "settings",
    [
        {"scale_factor": 2},
        {"scale_factor": 0.5},
        {"size": (6, 3)},
        {"scale_factor": 1.7, "recompute_scale_factor": True},
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_other_resizes_run(settings, dynamic) -> None:
    net, x = Resize(**settings), torch.rand(2, 3, 4, 4)
    shapes = None if dynamic else ({},)
    done = refold.compile_for_inference(net, (x,), target="ort", dynamic_shapes=shapes)
    torch.testing.assert_close(done(x), net(x), rtol=1e-4, atol=1e-5)
