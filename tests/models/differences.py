"""Difference convolutions of DEA-Net, in the three forms in which they can be written.

Chen et al., DEA-Net: Single image dehazing based on detail-enhanced convolution and
content-guided attention, 2024. Five parallel 3x3 convolutions, four of them on differences of
neighbours. Kernel positions are numbered row by row, 4 is the centre.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.case import Registry

MODELS = Registry()
CHANNELS = 6
IMAGE = (2, CHANNELS, 10, 11)
_ROTATED = [3, 0, 1, 6, 4, 2, 7, 8, 5]


class DetailConv(nn.Module):
    """The five free weights and biases; kernels are generated in the forward pass."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        size = (channels, channels)
        self.vanilla = nn.Parameter(torch.randn(*size, 3, 3) / 8)
        self.central = nn.Parameter(torch.randn(*size, 3, 3) / 8)
        self.horizontal = nn.Parameter(torch.randn(*size, 3) / 8)
        self.vertical = nn.Parameter(torch.randn(*size, 3) / 8)
        self.angular = nn.Parameter(torch.randn(*size, 3, 3) / 8)
        self.biases = nn.Parameter(torch.zeros(5, channels))

    def kernels(self) -> list[Tensor]:
        """Effective 3x3 kernels, written with the in-place stores that authors use."""
        size = (*self.vanilla.shape[:2], 9)

        flat = self.central.flatten(2)
        central = torch.zeros(size, dtype=flat.dtype, device=flat.device)
        central[:, :, :] = flat[:, :, :]
        central[:, :, 4] = flat[:, :, 4] - flat.sum(2)

        horizontal = torch.zeros(size, dtype=flat.dtype, device=flat.device)
        horizontal[:, :, [0, 3, 6]] = self.horizontal
        horizontal[:, :, [2, 5, 8]] = -self.horizontal

        vertical = torch.zeros(size, dtype=flat.dtype, device=flat.device)
        vertical[:, :, [0, 1, 2]] = self.vertical
        vertical[:, :, [6, 7, 8]] = -self.vertical

        flat = self.angular.flatten(2)
        angular = flat - flat[:, :, _ROTATED]

        made = (central, horizontal, vertical, angular)
        return [self.vanilla, *(kernel.reshape(self.vanilla.shape) for kernel in made)]


class OneConv(DetailConv):
    """The released code: kernels are added, then one convolution runs."""

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.kernels()
        for kernel in others:
            first = first + kernel
        return F.relu(F.conv2d(x, first, self.biases.sum(0), padding=1))


class FiveConvs(DetailConv):
    """The figure of the paper: five convolutions, then sums."""

    def forward(self, x: Tensor) -> Tensor:
        first, *others = (
            F.conv2d(x, kernel, bias, padding=1)
            for kernel, bias in zip(self.kernels(), self.biases.unbind(0), strict=True)
        )
        for branch in others:
            first = first + branch
        return F.relu(first)


class LiteralDifferences(DetailConv):
    """The definition: weights times differences of pixels, no kernel generated for the borders."""

    def forward(self, x: Tensor) -> Tensor:
        bias = self.biases.unbind(0)
        vanilla = F.conv2d(x, self.vanilla, bias[0], padding=1)
        centre = self.central.sum((2, 3), keepdim=True)
        central = F.conv2d(x, self.central, bias[1], padding=1) - F.conv2d(x, centre)

        column = self.horizontal.unsqueeze(3)
        columns = F.conv2d(F.pad(x, (1, 1, 1, 1)), column)
        horizontal = columns[:, :, :, :-2] - columns[:, :, :, 2:]
        row = self.vertical.unsqueeze(2)
        rows = F.conv2d(F.pad(x, (1, 1, 1, 1)), row)
        vertical = rows[:, :, :-2] - rows[:, :, 2:]

        turned = self.angular.flatten(2)[:, :, _ROTATED].reshape(self.angular.shape)
        angular = F.conv2d(x, self.angular, bias[4], padding=1) - F.conv2d(x, turned, padding=1)

        total = vanilla + central + (horizontal + bias[2].view(-1, 1, 1))
        return F.relu(total + (vertical + bias[3].view(-1, 1, 1)) + angular)


@MODELS.add("deconv one convolution", IMAGE, conv=1, add=0)
def one_conv() -> nn.Module:
    return OneConv(CHANNELS)


@MODELS.add("deconv five convolutions", IMAGE, conv=1, add=0)
def five_convs() -> nn.Module:
    return FiveConvs(CHANNELS)


@MODELS.add("deconv literal differences", IMAGE, conv=1, add=0, sub=0)
def literal_differences() -> nn.Module:
    return LiteralDifferences(CHANNELS)
