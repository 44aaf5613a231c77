"""Mixtures of experts in the spellings that their papers and libraries train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 6


class FFN(nn.Module):
    """Affine, activation, affine."""

    def __init__(self, hidden: int = 8, *, bias: bool = True, act: Callable = F.gelu) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, hidden, bias=bias)
        self.down = nn.Linear(hidden, WIDTH, bias=bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class SwiGLU(nn.Module):
    """Shazeer, GLU Variants Improve Transformer, 2020."""

    def __init__(self, hidden: int = 8, *, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, hidden, bias=bias)
        self.up = nn.Linear(WIDTH, hidden, bias=bias)
        self.down = nn.Linear(hidden, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class FusedSwiGLU(nn.Module):
    """The same with gate and up projection in one product."""

    def __init__(self, hidden: int = 8, *, bias: bool = False) -> None:
        super().__init__()
        self.both = nn.Linear(WIDTH, 2 * hidden, bias=bias)
        self.down = nn.Linear(hidden, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Normed(nn.Module):
    """An expert with norms before, within and after."""

    def __init__(self, hidden: int = 8, *, bias: bool = True) -> None:
        super().__init__()
        self.before, self.within = nn.LayerNorm(WIDTH), nn.LayerNorm(hidden)
        self.after = nn.RMSNorm(WIDTH)
        self.body = FFN(hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.within(self.body.up(self.before(x))))
        return self.after(self.body.down(hidden))


EXPERTS: dict[str, Callable[..., nn.Module]] = {
    "ffn": FFN, "swiglu": SwiGLU, "fused": FusedSwiGLU, "normed": Normed,
}  # fmt: skip


def spread(expert: nn.Module, count: int, by: float, seed: int = 0) -> nn.ModuleList:
    """Copies of an expert whose weights deviate from it by about ``by`` of their size."""
    generator = torch.Generator().manual_seed(seed)
    copies = [deepcopy(expert) for _ in range(count)]
    with torch.no_grad():
        for copy in copies:
            for parameter in copy.parameters():
                drawn = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                size = parameter.square().mean().sqrt().clamp_min(0.1)
                parameter.add_(drawn, alpha=float(by * size))
    return nn.ModuleList(copies)


def averaged(experts: Sequence[nn.Module], weights: Sequence[float] | None = None) -> nn.Module:
    """One expert with the mean of their weights: the definition, by hand."""
    weights = weights or [1 / len(experts)] * len(experts)
    one = deepcopy(experts[0])
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            parts = [dict(e.named_parameters())[name] for e in experts]
            parameter.copy_(sum(w * p for w, p in zip(weights, parts, strict=True)))
    return one


class Mixture(nn.Module):
    """Experts, and what their outputs should add up to."""

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def mean(self, x: Tensor) -> Tensor:
        return sum(e(x) for e in self.experts) / len(self.experts)


class RandomPartition(Mixture):
    """Huang et al., Experts Weights Averaging, 2023: each expert a random part of the tokens."""

    def __init__(
        self, experts: Sequence[nn.Module], split: str = "tensor_split", undo: str = "argsort"
    ) -> None:
        super().__init__(experts)
        self.split, self.undo = split, undo

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        order = torch.randperm(len(tokens))
        parts = getattr(tokens[order], self.split)(len(self.experts))
        joined = torch.cat([e(p) for e, p in zip(self.experts, parts, strict=False)])
        return self._undone(joined, order).reshape(x.shape)

    def _undone(self, joined: Tensor, order: Tensor) -> Tensor:
        if self.undo == "argsort":
            return joined[order.argsort()]
        if self.undo == "sort":
            return joined[order.sort()[1]]
        if self.undo == "index_select":
            return joined.index_select(0, order.argsort())
        if self.undo == "inverse":
            inverse = torch.empty_like(order)
            inverse[order] = torch.arange(len(order))
            return joined[inverse]
        if self.undo == "index_put":
            out = torch.empty_like(joined)
            out[order] = joined
            return out
        if self.undo == "index_copy":
            return torch.zeros_like(joined).index_copy(0, order, joined)
        return torch.zeros_like(joined).scatter(0, order[:, None].expand_as(joined), joined)


UNDO = ("argsort", "sort", "index_select", "inverse", "index_put", "index_copy", "scatter")


class Ensemble(Mixture):
    """All experts on all tokens, joined with constant gates in one of several spellings."""

    def __init__(
        self, experts: Sequence[nn.Module], how: str = "sum", gates: Tensor | None = None
    ) -> None:
        super().__init__(experts)
        self.how = how
        self.gates = None if gates is None else nn.Parameter(gates)

    def forward(self, x: Tensor) -> Tensor:
        values = [e(x) for e in self.experts]
        if self.how == "sum":
            return sum(values) / len(values)
        if self.how == "stack":
            return torch.stack(values).mean(0)
        if self.how == "stack last":
            return torch.stack(values, -1).mean(-1)
        gates = self.gates.softmax(0) if self.how == "softmax" else self.gates
        if self.how == "einsum":
            return torch.einsum("e,ebtd->btd", gates, torch.stack(values))
        if self.how == "weighted stack":
            return (gates[:, None, None, None] * torch.stack(values)).sum(0)
        total = gates[0] * values[0]
        for gate, value in zip(gates[1:], values[1:], strict=True):
            total = total + value * gate
        return total


class Stacked(nn.Module):
    """Weights with an expert axis; ``gates`` of the experts, or their mean."""

    def __init__(self, count: int, how: str, *, gates: bool = False, hidden: int = 8) -> None:
        super().__init__()
        self.how, self.count = how, count
        self.up = nn.Parameter(torch.randn(count, WIDTH, hidden) / 2)
        self.up_bias = nn.Parameter(torch.randn(count, 1, hidden) / 2)
        self.down = nn.Parameter(torch.randn(count, hidden, WIDTH) / 2)
        self.down_bias = nn.Parameter(torch.randn(count, 1, WIDTH) / 2)
        self.gates = nn.Parameter(torch.randn(count)) if gates else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        return self._joined(self._each(tokens)).reshape(x.shape)

    def _each(self, tokens: Tensor) -> Tensor:
        if self.how == "einsum":
            hidden = torch.einsum("td,edh->eth", tokens, self.up) + self.up_bias
            return torch.einsum("eth,ehd->etd", F.gelu(hidden), self.down) + self.down_bias
        if self.how == "einsum inner":
            hidden = torch.einsum("td,edh->teh", tokens, self.up) + self.up_bias[:, 0]
            each = torch.einsum("teh,ehd->ted", F.gelu(hidden), self.down) + self.down_bias[:, 0]
            return each.transpose(0, 1) if self.gates is not None else each
        if self.how == "matmul":
            hidden = tokens @ self.up + self.up_bias
            return F.gelu(hidden) @ self.down + self.down_bias
        repeated = tokens.expand(self.count, -1, -1)
        if self.how == "bmm":
            hidden = torch.bmm(repeated, self.up) + self.up_bias
            return torch.bmm(F.gelu(hidden), self.down) + self.down_bias
        hidden = torch.baddbmm(self.up_bias, repeated, self.up)
        return torch.baddbmm(self.down_bias, F.gelu(hidden), self.down)

    def _joined(self, each: Tensor) -> Tensor:
        if self.gates is not None:
            return torch.einsum("e,etd->td", self.gates, each)
        return each.mean(1 if self.how == "einsum inner" else 0)

    def factors(self) -> list[float]:
        if self.gates is None:
            return [1 / self.count] * self.count
        return self.gates.tolist()

    def one(self, index: int | None = None) -> nn.Module:
        """One expert, or the one with the mean of the weights, gates taken into account."""
        factors = self.factors()
        total = sum(factors)

        def of(parameter: Tensor) -> Tensor:
            if index is not None:
                return parameter[index]
            return sum(f / total * p for f, p in zip(factors, parameter, strict=True))

        expert = FFN(self.up.shape[2]).to(self.up.dtype)
        with torch.no_grad():
            expert.up.weight.copy_(of(self.up).t())
            expert.up.bias.copy_(of(self.up_bias)[0])
            expert.down.weight.copy_(of(self.down).t())
            expert.down.bias.copy_(of(self.down_bias)[0])
        return expert


STACKED = ("einsum", "einsum inner", "matmul", "bmm", "baddbmm")


class SoftGated(Mixture):
    """Every expert on every token, weighed by a router: soft mixtures and conditional layers."""

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__(experts)
        self.router = nn.Linear(WIDTH, len(self.experts))

    def gates(self, x: Tensor) -> Tensor:
        return self.router(x).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gates(x)
        return sum(gates[..., i : i + 1] * e(x) for i, e in enumerate(self.experts))


class TopK(SoftGated):
    """Jiang et al., Mixtral of Experts, 2024: the loop over experts that libraries export."""

    def __init__(self, experts: Sequence[nn.Module], choices: int = 2) -> None:
        super().__init__(experts)
        self.choices = choices

    def gates(self, x: Tensor) -> Tensor:
        """Each expert's gate for each token, 0 where it was not chosen."""
        weights, chosen = self._chosen(x.reshape(-1, WIDTH))
        return torch.zeros(len(weights), len(self.experts), dtype=x.dtype).scatter(
            1, chosen, weights
        )

    def _chosen(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = self.router(tokens).softmax(-1).topk(self.choices, dim=-1)
        return weights / weights.sum(-1, keepdim=True), chosen

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        weights, chosen = self._chosen(tokens)
        out = torch.zeros_like(tokens)
        mask = F.one_hot(chosen, len(self.experts)).permute(2, 1, 0)
        for index, expert in enumerate(self.experts):
            choice, rows = torch.where(mask[index])
            value = expert(tokens[None, rows].reshape(-1, WIDTH))
            out.index_add_(0, rows, value * weights[rows, choice, None])
        return out.reshape(x.shape)
