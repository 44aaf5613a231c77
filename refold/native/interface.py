"""Calls the kernel's shared library through its C interface."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, NamedTuple

import torch

from refold.errors import BackendError
from refold.native import build

ISAS = {"portable": 0, "avx2": 1, "avx512": 2, "neon": 3}
_OK, _RANGE, _MEMORY, _ABSENT = 0, 1, 2, 4
REBUILD = "build it with `python -m refold.native`, which needs a C compiler"


class NativeError(BackendError):
    """The library is not there, does not load, or is of other sources; or a call failed."""


class Packed(NamedTuple):  # made in every call
    """A layer as the kernel reads it; see ``bcq.c``.

    Attributes:
        planes: uint8, ``[tiles, ceil(K / 8), q, 64]``.
        scales: float32 or float16, ``[tiles, groups, 1 or q, 64]``.
        rows: N; the last tile may have fewer than 64.
        group_size: columns that share a scale, a multiple of 8.
    """

    planes: torch.Tensor
    scales: torch.Tensor
    rows: int
    group_size: int


class KernelLibrary:
    """The kernel, loaded from a file."""

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
            self._library.bcq_source.restype = ctypes.c_char_p
            source = self._library.bcq_source().decode()
            self._multiply = self._library.bcq_multiply
            self._product = self._library.bcq_product
            self._unpack = self._library.bcq_unpack
            # Nothing may write to tensors meanwhile: this one holds Python's lock.
            self.unchanged = ctypes.PyDLL(str(path)).watch_unchanged
        except (OSError, AttributeError) as error:
            raise NativeError(f"{path} is no usable library ({error}): {REBUILD}") from error
        if source != build.fingerprint():
            raise NativeError(f"{path} was built from other sources: {REBUILD}")
        long, pointer, number = ctypes.c_long, ctypes.c_void_p, ctypes.c_int
        layer = [long, long, number, number, long]
        self._multiply.argtypes = [
            pointer, long, pointer, pointer, number, pointer, pointer, *layer, *[number] * 3,
        ]  # fmt: skip
        self._product.argtypes = [
            pointer, long, pointer, pointer, number, pointer, pointer, *layer, *[number] * 2,
        ]  # fmt: skip
        self._unpack.argtypes = [
            pointer, pointer, number, pointer, long, long, long, *layer, number, number,
        ]  # fmt: skip
        self.unchanged.argtypes = [long, *[pointer] * 3]
        self.isas = tuple(name for name, isa in ISAS.items() if self._library.bcq_supports(isa))
        self._best = ISAS[self.isas[-1]]

    def multiply(
        self,
        x: torch.Tensor,
        packed: Packed,
        bias: torch.Tensor | None,
        *,
        exact: bool,
        isa: str | None = None,
    ) -> torch.Tensor | None:
        """``x @ W.T + bias`` for a contiguous float32 ``[..., K]``.

        Returns:
            ``None`` if ``x`` holds infinities, NaN or magnitudes past 1e18: not for this kernel.
        """
        *leading, features = x.shape
        y = x.new_empty((*leading, packed.rows))
        status = self._multiply(
            x.data_ptr(), x.numel() // features, *_pointers(packed),
            None if bias is None else bias.data_ptr(), y.data_ptr(), *_layer(packed, features),
            exact, self._isa(isa), torch.get_num_threads(),
        )  # fmt: skip
        if status == _RANGE:
            return None
        if status != _OK:
            raise _failure(status)
        return y

    def product(
        self,
        x: torch.Tensor,
        packed: Packed,
        bias: torch.Tensor | None,
        *,
        isa: str | None = None,
    ) -> torch.Tensor | None:
        """The same, exact, for any ``x``, through weights that are formed in the cache.

        Returns:
            ``None`` if the instruction set has no such product.
        """
        *leading, features = x.shape
        y = x.new_empty((*leading, packed.rows))
        status = self._product(
            x.data_ptr(), x.numel() // features, *_pointers(packed),
            None if bias is None else bias.data_ptr(), y.data_ptr(), *_layer(packed, features),
            self._isa(isa), torch.get_num_threads(),
        )  # fmt: skip
        if status == _ABSENT:
            return None
        if status != _OK:
            raise _failure(status)
        return y

    def unpack(
        self,
        out: torch.Tensor,
        packed: Packed,
        features: int,
        first: int,
        count: int,
        *,
        isa: str | None = None,
    ) -> None:
        """Writes the weights of whole tiles, transposed, into ``[K, 64 * count]`` floats."""
        status = self._unpack(
            *_pointers(packed), out.data_ptr(), out.stride(0), first, count,
            *_layer(packed, features), self._isa(isa), torch.get_num_threads(),
        )  # fmt: skip
        if status != _OK:
            raise _failure(status)

    def _isa(self, name: str | None) -> int:
        return self._best if name is None else ISAS[name]


def _pointers(packed: Packed) -> tuple[Any, ...]:
    half = packed.scales.dtype == torch.float16
    return packed.planes.data_ptr(), packed.scales.data_ptr(), half


def _layer(packed: Packed, features: int) -> tuple[int, ...]:
    """N, K, q, a, columns that share a scale; a single group is as wide as suits the kernel."""
    _, groups, families, _ = packed.scales.shape
    size = packed.group_size if groups > 1 else -(-features // 64) * 64
    return packed.rows, features, packed.planes.shape[2], families, size


def _failure(status: int) -> NativeError:
    if status == _MEMORY:
        return NativeError("the kernel has no memory for its tables: free some")
    return NativeError(f"the kernel refuses the layer (status {status})")
