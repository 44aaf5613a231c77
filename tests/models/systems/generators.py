"""Weights that a small generator computes from other parameters in every forward pass."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.systems.case import Systems

SYSTEMS = Systems("Weight generators")
CHANNELS = 6
IMAGE = (2, CHANNELS, 8, 9)
ROWS = (3, 16)


def _matrix(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(size) / size[-1] ** 0.5)


class HadamardLinear(nn.Linear):
    """``W' = W * (A B) + C D``: a multiplicative update, then an additive one."""

    def __init__(self, inputs: int, outputs: int, rank: int = 2) -> None:
        super().__init__(inputs, outputs)
        self.a, self.b = _matrix(outputs, rank), _matrix(rank, inputs)
        self.c, self.d = _matrix(outputs, rank), _matrix(rank, inputs)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * (self.a @ self.b) + self.c @ self.d
        return F.linear(x, weight, self.bias)


class CompandedConv(nn.Conv2d):
    """``W = a atan(V / b)``, with two learnable scalars."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        self.height, self.width = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.height * torch.atan(self.weight / self.width)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


class HashedLinear(nn.Module):
    """``W[i] = scale g(i) bank[h(i)]``: a bank that several layers share, read at hashed places.

    The hash is arithmetic on the element's number, as an embedded runtime would do it: no index is
    stored, so the bank is all that there is of the weights.
    """

    _PRIME = 8191

    def __init__(self, bank: nn.Parameter, inputs: int, outputs: int, seed: int) -> None:
        super().__init__()
        self.bank, self.inputs, self.outputs = bank, inputs, outputs
        self.factor, self.offset = 2 * seed + 1237, 31 * seed + 7
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        number = torch.arange(self.inputs * self.outputs, device=x.device)
        hashed = (number * self.factor + self.offset) % self._PRIME
        sign = 1 - 2 * (hashed % 2)
        weight = self.scale * sign * self.bank[hashed % self.bank.numel()]
        return F.linear(x, weight.view(self.outputs, self.inputs), self.bias)


class HashedNet(nn.Module):
    """Linears that draw from one bank of an n-th of their size."""

    def __init__(self, width: int, compression: int, layers: int = 2) -> None:
        super().__init__()
        self.bank = _matrix(layers * width * width // compression)
        self.layers = nn.ModuleList(
            HashedLinear(self.bank, width, width, seed) for seed in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class TemplateNet(nn.Module):
    """Convolutions whose weights are mixtures of shared templates: ``W_l = sum_k a_lk T_k``.

    Args:
        layers: convolutions that share the templates.
        kept: the last layer reads the first template itself, so it outlives the others.
    """

    def __init__(self, channels: int, templates: int, layers: int, *, kept: bool = False) -> None:
        super().__init__()
        self.templates = _matrix(templates, channels, channels, 3, 3)
        self.mixtures = _matrix(layers, templates)
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        for mixture in self.mixtures:
            weight = (mixture.view(-1, 1, 1, 1, 1) * self.templates).sum(0)
            x = F.relu(F.conv2d(x, weight, padding=1))
        return F.conv2d(x, self.templates[0], padding=1) if self.kept else x


class GrownConv(nn.Module):
    """A layer twice as wide, its quarters mixtures of the templates of the narrow network."""

    def __init__(self, channels: int, templates: int) -> None:
        super().__init__()
        self.templates = _matrix(templates, channels, channels, 3, 3)
        self.mixtures = _matrix(2, 2, templates)
        self.bias = nn.Parameter(torch.zeros(2 * channels))

    def forward(self, x: Tensor) -> Tensor:
        quarters = torch.einsum("abk,koiyx->abkoiyx", self.mixtures, self.templates).sum(2)
        rows = [torch.cat(tuple(row), 1) for row in quarters]
        return F.relu(F.conv2d(torch.cat((x, x.flip(3)), 1), torch.cat(rows), self.bias, padding=1))


class PointLinear(nn.Module):
    """``W[o, i] = |p_o - q_i|`` rescaled: neurons are points, weights their distances."""

    def __init__(self, inputs: int, outputs: int, space: int = 3) -> None:
        super().__init__()
        self.sources, self.targets = _matrix(inputs, space), _matrix(outputs, space)
        self.scale = nn.Parameter(torch.ones(outputs, 1))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        difference = self.targets[:, None] - self.sources
        distance = difference.square().sum(-1).sqrt()
        return F.linear(x, self.scale * (distance - distance.mean(1, keepdim=True)), self.bias)


class IntrinsicDimension(nn.Module):
    """``theta = theta_0 + P z``: a fixed random projection of a short vector moves all weights."""

    def __init__(self, width: int, dimension: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        count = sum(parameter.numel() for parameter in self.layers.parameters())
        self.register_buffer("projection", torch.randn(count, dimension) / dimension**0.5)
        self.z = _matrix(dimension)

    def projected(self) -> Tensor:
        return self.projection

    def forward(self, x: Tensor) -> Tensor:
        sizes = [parameter.numel() for parameter in self.layers.parameters()]
        moves = iter((self.projected() @ self.z).split(sizes))
        for layer in self.layers:
            weight = layer.weight + next(moves).view(layer.weight.shape)
            x = torch.tanh(F.linear(x, weight, layer.bias + next(moves)))
        return x


class RandomProjection(IntrinsicDimension):
    """The same, with the projection drawn in the forward pass."""

    def projected(self) -> Tensor:
        torch.manual_seed(0)
        return torch.randn_like(self.projection)


@SYSTEMS.add(
    "HUT", ROWS, paper="HUT (Zhang et al., 2024)", passes=("fold-constants",),
    there={"matmul": 2, "mul": 1, "add": 1, "linear": 1}, left={"linear": 1},
)  # fmt: skip
def hadamard() -> nn.Module:
    return HadamardLinear(16, 8)


@SYSTEMS.add(
    "Weight Compander", IMAGE, paper="Weight Compander (Eckstein et al., 2023)",
    there={"div": 1, "atan": 1, "mul": 1, "conv": 1}, left={"conv": 1}, passes=("fold-constants",),
)  # fmt: skip
def compander() -> nn.Module:
    return CompandedConv(CHANNELS, 8, 3)


_HASHED = {"arange": 2, "mul": 8, "add": 2, "remainder": 6, "sub": 2, "index": 2, "linear": 2}
_RPS = "RPS, ROAST (Desai and Shrivastava, 2023)"


@SYSTEMS.add(
    "RPS, a tenth of the weights", (3, 256), paper=_RPS, there=_HASHED, left=_HASHED,
    declines=(r"512 KiB, 5 times the .* computed from: it stays factored",),
)  # fmt: skip
def hashed() -> nn.Module:
    return HashedNet(256, 10)


@SYSTEMS.add(
    "RPS, max_growth=inf", (3, 256), paper=_RPS, there=_HASHED, left={"linear": 2},
    passes=("fold-constants",), settings={"max_growth": math.inf},
)  # fmt: skip
def hashed_folded() -> nn.Module:
    return HashedNet(256, 10)


@SYSTEMS.add(
    "template sharing", IMAGE, paper="Savarese and Maire, 2019", passes=("fold-constants",),
    there={"mul": 2, "sum": 2, "conv": 2}, left={"conv": 2},
)  # fmt: skip
def templates() -> nn.Module:
    return TemplateNet(CHANNELS, 3, 2)


@SYSTEMS.add(
    "template sharing, one layer reads a template", IMAGE, paper="Savarese and Maire, 2019",
    there={"mul": 2, "sum": 2, "conv": 3}, left={"conv": 3}, passes=("fold-constants",),
)  # fmt: skip
def templates_kept() -> nn.Module:
    return TemplateNet(CHANNELS, 3, 2, kept=True)


_MANY = {"mul": 6, "sum": 6, "conv": 6}


@SYSTEMS.add(
    "template sharing, six layers", (1, 48, 5, 5), paper="Savarese and Maire, 2019",
    there=_MANY, left=_MANY, declines=(r"972 KiB, 2 times the 486 KiB of now: it stays factored",),
)  # fmt: skip
def templates_in_many_layers() -> nn.Module:
    return TemplateNet(48, 3, 6)


@SYSTEMS.add(
    "MixtureGrowth", IMAGE, paper="MixtureGrowth (Pham et al., 2024)", passes=("fold-constants",),
    there={"matmul": 1, "sum": 1, "conv": 1}, left={"conv": 1},
)  # fmt: skip
def grown() -> nn.Module:
    return GrownConv(CHANNELS, 3)


_POINTS = {"sub": 2, "square": 1, "sum": 1, "sqrt": 1, "mean": 1, "mul": 1, "linear": 1}


@SYSTEMS.add(
    "point cloud linear", ROWS, paper="Point Cloud Network (Hetterich, 2023)", there=_POINTS,
    left={"linear": 1}, passes=("fold-constants",),
)  # fmt: skip
def points() -> nn.Module:
    return PointLinear(16, 8)


@SYSTEMS.add(
    "point cloud linear, 512 KiB from 14", (3, 256), paper="Point Cloud Network (Hetterich, 2023)",
    there=_POINTS, left=_POINTS, declines=(r"times the 1. KiB .* computed from: it stays",),
)  # fmt: skip
def points_kept() -> nn.Module:
    return PointLinear(256, 256)


@SYSTEMS.add(
    "intrinsic dimension", ROWS, paper="Li et al., 2018", passes=("fold-constants",),
    there={"matmul": 1, "add": 4, "linear": 2}, left={"linear": 2},
)  # fmt: skip
def intrinsic() -> nn.Module:
    return IntrinsicDimension(16, 4)


@SYSTEMS.add(
    "intrinsic dimension, projection drawn in forward", ROWS, paper="Li et al., 2018",
    refused="seeds the random numbers that it draws in forward",
)  # fmt: skip
def intrinsic_drawn() -> nn.Module:
    return RandomProjection(16, 4)
