"""Blocks of Mamba-YOLO, with the selective scan as an operator of its own.

Wang et al., Mamba YOLO: SSMs-Based YOLO For Object Detection, 2024. Gu and Dao, Mamba: Linear-Time
Sequence Modeling with Selective State Spaces, 2023.

The scan is one call in the graph. It has no kernel beside its composite one, so an exporter that
does not know it writes that: with the tokens counted by the trace, a chain of them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.branches import conv_bn
from tests.models.systems.case import Systems

SYSTEMS = Systems("Mamba-YOLO")
PAPER = "Mamba-YOLO (Wang et al., 2024)"
CHANNELS = 8

_LIBRARY = torch.library.Library("refold_systems", "FRAGMENT")
_LIBRARY.define(
    "selective_scan(Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor d) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def selective_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """``h' = exp(delta a) h + delta b u``, ``y = c h + d u``, token by token.

    Args:
        u: input, ``[B, K * C, L]`` for K directions of C channels.
        delta: step sizes before their softplus, like ``u``.
        a: decay, ``[K * C, N]`` for N states a channel.
        b: input weights, ``[B, K, N, L]``.
        c: output weights, like ``b``.
        d: weight of the skip, ``[K * C]``.
    """
    repeats = u.shape[1] // b.shape[1]
    delta = F.softplus(delta)
    b, c = b.repeat_interleave(repeats, 1), c.repeat_interleave(repeats, 1)
    decay = torch.exp(delta.unsqueeze(2) * a[None, :, :, None])
    drive = (delta * u).unsqueeze(2) * b
    state = drive[..., 0]
    outputs = [(state * c[..., 0]).sum(-1)]
    for token in range(1, u.shape[2]):
        state = decay[..., token] * state + drive[..., token]
        outputs.append((state * c[..., token]).sum(-1))
    return torch.stack(outputs, -1) + d[:, None] * u


_LIBRARY.impl("selective_scan", selective_scan, "CompositeImplicitAutograd")


class SimpleStem(nn.Module):
    """Two strided convolutions, each with a batch norm and an activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.first = conv_bn(3, half, 3, stride=2, padding=1)
        self.second = conv_bn(half, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.second(F.gelu(self.first(x))))


class VisionClueMerge(nn.Module):
    """The four phases of the pixels side by side, then a pointwise convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.point = conv_bn(4 * inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        phases = [x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return F.silu(self.point(torch.cat(phases, 1)))


class LocalBlock(nn.Module):
    """Depthwise, norm, pointwise, activation, pointwise, on a skip (LSBlock)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.BatchNorm2d(channels)
        self.expand = nn.Conv2d(channels, channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.norm(self.depthwise(x)))
        return x + self.project(F.gelu(y))


class GatedBlock(nn.Module):
    """A gated feed-forward whose gate is local: ``gelu(depthwise(x) + x) * v`` (RGBlock)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, 2 * hidden, 1)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.project = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, v = self.expand(x).chunk(2, 1)
        return self.project(F.gelu(self.depthwise(x) + x) * v)


class Scan2d(nn.Module):
    """Four selective scans over the pixels: rows, columns, and both backwards (SS2D)."""

    def __init__(self, channels: int, states: int = 4, rank: int = 2) -> None:
        super().__init__()
        self.states, self.rank = states, rank
        self.enter = nn.Conv2d(channels, channels, 1, bias=False)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        width = rank + 2 * states
        self.projection = nn.Parameter(torch.randn(4, width, channels) / math.sqrt(channels))
        self.steps = nn.Parameter(torch.randn(4, channels, rank) / math.sqrt(rank))
        self.step_bias = nn.Parameter(torch.randn(4, channels) * 0.1)
        decay = torch.arange(1, states + 1, dtype=torch.float32).repeat(4 * channels, 1)
        self.log_decay = nn.Parameter(torch.log(decay))
        self.skip = nn.Parameter(torch.ones(4 * channels))
        self.norm = nn.LayerNorm(channels)
        self.leave = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.depthwise(self.enter(x)))
        batch, channels, height, width = x.shape
        tokens = height * width
        both = torch.stack([x.flatten(2), x.transpose(2, 3).flatten(2)], 1)
        u = torch.cat([both, both.flip(-1)], 1)
        made = torch.einsum("bkcl,kwc->bkwl", u, self.projection)
        steps, b, c = made.split([self.rank, self.states, self.states], 2)
        delta = torch.einsum("bkrl,kcr->bkcl", steps, self.steps) + self.step_bias[None, :, :, None]
        y = torch.ops.refold_systems.selective_scan(
            u.reshape(batch, -1, tokens), delta.reshape(batch, -1, tokens),
            -torch.exp(self.log_decay), b, c, self.skip,
        ).view(batch, 4, channels, tokens)  # fmt: skip
        y = y[:, :2] + y[:, 2:].flip(-1)
        columns = y[:, 1].view(batch, channels, width, height).transpose(2, 3).flatten(2)
        y = self.norm((y[:, 0] + columns).transpose(1, 2)).transpose(1, 2)
        return self.leave(y.reshape(batch, channels, height, width))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ScanBlock(nn.Module):
    """A projection with its norm, a local block, the scan and a gated feed-forward (VSSBlock)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.enter = conv_bn(inputs, outputs, 1)
        self.local = LocalBlock(outputs)
        self.norm1, self.norm2 = LayerNorm2d(outputs), LayerNorm2d(outputs)
        self.scan = Scan2d(outputs)
        self.feed = GatedBlock(outputs, outputs)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.enter(x))
        x = x + self.drop(self.scan(self.norm1(self.local(x))))
        return x + self.drop(self.feed(self.norm2(x)))


class Backbone(nn.Module):
    """Stem, a block, a merge, a block, and a fused level above (XSSBlock on an upsampled cat)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = SimpleStem(channels)
        self.first = ScanBlock(channels, channels)
        self.merge = VisionClueMerge(channels, 2 * channels)
        self.second = ScanBlock(2 * channels, 2 * channels)
        self.above = ScanBlock(3 * channels, channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one = self.first(self.stem(x))
        two = self.second(self.merge(one))
        raised = F.interpolate(two, scale_factor=2, mode="nearest")
        return self.above(torch.cat([raised, one], 1)), two


@SYSTEMS.add(
    "VisionClueMerge", (2, CHANNELS, 12, 14), paper=PAPER,
    there={"conv": 1, "batch-norm": 1, "layout": 9}, left={"conv": 1},
    passes=("fold-batch-norm",),
)  # fmt: skip
def vision_clue_merge() -> nn.Module:
    return VisionClueMerge(CHANNELS, 12)


@SYSTEMS.add(
    "Mamba-YOLO local and gated blocks", (2, CHANNELS, 9, 10), paper=PAPER,
    there={"conv": 6, "batch-norm": 1, "add": 2, "mul": 1},
    left={"conv": 6, "add": 1, "mul": 1},
    passes=("fold-batch-norm", "fold-branches"),
)  # fmt: skip
def local_and_gated() -> nn.Module:
    return nn.Sequential(LocalBlock(CHANNELS), GatedBlock(CHANNELS, 2 * CHANNELS))


@SYSTEMS.add(
    "Mamba-YOLO backbone", (2, 3, 16, 16), paper=PAPER, slow=True,
    there={"conv": 33, "batch-norm": 9, "selective-scan": 3, "add": 21},
    left={"conv": 33, "selective-scan": 3, "add": 18},
    passes=("fold-constants", "fold-batch-norm", "fold-branches"),
)  # fmt: skip
def backbone() -> nn.Module:
    return Backbone(CHANNELS)
