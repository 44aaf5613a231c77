"""State spaces and structured matrices: long kernels made of few parameters."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.systems.case import Systems

SYSTEMS = Systems("State spaces and structured matrices")
CHANNELS = 4
LENGTH = 16
SIGNAL = (2, CHANNELS, LENGTH)


def causal_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """``y[l] = sum_j kernel[j] x[l - j]`` by a Fourier transform of twice the length."""
    length = x.shape[-1]
    spectrum = torch.fft.rfft(x, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
    return torch.fft.irfft(spectrum, n=2 * length)[..., :length]


def _pair(*size: int) -> nn.Parameter:
    """A complex parameter as a last axis of two."""
    return nn.Parameter(torch.randn(*size, 2) / 2)


class StateSpace(nn.Module):
    """``y = K * u + D u`` with a kernel of the signal's length; subclasses make ``K``."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.length = length
        self.log_step = nn.Parameter(torch.rand(channels, 1) - 3)
        self.skip = nn.Parameter(torch.randn(channels, 1))

    def kernel(self) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(causal_convolution(x, self.kernel()) + self.skip * x)


class DiagonalStateSpace(StateSpace):
    """S4D: ``K[l] = 2 Re sum_n C_n (exp(d A_n) - 1) / A_n exp(l d A_n)``."""

    def __init__(self, channels: int, length: int, states: int = 4) -> None:
        super().__init__(channels, length)
        self.log_decay = nn.Parameter(torch.randn(channels, states) / 2)
        self.frequency = nn.Parameter(math.pi * torch.rand(channels, states) * states)
        self.c = _pair(channels, states)

    def kernel(self) -> Tensor:
        step = self.log_step.exp()
        a = torch.complex(-self.log_decay.exp(), self.frequency)
        c = torch.view_as_complex(self.c) * ((step * a).exp() - 1) / a
        position = torch.arange(self.length, device=step.device)
        powers = ((step * a).unsqueeze(-1) * position).exp()
        return 2 * torch.einsum("hn,hnl->hl", c, powers).real


class NormalLowRankStateSpace(StateSpace):
    """S4: ``A = diag(a) - p q``; the kernel's spectrum by Cauchy sums and Woodbury's identity.

    With ``c = 2/d (1 - z)`` and ``s = 1 + z`` at each root of unity, ``k(u, v) =
    sum_n u_n v_n / (c - a_n s)`` gives ``K^ = 2 (k(C, B) - s k(C, p) k(q, B) / (1 + s k(q, p)))``.
    """

    def __init__(self, channels: int, length: int, states: int = 4) -> None:
        super().__init__(channels, length)
        self.log_decay = nn.Parameter(torch.randn(channels, states) / 2)
        self.frequency = nn.Parameter(math.pi * torch.rand(channels, states) * states)
        self.b, self.c, self.p = (_pair(channels, states) for _ in range(3))

    def kernel(self) -> Tensor:
        position = torch.arange(self.length, dtype=self.b.dtype, device=self.b.device)
        turn = 2 * math.pi * position / self.length
        z = torch.polar(torch.ones_like(turn), -turn)
        a = torch.complex(-self.log_decay.exp(), self.frequency)
        b, c, p = (torch.view_as_complex(v) for v in (self.b, self.c, self.p))
        step = self.log_step.exp()
        resolvent = 1 / ((2 / step * (1 - z)).unsqueeze(1) - a.unsqueeze(-1) * (1 + z))

        def k(u: Tensor, v: Tensor) -> Tensor:
            return ((u * v).unsqueeze(-1) * resolvent).sum(1)

        q = p.conj()
        low_rank = (1 + z) * k(c, p) * k(q, b) / (1 + (1 + z) * k(q, p))
        return torch.fft.ifft(2 * (k(c, b) - low_rank)).real


class CompanionStateSpace(StateSpace):
    """SpaceTime: ``K[l] = C A^l B`` with a shift whose last column is learned.

    The powers come in pairs: ``[X, A^n X]`` has twice the columns of ``X``.
    """

    def __init__(self, channels: int, length: int, states: int = 4) -> None:
        super().__init__(channels, length)
        self.column = nn.Parameter(torch.randn(channels, states) / states)
        self.b, self.c = (nn.Parameter(torch.randn(channels, states)) for _ in range(2))
        self.register_buffer("shift", torch.diag(torch.ones(states - 1), -1))

    def kernel(self) -> Tensor:
        last = F.one_hot(torch.tensor(self.shift.shape[0] - 1), self.shift.shape[0])
        power = self.shift + self.column.unsqueeze(-1) * last
        krylov = self.b.unsqueeze(-1)
        while krylov.shape[-1] < self.length:
            krylov = torch.cat((krylov, power @ krylov), -1)
            power = power @ power
        return torch.einsum("hn,hnl->hl", self.c, krylov[..., : self.length])


