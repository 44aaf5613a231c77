"""Adapters that add, mask or scale a low-rank product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.systems.case import Systems

SYSTEMS = Systems("Low-rank adapters")
WIDTH = 16
TOKENS = (2, 5, WIDTH)


def _matrix(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(size) / size[-1] ** 0.5)


class RandomBasisLinear(nn.Module):
    """NOLA: ``y = W x + s (sum_i a_i A_i) (sum_j b_j B_j) x`` over fixed random bases."""

    def __init__(self, width: int, rank: int = 2, count: int = 6) -> None:
        super().__init__()
        self.base = nn.Linear(width, width)
        self.register_buffer("bases_a", torch.randn(count, width, rank) / width**0.5)
        self.register_buffer("bases_b", torch.randn(count, rank, width) / rank**0.5)
        self.alpha, self.beta = _matrix(count), _matrix(count)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.einsum("n,nir->ir", self.alpha, self.bases_a)
        b = torch.einsum("n,nro->ro", self.beta, self.bases_b)
        return self.base(x) + 0.5 * (x @ a) @ b


class SeededBasisLinear(nn.Module):
    """NOLA as released: the bases are drawn anew, from a seed, in each forward pass."""

    def __init__(self, width: int, rank: int = 2, count: int = 6) -> None:
        super().__init__()
        self.base = nn.Linear(width, width)
        self.rank, self.seed = rank, 7
        self.alpha, self.beta = _matrix(count), _matrix(count)

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        torch.manual_seed(self.seed)
        a = torch.empty(self.alpha.numel(), width, self.rank, dtype=x.dtype).uniform_(-1, 1)
        b = torch.empty(self.beta.numel(), self.rank, width, dtype=x.dtype).uniform_(-1, 1)
        a = torch.einsum("n,nir->ir", self.alpha, a)
        return self.base(x) + (x @ a) @ torch.einsum("n,nro->ro", self.beta, b)


class PrincipalLinear(nn.Module):
    """PiSSA: the largest singular triples are trained, the residue is frozen."""

    def __init__(self, width: int, rank: int = 3) -> None:
        super().__init__()
        weight = torch.randn(width, width) / width**0.5
        u, s, v = torch.linalg.svd(weight)
        root = s[:rank].sqrt()
        self.original = weight
        self.up, self.down = nn.Linear(rank, width, bias=False), nn.Linear(width, rank, bias=False)
        self.residue = nn.Linear(width, width)
        with torch.no_grad():
            self.up.weight.copy_(u[:, :rank] * root)
            self.down.weight.copy_(root.unsqueeze(1) * v[:rank])
            self.residue.weight.copy_(weight - self.up.weight @ self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.residue(x) + self.up(self.down(x))


class FrozenProjections(nn.Module):
    """AFLoRA: ``W x + diag(b) B diag(d) A x``, on activations."""

    def __init__(self, width: int, rank: int = 3) -> None:
        super().__init__()
        self.base = nn.Linear(width, width)
        self.a, self.b = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        self.inner, self.outer = nn.Parameter(torch.ones(rank)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.outer * self.b(self.inner * self.a(x))


class DynamicRank(nn.Module):
    """DoRA of dynamic ranks: ``W x + sum_i c_i b_i a_i x``; pruned components have ``c_i = 0``."""

    def __init__(self, width: int, rank: int = 6) -> None:
        super().__init__()
        self.base = nn.Linear(width, width)
        self.a, self.b = _matrix(rank, width), _matrix(width, rank)
        self.c = nn.Parameter(torch.ones(rank))
        self.register_buffer("kept", (torch.arange(rank) % 3 != 0).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a) * (self.c * self.kept), self.b)


class ShardMixture(nn.Module):
    """MoS: each layer's low-rank matrices are shards of pools that all layers share."""

    def __init__(self, width: int, layers: int = 2, rank: int = 4, shards: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        pool = 2 * rank * shards
        self.pool_a = _matrix(pool, width // shards)
        self.pool_b = _matrix(pool, width // shards)
        for name in ("index_a", "index_b"):
            index = torch.stack([torch.randperm(pool)[: rank * shards] for _ in range(layers)])
            self.register_buffer(name, index.view(layers, rank, shards))

    def forward(self, x: Tensor) -> Tensor:
        for layer, index_a, index_b in zip(self.layers, self.index_a, self.index_b, strict=True):
            a = self.pool_a[index_a].flatten(1)
            b = self.pool_b[index_b].flatten(1).t()
            x = torch.tanh(layer(x) + F.linear(F.linear(x, a), b) * 2)
        return x


class TuckerLinear(nn.Module):
    """FLoRA: ``W x + s (U_o G U_i) x``."""

    def __init__(self, inputs: int, outputs: int, rank: int = 3) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.core = _matrix(rank, rank)
        self.u_out, self.u_in = _matrix(outputs, rank), _matrix(inputs, rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.3 * F.linear(x, self.u_out @ self.core @ self.u_in.t())


class TuckerConv(nn.Module):
    """FLoRA over 1 to 3 axes: ``dW[o,i,k...] = s sum G[a,b,c...] U_o[o,a] U_i[i,b] U_k[k,c] ...``.

    Both convolutions run, with the same stride and padding.
    """

    def __init__(self, channels: int, axes: int, kernel: int = 3, rank: int = 2) -> None:
        super().__init__()
        self.base = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](
            channels, channels, kernel, stride=2, padding=1
        )
        self.core = nn.Parameter(torch.randn((rank,) * (2 + axes)))
        sizes = (channels, channels, *(kernel for _ in range(axes)))
        self.factors = nn.ParameterList(torch.randn(size, rank) / rank for size in sizes)
        self.convolve = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]

    def forward(self, x: Tensor) -> Tensor:
        delta = self.core
        for factor in self.factors:  # the first axis goes, the new one comes last
            delta = torch.tensordot(delta, factor, dims=([0], [1]))
        return self.base(x) + self.convolve(x, 0.3 * delta, None, 2, 1)


class SparseUpdate(nn.Module):
    """SaRA: ``W' = W + M * P``; the mask marks the smallest weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        size = self.conv.weight.abs()
        self.register_buffer("mask", (size < size.quantile(0.15)).float())
        self.update = _matrix(*size.shape)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight + self.mask * self.update
        return F.relu(F.conv2d(x, weight, self.conv.bias, padding=1))


class MaskedLowRank(nn.Module):
    """PERP: ``W' = M * W + M * (s B A)`` with two of four weights kept; norms are retrained."""

    def __init__(self, width: int, rank: int = 2) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)
        self.a, self.b = _matrix(rank, width), _matrix(width, rank)
        order = torch.rand(width, width // 4, 4).argsort(-1)
        self.register_buffer("mask", (order < 2).float().view(width, width))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.mask * self.linear.weight + self.mask * (2.0 * (self.b @ self.a))
        return F.linear(self.norm(x), weight, self.linear.bias)


class ConditionLoRA(nn.Module):
    """CtrLoRA: a base network that all conditions share, and a low-rank pair for each condition."""

    def __init__(self, width: int, conditions: int = 3, rank: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.down = nn.ParameterList(torch.randn(conditions, rank, width) / 4 for _ in range(2))
        self.up = nn.ParameterList(torch.randn(conditions, width, rank) for _ in range(2))
        self.condition = 1

    def forward(self, x: Tensor) -> Tensor:
        for layer, down, up in zip(self.layers, self.down, self.up, strict=True):
            change = F.linear(F.linear(x, down[self.condition]), up[self.condition])
            x = F.silu(layer(x) + change)
        return x


class Prefix(nn.Module):
    """Prefix tuning: keys and values before the tokens', from an MLP of a table; LoRA on q and v.

    The adapter after the attention has an activation inside, so it stays.
    """

    def __init__(self, width: int, prefix: int = 3, rank: int = 2) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.table = _matrix(prefix, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2 * width))
        self.down_q, self.down_v = _matrix(rank, width), _matrix(rank, width)
        self.up_q, self.up_v = _matrix(width, rank), _matrix(width, rank)
        self.squeeze, self.expand = nn.Linear(width, 4), nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x) + F.linear(F.linear(x, self.down_q), self.up_q)
        v = self.v(x) + F.linear(F.linear(x, self.down_v), self.up_v)
        keys, values = self.mlp(self.table).chunk(2, -1)
        k = torch.cat((keys.expand(x.shape[0], -1, -1), self.k(x)), 1)
        v = torch.cat((values.expand(x.shape[0], -1, -1), v), 1)
        q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in (q, k, v))
        y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y + self.expand(F.relu(self.squeeze(y)))


