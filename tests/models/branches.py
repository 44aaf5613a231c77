"""Convolutional blocks with parallel branches, in the form that their papers train."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.case import Registry

MODELS = Registry()
CHANNELS = 8
IMAGE = (2, CHANNELS, 12, 13)


def conv_bn(
    inputs: int,
    outputs: int,
    kernel: int | tuple[int, int],
    *,
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    """A convolution without bias and its batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class RepVGGBlock(nn.Module):
    """3x3, 1x1 and identity branches, each with a batch norm.

    Ding et al., RepVGG: Making VGG-style ConvNets Great Again, 2021.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.wide = conv_bn(inputs, outputs, 3, stride=stride, padding=1, groups=groups)
        self.narrow = conv_bn(inputs, outputs, 1, stride=stride, groups=groups)
        keeps_shape = inputs == outputs and stride == 1
        self.identity = nn.BatchNorm2d(inputs) if keeps_shape else None

    def forward(self, x: Tensor) -> Tensor:
        skip = 0 if self.identity is None else self.identity(x)
        return F.relu(self.wide(x) + self.narrow(x) + skip)


@MODELS.add("repvgg", (2, 3, 17, 16), conv=4, batch_norm=0, add=0)
def repvgg() -> nn.Module:
    return nn.Sequential(
        RepVGGBlock(3, 8, 2),
        RepVGGBlock(8, 8),
        RepVGGBlock(8, 12, 2, groups=2),
        RepVGGBlock(12, 12, groups=4),
    )


class SqueezeExcite(nn.Module):
    """Channel gates that depend on the input (Hu et al., Squeeze-and-Excitation Networks, 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 4, 1)
        self.expand = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(pooled))))


