"""Which encoding each layer gets: integers where its scales are a grid, else the planes themselves.

The widths and block sizes of :func:`onnx_runtime` were measured with ONNX Runtime 1.31 on the CPU.
What is left out falls off a cliff there: 2 and 8 bits without int8 activations (20 to 30 times
slower than float32), blocks of 16 and 256 at 2 bits, blocks that are no power of two, float zero
points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from refold.algebra import integer_grid

FUNCTION = "bit-exact planes"
EXACT = "exact weights, float math"
INT8_ACTIVATIONS = "exact weights, int8 activations"
REQUANTISED = "requantised weights"
DENSE = "exact weights, stored as floats"

# The operator set that first has block-wise DequantizeLinear over integers of a width.
_OPSET = {2: 25, 4: 21, 8: 21}
_WIDE_BLOCKS = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class Kernels:
    """What a runtime multiplies fast.

    Attributes:
        name: how notes call the runtime.
        blocks: block sizes by width in bits, largest first.
        exactness: class of a layer whose weights are exact.
        dense: a layer that fits nothing becomes a float weight, not a function of its planes.
        requantise: width that a layer is rounded to if nothing exact fits, on request.
    """

    name: str
    blocks: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    exactness: str = EXACT
    dense: bool = False
    requantise: int | None = None


@dataclass(frozen=True)
class Encoding:
    """How one layer is written.

    Attributes:
        bits: width of its integers; 0 for the planes as they are, or a dense weight.
        block: weights that share a scale in the file.
        grid: the integers behind the scales, ``None`` if they are rounded or not integers.
        exactness: class of the result.
        reason: why nothing better was possible, if so.
    """

    bits: int
    block: int = 0
    grid: integer_grid.Grid | None = None
    exactness: str = FUNCTION
    reason: str = ""

    @property
    def opset(self) -> int:
        """The first operator set that has it."""
        return _OPSET.get(self.bits, 18)


ANY = Kernels("this target", dense=True)


def tensorrt(requantise: int | None = None) -> Kernels:
    """TensorRT's weight-only INT4: zero point 0, and no function whose planes it could read."""
    return Kernels("TensorRT", {4: (128, 64, 32, 16)}, EXACT, dense=True, requantise=requantise)


def onnx_runtime(accuracy_level: int, requantise: int | None = None) -> Kernels:
    """ONNX Runtime's kernels: with int8 activations (level 4), or in float32 (level 0)."""
    if accuracy_level == 0:
        return Kernels("ONNX Runtime", {4: _WIDE_BLOCKS}, EXACT, requantise=requantise)
    blocks = {2: (128, 64, 32), 4: _WIDE_BLOCKS, 8: _WIDE_BLOCKS}
    return Kernels("ONNX Runtime", blocks, INT8_ACTIVATIONS, requantise=requantise)


def choose(
    planes: torch.Tensor,
    alpha: torch.Tensor,
    features: int,
    group_size: int,
    dtype: torch.dtype,
    kernels: Kernels,
) -> Encoding:
    """The smallest exact encoding that is fast, else what was asked for instead."""
    unfit = DENSE if kernels.dense else FUNCTION
    widths = tuple(kernels.blocks)
    if not widths:
        return Encoding(0, exactness=unfit, reason=f"{kernels.name} has no kernel for it")
    if dtype not in (torch.float32, torch.float16):
        return Encoding(0, exactness=unfit, reason=f"the activations are {dtype}")
    blocks = {bits: _block(features, group_size, kernels.blocks[bits]) for bits in widths}
    fitting = tuple(bits for bits in widths if blocks[bits])
    grid = integer_grid.find(alpha, planes.shape[0])
    bits = integer_grid.bits_needed(grid, fitting) if grid is not None else None
    if grid is not None and bits is not None and _holds(grid.unit, dtype):
        return Encoding(bits, blocks[bits], grid, kernels.exactness)
    if kernels.requantise in fitting:
        return Encoding(kernels.requantise, blocks[kernels.requantise], None, REQUANTISED)
    if not fitting:
        reason = f"no block size of {kernels.name} divides groups of {group_size}"
    elif grid is None:
        reason = "its scales are not integers times one unit"
    elif bits is None:
        held = " and ".join(map(str, sorted(fitting)))
        reason = f"its integers go to {int(grid.sums.max())}, past {held} bits"
    else:
        reason = f"its scales leave the range of {dtype}"
    return Encoding(0, exactness=unfit, reason=reason)


def _block(features: int, group_size: int, sizes: tuple[int, ...]) -> int:
    """The largest block that crosses no border of a group, or 0."""
    one_group = group_size >= features
    return next((b for b in sizes if group_size % b == 0 or (one_group and b <= features)), 0)


def _holds(unit: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a dtype holds the units to its own rounding: none overflows or loses digits."""
    wide = 2 * unit.abs()
    limits = torch.finfo(dtype)
    return bool(((unit == 0) | ((unit >= limits.tiny) & (wide <= limits.max))).all())