_LOW_RANK = {"linear": 3, "add": 1}


@SYSTEMS.add(
    "NOLA, bases as buffers", TOKENS, paper="NOLA (Koohpayegani et al., 2024)", left={"linear": 1},
    there={"matmul": 4, "linear": 1, "mul": 1, "add": 1},
    passes=("fold-constants", "fold-branches"),
)  # fmt: skip
def nola() -> nn.Module:
    return RandomBasisLinear(WIDTH)


@SYSTEMS.add(
    "NOLA, bases drawn in forward", TOKENS, paper="NOLA (Koohpayegani et al., 2024)",
    refused="seeds the random numbers that it draws in forward",
)  # fmt: skip
def nola_seeded() -> nn.Module:
    return SeededBasisLinear(WIDTH)


@SYSTEMS.add(
    "PiSSA", TOKENS, paper="PiSSA (Meng et al., 2024)", there=_LOW_RANK, left={"linear": 1},
    passes=("fold-branches",), prepared=True,
)  # fmt: skip
def pissa() -> nn.Module:
    return PrincipalLinear(WIDTH)


@SYSTEMS.add(
    "AFLoRA", TOKENS, paper="AFLoRA (Liu et al., 2024)", there={**_LOW_RANK, "mul": 2},
    left={"linear": 1}, passes=("fold-branches",),
)  # fmt: skip
def aflora() -> nn.Module:
    return FrozenProjections(WIDTH)


