"""Networks with an input that is constant in use: once bound, what computes from it is gone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.systems.case import Systems

SYSTEMS = Systems("Bound inputs")
CHANNELS = 6
IMAGE = (2, CHANNELS, 8, 9)
WIDTH = 16


def _matrix(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(size) / size[-1] ** 0.5)


def mlp(*widths: int) -> nn.Sequential:
    """Linears with a SiLU between."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def values(**bound: Tensor) -> Callable[[], Mapping[str, Tensor]]:
    return lambda: bound


def normal(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(5))


class ConditionAwareConv(nn.Module):
    """A static kernel plus one that a class and a time make."""

    def __init__(self, channels: int, classes: int = 10, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.classes = nn.Embedding(classes, width)
        self.time = mlp(width, width, width)
        self.generator = nn.Linear(width, self.conv.weight.numel())
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor, label: Tensor, time: Tensor) -> Tensor:
        half = self.classes.embedding_dim // 2
        frequency = torch.exp(torch.arange(half, dtype=time.dtype) * -(math.log(100.0) / half))
        waves = torch.cat(((time * frequency).sin(), (time * frequency).cos()))
        condition = F.silu(self.classes(label) + self.time(waves))
        weight = self.conv.weight + self.generator(condition).view(self.conv.weight.shape)
        return F.relu(self.norm(F.conv2d(x, weight, self.conv.bias, padding=1)))


@SYSTEMS.add(
    "CAN, class and time", IMAGE, paper="CAN (Cai et al., 2024)",
    bind=values(label=torch.tensor(3), time=torch.tensor([0.7])),
    there={"embedding": 1, "sin": 1, "cos": 1, "silu": 2, "linear": 3, "conv": 1, "batch-norm": 1},
    left={"conv": 1}, passes=("fold-constants", "fold-batch-norm"),
)  # fmt: skip
def condition_aware() -> nn.Module:
    return ConditionAwareConv(CHANNELS)


class TunableConv(nn.Module):
    """``W = sum_i p_i W_i`` with ``p`` an MLP of the parameters, one set for the batch."""

    def __init__(self, channels: int, count: int = 3) -> None:
        super().__init__()
        self.weights, self.biases = (
            _matrix(count, channels, channels, 3, 3),
            _matrix(count, channels),
        )
        self.mlp = mlp(2, 8, count)

    def mixture(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        mix = torch.softmax(self.mlp(parameters), -1)
        weight = torch.tensordot(mix, self.weights, dims=1)
        return weight, mix @ self.biases

    def forward(self, x: Tensor, parameters: Tensor) -> Tensor:
        weight, bias = self.mixture(parameters)
        return F.relu(F.conv2d(x, weight, bias, padding=1))


class TunableConvOfSamples(TunableConv):
    """The same with a set for each sample: samples become groups of one convolution."""

    def forward(self, x: Tensor, parameters: Tensor) -> Tensor:
        weight, bias = self.mixture(parameters)
        flat = x.reshape(1, -1, *x.shape[2:])
        y = F.conv2d(flat, weight.flatten(0, 1), bias.flatten(), padding=1, groups=x.shape[0])
        return F.relu(y.view(x.shape))


_TUNABLE = {"linear": 2, "silu": 1, "softmax": 1, "tensordot": 1, "matmul": 1, "conv": 1}


@SYSTEMS.add(
    "TunableConv", IMAGE, paper="TunableConv (Maggioni et al., 2023)", there=_TUNABLE,
    bind=values(parameters=normal(2)), left={"conv": 1}, passes=("fold-constants",),
)  # fmt: skip
def tunable() -> nn.Module:
    return TunableConv(CHANNELS)


@SYSTEMS.add(
    "TunableConv, a set for each sample", IMAGE, paper="TunableConv (Maggioni et al., 2023)",
    bind=values(parameters=normal(2, 2)), there=_TUNABLE, left={"conv": 1}, fixed_batch=True,
    passes=("fold-constants",),
)  # fmt: skip
def tunable_of_samples() -> nn.Module:
    return TunableConvOfSamples(CHANNELS)


class ParameterAttention(nn.Module):
    """Channels scaled by a gate of the equation's parameters, after and before a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 3, padding=1)
        self.second = nn.Conv2d(8, channels, 1)
        self.gate = mlp(3, 8, 8)

    def forward(self, x: Tensor, equation: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(equation)).view(1, -1, 1, 1)
        return x + self.second(F.gelu(self.first(x)) * gate)


@SYSTEMS.add(
    "CAPE", IMAGE, paper="CAPE (Takamoto et al., 2023)", bind=values(equation=normal(3)),
    there={"linear": 2, "silu": 1, "sigmoid": 1, "mul": 1, "conv": 2, "add": 1},
    left={"conv": 2, "add": 1}, passes=("fold-constants", "absorb-scale-shift"),
)  # fmt: skip
def parameter_attention() -> nn.Module:
    return ParameterAttention(CHANNELS)


class DeepOperator(nn.Module):
    """``y(u)(x) = sum_k b_k(u) t_k(x)``: a branch of the function, a trunk of the places."""

    def __init__(self, sensors: int, features: int) -> None:
        super().__init__()
        self.branch, self.trunk = mlp(sensors, 12, features), mlp(2, 12, features)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, u: Tensor, places: Tensor) -> Tensor:
        return self.branch(u) @ self.trunk(places).t() + self.bias


@SYSTEMS.add(
    "DeepONet, fixed grid", (3, 10), paper="DeepONet (Lu et al., 2021)",
    bind=values(places=normal(7, 2)), left={"linear": 2, "silu": 1},
    there={"linear": 4, "silu": 2, "matmul": 1, "add": 1},
    passes=("fold-constants", "fold-branches"),
)  # fmt: skip
def deep_operator() -> nn.Module:
    return DeepOperator(10, 8)


class Attention(nn.Module):
    """Multi-head attention of queries to a context."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        heads = (self.q(x), self.k(context), self.v(context))
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(-3, -2) for t in heads)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2))


