"""The native CPU kernel of layers of binary planes: whether it is there, and why not.

It is a C library that knows neither Python nor torch, built when refold is installed where there is
a C compiler. ``REFOLD_NATIVE=0`` in the environment switches it off: the reference runs. The same
library looks at tensors for changes (``watch.py``).
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from refold.native import build
from refold.native.interface import REBUILD, KernelLibrary, NativeError
from refold.native.layer import multiply, pack
from refold.ops import bcq_linear

OFF = "REFOLD_NATIVE"


def status() -> str | None:
    """``None`` if the native kernel runs here, else why not, and the fix."""
    found = _find()
    return found if isinstance(found, str) else None


def library() -> KernelLibrary | None:
    """The library, or ``None`` where :func:`status` says why."""
    found = _find()
    return None if isinstance(found, str) else found


def _find() -> KernelLibrary | str:
    if os.environ.get(OFF) == "0":
        return f"it is switched off ({OFF}=0)"
    return _open(build.LIBRARY)


@functools.cache
def _open(path: Path) -> KernelLibrary | str:
    if not path.exists():
        return f"it was not built when refold was installed: {REBUILD}"
    try:
        kernel = KernelLibrary(path)
        # Whoever asks first may do so under autocast, or under a mode that makes no real tensors;
        # a new thread has none of these.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_try_out, kernel).result()
    except NativeError as error:
        return str(error)
    return kernel


def _try_out(kernel: KernelLibrary) -> None:
    """A small layer, against the reference: a compiler that fails silently must not be trusted."""
    generator = torch.Generator().manual_seed(0)
    planes = torch.randint(0, 256, (3, 70, 20), dtype=torch.uint8, generator=generator)
    alpha = torch.rand(3, 70, 3, generator=generator, dtype=torch.float32)
    for rows in (2, 300):  # as they are, and with the weights formed
        x = torch.randn(rows, 160, generator=generator, dtype=torch.float32)
        expected = bcq_linear.reference(x, planes, alpha, None, 64)
        for exact, allowed in ((True, 1e-5), (False, 3e-2)):
            got = multiply(kernel, x, pack(planes, alpha, 64), exact=exact)
            error = float((got - expected).norm() / expected.norm())
            if not error <= allowed:
                raise NativeError(
                    f"it computes wrong numbers on this machine (error {error:.1e}): {REBUILD}, "
                    "with another one if need be (CC=clang)"
                )
