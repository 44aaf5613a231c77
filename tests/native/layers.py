"""Random layers of binary planes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from refold.native.interface import Packed
from refold.native.layer import pack
from refold.ops import bcq_linear

# Summation order: rounding of some thousand float32 additions, of random signs.
EXACT = 1e-6
# Look-ups rounded to 8 bits.
LOOKUP = 1e-2


@dataclass(frozen=True)
class Layer:
    planes: torch.Tensor
    alpha: torch.Tensor
    group_size: int
    features: int

    @property
    def packed(self) -> Packed:
        return pack(self.planes, self.alpha, self.group_size)

    def reference(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """In float64."""
        return bcq_linear.reference(x.double(), self.planes, self.alpha, bias, self.group_size)


def layer(
    q: int,
    rows: int,
    features: int,
    group_size: int,
    *,
    uniform: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Layer:
    """Random signs; scales of both signs, a tenth of them zero."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (q, rows, features), generator=generator) * 2 - 1
    shape = (1 if uniform else q, rows, -(-features // group_size))
    alpha = torch.randn(shape, generator=generator)
    alpha[torch.rand(shape, generator=generator) < 0.1] = 0
    return Layer(bcq_linear.pack(signs), alpha.to(dtype), group_size, features)


def activations(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())