class MonarchMixer(nn.Module):
    """A long convolution whose kernel an MLP of the position gives, then Monarch products.

    The channels are mixed by two block-diagonal matrices with a transposition between them.
    """

    def __init__(self, channels: int, length: int, blocks: int) -> None:
        super().__init__()
        self.length, self.blocks = length, blocks
        self.filter = nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, channels))
        self.decay = nn.Parameter(torch.ones(channels))
        size = channels // blocks
        self.left = nn.Parameter(torch.randn(size, blocks, blocks) / blocks**0.5)
        self.right = nn.Parameter(torch.randn(blocks, size, size) / size**0.5)

    def kernel(self) -> Tensor:
        like = {"dtype": self.decay.dtype, "device": self.decay.device}
        time = torch.linspace(0, 1, self.length, **like).unsqueeze(1)
        wave = 2 * math.pi * time * torch.arange(1, 3, device=time.device)
        features = torch.cat((time, wave.sin(), wave.cos()), 1)
        return (self.filter(features) * (-self.decay.abs() * time).exp()).t()

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(causal_convolution(x, self.kernel()))
        batch, channels, length = x.shape
        rows = x.transpose(1, 2).reshape(-1, self.blocks, channels // self.blocks)
        rows = torch.bmm(rows.transpose(0, 1), self.right)  # [blocks, rows, size]
        rows = torch.bmm(rows.permute(2, 1, 0), self.left)  # [size, rows, blocks]
        return rows.permute(1, 2, 0).reshape(batch, length, channels).transpose(1, 2)


_LEFT = {"fft-rfft": 1, "mul": 2, "fft-irfft": 1, "add": 1}


@SYSTEMS.add(
    "S4D", SIGNAL, paper="S4D (Gu et al., 2022)", passes=("fold-constants",), left=_LEFT,
    there={"exp": 4, "complex": 1, "matmul": 1, "real": 1, "fft-rfft": 2, "fft-irfft": 1, "add": 1},
)  # fmt: skip
def s4d() -> nn.Module:
    return DiagonalStateSpace(CHANNELS, LENGTH)


@SYSTEMS.add(
    "S4", SIGNAL, paper="S4 (Gu et al., 2022)", passes=("fold-constants",), left=_LEFT,
    there={"polar": 1, "exp": 2, "reciprocal": 2, "sum": 4, "fft-ifft": 1, "fft-rfft": 2,
           "fft-irfft": 1, "add": 5},
)  # fmt: skip
def s4() -> nn.Module:
    return NormalLowRankStateSpace(CHANNELS, LENGTH)


_LONG = {
    "polar": 1, "reciprocal": 1, "sum": 4, "fft-ifft": 1, "fft-rfft": 2, "fft-irfft": 1, "add": 5,
}  # fmt: skip


@SYSTEMS.add(
    "S4, 16k", (2, 2, 16384), paper="S4 (Gu et al., 2022)", slow=True,
    there={**_LONG, "reciprocal": 2}, left=_LONG,
    noted=("made of complex numbers, which the target does not compute, and so stored past "
           "max_growth: fft_rfft_1, 256 KiB, 993 times the 264 B that they are computed from",),
    declines=(r"512 KiB, 993 times the 528 B .* computed from: it stays factored",),
)  # fmt: skip
def s4_kept() -> nn.Module:
    return NormalLowRankStateSpace(2, 16384)


@SYSTEMS.add(
    "S4, 16k, max_growth=inf", (2, 2, 16384), paper="S4 (Gu et al., 2022)", slow=True,
    there={**_LONG, "reciprocal": 2}, left=_LEFT, passes=("fold-constants",),
    settings={"max_growth": math.inf},
)  # fmt: skip
def s4_folded() -> nn.Module:
    return NormalLowRankStateSpace(2, 16384)


@SYSTEMS.add(
    "SpaceTime", SIGNAL, paper="SpaceTime (Zhang et al., 2023)", passes=("fold-constants",),
    there={"one-hot": 1, "matmul": 8, "fft-rfft": 2, "fft-irfft": 1, "add": 2}, left=_LEFT,
)  # fmt: skip
def space_time() -> nn.Module:
    return CompanionStateSpace(CHANNELS, LENGTH)


@SYSTEMS.add(
    "Monarch Mixer", SIGNAL, paper="Monarch Mixer (Fu et al., 2023)", passes=("fold-constants",),
    there={"linear": 2, "silu": 1, "sin": 1, "cos": 1, "exp": 1, "fft-rfft": 2, "fft-irfft": 1,
           "matmul": 2},
    left={"fft-rfft": 1, "mul": 1, "fft-irfft": 1, "matmul": 2},
)  # fmt: skip
def monarch() -> nn.Module:
    return MonarchMixer(CHANNELS, LENGTH, 2)
