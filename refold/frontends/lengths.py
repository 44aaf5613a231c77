"""``len(x)`` of a tensor: Python makes an ``int`` of it, which fixes that size in a trace.

``x.shape[0]`` is a symbol there. So the trace is watched for such a call, and made again with a
``len`` that gives the symbol; whether it holds at other sizes is asked as of every trace.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Watch:
    """Whether a size that varies was read by ``len``.

    Attributes:
        fixed: it was.
    """

    def __init__(self) -> None:
        self.fixed = False

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watches calls inside of the block."""
        own = torch.Tensor.__len__

        def length(tensor: torch.Tensor) -> int:
            self.fixed |= _varies(tensor)
            return own(tensor)

        torch.Tensor.__len__ = length  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.Tensor.__len__ = own  # type: ignore[method-assign]


@contextmanager
def symbolic() -> Iterator[None]:
    """Lets ``len`` give the symbol of a size that varies; for all else it is what it was."""
    own = builtins.len

    def length(value: Any, /) -> Any:
        if isinstance(value, torch.Tensor) and _varies(value):
            return value.shape[0]
        return own(value)

    builtins.len = length
    try:
        yield
    finally:
        builtins.len = own


def _varies(tensor: torch.Tensor) -> bool:
    return tensor.dim() > 0 and isinstance(tensor.shape[0], torch.SymInt)
