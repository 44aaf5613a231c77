"""A float64 tensor that is computed when somebody needs its numbers, and known by shape before."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Lazy:
    """A float64 tensor behind a function.

    Composed weights are decided upon by their shapes alone; only those that survive are computed,
    once, at the end. Nothing is cached: a chain costs its own arithmetic and no standing memory.
    """

    def __init__(self, shape: tuple[int, ...], compute: Callable[[], torch.Tensor]) -> None:
        self.shape = tuple(int(s) for s in shape)
        self._compute = compute

    @staticmethod
    def of(tensor: torch.Tensor) -> Lazy:
        """Wraps a tensor of any floating dtype; it is widened when it is asked for."""
        return Lazy(tuple(tensor.shape), lambda: tensor.detach().to(torch.float64))

    def get(self) -> torch.Tensor:
        """Computes the tensor (float64). Callers must not write into it."""
        with torch.no_grad():
            out = self._compute()
        assert tuple(out.shape) == self.shape, (tuple(out.shape), self.shape)
        return out

    def map(self, shape: tuple[int, ...], function: Callable[[torch.Tensor], torch.Tensor]) -> Lazy:
        """A lazy tensor computed from this one."""
        return Lazy(shape, lambda: function(self.get()))

    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count
