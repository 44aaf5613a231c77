"""Adapters and scales of transformers: low-rank branches, layer scale, scale-and-shift features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.case import Registry

MODELS = Registry()
WIDTH = 16
TOKENS = (2, 9, WIDTH)


class LoRALinear(nn.Module):
    """``W x + s B A x`` (Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2022)."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.up.weight)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(self.dropout(x))) * 2.0


class LoRAConv(nn.Module):
    """The convolutional form: a thin convolution, then a pointwise one."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        options = {"stride": stride, "padding": kernel // 2}
        self.base = nn.Conv2d(inputs, outputs, kernel, **options)
        self.down = nn.Conv2d(inputs, 2, kernel, bias=False, **options)
        self.up = nn.Conv2d(2, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


class Attention(nn.Module):
    """Multi-head self-attention; ``linear`` makes its projections."""

    def __init__(self, width: int, linear: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.heads = 2
        self.qkv = linear(width, 3 * width)
        self.out = linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class LoRABlock(nn.Module):
    """A transformer block with a low-rank branch on every linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, LoRALinear)
        self.expand = LoRALinear(width, 2 * width)
        self.project = LoRALinear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.project(F.gelu(self.expand(self.norm2(x))))


@MODELS.add("lora transformer", TOKENS, linear=8, add=4, mul=0, dropout=0)
def lora_transformer() -> nn.Module:
    return nn.Sequential(LoRABlock(WIDTH), LoRABlock(WIDTH))


@MODELS.add("lora conv", (2, 4, 11, 12), conv=2, add=0, mul=0)
def lora_conv() -> nn.Module:
    return nn.Sequential(LoRAConv(4, 8, 3), nn.ReLU(), LoRAConv(8, 8, 3, stride=2))


class LayerScaleBlock(nn.Module):
    """A transformer block whose branches are scaled per channel.

    Touvron et al., Going deeper with Image Transformers (CaiT), 2021.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.expand, self.project = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.gamma1 = nn.Parameter(torch.full((width,), 1e-5))
        self.gamma2 = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1 * self.attention(self.norm1(x))
        return x + self.project(F.gelu(self.expand(self.norm2(x)))) * self.gamma2


@MODELS.add("layerscale vit", TOKENS, linear=4, add=2, mul=0)
def layer_scale_vit() -> nn.Module:
    return LayerScaleBlock(WIDTH)


class ScaleShift(nn.Module):
    """A scale and a shift over the last axis, or over axis 1 of an image.

    Lian et al., Scaling & Shifting Your Features (SSF), 2022.
    """

    def __init__(self, width: int, *, image: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))
        self.image = image

    def forward(self, x: Tensor) -> Tensor:
        if self.image:
            return x * self.scale.view(1, -1, 1, 1) + self.shift.view(1, -1, 1, 1)
        return x * self.scale + self.shift


class ScaledAttention(Attention):
    """Attention with a scale-shift after each projection."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.qkv = nn.Sequential(nn.Linear(width, 3 * width, bias=False), ScaleShift(3 * width))
        self.out = nn.Sequential(nn.Linear(width, width), ScaleShift(width))


class ScaleShiftViT(nn.Module):
    """A patch embedding and one block, with scale-shifts at the places of the SSF paper."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.patch_ssf = ScaleShift(width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, 10, width) * 0.02)
        self.norm1 = nn.Sequential(nn.LayerNorm(width), ScaleShift(width))
        self.attention = ScaledAttention(width)
        self.norm2 = nn.Sequential(nn.LayerNorm(width), ScaleShift(width))
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width),
            ScaleShift(2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
            ScaleShift(width),
        )
        self.norm = nn.Sequential(nn.LayerNorm(width), ScaleShift(width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_ssf(self.patch(x).flatten(2).transpose(1, 2))
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = x + self.attention(self.norm1(x))
        return self.norm(x + self.mlp(self.norm2(x)))[:, 0]


@MODELS.add("ssf vit", (2, 3, 12, 12), conv=1, linear=4, mul=0, add=3)
def scale_shift_vit() -> nn.Module:
    return ScaleShiftViT(WIDTH)


class ScaleShiftConvNeXt(nn.Module):
    """A stem and one ConvNeXt block (Liu et al., A ConvNet for the 2020s, 2022), with SSF."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.stem_ssf = ScaleShift(width, image=True)
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.depthwise_ssf = ScaleShift(width, image=True)
        self.norm = nn.Sequential(nn.LayerNorm(width), ScaleShift(width))
        self.expand = nn.Sequential(nn.Linear(width, 2 * width), ScaleShift(2 * width))
        self.project = nn.Sequential(nn.Linear(2 * width, width), ScaleShift(width))
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_ssf(self.stem(x))
        y = self.norm(self.depthwise_ssf(self.depthwise(x)).permute(0, 2, 3, 1))
        y = self.gamma * self.project(F.gelu(self.expand(y)))
        return x + y.permute(0, 3, 1, 2)


@MODELS.add("ssf convnext", (2, 3, 24, 28), conv=2, linear=2, mul=0, add=1)
def scale_shift_convnext() -> nn.Module:
    return ScaleShiftConvNeXt(WIDTH)
