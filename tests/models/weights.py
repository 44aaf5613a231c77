"""Generated, normalised, tied and reused weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from tests.models.case import Registry

MODELS = Registry()
CHANNELS = 6
IMAGE = (2, CHANNELS, 8, 9)


@MODELS.add("weight norm", IMAGE, conv=2, batch_norm=0)
def weight_normed() -> nn.Module:
    """Salimans and Kingma, Weight Normalization, 2016."""
    return nn.Sequential(
        weight_norm(nn.Conv2d(CHANNELS, 8, 3, padding=1)),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        weight_norm(nn.Conv2d(8, 4, 1)),
        nn.Sigmoid(),
    )


@MODELS.add("spectral norm", IMAGE, conv=1, linear=1)
def spectral_normed() -> nn.Module:
    """Miyato et al., Spectral Normalization for Generative Adversarial Networks, 2018."""
    return nn.Sequential(
        spectral_norm(nn.Conv2d(CHANNELS, 8, 3, padding=1)),
        nn.LeakyReLU(0.1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        spectral_norm(nn.Linear(8, 5)),
    )


@MODELS.add("orthogonal linear", (3, 8), linear=1)
def orthogonal() -> nn.Module:
    return nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 8)), nn.ReLU())


class StandardisedConv(nn.Conv2d):
    """A convolution whose weight is standardised per output channel.

    Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization, 2019.
    """

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (std + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)


@MODELS.add("weight standardisation", IMAGE, conv=1, batch_norm=0)
def weight_standardised() -> nn.Module:
    conv = StandardisedConv(CHANNELS, 8, 3, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU())


class TiedWeights(nn.Module):
    """One weight read by two linears (an auto-encoder's halves) and by a scaled third."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        y = torch.tanh(self.second(y) * self.scale)
        return F.linear(y, self.first.weight.t())


@MODELS.add("tied weights", (3, 8), linear=3)
def tied_weights() -> nn.Module:
    return TiedWeights(8)


class ModuleTwice(nn.Module):
    """One convolution called twice, with a norm of its own at each call."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.norm2 = nn.BatchNorm2d(channels)
        self.head = nn.Conv2d(channels, 64, 3)  # so large that a second weight is no growth

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv(x)))
        return self.head(F.relu(self.norm2(self.conv(x))))


@MODELS.add("module called twice", IMAGE, conv=3, batch_norm=0)
def module_twice() -> nn.Module:
    return ModuleTwice(CHANNELS)


class SharedConvBN(nn.Module):
    """A convolution and its norm, called on two different tensors (a siamese pair)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        left, right = self.norm(self.conv(x)), self.norm(self.conv(y))
        return torch.tanh(left) * torch.sigmoid(right)


@MODELS.add("siamese", IMAGE, IMAGE, conv=2, batch_norm=0)
def siamese() -> nn.Module:
    return SharedConvBN(CHANNELS)


class BatchStatistics(nn.Module):
    """A norm that always takes its statistics from the batch: it must stay."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(self.conv(x), None, None, self.scale, self.shift, training=True)
        return F.relu(y)


@MODELS.add("batch statistics", IMAGE, conv=1)
def batch_statistics() -> nn.Module:
    return BatchStatistics(CHANNELS)
