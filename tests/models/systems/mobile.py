"""Whole networks of many-branched blocks: MobileOne in its five sizes, and TF-Net."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.branches import MobileOneBlock
from tests.models.systems.case import Systems

SYSTEMS = Systems("MobileOne and TF-Net")


class MobileOne(nn.Module):
    """A stem, then stages of depthwise and pointwise blocks; the largest size gates its last ones.

    Vasu et al., MobileOne: An Improved One millisecond Mobile Backbone, 2023.
    """

    def __init__(self, widths: tuple[int, ...], branches: int, gated: int) -> None:
        super().__init__()
        depths = (1, 2, 2, 1)
        layers: list[nn.Module] = [MobileOneBlock(3, widths[0], 3, stride=2, branches=1)]
        inputs = widths[0]
        total = sum(depths)
        for outputs, depth in zip(widths, depths, strict=True):
            for stride in (2, *([1] * (depth - 1))):
                squeeze = (len(layers) - 1) // 2 >= total - gated
                made = partial(MobileOneBlock, branches=branches, squeeze=squeeze)
                layers.append(made(inputs, inputs, 3, stride=stride, groups=inputs))
                layers.append(made(inputs, outputs, 1))
                inputs = outputs
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1))


def _mobileone(
    size: str, widths: tuple[int, ...], there: dict[str, int], *, branches: int = 1, gated: int = 0
) -> None:
    left = {"conv": 13 + 4 * gated, "linear": 1}
    SYSTEMS.add(
        f"MobileOne-{size}", (2, 3, 32, 40), paper="MobileOne (Vasu et al., 2023)",
        there=there, left=left, passes=("fold-batch-norm", "fold-branches"),
        slow=size not in ("s2", "s4"),
    )(partial(MobileOne, widths, branches, gated))  # fmt: skip


# One branch a block: 1 stem of 2 convolutions, 6 depthwise blocks of 2, 6 pointwise of 1. Norms
# beside those: identity norms where the sizes agree. The sums start at the number 0.
_mobileone("s0", (4, 6, 8, 12), {"conv": 56, "batch-norm": 61, "add": 59}, branches=4)
_mobileone("s1", (4, 6, 8, 8), {"conv": 20, "batch-norm": 26, "add": 24})
_mobileone("s2", (4, 8, 12, 16), {"conv": 20, "batch-norm": 25, "add": 23})
_mobileone("s3", (8, 8, 12, 16), {"conv": 20, "batch-norm": 26, "add": 24})
_mobileone("s4", (8, 12, 16, 24), {"conv": 32, "batch-norm": 25, "add": 23}, gated=3)


class PyramidPooling(nn.Module):
    """Pooled to four sizes, narrowed, brought back to the full size, side by side, and fused."""

    def __init__(self, channels: int, narrow: int) -> None:
        super().__init__()
        self.sizes = (1, 2, 3, 6)
        self.branches = nn.ModuleList(_pointwise(channels, narrow) for _ in self.sizes)
        self.main = _pointwise(channels, narrow)
        self.fusion = _pointwise(narrow * 5, channels)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        parts = [self.main(x)]
        for pooled, branch in zip(self.sizes, self.branches, strict=True):
            small = branch(F.adaptive_avg_pool2d(x, pooled))
            parts.append(F.interpolate(small, size, mode="bilinear", align_corners=False))
        return self.fusion(torch.cat(parts, 1))


def _pointwise(inputs: int, outputs: int) -> MobileOneBlock:
    return MobileOneBlock(inputs, outputs, 1, branches=1)


def _wide(inputs: int, outputs: int, stride: int = 1) -> MobileOneBlock:
    return MobileOneBlock(inputs, outputs, 3, stride=stride, branches=1)


class TFNet(nn.Module):
    """An encoder of dense MobileOne blocks, pyramid pooling, and a decoder with skips.

    TFM Dataset: A Novel Multi-task Dataset and Integrated Pipeline for Automated Tear Film
    Break-Up Segmentation, 2025.
    """

    def __init__(self, widths: tuple[int, ...] = (4, 6, 8, 10)) -> None:
        super().__init__()
        stages = []
        inputs = 3
        for outputs, depth in zip(widths, (3, 3, 4, 4), strict=True):
            others = (_wide(outputs, outputs) for _ in range(depth - 1))
            stages.append(nn.Sequential(_wide(inputs, outputs, 2), *others))
            inputs = outputs
        self.stages = nn.ModuleList(stages)
        self.pyramid = PyramidPooling(inputs, 3)
        decoder = []
        for skip in widths[-2::-1]:
            decoder.append(nn.Sequential(_wide(inputs + skip, skip), _wide(skip, skip)))
            inputs = skip
        self.decoder = nn.ModuleList(decoder)
        self.head = nn.Conv2d(inputs, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        x = self.pyramid(skips.pop())
        for block in self.decoder:
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skips.pop()], 1))
        x = F.interpolate(self.head(x), scale_factor=2, mode="bilinear", align_corners=False)
        return torch.sigmoid(x)


@SYSTEMS.add(
    "TF-Net", (2, 3, 48, 64), paper="TFM Dataset (2025)",
    there={"conv": 47, "batch-norm": 59, "add": 46}, left={"conv": 27},
    passes=("clean-up", "fold-batch-norm", "fold-branches"),
)  # fmt: skip
def tf_net() -> nn.Module:
    return TFNet()


# Wide enough that the fusion is cheaper below the resizes, in two parts.
@SYSTEMS.add(
    "TF-Net, pyramid pooling", (2, 128, 24, 32), paper="TFM Dataset (2025)",
    there={"conv": 6, "batch-norm": 6, "add": 6}, left={"conv": 7, "add": 1},
    passes=("fold-batch-norm", "defer-resizes"),
)  # fmt: skip
def pyramid_pooling() -> nn.Module:
    return PyramidPooling(128, 32)
