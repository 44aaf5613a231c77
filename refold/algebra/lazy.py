"""A float64 tensor that is computed when somebody needs its numbers, and known by shape before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar

import torch

# What several parents share in the constant that is being computed: its tensor, once it is known.
_SHARED: ContextVar[dict[Lazy, torch.Tensor | None] | None] = ContextVar("shared", default=None)


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
        self._parents = tuple(parents)
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
        shared = _SHARED.get()
        if shared is None or self not in shared:
            return self._checked()
        known = shared[self]
        if known is None:
            known = shared[self] = self._checked()
        return known.clone() if self.fresh else known

    def evaluate(self) -> torch.Tensor:
        """:meth:`get`, computing what is shared once."""
        seen: set[Lazy] = set()
        shared: dict[Lazy, torch.Tensor | None] = {}
        stack: list[Lazy] = [self]
        while stack:
            current = stack.pop()
            if current in seen:
                shared[current] = None
                continue
            seen.add(current)
            stack.extend(current._parents)
        token = _SHARED.set(shared)
        try:
            return self.get()
        finally:
            _SHARED.reset(token)

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
        if self._factors is None or self in (_SHARED.get() or ()):
            out += self.get()
        else:
            out.addmm_(self._factors[0].get(), self._factors[1].get())

    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count