class TwoTowers(nn.Module):
    """``exp(t) f(x) / |f(x)| . T / |T|`` over the texts of the classes."""

    def __init__(self, width: int, words: int = 20) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(8, width, bias=False),
        )  # fmt: skip
        self.words, self.norm = nn.Embedding(words, width), nn.LayerNorm(width)
        self.attention, self.text = Attention(width), nn.Linear(width, width, bias=False)
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor, texts: Tensor) -> Tensor:
        words = self.norm(self.words(texts))
        text = self.text(self.attention(words, words)[:, -1])
        image = self.image(x)
        image = image / image.norm(dim=-1, keepdim=True)
        text = text / text.norm(dim=-1, keepdim=True)
        return self.temperature.exp() * image @ text.t()


@SYSTEMS.add(
    "CLIP, fixed classes", (2, 3, 9, 9), paper="CLIP (Radford et al., 2021)",
    bind=values(texts=torch.arange(15).view(5, 3)),
    there={"embedding": 1, "attention": 1, "layer-norm": 1, "conv": 1, "batch-norm": 1,
           "linear": 6, "matmul": 1, "mul": 1, "div": 2, "linalg-vector-norm": 2, "exp": 1},
    left={"conv": 1, "linear": 2, "div": 1, "linalg-vector-norm": 1},
    passes=("fold-constants", "fold-batch-norm", "absorb-scale-shift"),
)  # fmt: skip
def two_towers() -> nn.Module:
    return TwoTowers(WIDTH)


