"""Scale-and-shift fine-tuning (SSF) of four backbones, with every site of the paper's code.

Lian et al., Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning, 2022: a
scale and a shift per channel after each linear, convolution and norm.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.adapters import ScaleShift
from tests.models.systems.case import Systems

SYSTEMS = Systems("Scale and shift (SSF)")
PAPER = "SSF (Lian et al., 2022)"
WIDTH = 8


def tuned(layer: nn.Module, width: int, *, image: bool = False) -> nn.Sequential:
    """A layer and its scale-shift."""
    return nn.Sequential(layer, ScaleShift(width, image=image))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = tuned(nn.Linear(width, 2 * width), 2 * width)
        self.project = tuned(nn.Linear(2 * width, width), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.gelu(self.expand(x)))


class Attention(nn.Module):
    """Self-attention over the tokens of each row; ``window`` adds a table of relative positions."""

    def __init__(self, width: int, window: int = 0) -> None:
        super().__init__()
        self.heads = 2
        self.qkv = tuned(nn.Linear(width, 3 * width, bias=window > 0), 3 * width)
        self.out = tuned(nn.Linear(width, width), width)
        self.table: nn.Parameter | None = None
        if window:
            self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, self.heads) * 0.02)
            axis = torch.arange(window)
            place = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)
            apart = place[:, :, None] - place[:, None, :] + window - 1
            self.register_buffer("index", apart[0] * (2 * window - 1) + apart[1])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        rows, tokens, width = x.shape
        qkv = self.qkv(x).reshape(rows, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.table is None:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            bias = self.table[self.index.flatten()].view(tokens, tokens, -1).permute(2, 0, 1)
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias.unsqueeze(0)
            if mask is not None:
                windows = mask.shape[0]
                split = scores.view(rows // windows, windows, self.heads, tokens, tokens)
                scores = (split + mask[:, None]).view(rows, self.heads, tokens, tokens)
            mixed = scores.softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(rows, tokens, width))


class ViTBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = tuned(nn.LayerNorm(width), width)
        self.attention = Attention(width)
        self.norm2 = tuned(nn.LayerNorm(width), width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Sites: the patch embedding (before class token and positions), 6 a block, the last norm."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.patch_ssf = ScaleShift(width)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 10, width) * 0.02)
        self.blocks = nn.Sequential(*(ViTBlock(width) for _ in range(depth)))
        self.norm = tuned(nn.LayerNorm(width), width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_ssf(self.patch(x).flatten(2).transpose(1, 2))
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


# 20 sites in the traced form: 20 mul, and 20 add beside 6 residuals and the positions
@SYSTEMS.add(
    "SSF on ViT", (2, 3, 12, 12), paper=PAPER,
    there={"mul": 20, "add": 27, "layer-norm": 7, "linear": 13, "conv": 1},
    left={"add": 7, "layer-norm": 7, "linear": 13, "conv": 1},
    passes=("absorb-scale-shift",),
)  # fmt: skip
def vit() -> nn.Module:
    return ViT(WIDTH, 3)


def windows(x: Tensor, size: int) -> Tensor:
    batch, height, width, channels = x.shape
    x = x.view(batch, height // size, size, width // size, size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, channels)


def unwindowed(x: Tensor, size: int, height: int, width: int) -> Tensor:
    x = x.view(-1, height // size, width // size, size, size, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, x.shape[-1])


class SwinBlock(nn.Module):
    """Attention in windows that every other block shifts; masks keep the wrapped parts apart."""

    def __init__(self, width: int, size: int, window: int, shift: int) -> None:
        super().__init__()
        self.size, self.window, self.shift = size, window, shift
        self.norm1 = tuned(nn.LayerNorm(width), width)
        self.attention = Attention(width, window)
        self.norm2 = tuned(nn.LayerNorm(width), width)
        self.mlp = MLP(width)
        self.mask: Tensor | None
        mask = None
        if shift:
            regions = torch.zeros(1, size, size, 1)
            cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
            for number, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
                regions[:, rows, columns] = number
            region = windows(regions, window).squeeze(-1)
            apart = region[:, None] != region[:, :, None]
            mask = torch.where(apart, -100.0, 0.0)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        y = self.norm1(x).view(batch, self.size, self.size, width)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = self.attention(windows(y, self.window), self.mask)
        y = unwindowed(y, self.window, self.size, self.size)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + y.reshape(batch, tokens, width)
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Four neighbours side by side, a norm with its scale-shift, a reduction without bias."""

    def __init__(self, width: int, size: int, norm: nn.Module) -> None:
        super().__init__()
        self.size = size
        self.norm = tuned(norm, 4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, width = x.shape
        x = x.view(batch, self.size, self.size, width)
        parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1).view(batch, -1, 4 * width)))