class MobileOneBlock(nn.Module):
    """Several over-parameterised branches, a 1x1 scale branch and a skip, each with a batch norm.

    Vasu et al., MobileOne: An Improved One millisecond Mobile Backbone, 2023. As in the authors'
    formulation the sum starts at the number 0.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        branches: int = 2,
        squeeze: bool = False,
    ) -> None:
        super().__init__()
        options = {"stride": stride, "groups": groups}
        self.branches = nn.ModuleList(
            conv_bn(inputs, outputs, kernel, padding=kernel // 2, **options)
            for _ in range(branches)
        )
        self.scale = conv_bn(inputs, outputs, 1, **options) if kernel > 1 else None
        keeps_shape = inputs == outputs and stride == 1
        self.skip = nn.BatchNorm2d(inputs) if keeps_shape else None
        self.gate = SqueezeExcite(outputs) if squeeze else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        scale = 0 if self.scale is None else self.scale(x)
        skip = 0 if self.skip is None else self.skip(x)
        total = scale + skip
        for branch in self.branches:
            total = total + branch(x)
        return F.relu(self.gate(total))


@MODELS.add("mobileone", (2, 3, 16, 17), conv=7, batch_norm=0, add=0)
def mobileone() -> nn.Module:
    return nn.Sequential(
        MobileOneBlock(3, 8, 3, stride=2, branches=1),
        MobileOneBlock(8, 8, 3, groups=8, branches=4),
        MobileOneBlock(8, 8, 1, branches=3),
        MobileOneBlock(8, 8, 3, stride=2, groups=8),
        MobileOneBlock(8, 16, 1, squeeze=True),
    )


class AsymmetricBlock(nn.Module):
    """Square, vertical and horizontal kernels, each with a batch norm.

    Ding et al., ACNet: Strengthening the Kernel Skeletons, 2019.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.square = conv_bn(inputs, outputs, 3, stride=stride, padding=1)
        self.vertical = conv_bn(inputs, outputs, (3, 1), stride=stride, padding=(1, 0))
        self.horizontal = conv_bn(inputs, outputs, (1, 3), stride=stride, padding=(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.square(x) + self.vertical(x) + self.horizontal(x))


@MODELS.add("acnet", (2, 3, 15, 16), conv=2, batch_norm=0, add=0)
def acnet() -> nn.Module:
    return nn.Sequential(AsymmetricBlock(3, 8), AsymmetricBlock(8, 8, 2))


class BorderedBatchNorm(nn.Module):
    """Batch norm, then padding with the value that a zero pixel has after it (DBB's BN-and-pad)."""

    def __init__(self, channels: int, padding: int, *, slices: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.padding = padding
        self.slices = slices

    def forward(self, x: Tensor) -> Tensor:
        norm, p = self.norm, self.padding
        y = norm(x)
        assert norm.running_var is not None
        border = norm.bias - norm.running_mean * norm.weight / torch.sqrt(
            norm.running_var + norm.eps
        )
        border = border.view(1, -1, 1, 1)
        if not self.slices:
            return F.pad(y - border, [p] * 4) + border
        y = F.pad(y, [p] * 4)
        y[:, :, :p, :] = border
        y[:, :, -p:, :] = border
        y[:, :, :, :p] = border
        y[:, :, :, -p:] = border
        return y


class DiverseBranchBlock(nn.Module):
    """kxk; 1x1; 1x1 then kxk; 1x1 then average pooling: all with batch norms.

    Ding et al., Diverse Branch Block: Building a Convolution as an Inception-like Unit, 2021.
    """

    def __init__(self, channels: int, kernel: int = 3, *, slices: bool) -> None:
        super().__init__()
        pad = kernel // 2
        self.origin = conv_bn(channels, channels, kernel, padding=pad)
        self.pointwise = conv_bn(channels, channels, 1)
        self.sequence = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False),
            BorderedBatchNorm(channels, pad, slices=slices),
            conv_bn(channels, channels, kernel),
        )
        self.average = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False),
            BorderedBatchNorm(channels, pad, slices=slices),
            nn.AvgPool2d(kernel, 1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        total = self.origin(x) + self.pointwise(x)
        return F.relu(total + self.sequence(x) + self.average(x))


@MODELS.add("dbb", IMAGE, conv=1, batch_norm=0, add=0, pad=0)
def diverse_branches() -> nn.Module:
    return DiverseBranchBlock(CHANNELS, slices=False)


@MODELS.add("dbb slice assignment", IMAGE, conv=1, batch_norm=0, add=0, pad=0)
def diverse_branches_slices() -> nn.Module:
    return DiverseBranchBlock(CHANNELS, slices=True)


class LargeKernel(nn.Module):
    """A large depthwise kernel with a small one beside it.

    Ding et al., Scaling Up Your Kernels to 31x31 (RepLKNet), 2022.
    """

    def __init__(self, channels: int, large: int, small: int) -> None:
        super().__init__()
        self.large = conv_bn(channels, channels, large, padding=large // 2, groups=channels)
        self.small = conv_bn(channels, channels, small, padding=small // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.large(x) + self.small(x))


@MODELS.add("replknet", IMAGE, conv=1, batch_norm=0, add=0)
def large_kernel() -> nn.Module:
    return LargeKernel(CHANNELS, 13, 5)


class DilatedReparamBlock(nn.Module):
    """A large depthwise kernel with dilated small ones beside it.

    Ding et al., UniRepLKNet: A Universal Perception Large-Kernel ConvNet, 2024.
    """

    def __init__(self, channels: int, kernel: int, branches: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        self.large = conv_bn(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.dilated = nn.ModuleList(
            conv_bn(
                channels,
                channels,
                size,
                padding=dilation * (size - 1) // 2,
                dilation=dilation,
                groups=channels,
            )
            for size, dilation in branches
        )

    def forward(self, x: Tensor) -> Tensor:
        total = self.large(x)
        for branch in self.dilated:
            total = total + branch(x)
        return F.relu(total)


@MODELS.add("unireplknet", IMAGE, conv=1, batch_norm=0, add=0)
def dilated_branches() -> nn.Module:
    return DilatedReparamBlock(CHANNELS, 9, ((5, 1), (5, 2), (3, 3), (3, 4)))


class EdgeSequence(nn.Module):
    """1x1 with bias, a border of that bias, then a 3x3 or a scaled fixed edge kernel."""

    def __init__(self, channels: int, mask: Tensor | None = None) -> None:
        super().__init__()
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.mask: Tensor | None
        self.register_buffer("mask", mask)
        if mask is None:
            self.weight = nn.Parameter(torch.randn(channels, channels, 3, 3) / 9)
        else:
            self.weight = nn.Parameter(torch.randn(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.pointwise(x), (1, 1, 1, 1), "constant", 0)
        border = self.pointwise.bias.view(1, -1, 1, 1)
        y[:, :, 0:1, :] = border
        y[:, :, -1:, :] = border
        y[:, :, :, 0:1] = border
        y[:, :, :, -1:] = border
        if self.mask is None:
            return F.conv2d(y, self.weight, self.bias)
        return F.conv2d(y, self.weight * self.mask, self.bias, groups=self.weight.shape[0])


class EdgeBlock(nn.Module):
    """3x3 beside 1x1-3x3, 1x1-Sobel (two ways) and 1x1-Laplacian sequences, with a skip.

    Zhang et al., Edge-oriented Convolution Block for Real-time Super Resolution (ECBSR), 2021.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        laplace = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.sequences = nn.ModuleList([EdgeSequence(channels)])
        for mask in (sobel, sobel.T, laplace):
            self.sequences.append(EdgeSequence(channels, mask.expand(channels, 1, 3, 3).clone()))
        self.activation = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        total = self.conv(x)
        for sequence in self.sequences:
            total = total + sequence(x)
        return self.activation(total + x)


@MODELS.add("ecbsr", IMAGE, conv=1, add=0, pad=0)
def edge_block() -> nn.Module:
    return EdgeBlock(CHANNELS)


class RepMLPBlock(nn.Module):
    """A fully connected layer over the pixels of each plane, with convolutions beside it.

    Ding et al., RepMLP: Re-parameterizing Convolutions into Fully-connected Layers, 2021; here
    the local and partition perceptrons, with one weight for all channels.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.size = (height, width)
        self.dense = nn.Linear(height * width, height * width, bias=False)
        self.dense_norm = nn.BatchNorm2d(1)
        self.local = nn.ModuleList(conv_bn(1, 1, kernel, padding=kernel // 2) for kernel in (1, 3))

    def forward(self, x: Tensor) -> Tensor:
        planes = x.reshape(-1, 1, *self.size)
        total = self.dense_norm(self.dense(planes.flatten(1)).reshape(-1, 1, *self.size))
        for branch in self.local:
            total = total + branch(planes)
        return F.relu(total.reshape(x.shape))


@MODELS.add("repmlp", (2, CHANNELS, 4, 5), conv_like=1, batch_norm=0)
def repmlp() -> nn.Module:
    return RepMLPBlock(4, 5)


class RepViTBlock(nn.Module):
    """Depthwise token mixer with an identity and a norm over the sum, gates, then an MLP.

    Wang et al., RepViT: Revisiting Mobile CNN From ViT Perspective, 2024.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = conv_bn(channels, channels, 3, padding=1, groups=channels)
        self.narrow = nn.Conv2d(channels, channels, 1, groups=channels)
        self.norm = nn.BatchNorm2d(channels)
        self.gate = SqueezeExcite(channels)
        self.expand = conv_bn(channels, 2 * channels, 1)
        self.project = conv_bn(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate(self.norm(self.wide(x) + self.narrow(x) + x))
        return x + self.project(F.gelu(self.expand(x)))


@MODELS.add("repvit", IMAGE, conv=5, batch_norm=0, add=1)
def repvit() -> nn.Module:
    return RepViTBlock(CHANNELS)


class RepMixerBlock(nn.Module):
    """``x + scale * (mixer(x) - norm(x))``, then a convolutional feed-forward with layer scale.

    Vasu et al., FastViT: A Fast Hybrid Vision Transformer, 2023.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mixer_wide = conv_bn(channels, channels, 3, padding=1, groups=channels)
        self.mixer_scale = conv_bn(channels, channels, 1, groups=channels)
        self.mixer_skip = nn.BatchNorm2d(channels)
        self.norm = nn.BatchNorm2d(channels)
        self.mixer_layer_scale = nn.Parameter(torch.full((channels, 1, 1), 1e-5))
        self.depthwise = conv_bn(channels, channels, 7, padding=3, groups=channels)
        self.expand = nn.Conv2d(channels, 3 * channels, 1)
        self.project = nn.Conv2d(3 * channels, channels, 1)
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixer_wide(x) + self.mixer_scale(x) + self.mixer_skip(x)
        x = x + self.mixer_layer_scale * (mixed - self.norm(x))
        hidden = self.project(F.gelu(self.expand(self.depthwise(x))))
        return x + self.layer_scale * hidden


@MODELS.add("fastvit", IMAGE, conv=4, batch_norm=0, mul=0, sub=0, add=1)
def fastvit() -> nn.Module:
    return RepMixerBlock(CHANNELS)


class GhostModule(nn.Module):
    """A primary pointwise part and a cheap depthwise part made from it, both many-branched.

    Liu et al., GhostNetV3: Exploring the Training Strategies for Compact Models, 2024.
    """

    def __init__(self, inputs: int, outputs: int, branches: int = 3) -> None:
        super().__init__()
        half = outputs // 2
        self.primary = nn.ModuleList(conv_bn(inputs, half, 1) for _ in range(branches))
        self.primary_skip = nn.BatchNorm2d(inputs) if inputs == half else None
        self.cheap = nn.ModuleList(
            conv_bn(half, half, 3, padding=1, groups=half) for _ in range(branches)
        )
        self.cheap_scale = conv_bn(half, half, 1, groups=half)
        self.cheap_skip = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        first = 0 if self.primary_skip is None else self.primary_skip(x)
        for branch in self.primary:
            first = first + branch(x)
        first = F.relu(first)
        second = self.cheap_scale(first) + self.cheap_skip(first)
        for branch in self.cheap:
            second = second + branch(first)
        return torch.cat([first, F.relu(second)], 1)


@MODELS.add("ghostnetv3", IMAGE, conv=4, batch_norm=0, add=0)
def ghostnetv3() -> nn.Module:
    return nn.Sequential(GhostModule(CHANNELS, 2 * CHANNELS), GhostModule(2 * CHANNELS, CHANNELS))
