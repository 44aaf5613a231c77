"""Judges 8-bit sums of activations by what rounding can explain."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from refold.errors import VerificationError
from refold.native.interface import Packed
from refold.native.lower import is_packed

_FLOAT = 1e-5  # what two float32 sums of thousands of terms may be apart, of their terms


def rounding(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """How far an output with 8-bit sums can be from the exact one: half a step for each look-up.

    Args:
        x: activations ``[m, K]``.
        packed: the layer.

    Returns:
        The bound of each output, ``[m, N]``.
    """
    steps, alpha, lookups = _steps(x, packed)
    return (steps * lookups / 2) @ alpha


def noise(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """The deviation of such an output: look-ups are off by anything up to half a step."""
    steps, alpha, lookups = _steps(x, packed)
    return ((steps.square() * lookups / 12) @ alpha.square()).sqrt()


def _steps(x: torch.Tensor, packed: Packed) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The steps of each block ``[m, blocks]``, its scales ``[blocks, N]``, its look-ups."""
    _, groups, families, _ = packed.scales.shape
    q, size = packed.planes.shape[2], packed.group_size if groups > 1 else 64
    block = next(b for b in (64, 32, 16, 8) if size % b == 0)
    scales = packed.scales.double().abs().sum(2) * (2**q - 1 if families < q else 1)
    alpha = scales.transpose(0, 1).flatten(1)[:, : packed.rows]  # [groups, N]
    blocks = F.pad(x.double(), (0, -x.shape[1] % block)).unflatten(1, (-1, block // 4, 4))
    steps = blocks.abs().sum(-1).amax(-1) / 127  # [m, blocks]
    owner = torch.arange(steps.shape[1]) * block // packed.group_size
    return steps, alpha[owner], block // 4


class Noisy(fx.Interpreter):
    """Runs a graph with exact sums, to each of which it adds what 8-bit ones would cost."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self._generator = torch.Generator().manual_seed(0)

    def run_node(self, n: fx.Node) -> Any:
        exact = super().run_node(n)
        if not is_packed(n):
            return exact
        args, _ = self.fetch_args_kwargs_from_env(n)
        x, packed = args[0].flatten(0, -2), Packed(args[1], args[2], args[4], args[5])
        deviation = noise(x, packed).view(exact.shape)
        drawn = torch.randn(exact.shape, generator=self._generator, dtype=torch.float64)
        return (exact.double() + deviation * drawn).to(exact.dtype)


class SumsJudge(fx.Interpreter):
    """Runs a graph with 8-bit sums, and each of its layers with exact ones beside.

    Attributes:
        worst: relative L2 of the layer that is furthest from its exact sums.
        where: its name.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.worst, self.where = 0.0, ""

    def run_node(self, n: fx.Node) -> Any:
        got = super().run_node(n)
        if is_packed(n):
            args, _ = self.fetch_args_kwargs_from_env(n)
            self._judge(n, args, got)
        return got

    def _judge(self, node: fx.Node, args: tuple[Any, ...], got: torch.Tensor) -> None:
        exact = torch.ops.refold.bcq_linear_packed(*args[:-1], True)
        x, packed = args[0].flatten(0, -2), Packed(args[1], args[2], args[4], args[5])
        apart = (got.double() - exact.double()).flatten(0, -2)
        finite = apart.isfinite()  # elsewhere both come from one path
        allowed = rounding(x, packed) * (1 + _FLOAT) + torch.finfo(got.dtype).eps * 4 * exact.abs()
        past = finite & (apart.abs() > allowed.view_as(apart))
        if past.any():
            raise VerificationError(
                f"{node.name}: 8-bit sums are {float(apart[past].abs().max()):.1e} from exact "
                "ones, more than rounding explains; compile with exact=True and report this",
                layer=node.name,
            )
        size = exact.double().flatten(0, -2)[finite].norm()
        error = float(apart[finite].norm() / size) if size else 0.0
        if error > self.worst:
            self.worst, self.where = error, node.name