class FittedTable(nn.Module):
    """A prior-fitted network: rows of the table attend to each other, the queries to the rows."""

    def __init__(self, features: int, width: int, layers: int = 2) -> None:
        super().__init__()
        self.rows, self.label = nn.Linear(features, width), nn.Linear(1, width)
        self.attentions = nn.ModuleList(Attention(width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.mixers = nn.ModuleList(mlp(width, 2 * width, width) for _ in range(layers))
        self.head = nn.Linear(width, 3)

    def layers(self) -> zip[tuple[nn.Module, nn.Module, nn.Module]]:
        return zip(self.attentions, self.norms, self.mixers, strict=True)

    def forward(self, x: Tensor, table: Tensor, labels: Tensor) -> Tensor:
        query = self.rows(x).unsqueeze(0)
        known = (self.rows(table) + self.label(labels)).unsqueeze(0)
        for attention, norm, mixer in self.layers():
            context = norm(known)
            query = query + attention(norm(query), context)
            query = query + mixer(query)
            known = known + attention(context, context)
            known = known + mixer(known)
        return self.head(query.squeeze(0))


class FittedTableMasked(FittedTable):
    """The same as one sequence, with a mask that hides the queries."""

    def forward(self, x: Tensor, table: Tensor, labels: Tensor) -> Tensor:
        known = self.rows(table) + self.label(labels)
        tokens = torch.cat((known, self.rows(x))).unsqueeze(0)
        count, rows = tokens.shape[1], table.shape[0]
        visible = (torch.arange(count) < rows).expand(count, count)
        for attention, norm, mixer in self.layers():
            y = norm(tokens)
            heads = (attention.q(y), attention.k(y), attention.v(y))
            q, k, v = (t.unflatten(-1, (2, -1)).transpose(-3, -2) for t in heads)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
            tokens = tokens + attention.out(y.transpose(-3, -2).flatten(-2))
            tokens = tokens + mixer(tokens)
        return self.head(tokens[0, rows:])


_TABLE = values(table=normal(6, 4), labels=normal(6, 1))
_QUERIES = {"linear": 10, "attention": 2, "layer-norm": 2, "silu": 2}


@SYSTEMS.add(
    "TabPFN, fitted table", (3, 4), paper="TabPFN (Hollmann et al., 2023)", bind=_TABLE,
    there={"linear": 22, "attention": 3, "layer-norm": 4, "silu": 3}, left=_QUERIES,
    passes=("fold-constants",),
)  # fmt: skip
def fitted_table() -> nn.Module:
    return FittedTable(4, WIDTH)


@SYSTEMS.add(
    "TabPFN, one masked sequence", (3, 4), paper="TabPFN (Hollmann et al., 2023)", bind=_TABLE,
    there={"linear": 16, "attention": 2, "layer-norm": 2, "silu": 2}, left=_QUERIES,
    passes=("split-constant-tokens", "fold-constants"),
)  # fmt: skip
def fitted_table_masked() -> nn.Module:
    return FittedTableMasked(4, WIDTH)


class HyperNetwork(nn.Module):
    """``theta = theta_0 + h(E(g))``: one vector sets every weight of a small network."""

    def __init__(self, channels: int, width: int = 8) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(channels, 8, 3), nn.Linear(8, 5)
        self.own = [self.conv.weight, self.conv.bias, self.head.weight, self.head.bias]
        self.hyper = mlp(4, width, sum(p.numel() for p in self.own))

    def forward(self, x: Tensor, setting: Tensor) -> Tensor:
        own = (self.conv.weight, self.conv.bias, self.head.weight, self.head.bias)
        encoded = torch.cat((setting, 1 - setting))
        moves = self.hyper(encoded).split([p.numel() for p in own])
        w, b, v, c = (p + move.view(p.shape) for p, move in zip(own, moves, strict=True))
        return F.linear(F.relu(F.conv2d(x, w, b)).mean((2, 3)), v, c)


@SYSTEMS.add(
    "hypernetwork", IMAGE, paper="MIP (Ortiz et al., 2023)", bind=values(setting=normal(2)),
    there={"linear": 3, "silu": 1, "add": 4, "conv": 1}, left={"conv": 1, "linear": 1},
    passes=("fold-constants",),
)  # fmt: skip
def hyper_network() -> nn.Module:
    return HyperNetwork(CHANNELS)


class TimedNorm(nn.Module):
    """A block whose norm takes its scale and shift from the lead time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.scale, self.shift = nn.Linear(1, width), nn.Linear(1, width)
        self.mixer = mlp(width, 2 * width, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x) * (1 + self.scale(time)) + self.shift(time))


@SYSTEMS.add(
    "time-conditioned norm", (2, 5, WIDTH), paper="Poseidon (Herde et al., 2024)",
    bind=values(time=torch.tensor([0.3])),
    there={"linear": 4, "layer-norm": 1, "mul": 1, "add": 3, "silu": 1},
    left={"linear": 2, "layer-norm": 1, "add": 1, "silu": 1}, passes=("absorb-scale-shift",),
)  # fmt: skip
def timed_norm() -> nn.Module:
    return TimedNorm(WIDTH)


class LocationNorm(nn.Module):
    """A norm whose scale and shift differ from pixel to pixel, by what is known of the place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False)
        self.scale, self.shift = nn.Conv2d(2, 8, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) * self.scale(place) + self.shift(place))


