"""A linear layer whose weight is a sum of scaled binary planes.

    y = x @ W.T + bias        W[n, k] = sum over i of alpha[i, n, k // group_size] * b_i[n, k]

``b_i`` is +1 or -1, stored as one bit. ``alpha`` is ``[q, N, G]`` with G = ceil(K / group_size), or
``[1, N, G]`` for the uniform grid without a zero, where plane i has ``alpha[0] * 2**(q - 1 - i)``:
the levels are the odd multiples of ``alpha[0]``, which is half a step.

This module is the operator's definition: its schema, its shapes and its reference in torch. Faster
kernels and lowerings are compared with the reference.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

torch.library.define(
    "refold::bcq_linear",
    "(Tensor x, Tensor planes, Tensor alpha, Tensor? bias, int group_size) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def pack(signs: torch.Tensor) -> torch.Tensor:
    """Packs the last axis, eight signs a byte, least significant bit first; positive means +1.

    Bits past the end are 0.
    """
    missing = -signs.shape[-1] % 8
    bits = F.pad((signs > 0).to(torch.uint8), (0, missing)).unflatten(-1, (-1, 8))
    return (bits << _places(bits.device)).sum(-1, dtype=torch.uint8)


def unpack(planes: torch.Tensor, features: int) -> torch.Tensor:
    """The signs, +1 and -1 as int8, of what :func:`pack` made of ``features`` of them."""
    bits = (planes.unsqueeze(-1) >> _places(planes.device)) & 1
    return (bits.flatten(-2)[..., :features] << 1).to(torch.int8) - 1


def dequantise(
    planes: torch.Tensor,
    alpha: torch.Tensor,
    features: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The weight ``[N, features]`` that planes and scales stand for, formed in ``dtype``."""
    wide = alpha.to(dtype)
    if alpha.shape[0] == 1 and planes.shape[0] > 1:
        wide = wide * (2.0 ** torch.arange(planes.shape[0] - 1, -1, -1)).to(wide)[:, None, None]
    weight = torch.zeros(planes.shape[1], features, dtype=dtype, device=planes.device)
    for plane, scale in zip(planes, wide, strict=True):
        each = scale.repeat_interleave(group_size, dim=-1)[:, :features]
        weight += unpack(plane, features) * each
    return weight


def reference(
    x: torch.Tensor,
    planes: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """The operator in plain torch: the weight is formed, in float64 for float64, else in float32.

    Raises:
        ValueError: the shapes or dtypes do not fit each other.
    """
    _check(x, planes, alpha, bias, group_size)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = dequantise(planes, alpha, int(x.shape[-1]), group_size, wide)
    return F.linear(x.to(wide), weight, None if bias is None else bias.to(wide)).to(x.dtype)


def _fake(
    x: torch.Tensor,
    planes: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    _check(x, planes, alpha, bias, group_size)
    return x.new_empty((*x.shape[:-1], planes.shape[1]))


def _places(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def _check(
    x: torch.Tensor,
    planes: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
) -> None:
    features = x.shape[-1]
    if not x.is_floating_point() or not alpha.is_floating_point() or planes.dtype != torch.uint8:
        raise ValueError(
            "bcq_linear: expected floating x and alpha and uint8 planes, got "
            f"{x.dtype}, {alpha.dtype} and {planes.dtype}"
        )
    if group_size <= 0 or group_size % 8:
        raise ValueError(f"bcq_linear: group_size is {group_size}, expected a multiple of 8")
    if planes.dim() != 3 or planes.shape[2] != -(-features // 8):
        raise ValueError(
            f"bcq_linear: planes are {list(planes.shape)}, expected [q, N, {-(-features // 8)}] "
            f"for x with {features} features"
        )
    outputs, groups = planes.shape[1], -(-features // group_size)
    if (
        alpha.dim() != 3
        or alpha.shape[0] not in (1, planes.shape[0])
        or (tuple(alpha.shape[1:]) != (outputs, groups))
    ):
        raise ValueError(
            f"bcq_linear: alpha is {list(alpha.shape)}, expected [1 or {planes.shape[0]}, "
            f"{outputs}, {groups}]"
        )
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"bcq_linear: bias is {list(bias.shape)}, expected [{outputs}]")


torch.library.register_fake("refold::bcq_linear", _fake)
torch.library.impl("refold::bcq_linear", "CompositeExplicitAutograd", reference)
