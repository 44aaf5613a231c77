"""Masks and trained quantisers: ``effective`` weights behind a threshold or a rounding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.folding import randomise_norms
from tests.models.systems.case import Systems

SYSTEMS = Systems("Masks and trained quantisers")
CHANNELS = 6
IMAGE = (2, CHANNELS, 8, 9)


class SignedSupermask(nn.Conv2d):
    """``W = W_0 * m`` with ``m`` in {-1, 0, 1}: fixed weights, thresholded scores."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, bias=False)
        self.scores = nn.Parameter(torch.randn(self.weight.shape))

    def effective(self) -> Tensor:
        gate = torch.sigmoid(self.scores)
        return self.weight * ((gate > 0.7).to(gate.dtype) - (gate < 0.3).to(gate.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.effective(), padding=1)


class SelfCompressing(nn.Conv2d):
    """``W = 2^e round(clip(2^-e W, -2^(b-1), 2^(b-1) - 1))``, bits and exponents per channel."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.exponent = nn.Parameter(torch.full((outputs, 1, 1, 1), -3.0))
        self.bits = nn.Parameter(torch.full((outputs, 1, 1, 1), 4.0))

    def effective(self) -> Tensor:
        bits = self.bits.relu()
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        steps = torch.minimum(torch.maximum(2**-self.exponent * self.weight, low), high).round()
        return 2**self.exponent * steps

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.effective(), self.bias, padding=1)


class SelfCompressingNet(nn.Module):
    """Two such layers; some channels have no bits left."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = SelfCompressing(channels, 2 * channels)
        self.second = SelfCompressing(2 * channels, channels)
        self.norm = nn.BatchNorm2d(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.norm(self.first(x))))


class AdaptiveRounding(nn.Linear):
    """AdaRound: ``s clip(floor(W / s) + h(V), n, p)`` with the rectified sigmoid hardened."""

    def __init__(self, inputs: int, outputs: int, bits: int = 4) -> None:
        super().__init__(inputs, outputs)
        self.v = nn.Parameter(torch.randn(outputs, inputs))
        self.register_buffer("step", self.weight.detach().abs().amax(1, keepdim=True) / 2**bits)
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def effective(self) -> Tensor:
        up = (torch.sigmoid(self.v) * 1.2 - 0.1).clamp(0, 1) >= 0.5
        integers = torch.floor(self.weight / self.step) + up
        return self.step * integers.clamp(self.low, self.high)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective(), self.bias)


class FlexibleRounding(nn.Linear):
    """FlexRound: ``s_1 round(W / (s_1 S_2 s_3))``, a divisor for each element and each row."""

    def __init__(self, inputs: int, outputs: int, bits: int = 4) -> None:
        super().__init__(inputs, outputs)
        self.s1 = nn.Parameter(self.weight.detach().abs().max() / 2 ** (bits - 1))
        self.s2 = nn.Parameter(1 + 0.2 * torch.rand(outputs, inputs))
        self.s3 = nn.Parameter(1 + 0.2 * torch.rand(outputs, 1))
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def effective(self) -> Tensor:
        integers = torch.round(self.weight / (self.s1 * self.s2 * self.s3))
        return self.s1 * integers.clamp(self.low, self.high)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective(), self.bias)