@SYSTEMS.add(
    "DoRA, dynamic ranks", TOKENS, paper="DoRA (Mao et al., 2024)", there={**_LOW_RANK, "mul": 2},
    left={"linear": 1}, passes=("fold-branches",),
)  # fmt: skip
def dynamic_rank() -> nn.Module:
    return DynamicRank(WIDTH)


@SYSTEMS.add(
    "MoS", TOKENS, paper="MoS (Wang et al., 2024)", passes=("fold-constants", "fold-branches"),
    there={"index": 4, "linear": 6, "mul": 2, "add": 2}, left={"linear": 2},
)  # fmt: skip
def shards() -> nn.Module:
    return ShardMixture(WIDTH)


_FLORA = "FLoRA (Si et al., 2024)"
_BOTH = ("fold-constants", "fold-branches")


@SYSTEMS.add(
    "FLoRA, linear", TOKENS, paper=_FLORA, passes=_BOTH, left={"linear": 1},
    there={"linear": 2, "matmul": 2, "mul": 1, "add": 1},
)  # fmt: skip
def tucker_linear() -> nn.Module:
    return TuckerLinear(WIDTH, 8)


@SYSTEMS.add(
    "FLoRA, 1-d", (2, 6, 9), paper=_FLORA, passes=_BOTH, left={"conv": 1},
    there={"tensordot": 3, "conv": 2, "mul": 1, "add": 1},
)  # fmt: skip
def tucker_1d() -> nn.Module:
    return TuckerConv(6, 1)


@SYSTEMS.add(
    "FLoRA, 2-d", (2, 6, 9, 8), paper=_FLORA, passes=_BOTH, left={"conv": 1},
    there={"tensordot": 4, "conv": 2, "mul": 1, "add": 1},
)  # fmt: skip
def tucker_2d() -> nn.Module:
    return TuckerConv(6, 2)


@SYSTEMS.add(
    "FLoRA, 3-d", (2, 6, 5, 7, 6), paper=_FLORA, passes=_BOTH, left={"conv": 1},
    there={"tensordot": 5, "conv": 2, "mul": 1, "add": 1},
)  # fmt: skip
def tucker_3d() -> nn.Module:
    return TuckerConv(6, 3)


@SYSTEMS.add(
    "SaRA", (2, 6, 8, 9), paper="SaRA (Hu et al., 2024)", there={"mul": 1, "add": 1, "conv": 1},
    left={"conv": 1}, passes=("fold-constants",), prepared=True,
)  # fmt: skip
def sara() -> nn.Module:
    return SparseUpdate(6)


@SYSTEMS.add(
    "PERP, masked", TOKENS, paper="PERP (Zimmer et al., 2023)", passes=("fold-constants",),
    there={"mul": 3, "matmul": 1, "add": 1, "linear": 1, "layer-norm": 1},
    left={"linear": 1, "layer-norm": 1},
)  # fmt: skip
def perp() -> nn.Module:
    return MaskedLowRank(WIDTH)


@SYSTEMS.add(
    "CtrLoRA, one condition", TOKENS, paper="CtrLoRA (Xu et al., 2024)", left={"linear": 2},
    there={"linear": 6, "add": 2}, passes=("fold-branches",),
)  # fmt: skip
def condition() -> nn.Module:
    return ConditionLoRA(WIDTH)


@SYSTEMS.add(
    "prefix, LoRA and adapter", TOKENS, paper="He et al., 2022: a unified view", passes=_BOTH,
    there={"linear": 12, "add": 3, "tanh": 1, "attention": 1, "relu": 1},
    left={"linear": 6, "add": 1, "attention": 1, "relu": 1},
)  # fmt: skip
def prefix() -> nn.Module:
    return Prefix(WIDTH)
