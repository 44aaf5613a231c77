"""Records decline what they cannot describe."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refold.graph.records import convolutions
from tests.tracing import find, trace


class SamplesAsGroups(nn.Module):
    """One convolution with a group for each sample, written for any number of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.expand(x.shape[0], -1, -1, -1, -1).flatten(0, 1)
        return F.conv2d(x.reshape(1, -1, 5, 5), weight, groups=x.shape[0])


@pytest.mark.slow
def test_groups_that_vary_with_the_batch_are_no_convolution() -> None:
    x = torch.randn(2, 4, 5, 5)
    assert convolutions.conv(find(trace(SamplesAsGroups(), x, dynamic=True), "conv2d")) is None


def test_groups_of_a_fixed_number_are() -> None:
    conv = nn.Conv2d(4, 6, 3, groups=2)
    record = convolutions.conv(find(trace(conv, torch.randn(2, 4, 5, 5), dynamic=True), "conv2d"))
    assert record is not None
    assert record.groups == 2
