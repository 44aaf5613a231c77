"""Notices that tensors were written or moved, with one call for all of them.

The library asks torch through two of its functions: ``aoti_torch_get_data_ptr`` of its C
interface, and ``at::TensorBase::_version``, a symbol of C++. Where either is missing there is no
watch, and whoever wants one asks the tensors in Python.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch._C import _aoti

from refold import native
from refold.native.interface import Library

_FUNCTIONS = ("aoti_torch_get_data_ptr", "_ZNK2at10TensorBase8_versionEv")


class Watch:
    """A call says whether the tensors lie where they lay when it was made, with no write counted.

    It holds the tensors.
    """

    def __init__(
        self, library: Library, functions: Sequence[int], tensors: Sequence[torch.Tensor],
        versions: Sequence[int],
    ) -> None:  # fmt: skip
        capsules = _aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
        weakref.finalize(self, _aoti.alloc_tensors_by_stealing_from_void_ptrs, capsules)
        count = len(tensors)
        pointers = ctypes.c_void_p * count
        self._call = functools.partial(
            library.unchanged,
            count,
            pointers(*map(_pointer, capsules)),
            pointers(*[t.data_ptr() for t in tensors]),
            (ctypes.c_int64 * count)(*versions),
            *functions,
        )

    def __call__(self) -> bool:
        return bool(self._call())


def watch(tensors: Sequence[torch.Tensor], versions: Sequence[int]) -> Watch | None:
    """A watch of tensors that count these versions now; ``None`` where there can be none.

    Args:
        tensors: with memory of their own, on any device.
        versions: one for each; -1: that tensor counts none.
    """
    library, functions = native.library(), _functions_of_torch()
    if library is None or functions is None:
        return None
    made = Watch(library, functions, tensors, versions)
    return made if made() else None  # what it reads is not what Python reads


@functools.cache
def _functions_of_torch() -> tuple[int, ...] | None:
    suffix = "dylib" if sys.platform == "darwin" else "so"
    path = Path(torch.__file__).with_name("lib") / f"libtorch_cpu.{suffix}"
    try:
        library = ctypes.CDLL(str(path))  # which this process has loaded long since
        found = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in _FUNCTIONS]
    except (OSError, AttributeError):
        return None
    return tuple(address or 0 for address in found)


def _pointer(capsule: object) -> int:
    return _capsule_pointer(capsule, None)


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
