"""Hand-written modules of a few layers, with random batch-norm statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in eval mode with random, sometimes negative, batch-norm parameters."""
    torch.manual_seed(seed)
    for m in module.modules():
        if isinstance(m, BATCH_NORMS):
            nn.init.uniform_(m.weight, -1.5, 1.5)
            nn.init.normal_(m.bias)
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2.0)
    return module.eval()


class ConvNet(nn.Module):
    """conv, batch norm, relu, pooling, linear: one batch norm folds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.bn(self.conv(x))).mean((2, 3)))


class NothingToFold(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x).cumsum(1)


class LateNorm(nn.Module):
    """A batch norm between two non-linearities: nothing can take it."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.bn(torch.relu(x)))


@dataclass
class Detections:
    scores: torch.Tensor
    boxes: torch.Tensor


torch.export.register_dataclass(Detections, serialized_type_name="refold.tests.Detections")


@dataclass
class Unnamed:
    value: torch.Tensor


torch.export.register_dataclass(Unnamed)


class Structured(nn.Module):
    """Nested inputs by keyword, nested outputs with constants, repeats and an input passed on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        # A name that an output would like to have.
        self.logits = nn.Parameter(torch.ones(()))

    def forward(self, x, *, extra, mode="sum", mask=None):
        y = F.relu(self.bn(self.conv(x)))
        z = y.mean((2, 3)) * self.logits
        if mode == "mean":
            z = z / 2
        return {
            "logits": z,
            "again": (z, None, 3, x),
            "size": y.shape[0],
            "found": Detections(z.sigmoid(), extra["a"] - extra["b"]),
            "best": z.argmax(1),
            "positive": z > 0,
        }


def structured_call(batch: int, reverse: bool = False):
    extra = {"a": torch.randn(batch, 2), "b": torch.randn(batch, 2)}
    if reverse:
        extra = {"b": extra["b"], "a": extra["a"]}
    return (torch.randn(batch, 3, 8, 8),), {"extra": extra}


def assert_same(got: object, expected: object) -> None:
    """Equal structure, close tensors, equal constants."""
    ours, spec = pytree.tree_flatten(got)
    theirs, wanted = pytree.tree_flatten(expected)
    assert spec == wanted
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b)
        else:
            assert a == b


class PaddedMaxPool(nn.Module):
    """A zero pad in front of max pooling: the border is 0, not -inf."""

    def __init__(self, twice: bool = False, own: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.twice, self.own = twice, own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.pad(self.conv(x) - 100.0, (0, 1, 2, 0))
        if self.twice:
            y = F.pad(y, (1, 0, 0, 0))
        return F.max_pool2d(y, 3, stride=2, padding=self.own)


class Summed(nn.Module):
    """Two inputs that share their batch."""

    def forward(self, x: torch.Tensor, y: torch.Tensor, scale: int = 1) -> torch.Tensor:
        return (x + y) * scale
