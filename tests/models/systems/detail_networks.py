"""DEA-Net: detail-enhanced convolutions, alone and in a small dehazing network.

Chen et al., DEA-Net: Single image dehazing based on detail-enhanced convolution and
content-guided attention, 2024. The convolution is written in three forms: kernels added in the
graph (the released code), five parallel convolutions (the figure), literal differences of pixels
(the definition).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from tests.models.differences import DetailConv, FiveConvs, LiteralDifferences, OneConv
from tests.models.systems.case import Systems

SYSTEMS = Systems("DEA-Net")
PAPER = "DEA-Net (Chen et al., 2024)"
CHANNELS = 8


class DetailBlock(nn.Module):
    """A detail-enhanced convolution with its activation, a skip, a plain convolution, a skip."""

    def __init__(self, channels: int, form: type[DetailConv]) -> None:
        super().__init__()
        self.detail = form(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def inner(self, x: Tensor) -> Tensor:
        return self.conv(self.detail(x) + x)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x


class ContentGuide(nn.Module):
    """Weights per channel and per pixel, made from channel and spatial attention together.

    The paper's code puts a sigmoid on the sigmoid of the pixel attention.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channel = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // 4, 1),
            nn.ReLU(),
            nn.Conv2d(channels // 4, channels, 1),
        )
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, padding_mode="reflect")
        self.pixel = nn.Conv2d(
            2 * channels, channels, 7, padding=3, padding_mode="reflect", groups=channels
        )

    def forward(self, x: Tensor) -> Tensor:
        highest, _ = x.max(1, keepdim=True)
        coarse = self.spatial(torch.cat([x.mean(1, keepdim=True), highest], 1)) + self.channel(x)
        batch, channels, height, width = x.shape
        paired = torch.stack([x, coarse], 2).reshape(batch, 2 * channels, height, width)
        return torch.sigmoid(torch.sigmoid(self.pixel(paired)))


class AttentiveBlock(DetailBlock):
    """The block of the deepest level: its result is gated by its own content."""

    def __init__(self, channels: int, form: type[DetailConv]) -> None:
        super().__init__(channels, form)
        self.guide = ContentGuide(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y * self.guide(y) + x


class Fusion(nn.Module):
    """Two feature maps mixed by weights that their sum decides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.guide = ContentGuide(channels)
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        total = x + y
        gate = self.guide(total)
        return self.conv(total + gate * x + (1 - gate) * y)


class Dehazing(nn.Module):
    """Three levels; down by strided convolutions, up by transposed ones, fused by content."""

    def __init__(self, channels: int, form: type[DetailConv]) -> None:
        super().__init__()
        c = channels
        self.enter = nn.Conv2d(3, c, 3, padding=1)
        self.down1 = nn.Sequential(nn.Conv2d(c, 2 * c, 3, 2, 1), nn.ReLU())
        self.down2 = nn.Sequential(nn.Conv2d(2 * c, 4 * c, 3, 2, 1), nn.ReLU())
        self.first, self.second = DetailBlock(c, form), DetailBlock(2 * c, form)
        self.deep = AttentiveBlock(4 * c, form)
        self.up2 = nn.Sequential(nn.ConvTranspose2d(4 * c, 2 * c, 3, 2, 1, 1), nn.ReLU())
        self.up1 = nn.Sequential(nn.ConvTranspose2d(2 * c, c, 3, 2, 1, 1), nn.ReLU())
        self.fusion2, self.fusion1 = Fusion(2 * c), Fusion(c)
        self.third, self.fourth = DetailBlock(2 * c, form), DetailBlock(c, form)
        self.leave = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.first(self.enter(x))
        two = self.second(self.down1(one))
        three = self.deep(self.down2(two))
        two = self.third(self.fusion2(two, self.up2(three)))
        one = self.fourth(self.fusion1(one, self.up1(two)))
        return self.leave(one)


def _add(words: str, form: type[DetailConv], convs: int) -> None:
    """One DEConv alone, and the network with five; 23 other convolutions are in that.

    Where kernels are generated, it shows that the centre of the central and of the angular
    difference is taken away again.
    """
    passes = ("fold-constants", "fold-branches") if convs > 1 else ("fold-constants",)
    parts = ("central[:, :, 1, 1]", "angular[:, :, 1, 1]") if form is not LiteralDifferences else ()
    blocks = ("first", "second", "deep", "third", "fourth")
    SYSTEMS.add(
        f"DEConv, {words}", (2, CHANNELS, 10, 11), paper=PAPER, there={"conv": convs},
        left={"conv": 1}, passes=passes, dead=parts,
    )(partial(form, CHANNELS))  # fmt: skip
    SYSTEMS.add(
        f"DEA-Net, {words}", (2, 3, 16, 20), paper=PAPER,
        there={"conv": 23 + 5 * convs, "conv-transpose": 2},
        left={"conv": 28, "conv-transpose": 2}, passes=passes,
        dead=tuple(f"{block}.detail.{part}" for block in blocks for part in parts),
        slow=form is not OneConv,
    )(partial(Dehazing, CHANNELS, form))  # fmt: skip


_add("one convolution", OneConv, 1)
_add("five convolutions", FiveConvs, 5)
_add("literal differences", LiteralDifferences, 7)
