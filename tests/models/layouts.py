"""Networks whose norms stand behind layout calls, concatenation, upsampling; other dimensions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.case import Registry

MODELS = Registry()


class ShuffleUnit(nn.Module):
    """Grouped 1x1, channel shuffle, depthwise 3x3, grouped 1x1, with a residual.

    Zhang et al., ShuffleNet, 2018; the first norm stands after the shuffle here.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.first = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)
        self.first_norm = nn.BatchNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(channels)
        self.last = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)
        self.last_norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        batch, channels, height, width = y.shape
        y = y.view(batch, self.groups, channels // self.groups, height, width)
        y = y.transpose(1, 2).reshape(batch, channels, height, width)
        y = self.depthwise_norm(self.depthwise(F.relu(self.first_norm(y))))
        return F.relu(x + self.last_norm(self.last(y)))


@MODELS.add("shufflenet", (2, 12, 9, 8), batch_norm=0, add=1)
def shufflenet() -> nn.Module:
    return ShuffleUnit(12, 3)


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1, norm, ReLU, 3x3; the result is appended to its input.

    Huang et al., Densely Connected Convolutional Networks, 2017. Only the second norm can go.
    """

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


@MODELS.add("densenet", (2, 6, 9, 8), conv=4)
def densenet() -> nn.Module:
    return nn.Sequential(DenseLayer(6, 4), DenseLayer(10, 4))


class ConcatNorm(nn.Module):
    """Two convolutions side by side, one norm over both, pooled, normalised again."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.left = nn.Conv2d(channels, channels, 3, padding=1)
        self.right = nn.Conv2d(channels, 2 * channels, 1)
        self.norm = nn.BatchNorm2d(3 * channels)
        self.pooled = nn.BatchNorm2d(3 * channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.cat([self.left(x), self.right(x)], 1))
        return F.relu(self.pooled(F.avg_pool2d(y, 2)))


@MODELS.add("concat then norms", (2, 4, 8, 10), batch_norm=0)
def concat_norm() -> nn.Module:
    return ConcatNorm(4)


@MODELS.add("pixel shuffle", (2, 4, 7, 6), conv=2, batch_norm=0)
def pixel_shuffle() -> nn.Module:
    """Shi et al., Efficient Sub-Pixel Convolutional Neural Network, 2016, with norms."""
    return nn.Sequential(
        nn.Conv2d(4, 32, 3, padding=1, bias=False),
        nn.PixelShuffle(2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.PixelShuffle(2),
        nn.Tanh(),
    )


@MODELS.add("transposed convolutions", (2, 8, 5, 6), conv_transpose=2, batch_norm=0)
def generator() -> nn.Module:
    """Radford et al., DCGAN, 2016: transposed convolutions with norms, one of them grouped."""
    return nn.Sequential(
        nn.ConvTranspose2d(8, 12, 4, 2, 1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 8, 3, 2, 1, output_padding=1, groups=4),
        nn.BatchNorm2d(8),
        nn.Tanh(),
    )


class CausalBlock(nn.Module):
    """Dilated convolutions padded on the left alone, with norms and a residual.

    Bai et al., An Empirical Evaluation of Generic Convolutional and Recurrent Networks, 2018.
    """

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.left = 2 * dilation
        self.conv = nn.Conv1d(channels, channels, 3, dilation=dilation)
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + F.dropout(self.norm(self.conv(F.pad(x, (self.left, 0)))), 0.1, False))


@MODELS.add("causal 1-d", (2, 6, 21), conv=2, batch_norm=0, dropout=0)
def causal() -> nn.Module:
    return nn.Sequential(CausalBlock(6, 1), CausalBlock(6, 2))


class VolumeBlock(nn.Module):
    """A RepVGG block in three dimensions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        self.wide_norm = nn.BatchNorm3d(channels)
        self.flat = nn.Conv3d(channels, channels, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.flat_norm = nn.BatchNorm3d(channels)
        self.skip = nn.BatchNorm3d(channels)

    def forward(self, x: Tensor) -> Tensor:
        total = self.wide_norm(self.wide(x)) + self.flat_norm(self.flat(x))
        return F.relu(total + self.skip(x))


@MODELS.add("volume", (2, 4, 5, 6, 7), conv=1, batch_norm=0, add=0)
def volume() -> nn.Module:
    return VolumeBlock(4)


class TokenNorms(nn.Module):
    """Linears with a batch norm over flattened tokens and a norm before the head.

    Graham et al., LeViT: a Vision Transformer in ConvNet's Clothing, 2021.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, 2 * width, bias=False)
        self.first_norm = nn.BatchNorm1d(2 * width)
        self.last = nn.Linear(2 * width, width, bias=False)
        self.last_norm = nn.BatchNorm1d(width)
        self.head_norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 5)

    def _tokens(self, linear: nn.Linear, norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
        y = linear(x)
        return norm(y.flatten(0, 1)).reshape_as(y)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self._tokens(self.first, self.first_norm, x))
        x = x + self._tokens(self.last, self.last_norm, y)
        return self.head(self.head_norm(x.mean(1)))


@MODELS.add("levit", (3, 7, 8), linear=3, batch_norm=0, add=1)
def levit() -> nn.Module:
    return TokenNorms(8)
