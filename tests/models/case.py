"""What a test model is: how to build it, its inputs, and the nodes that its paper's form leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from refold.graph.ops import census
from tests.randomise import randomise

CONV_LIKE = ("conv", "conv-transpose", "linear")


@dataclass(frozen=True)
class ModelCase:
    """A training-form network.

    Attributes:
        build: makes the module, with the weights that its author starts from.
        shapes: sizes of the positional inputs.
        expected: nodes by kind that the folded network may have at most; ``conv-like`` is the sum
            of convolutions, transposed convolutions and linears.
    """

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    expected: Mapping[str, int] = field(default_factory=dict)

    def inputs(self, seed: int = 1) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(size, generator=generator) for size in self.shapes)

    def model(self, seed: int = 0) -> nn.Module:
        """The module in eval mode, with random weights and calibrated statistics."""
        torch.manual_seed(seed)
        return randomise(self.build(), self.inputs(), seed)


class Registry(dict[str, ModelCase]):
    """Cases by name, filled by the decorator :meth:`add`."""

    def add(
        self, name: str, *shapes: tuple[int, ...], **expected: int
    ) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
        """Registers a builder; kinds are written with underscores (``batch_norm=0``)."""

        def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
            counts = {kind.replace("_", "-"): count for kind, count in expected.items()}
            self[name] = ModelCase(build, shapes, counts)
            return build

        return register


def counts(gm: fx.GraphModule) -> dict[str, int]:
    """Nodes by kind, with the sum ``conv-like``."""
    found: dict[str, Any] = dict(census(gm.graph))
    found["conv-like"] = sum(found.get(kind, 0) for kind in CONV_LIKE)
    return found