@SYSTEMS.add(
    "location-aware norm", IMAGE, paper="LOAN (Eddin et al., 2023)",
    bind=values(place=normal(1, 2, 8, 9)),
    there={"conv": 3, "batch-norm": 1, "mul": 1, "add": 1}, left={"conv": 1, "mul": 1, "add": 1},
    passes=("fold-constants", "fold-batch-norm"),
)  # fmt: skip
def location_norm() -> nn.Module:
    return LocationNorm(CHANNELS)


class SelfTuning(nn.Module):
    """``(W x + b) + (V l) * (W_h x + b_h)``: the best response to the hyperparameters ``l``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base, self.response = nn.Linear(width, width), nn.Linear(width, width)
        self.v = nn.Linear(3, width, bias=False)

    def forward(self, x: Tensor, hyper: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + self.v(hyper) * self.response(x))


@SYSTEMS.add(
    "self-tuning network", (3, WIDTH), paper="STN (MacKay et al., 2019)",
    bind=values(hyper=normal(3)), there={"linear": 3, "mul": 1, "add": 1}, left={"linear": 1},
    passes=("fold-constants", "fold-branches"),
)  # fmt: skip
def self_tuning() -> nn.Module:
    return SelfTuning(WIDTH)


class Diverted(nn.Module):
    """``W = U diag(s * g(class)) V``."""

    def __init__(self, width: int, rank: int = 12, classes: int = 10) -> None:
        super().__init__()
        self.u, self.v, self.s = _matrix(width, rank), _matrix(rank, width), _matrix(rank)
        self.gate = nn.Embedding(classes, rank)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return F.linear(x, (self.u * (self.s * self.gate(label).relu())) @ self.v)


@SYSTEMS.add(
    "class-diverted weights", (3, WIDTH), paper="KIND (Xie et al., 2024)",
    bind=values(label=torch.tensor(4)), left={"linear": 1}, passes=("fold-constants",),
    there={"embedding": 1, "relu": 1, "mul": 2, "matmul": 1, "linear": 1},
)  # fmt: skip
def diverted() -> nn.Module:
    return Diverted(WIDTH)


class ContextAdapter(nn.Module):
    """Low-rank updates that one pass over a context makes: sums of outer products of its tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.keys = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.reads = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        for base, key, read in zip(self.base, self.keys, self.reads, strict=True):
            context = torch.tanh(base(context))
            update = read(context).t() @ torch.softmax(key(context), 0)
            x = torch.tanh(base(x) + x @ update.t() / context.shape[0])
        return x


@SYSTEMS.add(
    "adapter from a context", (3, WIDTH), paper="GenerativeAdapter (Chen et al., 2024)",
    bind=values(context=normal(6, WIDTH)), left={"linear": 2, "tanh": 2},
    there={"linear": 8, "matmul": 4, "softmax": 2, "div": 2, "add": 2, "tanh": 4},
    passes=("fold-constants", "fold-branches"),
)  # fmt: skip
def context_adapter() -> nn.Module:
    return ContextAdapter(WIDTH)
