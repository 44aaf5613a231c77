"""Small networks with quantisers in them, as training leaves them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization.fx import _decomposed  # registers the quantised operators

assert _decomposed is not None
ops = torch.ops.quantized_decomposed
FP8 = torch.float8_e4m3fn
_LARGEST = 448.0


def through_int8(x: torch.Tensor, scale: float, zero: int = 0) -> torch.Tensor:
    """Values through 8 bits; with a zero point they are unsigned."""
    limits = (0, 255, torch.uint8) if zero else (-128, 127, torch.int8)
    q = ops.quantize_per_tensor(x, scale, zero, *limits)
    return ops.dequantize_per_tensor(q, scale, zero, *limits)


class Int8Net(nn.Module):
    """Two quantised convolutions with batch norms, a skip, and a head in floats."""

    def __init__(self, *, zero: int = 0, scale: float = 1e-3) -> None:
        super().__init__()
        self.zero = zero
        for name, inputs in (("a", 3), ("b", 8)):
            weight = torch.randint(-127, 128, (8, inputs, 3, 3)).to(torch.int8)
            self.register_buffer(name, weight)
        self.register_buffer("scales", scale * (1 + torch.rand(8)))
        self.register_buffer("zeros", torch.zeros(8, dtype=torch.int64))
        self.bn_a, self.bn_b = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def _conv(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        given = (self.scales, self.zeros, 0, -127, 127, torch.int8)
        return F.conv2d(x, ops.dequantize_per_channel(weight, *given), padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = through_int8(x, 0.03, self.zero)
        y = through_int8(F.relu(self.bn_a(self._conv(x, self.a))), 0.03)
        y = through_int8(F.relu(self.bn_b(self._conv(y, self.b)) + y), 0.05)
        return self.head(y.mean((2, 3)))


class Float8Net(nn.Module):
    """A convolution whose input is cast to float8, and whose weight is stored so."""

    def __init__(self, *, bound: float = _LARGEST) -> None:
        super().__init__()
        self.bound = bound
        self.register_buffer("weight", (torch.randn(8, 3, 3, 3) * 50).to(FP8))
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x / 0.05).clamp(-self.bound, self.bound).to(FP8).to(torch.float32) * 0.05
        given = (self.weight, 0.004, 0, -448, 448, FP8)
        return self.bn(F.conv2d(x, ops.dequantize_per_tensor(*given)))
