"""One compilation at a time.

``torch.export``, dynamo and fake tensors keep state of the process: two traces in two threads
break each other. Dynamo's own lock is taken, not another one beside it: ``torch.compile`` holds it
while a backend runs, and an export may need it, so that two locks could wait for each other.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from torch._dynamo.convert_frame import compile_lock

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

COMPILING = compile_lock


def one_at_a_time(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Makes a function wait until no other thread compiles."""

    @functools.wraps(function)
    def locked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with COMPILING, _collecting_new_objects_alone():
            return function(*args, **kwargs)

    return locked


@contextmanager
def _collecting_new_objects_alone() -> Iterator[None]:
    """Keeps the garbage collector from looking through what was there before.

    PyTorch and its packages hold some hundred thousand objects. A compilation makes enough new
    ones for a full collection, which takes 0.2 to 0.3 s to find that those are still in use. What
    the caller has frozen stays frozen.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