class BinaryWeights(nn.Conv2d):
    """BWN: ``W ~ alpha sign(W)``, ``alpha`` the mean size of each filter."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.weight.abs().mean((1, 2, 3), keepdim=True)
        return F.relu(self.norm(F.conv2d(x, alpha * self.weight.sign(), padding=1)))


class XNORConv(nn.Conv2d):
    """XNOR: ``alpha K(x) conv(sign(BN(x)), sign(W))``, ``K`` the local mean size of the input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(inputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        size = F.avg_pool2d(x.abs().mean(1, keepdim=True), 3, 1, 1)
        alpha = self.weight.abs().mean((1, 2, 3)).view(1, -1, 1, 1)
        return F.conv2d(x.sign(), self.weight.sign(), padding=1) * size * alpha


class BinaryNet(nn.Module):
    """Blocks of batch norm, sign, binary convolution, ReLU or pool; full-precision ends."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))
        self.convs = nn.ModuleList(BinaryConv(channels) for _ in range(3))
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for norm, conv, ends in zip(self.norms, self.convs, (pooled, F.relu, pooled), strict=True):
            x = ends(conv(norm(x).sign()))
        return self.head(x.mean((2, 3)))


class BinaryConv(nn.Conv2d):
    """``alpha conv(x, sign(W))``, of signs."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.weight.abs().mean((1, 2, 3)).view(1, -1, 1, 1)
        return F.conv2d(x, self.weight.sign(), self.bias, padding=1) * alpha


def pooled(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2)


_XNOR = "XNOR-Net (Rastegari et al., 2016)"


@SYSTEMS.add(
    "signed supermask", IMAGE, paper="Signing the Supermask (Koster et al., 2022)",
    there={"sigmoid": 1, "gt": 1, "lt": 1, "sub": 1, "mul": 1, "conv": 1}, left={"conv": 1},
    passes=("fold-constants",),
)  # fmt: skip
def supermask() -> nn.Module:
    return SignedSupermask(CHANNELS)


@SYSTEMS.add(
    "self-compression", IMAGE, paper="Cséfalvay and Imber, 2023", prepared=True,
    there={"maximum": 2, "minimum": 2, "round": 2, "pow": 8, "conv": 2, "batch-norm": 1},
    left={"conv": 2}, passes=("fold-constants", "fold-batch-norm"),
)  # fmt: skip
def self_compressing() -> nn.Module:
    net = SelfCompressingNet(CHANNELS)
    with torch.no_grad():
        for layer in (net.first, net.second):
            layer.exponent.uniform_(-5, -3)
            layer.bits.uniform_(2, 5)
        net.first.bits[::4] = 0.0
    randomise_norms(net)
    return net


@SYSTEMS.add(
    "AdaRound", (3, 16), paper="AdaRound (Nagel et al., 2020)", prepared=True,
    there={"sigmoid": 1, "clamp": 2, "ge": 1, "floor": 1, "div": 1, "add": 1, "linear": 1},
    left={"linear": 1}, passes=("fold-constants",),
)  # fmt: skip
def adaptive_rounding() -> nn.Module:
    return AdaptiveRounding(16, 8)


@SYSTEMS.add(
    "FlexRound", (3, 16), paper="FlexRound (Lee et al., 2023)", prepared=True,
    there={"mul": 3, "div": 1, "round": 1, "clamp": 1, "linear": 1}, left={"linear": 1},
    passes=("fold-constants",),
)  # fmt: skip
def flexible_rounding() -> nn.Module:
    return FlexibleRounding(16, 8)


@SYSTEMS.add(
    "binary weights", IMAGE, paper=_XNOR, left={"conv": 1},
    there={"abs": 1, "mean": 1, "sign": 1, "mul": 1, "conv": 1, "batch-norm": 1},
    passes=("fold-constants", "fold-batch-norm"),
)  # fmt: skip
def binary_weights() -> nn.Module:
    return BinaryWeights(CHANNELS, 8)


@SYSTEMS.add(
    "XNOR", IMAGE, paper=_XNOR, passes=("fold-constants",),
    there={"abs": 2, "mean": 2, "sign": 2, "avg-pool": 1, "mul": 2, "conv": 1, "batch-norm": 1},
    left={"abs": 1, "mean": 1, "sign": 1, "avg-pool": 1, "mul": 1, "conv": 1, "batch-norm": 1},
)  # fmt: skip
def xnor() -> nn.Module:
    return XNORConv(CHANNELS, 8)


@SYSTEMS.add(
    "XNOR, blocks of norm, sign, conv, pool", (2, 3, 12, 12), paper=_XNOR,
    passes=("fold-constants", "fold-batch-norm", "absorb-scale-shift"),
    there={"abs": 3, "mean": 4, "sign": 6, "mul": 3, "conv": 4, "batch-norm": 3, "max-pool": 2,
           "relu": 2, "linear": 1},
    # the shift before a sign behind a pool goes through it; behind a ReLU it is the threshold
    left={"mean": 1, "sign": 3, "conv": 4, "add": 2, "max-pool": 2, "relu": 2, "linear": 1},
)  # fmt: skip
def binary_net() -> nn.Module:
    return BinaryNet(8)
