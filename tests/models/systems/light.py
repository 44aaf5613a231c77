"""Light networks and blocks: PP-LCNet, PoolFormer, FasterNet, BlurPool, SMPConv, CLR."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.branches import SqueezeExcite, conv_bn
from tests.models.systems.case import Systems

SYSTEMS = Systems("Light networks")
CHANNELS = 8


class SeparableBlock(nn.Module):
    """Depthwise, then pointwise, each with a norm and a hard swish; gated where asked."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, *, gated: bool = False
    ) -> None:
        super().__init__()
        options = {"stride": stride, "padding": kernel // 2, "groups": inputs}
        self.depthwise = conv_bn(inputs, inputs, kernel, **options)
        self.gate = SqueezeExcite(inputs) if gated else nn.Identity()
        self.pointwise = conv_bn(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate(F.hardswish(self.depthwise(x)))
        return F.hardswish(self.pointwise(x))


class LCNet(nn.Module):
    """Cui et al., PP-LCNet: A Lightweight CPU Convolutional Neural Network, 2021."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(
            SeparableBlock(8, 8, 3, 1),
            SeparableBlock(8, 12, 3, 2),
            SeparableBlock(12, 16, 5, 2),
            SeparableBlock(16, 16, 5, 1, gated=True),
        )
        self.last = nn.Conv2d(16, 24, 1, bias=False)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.hardswish(self.stem(x)))
        x = F.hardswish(self.last(F.adaptive_avg_pool2d(x, 1)))
        return self.head(x.flatten(1))


@SYSTEMS.add(
    "PP-LCNet", (2, 3, 32, 32), paper="PP-LCNet (Cui et al., 2021)",
    there={"conv": 12, "batch-norm": 9}, left={"conv": 12}, passes=("fold-batch-norm",),
)  # fmt: skip
def lcnet() -> nn.Module:
    return LCNet()


class RepSeparableBlock(nn.Module):
    """Depthwise kernels of several sizes in parallel, then pointwise ones, wide and narrow."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, gated: bool = False) -> None:
        super().__init__()
        options = {"stride": stride, "groups": inputs}
        self.depthwise = nn.ModuleList(
            conv_bn(inputs, inputs, kernel, padding=kernel // 2, **options) for kernel in (5, 3, 1)
        )
        self.skip = nn.BatchNorm2d(inputs) if stride == 1 else None
        self.gate = SqueezeExcite(inputs) if gated else nn.Identity()
        self.reduce = conv_bn(inputs, outputs // 2, 1)
        self.expand = conv_bn(outputs // 2, outputs, 1)
        self.residual = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        parts = [branch(x) for branch in self.depthwise]
        if self.skip is not None:
            parts.append(self.skip(x))
        y = self.gate(F.relu(sum(parts)))
        y = F.relu(self.expand(F.relu(self.reduce(y))))
        return x + y if self.residual else y


class LCNetV2(nn.Module):
    """PP-LCNetV2 of PaddleClas, 2022: the separable block re-parameterised."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(
            RepSeparableBlock(8, 8, 1),
            RepSeparableBlock(8, 16, 2),
            RepSeparableBlock(16, 16, 1, gated=True),
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


@SYSTEMS.add(
    "PP-LCNetV2", (2, 3, 32, 32), paper="PP-LCNetV2 (PaddleClas, 2022)",
    there={"conv": 18, "batch-norm": 18, "add": 13}, left={"conv": 12, "add": 2},
    passes=("clean-up", "fold-batch-norm", "fold-branches"),
)  # fmt: skip
def lcnet_v2() -> nn.Module:
    return LCNetV2()


class PoolFormerBlock(nn.Module):
    """``x + scale * (pool(n) - n)`` with ``n`` a group norm of ``x``, then a feed-forward.

    The pool leaves padding out of its mean, so it is no convolution. The norm's bias is a constant
    minus its own mean: dead.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, channels), nn.GroupNorm(1, channels)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.expand = nn.Conv2d(channels, 2 * channels, 1)
        self.project = nn.Conv2d(2 * channels, channels, 1)
        self.scale1 = nn.Parameter(torch.full((channels, 1, 1), 1e-5))
        self.scale2 = nn.Parameter(torch.full((channels, 1, 1), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.scale1 * (self.pool(y) - y)
        return x + self.scale2 * self.project(F.gelu(self.expand(self.norm2(x))))


@SYSTEMS.add(
    "PoolFormer", (2, 3, 32, 24), paper="MetaFormer (Yu et al., 2022)",
    there={"conv": 5, "group-norm": 4, "avg-pool": 3, "mul": 4, "sub": 2, "add": 4, "linear": 1},
    left={"conv": 5, "group-norm": 4, "avg-pool": 3, "sub": 2, "add": 4, "linear": 1},
    passes=("absorb-scale-shift",), dead=("1.norm1.bias", "2.norm1.bias"),
)  # fmt: skip
def poolformer() -> nn.Module:
    stem = nn.Conv2d(3, CHANNELS, 7, 4, 2)
    blocks = [PoolFormerBlock(CHANNELS), PoolFormerBlock(CHANNELS)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 5)]
    return nn.Sequential(stem, *blocks, *head)


class PartialConvBlock(nn.Module):
    """A 3x3 convolution of a quarter of the channels, then two pointwise ones, on a skip."""

    def __init__(self, channels: int, *, in_place: bool) -> None:
        super().__init__()
        self.part = channels // 4
        self.in_place = in_place
        self.conv = nn.Conv2d(self.part, self.part, 3, padding=1, bias=False)
        self.expand = conv_bn(channels, 2 * channels, 1)
        self.project = nn.Conv2d(2 * channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            y = x.clone()
            y[:, : self.part] = self.conv(y[:, : self.part])
        else:
            head, tail = x.split([self.part, x.shape[1] - self.part], 1)
            y = torch.cat([self.conv(head), tail], 1)
        return x + self.project(F.relu(self.expand(y)))


def fasternet(*, in_place: bool) -> nn.Module:
    """Chen et al., Run, Don't Walk: Chasing Higher FLOPS for Faster Neural Networks, 2023."""
    channels = 32
    return nn.Sequential(
        conv_bn(3, channels, 4, stride=4),
        PartialConvBlock(channels, in_place=in_place),
        conv_bn(channels, 2 * channels, 2, stride=2),
        PartialConvBlock(2 * channels, in_place=in_place),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * channels, 5),
    )


for words, in_place in (("split and cat", False), ("slice assignment", True)):
    SYSTEMS.add(
        f"FasterNet, {words}", (2, 3, 64, 48), paper="FasterNet (Chen et al., 2023)",
        there={"conv": 8, "batch-norm": 4, "add": 2, "linear": 1},
        left={"conv": 8, "add": 2, "linear": 1, "slice-scatter": 0},
        passes=("fold-batch-norm",),
    )(partial(fasternet, in_place=in_place))  # fmt: skip


class BlurPool(nn.Module):
    """A fixed binomial kernel on each channel, with reflected borders, of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", row.outer(row).expand(channels, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1), "reflect")
        return F.conv2d(x, self.kernel, stride=2, groups=x.shape[1])


class BlurBlock(nn.Module):
    """A residual block that blurs before it drops pixels, on its way and on the shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = conv_bn(inputs, outputs, 3, padding=1)
        self.second = nn.Sequential(BlurPool(outputs), conv_bn(outputs, outputs, 3, padding=1))
        self.shortcut = nn.Sequential(BlurPool(inputs), conv_bn(inputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


# The shortcut's blur and pointwise convolution are one: reflected borders commute with the latter.
@SYSTEMS.add(
    "BlurPool", (2, 4, 13, 14), paper="Making CNNs Shift-Invariant Again (Zhang, 2019)",
    there={"conv": 5, "batch-norm": 3, "pad": 2, "add": 1}, left={"conv": 4, "pad": 2, "add": 1},
    passes=("fold-batch-norm", "fold-branches"),
)  # fmt: skip
def blur_pool() -> nn.Module:
    return BlurBlock(4, 8)


class PointKernelConv(nn.Module):
    """A large depthwise kernel made of points that sit anywhere, with a small kernel beside it.

    ``K[c, y, x] = sum_p w[c, p] relu(1 - |place_p - (y, x)|_1 / radius_p)``, then flipped. A norm
    before the pointwise convolution, and one after.
    """

    def __init__(self, channels: int, kernel: int, points: int = 4) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(points, 2) * 0.3)
        self.radius = nn.Parameter(torch.full((points, 1, 1), 2 / kernel))
        self.weight = nn.Parameter(torch.randn(points, channels))
        axis = torch.linspace(-1, 1, kernel)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
        self.register_buffer("grid", grid)
        self.norm = nn.BatchNorm2d(channels)
        self.small = conv_bn(channels, channels, 5, padding=2, groups=channels)
        self.before = nn.BatchNorm2d(channels)
        self.expand = conv_bn(channels, 2 * channels, 1)
        self.project = conv_bn(2 * channels, channels, 1)

    def kernel(self) -> Tensor:
        apart = (self.place[:, None, None] - self.grid).abs().sum(-1)
        near = F.relu(1 - apart / self.radius)
        made = torch.matmul(near.permute(1, 2, 0), self.weight)
        return made.permute(2, 0, 1).unsqueeze(1).flip((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel()
        large = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2, groups=x.shape[1])
        x = x + F.relu(self.norm(large) + self.small(x))
        return x + self.project(F.gelu(self.expand(self.before(x))))


@SYSTEMS.add(
    "SMPConv", (2, CHANNELS, 15, 16), paper="SMPConv (Kim and Park, 2023)",
    there={"conv": 4, "batch-norm": 5, "matmul": 1}, left={"conv": 3},
    passes=("fold-constants", "fold-batch-norm", "fold-branches"),
)  # fmt: skip
def smp_conv() -> nn.Module:
    return PointKernelConv(CHANNELS, 13)


class Reprogrammed(nn.Module):
    """A convolution whose channels a task's own depthwise kernel filters again.

    Ge et al., CLR: Channel-wise Lightweight Reprogramming for Continual Learning, 2023. As a
    sequence, or as a residual with a strength for each channel.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, *, residual: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.task = nn.Conv2d(outputs, outputs, 3, padding=1, groups=outputs, bias=False)
        self.strength: nn.Parameter | None = None
        if residual:
            self.strength = nn.Parameter(torch.ones(outputs, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.strength is None:
            return self.task(y)
        return y + self.strength * self.task(y)


@SYSTEMS.add(
    "CLR, residual", (2, 4, 11, 12), paper="CLR (Ge et al., 2023)",
    there={"conv": 4, "mul": 2, "add": 2}, left={"conv": 3}, passes=("fold-branches",),
)  # fmt: skip
def residual_reprogramming() -> nn.Module:
    first, second = (Reprogrammed(i, 8, k, residual=True) for i, k in ((4, 3), (8, 1)))
    return nn.Sequential(first, nn.ReLU(), second)


# 3x3 after 3x3 pads in between: not one convolution. 1x1 then 3x3 depthwise are one dense 3x3.
@SYSTEMS.add(
    "CLR, sequence", (2, 4, 11, 12), paper="CLR (Ge et al., 2023)",
    there={"conv": 4}, left={"conv": 3}, declines=("hides positions",),
)  # fmt: skip
def sequential_reprogramming() -> nn.Module:
    first, second = (Reprogrammed(i, 8, k, residual=False) for i, k in ((4, 3), (8, 1)))
    return nn.Sequential(first, nn.ReLU(), second)
