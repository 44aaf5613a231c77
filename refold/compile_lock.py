"""One compilation at a time.

``torch.export``, dynamo and fake tensors keep state of the process: two traces in two threads
break each other. Dynamo's own lock is taken, not another one beside it: ``torch.compile`` holds it
while a backend runs, and an export may need it, so that two locks could wait for each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch._dynamo.convert_frame import compile_lock

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

COMPILING = compile_lock


def one_at_a_time(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Makes a function wait until no other thread compiles."""

    @functools.wraps(function)
    def locked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with COMPILING:
            return function(*args, **kwargs)

    return locked