class Swin(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.patch_ssf = ScaleShift(width)
        self.patch_norm = tuned(nn.LayerNorm(width), width)
        self.first = nn.Sequential(SwinBlock(width, 8, 4, 0), SwinBlock(width, 8, 4, 2))
        self.merge = PatchMerging(width, 8, nn.LayerNorm(4 * width))
        self.second = SwinBlock(2 * width, 4, 4, 0)
        self.norm = tuned(nn.LayerNorm(2 * width), 2 * width)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_norm(self.patch_ssf(self.patch(x).flatten(2).transpose(1, 2)))
        x = self.norm(self.second(self.merge(self.first(x))))
        return self.head(F.adaptive_avg_pool1d(x.transpose(1, 2), 1).flatten(1))


# 22 sites. The other 4 mul: 3 scale queries, 1 is a product of sizes; the other 10 add are 6
# residuals, 3 tables of positions, 1 mask.
@SYSTEMS.add(
    "SSF on Swin", (2, 3, 16, 16), paper=PAPER, slow=True,
    there={"mul": 26, "add": 32, "layer-norm": 9, "linear": 14, "conv": 1},
    left={"mul": 1, "add": 10, "layer-norm": 9, "linear": 14, "conv": 1},
    passes=("absorb-scale-shift", "fold-constants"),
)  # fmt: skip
def swin() -> nn.Module:
    return Swin(WIDTH)


class AxialShift(nn.Module):
    """Channel groups moved along one axis, then the other, between pointwise convolutions."""

    def __init__(self, width: int, shift: int = 3) -> None:
        super().__init__()
        self.shift = shift
        self.enter = tuned(nn.Conv2d(width, width, 1), width, image=True)
        self.rows = tuned(nn.Conv2d(width, width, 1), width, image=True)
        self.columns = tuned(nn.Conv2d(width, width, 1), width, image=True)
        self.leave = tuned(nn.Conv2d(width, width, 1), width, image=True)
        self.norm1, self.norm2 = nn.GroupNorm(1, width), nn.GroupNorm(1, width)

    def moved(self, x: Tensor, axis: int) -> Tensor:
        pad = self.shift // 2
        height, width = x.shape[2:]
        parts = torch.chunk(F.pad(x, (pad,) * 4), self.shift, 1)
        rolled = [torch.roll(p, s, axis) for p, s in zip(parts, range(-pad, pad + 1), strict=True)]
        return torch.cat(rolled, 1).narrow(2, pad, height).narrow(3, pad, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.enter(x)))
        rows = F.gelu(self.rows(self.moved(x, 3)))
        columns = F.gelu(self.columns(self.moved(x, 2)))
        return self.leave(self.norm2(rows + columns))


class ASMLPBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = tuned(nn.GroupNorm(1, width), width, image=True)
        self.mixer = AxialShift(width)
        self.norm2 = tuned(nn.GroupNorm(1, width), width, image=True)
        self.expand = tuned(nn.Conv2d(width, 2 * width, 1), 2 * width, image=True)
        self.project = tuned(nn.Conv2d(2 * width, width, 1), width, image=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.project(F.gelu(self.expand(self.norm2(x))))


class ASMLP(nn.Module):
    """Lian et al., AS-MLP: An Axial Shifted MLP Architecture for Vision, 2022, with SSF."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)  # the authors tune no site here
        self.patch_norm = nn.GroupNorm(1, width)
        self.first = ASMLPBlock(width)
        self.merge_norm = tuned(nn.GroupNorm(1, 4 * width), 4 * width, image=True)
        self.merge = nn.Conv2d(4 * width, 2 * width, 1, bias=False)
        self.second = ASMLPBlock(2 * width)
        self.norm = tuned(nn.GroupNorm(1, 2 * width), 2 * width, image=True)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.patch_norm(self.patch(x)))
        parts = [x[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        x = self.second(self.merge(self.merge_norm(torch.cat(parts, 1))))
        return self.head(F.adaptive_avg_pool2d(self.norm(x), 1).flatten(1))


@SYSTEMS.add(
    "SSF on AS-MLP", (2, 3, 16, 20), paper=PAPER, slow=True,
    there={"mul": 18, "add": 24, "group-norm": 11, "conv": 14, "linear": 1},
    left={"add": 6, "group-norm": 11, "conv": 14, "linear": 1},
    passes=("absorb-scale-shift",),
)  # fmt: skip
def as_mlp() -> nn.Module:
    return ASMLP(9)


class LayerNorm2d(nn.LayerNorm):
    """Normalises the channels of an image, laid out last for the norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.depthwise = tuned(depthwise, width, image=True)
        self.norm = tuned(nn.LayerNorm(width), width)
        self.mlp = MLP(width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        return x + (self.gamma * y).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Sites: stem 2, downsampling 2, 4 a block, and one on the last residual sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = 2 * width
        self.stem = tuned(nn.Conv2d(3, width, 4, 4), width, image=True)
        self.stem_norm = tuned(LayerNorm2d(width), width, image=True)
        self.first = ConvNeXtBlock(width)
        self.down_norm = tuned(LayerNorm2d(width), width, image=True)
        self.down = tuned(nn.Conv2d(width, wide, 2, 2), wide, image=True)
        self.second = ConvNeXtBlock(wide)
        self.last = ScaleShift(wide, image=True)
        self.norm = nn.LayerNorm(wide)
        self.head = nn.Linear(wide, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem_norm(self.stem(x)))
        x = self.last(self.second(self.down(self.down_norm(x))))
        return self.head(self.norm(F.adaptive_avg_pool2d(x, 1).flatten(1)))


@SYSTEMS.add(
    "SSF on ConvNeXt", (2, 3, 32, 24), paper=PAPER,
    there={"mul": 15, "add": 15, "layer-norm": 5, "conv": 4, "linear": 5},
    left={"mul": 1, "add": 3, "layer-norm": 5, "conv": 4, "linear": 5},
    passes=("absorb-scale-shift",), declines=("has other users.*layer_norm is not linear",),
)  # fmt: skip
def convnext() -> nn.Module:
    return ConvNeXt(WIDTH)


class CollidingAxes(nn.Module):
    """The paper's code finds the channel axis by its length: here it scales the columns.

    The width of the image is the number of channels, and the last axis is tried first.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Any:
        return F.gelu(self.conv(x) * self.scale + self.shift)


@SYSTEMS.add(
    "SSF where the width equals the channels", (2, 3, 7, WIDTH), paper=PAPER,
    there={"mul": 1, "add": 1, "conv": 1}, left={"mul": 1, "add": 1, "conv": 1},
    declines=("another axis than the channels",), warns=("^scale lies", "^shift lies"),
)  # fmt: skip
def colliding_axes() -> nn.Module:
    return CollidingAxes(WIDTH)
