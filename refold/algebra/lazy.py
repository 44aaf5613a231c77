"""A float64 tensor that is computed when somebody needs its numbers, and known by shape before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar

import torch

_KEPT: ContextVar[dict[Lazy, torch.Tensor] | None] = ContextVar("kept", default=None)


class Lazy:
    """A float64 tensor behind a function.

    Composed weights are decided upon by their shapes alone; only those that survive are computed,
    once, at the end. A chain costs its own arithmetic and no standing memory; what several parents
    share is kept while one constant is computed (:meth:`evaluate`), so that a ladder of skips costs
    its rungs and not its paths.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        compute: Callable[[], torch.Tensor],
        *,
        fresh: bool = False,
        parents: Sequence[Lazy] = (),
    ) -> None:
        self._readers: int = 0
        for parent in parents:
            parent._readers += 1
        self.shape = tuple(int(s) for s in shape)
        self._compute = compute
        self._factors: tuple[Lazy, Lazy] | None = None
        self.fresh = fresh  # every call makes a tensor of its own, which may be written

    @staticmethod
    def of(tensor: torch.Tensor) -> Lazy:
        """Wraps a tensor of any floating dtype and device; it is widened when it is asked for.

        All arithmetic is on the CPU: weights of any device fold alike.
        """
        raw = tensor.detach()
        widens = raw.dtype != torch.float64
        return Lazy(tuple(raw.shape), lambda: raw.to("cpu", torch.float64), fresh=widens)

    def get(self) -> torch.Tensor:
        """Computes the tensor (float64). Callers may write into it only if it is ``fresh``."""
        kept = _KEPT.get()
        if kept is not None and self._readers > 1:
            if self not in kept:
                kept[self] = self._checked()
            return kept[self].clone() if self.fresh else kept[self]
        return self._checked()

    def evaluate(self) -> torch.Tensor:
        """:meth:`get`, computing what is shared once."""
        token = _KEPT.set({})
        try:
            return self.get()
        finally:
            _KEPT.reset(token)

    def _checked(self) -> torch.Tensor:
        with torch.no_grad():
            out = self._compute()
        assert tuple(out.shape) == self.shape, (tuple(out.shape), self.shape)
        return out

    def map(self, shape: tuple[int, ...], function: Callable[[torch.Tensor], torch.Tensor]) -> Lazy:
        """A lazy tensor computed from this one."""
        return Lazy(shape, lambda: function(self.get()), parents=(self,))

    def times(self, factor: torch.Tensor) -> Lazy:
        """The product with a factor that broadcasts against it, without a second full tensor."""
        of_rows = factor.numel() == 1 or (factor.dim() == 2 and factor.shape[1] == 1)
        if self._factors is not None and of_rows:
            return Lazy.product(self._factors[0].times(factor), self._factors[1])
        return Lazy(
            self.shape,
            lambda: self.get().mul_(factor) if self.fresh else self.get() * factor,
            fresh=True,
            parents=(self,),
        )

    @staticmethod
    def product(left: Lazy, right: Lazy) -> Lazy:
        """The matrix product ``left @ right``; a sum takes it in without holding it."""
        out = Lazy(
            (left.shape[0], right.shape[1]),
            lambda: left.get() @ right.get(),
            fresh=True,
            parents=(left, right),
        )
        out._factors = (left, right)
        return out

    def add_to(self, out: torch.Tensor) -> None:
        """``out += self``, in place."""
        if self._factors is None or self._readers > 1:
            out += self.get()
        else:
            out.addmm_(self._factors[0].get(), self._factors[1].get())

    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count
