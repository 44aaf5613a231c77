"""Networks that decide on their data what to run.

Chen et al., DyCL: Dynamic Neural Network Compilation Via Program Rewriting and Graph Optimization,
2023 (static parts around a host's control flow). Regol et al., Jointly-Learned Exit and Inference
for a Dynamic Neural Network (JEI-DNN), 2024 (early exits behind learned gates).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.folding import randomise_norms
from tests.models.branches import conv_bn
from tests.models.systems.case import Systems

SYSTEMS = Systems("Dynamic networks")
DYCL, JEI = "DyCL (Chen et al., 2023)", "JEI-DNN (Regol et al., 2024)"
CHANNELS = 8


def choose(
    gate: Tensor, yes: Callable[..., Any], no: Callable[..., Any], operands: tuple[Any, ...]
) -> Any:
    """``torch.cond`` where it is exported; run eagerly it would start the compiler."""
    if torch.compiler.is_exporting():
        return torch.cond(gate, yes, no, operands)
    return yes(*operands) if bool(gate) else no(*operands)


class EarlyExit(nn.Module):
    """A classifier that is left after its stem where a learned gate is sure enough."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, CHANNELS, 3, padding=1)
        self.deep = nn.Sequential(
            conv_bn(CHANNELS, CHANNELS, 3, padding=1),
            nn.ReLU(inplace=True),
            conv_bn(CHANNELS, CHANNELS, 3, padding=1),
        )
        self.early, self.late = nn.Linear(CHANNELS, 5), nn.Linear(CHANNELS, 5)

    def forward(self, x: Tensor) -> Tensor:
        sure = x.mean() > 0
        x = F.relu(self.stem(x))
        return choose(sure, self.leave, self.stay, (x,))

    def leave(self, x: Tensor) -> Tensor:
        return self.early(x.mean((2, 3)))

    def stay(self, x: Tensor) -> Tensor:
        return self.late(F.relu(self.deep(x)).mean((2, 3)))


class SkippedBlocks(nn.Module):
    """Residual blocks, each run or skipped by itself; the second holds a decision of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, CHANNELS, 3, padding=1)
        self.first, self.second, self.third = (
            conv_bn(CHANNELS, CHANNELS, 3, padding=1) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = x[:, 0].mean() > 0, x[:, 1].mean() > 0
        x = self.stem(x)
        x = choose(height, lambda x: x + self.first(x), torch.clone, (x,))
        return choose(width, self.nested, torch.clone, (x,))

    def nested(self, x: Tensor) -> Tensor:
        y = self.second(x)
        return choose(y.mean() > 0, lambda y: self.third(y) + 1, lambda y: self.third(y), (y,))


class PythonExit(EarlyExit):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return self.leave(F.relu(self.stem(x)))
        return self.stay(F.relu(self.stem(x)))


class ExitPerSample(nn.Module):
    """Every sample leaves at the first exit that is sure enough; all exits are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(conv_bn(c, 8, 3, padding=1) for c in (3, 8, 8))
        self.heads = nn.ModuleList(nn.Linear(8, 5) for _ in range(3))
        self.gates = nn.Parameter(torch.ones(2))

    def exits(self, x: Tensor) -> list[Tensor]:
        logits = []
        for stage, head in zip(self.stages, self.heads, strict=True):
            x = F.relu(stage(x))
            logits.append(head(x.mean((2, 3))))
        return logits

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second, last = self.exits(x)
        leaves = sureness(first) > self.gates[0]
        follows = sureness(second) > self.gates[1]
        later = torch.where(follows[:, None], second, last)
        place = torch.where(leaves, 0, torch.where(follows, 1, 2))
        return torch.where(leaves[:, None], first, later), place


def sureness(logits: Tensor) -> Tensor:
    return logits.softmax(-1).amax(-1)


def prepared(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build().eval().requires_grad_(False)
    randomise_norms(model)
    return model


IMAGE = (2, 3, 8, 9)

SYSTEMS.add(
    "Early exit, torch.cond", IMAGE, paper=JEI, prepared=True,
    there={"conv": 3, "batch-norm": 3, "cond": 1, "linear": 2},
    left={"conv": 3, "cond": 1, "linear": 2}, passes=("fold-batch-norm",),
)(partial(prepared, EarlyExit))  # fmt: skip
SYSTEMS.add(
    "Skipped blocks, nested torch.cond", IMAGE, paper=DYCL, prepared=True,
    there={"conv": 5, "batch-norm": 5, "cond": 3}, left={"conv": 5, "cond": 3},
    passes=("fold-batch-norm",),
)(partial(prepared, SkippedBlocks))  # fmt: skip
SYSTEMS.add(
    "Exits of single samples, torch.where", IMAGE, paper=JEI, prepared=True,
    there={"conv": 3, "batch-norm": 3, "linear": 3}, left={"conv": 3, "linear": 3},
    passes=("fold-batch-norm",),
)(partial(prepared, ExitPerSample))  # fmt: skip
SYSTEMS.add(
    "Early exit, a Python branch", IMAGE, paper=DYCL, prepared=True,
    refused="control flow or its sizes depend on the values of tensors",
)(partial(prepared, PythonExit))  # fmt: skip
