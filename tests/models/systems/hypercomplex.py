"""Weights in blocks: Kronecker sums, quaternions and complex numbers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.systems.case import Systems

SYSTEMS = Systems("Hypercomplex weights")
CHANNELS = 8
IMAGE = (2, CHANNELS, 8, 9)


def kronecker_sum(left: Tensor, right: Tensor) -> Tensor:
    """``sum_n A_n (x) F_n`` with ``A`` ``[n, a, b]`` and ``F`` ``[n, o, i, *kernel]``."""
    n, a, b = left.shape
    _, o, i, *kernel = right.shape
    blocks = left.view(n, a, 1, b, 1, *(1 for _ in kernel)) * right.view(n, 1, o, 1, i, *kernel)
    return blocks.sum(0).reshape(a * o, b * i, *kernel)


class PHMLinear(nn.Module):
    """``W = sum_n A_n (x) F_n``."""

    def __init__(self, n: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.algebra = nn.Parameter(torch.randn(n, n, n) / n)
        self.filters = nn.Parameter(torch.randn(n, outputs // n, inputs // n) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, kronecker_sum(self.algebra, self.filters), self.bias)


class PHConv(nn.Module):
    """The convolutional form, with a batch norm after it."""

    def __init__(self, n: int, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        size = (n, outputs // n, inputs // n, kernel, kernel)
        self.algebra = nn.Parameter(torch.randn(n, n, n) / n)
        self.filters = nn.Parameter(torch.randn(size) / (inputs * kernel**2) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.norm = nn.BatchNorm2d(outputs)
        self.padding = kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        weight = kronecker_sum(self.algebra, self.filters)
        return F.relu(self.norm(F.conv2d(x, weight, self.bias, padding=self.padding)))


class QuaternionConv(nn.Module):
    """Four real kernels and the Hamilton product, written as the sixteen blocks of the weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        size = (outputs // 4, inputs // 4, 3, 3)
        self.parts = nn.ParameterList(torch.randn(size) / (9 * inputs) ** 0.5 for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        r, i, j, k = self.parts
        rows = ((r, -i, -j, -k), (i, r, -k, j), (j, k, r, -i), (k, -j, i, r))
        weight = torch.cat([torch.cat(row, 1) for row in rows], 0)
        return F.conv2d(x, weight, padding=1)


class CompacterAdapter(nn.Module):
    """``x + U phi(D x)``, both weights ``sum_n A_n (x) s_n t_n``; all layers share ``A``."""

    def __init__(self, shared: nn.Parameter, width: int, bottleneck: int, rank: int = 1) -> None:
        super().__init__()
        self.shared = shared
        n = shared.shape[0]
        down, up = (bottleneck // n, width // n), (width // n, bottleneck // n)
        for name, (rows, columns) in {"down": down, "up": up}.items():
            self.register_parameter(f"{name}_s", nn.Parameter(torch.randn(n, rows, rank)))
            self.register_parameter(f"{name}_t", nn.Parameter(torch.randn(n, rank, columns)))

    def forward(self, x: Tensor) -> Tensor:
        down = kronecker_sum(self.shared, self.down_s @ self.down_t)
        up = kronecker_sum(self.shared, self.up_s @ self.up_t)
        return x + F.linear(F.gelu(F.linear(x, down)), up)


class CompacterNet(nn.Module):
    """Frozen linears with an adapter after each."""

    def __init__(self, width: int, bottleneck: int, n: int = 4, layers: int = 2) -> None:
        super().__init__()
        shared = nn.Parameter(torch.randn(n, n, n) / n)
        self.linears = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.adapters = nn.ModuleList(
            CompacterAdapter(shared, width, bottleneck) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for linear, adapter in zip(self.linears, self.adapters, strict=True):
            x = adapter(torch.tanh(linear(x)))
        return x


class ComplexConv(nn.Module):
    """``(A + iB)(x + iy)`` as four real convolutions; the halves of the channels are x and y."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.real = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.imaginary = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        x, y = z.chunk(2, 1)
        real = self.real(x) - self.imaginary(y)
        imaginary = self.real(y) + self.imaginary(x)
        return torch.cat((real, imaginary), 1)


class ComplexNet(nn.Module):
    """Complex convolutions, each with its activation on both parts."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ComplexConv(channels, channels)
        self.second = ComplexConv(channels, 2 * channels)

    def forward(self, z: Tensor) -> Tensor:
        return self.second(F.relu(self.first(z)))


class ComplexPair(nn.Module):
    """The same convolution on two tensors, x and y, that nothing joins."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.real = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.imaginary = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.real(x) - self.imaginary(y), self.real(y) + self.imaginary(x)


_PHM = "PHM (Zhang et al., 2021)"
_PHC = "PHNN (Grassucci et al., 2022)"
_COMPACTER = "Compacter (Karimi Mahabadi et al., 2021)"
_COMPLEX = "Deep Complex Networks (Trabelsi et al., 2018)"


@SYSTEMS.add(
    "PHM linear", (3, 16), paper=_PHM, there={"mul": 1, "sum": 1, "linear": 1},
    left={"linear": 1}, passes=("fold-constants",),
)  # fmt: skip
def phm() -> nn.Module:
    return PHMLinear(4, 16, 8)


@SYSTEMS.add(
    "PHC, n = 4", IMAGE, paper=_PHC, there={"mul": 1, "sum": 1, "conv": 1, "batch-norm": 1},
    left={"conv": 1}, passes=("fold-constants", "fold-batch-norm"),
)  # fmt: skip
def phc() -> nn.Module:
    return PHConv(4, CHANNELS, CHANNELS, 3)


_WIDE = {"mul": 1, "sum": 1, "conv": 1, "batch-norm": 1}


@SYSTEMS.add(
    "PHC, n = 4, 1.1 MiB", (2, 128, 5, 5), paper=_PHC, there=_WIDE, left=_WIDE,
    declines=(r"1.12 MiB, 3.99 times the 288 KiB .* computed from: it stays factored",),
)  # fmt: skip
def phc_kept() -> nn.Module:
    return PHConv(4, 128, 128, 3)


@SYSTEMS.add(
    "PHC, n = 4, max_growth=5", (2, 128, 5, 5), paper=_PHC, there=_WIDE, left={"conv": 1},
    passes=("fold-constants", "fold-batch-norm"), settings={"max_growth": 5},
)  # fmt: skip
def phc_folded() -> nn.Module:
    return PHConv(4, 128, 128, 3)


@SYSTEMS.add(
    "quaternion convolution", IMAGE, paper="PHNN (Grassucci et al., 2022), Hamilton product",
    there={"neg": 6, "conv": 1}, left={"conv": 1}, passes=("fold-constants",),
)  # fmt: skip
def quaternion() -> nn.Module:
    return QuaternionConv(CHANNELS, 12)


_ADAPTED = {"linear": 6, "matmul": 4, "mul": 4, "sum": 4, "add": 2}


@SYSTEMS.add(
    "Compacter", (3, 16), paper=_COMPACTER, there=_ADAPTED, left={"linear": 6, "add": 2},
    passes=("fold-constants",),
)  # fmt: skip
def compacter() -> nn.Module:
    return CompacterNet(16, 8)


@SYSTEMS.add(
    "Compacter, 256 wide", (3, 256), paper=_COMPACTER, there=_ADAPTED, left=_ADAPTED,
    declines=(r"256 KiB, 73.1 times the 3.5 KiB .* computed from: it stays factored",),
)  # fmt: skip
def compacter_kept() -> nn.Module:
    return CompacterNet(256, 128)


@SYSTEMS.add(
    "Compacter, 256 wide, max_growth=inf", (3, 256), paper=_COMPACTER, there=_ADAPTED,
    left={"linear": 6, "add": 2}, passes=("fold-constants",), settings={"max_growth": math.inf},
)  # fmt: skip
def compacter_folded() -> nn.Module:
    return CompacterNet(256, 128)


@SYSTEMS.add(
    "complex convolution", IMAGE, paper=_COMPLEX, there={"conv": 8, "sub": 2, "add": 2},
    left={"conv": 2}, passes=("fold-branches",),
)  # fmt: skip
def complex_net() -> nn.Module:
    return ComplexNet(CHANNELS // 2)


_PAIR = {"conv": 4, "sub": 1, "add": 1}


@SYSTEMS.add(
    "complex convolution, parts apart", IMAGE, IMAGE, paper=_COMPLEX, there=_PAIR, left=_PAIR,
)  # fmt: skip
def complex_pair() -> nn.Module:
    return ComplexPair(CHANNELS)
