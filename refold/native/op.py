"""The operator ``refold::bcq_linear_packed``: planes in the kernel's order.

It computes what ``refold::bcq_linear`` computes. ``exact`` keeps float32 throughout; else sums of
activations are rounded to 8 bits a look-up, with one scale for 64 activations at most. Where there
is no library the reference runs, and forms the weight in each call.
"""

from __future__ import annotations

import torch

from refold import native
from refold.native.interface import Packed
from refold.native.layer import TILE, multiply, unpack
from refold.ops import bcq_linear

torch.library.define(
    "refold::bcq_linear_packed",
    "(Tensor x, Tensor planes, Tensor scales, Tensor? bias, int rows, int group_size, bool exact)"
    " -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _reference(
    x: torch.Tensor,
    planes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    group_size: int,
    exact: bool,
) -> torch.Tensor:
    packed = Packed(planes, scales, rows, group_size)
    return bcq_linear.reference(x, *unpack(packed), bias, group_size)


def _cpu(
    x: torch.Tensor,
    planes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    group_size: int,
    exact: bool,
) -> torch.Tensor:
    kernel = native.library()
    if kernel is None or x.dtype == torch.float64:
        return _reference(x, planes, scales, bias, rows, group_size, exact)
    packed = Packed(planes, scales, rows, group_size)
    _check(x, packed, bias)
    return multiply(kernel, x, packed, bias, exact=exact)


def _fake(
    x: torch.Tensor,
    planes: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    group_size: int,
    exact: bool,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _check(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> None:
    """What the C code cannot see: it reads and writes as far as these shapes say."""
    planes, scales, group_size = packed.planes, packed.scales, packed.group_size
    features = x.shape[-1]
    tiles, q = (planes.shape[0], planes.shape[2]) if planes.dim() == 4 else (0, 0)
    groups = -(-features // group_size) if group_size > 0 else 0
    fits = (
        group_size % 8 == 0
        and planes.shape == (-(-packed.rows // TILE), -(-features // 8), q, TILE)
        and 1 <= q <= 4
        and scales.shape in ((tiles, groups, 1, TILE), (tiles, groups, q, TILE))
        and planes.dtype == torch.uint8
        and scales.dtype in (torch.float16, torch.float32)
        and x.is_floating_point()
        and planes.is_contiguous()
        and scales.is_contiguous()
        and planes.is_cpu
        and scales.is_cpu
        and (bias is None or (bias.is_cpu and bias.shape == (packed.rows,)))
    )
    if not fits:
        raise ValueError(
            f"bcq_linear_packed: x {list(x.shape)}, planes {list(planes.shape)} {planes.dtype}, "
            f"scales {list(scales.shape)} {scales.dtype}, {packed.rows} rows and groups of "
            f"{packed.group_size} do not fit each other"
        )


torch.library.register_fake("refold::bcq_linear_packed", _fake)
torch.library.impl("refold::bcq_linear_packed", "CompositeExplicitAutograd", _reference)
torch.library.impl("refold::bcq_linear_packed", "CPU", _cpu)
