"""Notices that tensors have changed.

Address, version and, of statistics, content of all tensors are compared by one call of the native
library, which asks torch through two of its functions: ``aoti_torch_get_data_ptr`` of its C
interface, and ``at::TensorBase::_version``, a symbol of C++. Where one of the three is missing,
Python asks one tensor after the other.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import operator
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._C import _aoti

from refold import native
from refold.native.interface import KernelLibrary

_FUNCTIONS = ("aoti_torch_get_data_ptr", "_ZNK2at10TensorBase8_versionEv")


def watch(
    tensors: Sequence[torch.Tensor], statistics: Sequence[bool], *, sample: int = 0
) -> Callable[[], bool]:
    """A call that says whether the tensors are as they are now.

    Args:
        tensors: with memory of their own, on any device. They are held.
        statistics: which ones are written without a version being counted: they are compared by
            content, bit by bit, the others by version. All are compared by address.
        sample: how many bytes of the others in the memory of the CPU are compared as well.
    """
    versions = [
        -1 if by_content or t.is_inference() else t._version  # those count none
        for t, by_content in zip(tensors, statistics, strict=True)
    ]
    plain = [t.device.type == "cpu" and t.is_contiguous() for t in tensors]
    sizes = [
        (t.nbytes if by_content else min(sample, t.nbytes)) if readable else 0
        for t, by_content, readable in zip(tensors, statistics, plain, strict=True)
    ]
    native_watch = _native(tensors, versions, sizes)
    if native_watch is None:
        looks, left = [_in_python(tensors, versions)], statistics
        if sample:
            looks.append(_as_now(functools.partial(b"".join, _samples(tensors, sizes))))
    else:
        looks = [native_watch]
        left = [s and not seen for s, seen in zip(statistics, plain, strict=True)]
    looks += _contents(list(itertools.compress(tensors, left)))  # at those addresses
    return looks[0] if len(looks) == 1 else lambda: all(look() for look in looks)


def _in_python(tensors: Sequence[torch.Tensor], versions: Sequence[int]) -> Callable[[], bool]:
    counting = [t for t, version in zip(tensors, versions, strict=True) if version >= 0]

    def read() -> tuple[list[int], list[int]]:
        with torch._C.DisableTorchFunctionSubclass():  # a fifth of the time goes to asking for it
            return list(map(_version, counting)), list(map(torch.Tensor.data_ptr, tensors))

    return _as_now(read)


_version = operator.attrgetter("_version")


def _contents(tensors: Sequence[torch.Tensor]) -> list[Callable[[], bool]]:
    """Whether they hold the same bits; those of one kind are read at once."""
    alike: dict[Any, list[torch.Tensor]] = {}
    for t in tensors:
        alike.setdefault((t.dtype, t.device, t.dim()), []).append(t)
    return [_as_now(_reader(group)) for group in alike.values()]


def _as_now(read: Callable[[], object]) -> Callable[[], bool]:
    before = read()
    return lambda: read() == before


def _reader(alike: list[torch.Tensor]) -> Callable[[], bytes]:
    """Reads tensors of one dtype, device and rank, where they lie now: their bits, as NaN is."""
    if all(t.device.type == "cpu" and t.is_contiguous() for t in alike):
        return functools.partial(b"".join, [_bytes(t) for t in alike])
    return functools.partial(_joined, alike)


def _samples(tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[memoryview]:
    return [_bytes(t)[:size] for t, size in zip(tensors, sizes, strict=True) if size]


def _bytes(tensor: torch.Tensor) -> memoryview:
    plain = tensor.detach().resolve_conj().resolve_neg()
    flat: memoryview = plain.reshape(-1).view(torch.uint8).numpy().data
    return flat


def _joined(alike: list[torch.Tensor]) -> bytes:
    with torch.inference_mode():  # what autograd notes of each tensor takes as long as joining them
        joined = torch.cat(alike) if alike[0].dim() else torch.stack(alike)
        return joined.view(torch.uint8).cpu().numpy().tobytes()


def _native(
    tensors: Sequence[torch.Tensor], versions: Sequence[int], sizes: Sequence[int]
) -> Callable[[], bool] | None:
    library, functions = native.library(), _functions_of_torch()
    if library is None or functions is None:
        return None
    made = _Watch(library, functions, tensors, versions, sizes)
    return made if made() else None  # what it reads is not what Python reads


class _Watch:
    """Compares by the native library; ``sizes`` are those of the contents that are compared."""

    def __init__(
        self, library: KernelLibrary, functions: Sequence[int], tensors: Sequence[torch.Tensor],
        versions: Sequence[int], sizes: Sequence[int],
    ) -> None:  # fmt: skip
        capsules = _aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
        weakref.finalize(self, _aoti.alloc_tensors_by_stealing_from_void_ptrs, capsules)
        seen = (_Seen * len(tensors))()
        for one, capsule, tensor, version, size in zip(
            seen, capsules, tensors, versions, sizes, strict=True
        ):
            one.tensor = _capsule_pointer(capsule, None)
            one.address, one.version = tensor.data_ptr(), version
            if size:
                one.content, one.size = _bytes(tensor)[:size].tobytes(), size
        self._call = functools.partial(library.unchanged, len(seen), seen, *functions)

    def __call__(self) -> bool:
        return bool(self._call())


class _Seen(ctypes.Structure):
    """``seen_t`` of ``watch.c``."""

    _fields_ = (
        ("tensor", ctypes.c_void_p),
        ("address", ctypes.c_void_p),
        ("version", ctypes.c_int64),
        ("content", ctypes.c_char_p),
        ("size", ctypes.c_int64),
    )


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


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
