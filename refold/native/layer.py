"""A layer of binary planes in the kernel's order, and its product with activations."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch.nn import functional as F

from refold.native.interface import KernelLibrary, Packed

TILE = 64
# Rows of x up to which planes are multiplied as they are (exactly, with look-ups of bytes); from
# there on forming the weights pays, for the library's own product or else torch's. With AVX2 that
# meets look-ups of bytes at 128 rows for three planes, at 48 for four, nowhere for two.
GEMV_ROWS = {"portable": (4, 4), "avx2": (2, 128), "avx512": (128, 256), "neon": (4, 32)}
# Floats of weights that are formed at a time: they must stay in the cache.
_FORMED = 1 << 20
_LARGE_PAGE = 2 << 20


def pack(planes: torch.Tensor, alpha: torch.Tensor, group_size: int) -> Packed:
    """Reorders what ``refold::bcq_linear`` takes; see ``bcq.c`` for the order.

    float16 scales stay as they are, others become float32.
    """
    rows = planes.shape[1]
    missing = -rows % TILE
    scales = alpha if alpha.dtype == torch.float16 else alpha.float()
    tiles = F.pad(planes, (0, 0, 0, missing)).unflatten(1, (-1, 4, 16))  # [q, tiles, 4, 16, bytes]
    scales = F.pad(scales, (0, 0, 0, missing)).unflatten(1, (-1, TILE))
    return Packed(
        _in_large_pages(tiles.permute(1, 4, 0, 3, 2).flatten(3)),
        _in_large_pages(scales.permute(1, 3, 0, 2)),
        rows,
        group_size,
    )


def _in_large_pages(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in pages of 2 MiB, where the system has them to give.

    A product reads every byte once: in pages of 4 KiB, to look up their addresses takes a quarter
    of the time.
    """
    size = tensor.nbytes
    if size < _LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor.contiguous()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, size + _LARGE_PAGE, flags=flags)  # what is not touched takes no memory
    start = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % _LARGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, size // _LARGE_PAGE * _LARGE_PAGE)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
    return copy.view(tensor.shape).copy_(tensor)


def unpack(packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """The planes and scales that :func:`pack` was given."""
    planes = packed.planes.unflatten(3, (16, 4)).permute(2, 0, 4, 3, 1).flatten(1, 3)
    scales = packed.scales.permute(2, 0, 3, 1).flatten(1, 2)
    return planes[:, : packed.rows].contiguous(), scales[:, : packed.rows].contiguous()


def multiply(
    kernel: KernelLibrary,
    x: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None = None,
    *,
    exact: bool = True,
    isa: str | None = None,
) -> torch.Tensor:
    """``x @ W.T + bias`` with float32 arithmetic, in the dtype of ``x``.

    Args:
        kernel: the library.
        x: ``[..., K]`` of any strides, float32 or narrower.
        packed: the layer.
        bias: ``[N]``.
        exact: keep sums of activations in float32.
        isa: the instruction set, the best one unless given.
    """
    plain = x.dtype is torch.float32
    wide = x if plain and x.is_contiguous() else x.float().contiguous()
    if bias is not None:
        bias = bias.float().contiguous()
    y = None
    if x.numel() <= x.shape[-1] * GEMV_ROWS[isa or kernel.isas[-1]][0 if exact else 1]:
        y = kernel.multiply(wide, packed, bias, exact=exact, isa=isa)
    if y is None:
        y = kernel.product(wide, packed, bias, isa=isa)
    if y is None:
        flat = _multiply_formed(kernel, wide.view(-1, x.shape[-1]), packed, bias, isa)
        y = flat.view(*x.shape[:-1], packed.rows)
    return y if plain else y.to(x.dtype)


def _multiply_formed(
    kernel: KernelLibrary,
    x: torch.Tensor,
    packed: Packed,
    bias: torch.Tensor | None,
    isa: str | None,
) -> torch.Tensor:
    """The same through torch's product, with the weights of some tiles at a time."""
    features, tiles = x.shape[1], packed.planes.shape[0]
    step = min(tiles, max(1, _FORMED // (features * TILE)))
    formed = x.new_empty(features, step * TILE)
    y = x.new_empty(x.shape[0], packed.rows)
    for first in range(0, tiles, step):
        count = min(step, tiles - first)
        kernel.unpack(formed, packed, features, first, count, isa=isa)
        start, stop = first * TILE, min((first + count) * TILE, packed.rows)
        torch.mm(x, formed[:, : stop - start], out=y[:, start:stop])
    return y if bias is None else y.add_(bias)
