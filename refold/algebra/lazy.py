"""A float64 tensor that is computed when somebody needs its numbers, and known by shape before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar

import torch

# What several parents share in the constant that is being computed: its tensor, once it is known.
_SHARED: ContextVar[dict[Lazy, torch.Tensor | None] | None] = ContextVar("shared", default=None)
_STEPS = 20  # computed one inside the other, each a few frames; a longer chain is held in between


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
        channels_last: bool | None = None,
    ) -> None:
        self._parents = tuple(parents)
        steps, deep = 1, False
        laid_out = False
        for parent in self._parents:
            steps, deep = max(steps, parent._steps + 1), deep or parent._deep
            laid_out |= parent.channels_last
        # what is made of a weight is laid out as it is, unless its maker knows better
        self.channels_last: bool = laid_out if channels_last is None else channels_last
        self._held = steps >= _STEPS  # so that what is made of it does not reach deeper
        self._steps: int = 0 if self._held else steps
        self._deep: bool = self._held or deep
        self.shape = tuple(map(int, shape))
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
        return Lazy(
            tuple(raw.shape),
            lambda: raw.to("cpu", torch.float64),
            fresh=widens,
            channels_last=_is_channels_last(raw),
        )

    def get(self) -> torch.Tensor:
        """Computes the tensor (float64). Callers may write into it only if it is ``fresh``."""
        shared = _SHARED.get()
        if shared is None or self not in shared:
            beyond = self._deep and (shared is None or not self._held_above(shared))
            return self.evaluate() if beyond else self._checked()
        known = shared[self]
        if known is None:
            known = shared[self] = self._checked()
        return known.clone() if self.fresh else known

    def evaluate(self) -> torch.Tensor:
        """:meth:`get`, computing what is shared once, and long chains piece by piece."""
        shared, held = self._plan()
        token = _SHARED.set(shared)
        try:
            for piece in held:
                piece.get()
            return self.get() if self in shared else self._checked()
        finally:
            _SHARED.reset(token)

    def _plan(self) -> tuple[dict[Lazy, torch.Tensor | None], list[Lazy]]:
        """What several parents share, and what is to be held, each after what it is made of."""
        seen: set[Lazy] = set()
        shared: dict[Lazy, torch.Tensor | None] = {}
        held: list[Lazy] = []
        stack = [(self, False)]
        while stack:
            current, ready = stack.pop()
            if ready:
                held.append(current)
            elif current in seen:
                shared[current] = None
            else:
                seen.add(current)
                if current._held:
                    shared[current] = None
                    stack.append((current, True))
                stack.extend((parent, False) for parent in current._parents)
        return shared, held

    def _held_above(self, shared: dict[Lazy, torch.Tensor | None]) -> bool:
        """True if the pieces that this is made of are held while a constant is computed."""
        stack = [p for p in self._parents if p._deep]
        while stack:
            current = stack.pop()
            if current._held:
                if current not in shared:
                    return False
            else:
                stack.extend(p for p in current._parents if p._deep)
        return True

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

    @property
    def memory_format(self) -> torch.memory_format:
        """How the tensor is stored: a kernel lays its result out as its weight is."""
        return (_CHANNELS_LAST if self.channels_last else {}).get(
            len(self.shape), torch.contiguous_format
        )


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _is_channels_last(tensor: torch.Tensor) -> bool:
    """By its strides: of a 1x1 kernel both layouts are the same memory."""
    if tensor.dim() not in _CHANNELS_LAST:
        return False
    last = torch.empty(tensor.shape, device="meta", memory_format=_CHANNELS_LAST[tensor.dim()])
    first = torch.empty(tensor.shape, device="meta")
    return tensor.stride() == last.stride() != first.stride()
