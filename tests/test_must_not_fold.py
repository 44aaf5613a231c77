"""Traps: networks that a careless fold gets wrong.

Each must stay equal to the original in float64. Where a pass had a fold in sight, it must say why
it did not take it.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refold
from refold.graph.ops import census
from tests.compare import assert_declined, call, double, fold_double, relative_error
from tests.models.patterns import Expression
from tests.randomise import randomise

C = 8
IMAGE = (2, C, 10, 9)
TOKENS = (2, 7, C)

# Any word by which a reason may name its cause.
BORDER = r"pad|border|outside"
AXIS = r"axis|channel|broadcast|feature|size|shape"
SIGN = r"negative|positive|sign|zero"
CROSSING = r"commute|relu|hardtanh|clamp|silu|gelu|linear|homogeneous|activation|cross"
USERS = r"user|read|use|shared|else"
STATISTICS = r"statistic|running|training|batch"


@dataclass(frozen=True)
class Trap:
    """A network, its input sizes, and a pattern for the reason that must be given, if any."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    reason: str | None = None


TRAPS: dict[str, Trap] = {}


def trap(
    name: str,
    forward: Callable[..., Any],
    *shapes: tuple[int, ...],
    reason: str | None = None,
    **parts: Callable[[], Any],
) -> None:
    """Registers ``forward(net, x, ...)`` over parts that are made when the test runs."""

    def build() -> nn.Module:
        return Expression(forward, **{key: make() for key, make in parts.items()})

    assert name not in TRAPS
    TRAPS[name] = Trap(build, shapes or (IMAGE,), reason)


def conv(kernel: Any = 3, outputs: int = C, inputs: int = C, **options: Any) -> Callable[[], Any]:
    return lambda: nn.Conv2d(inputs, outputs, kernel, **options)


def transposed(kernel: Any = 3, outputs: int = C, **options: Any) -> Callable[[], Any]:
    return lambda: nn.ConvTranspose2d(C, outputs, kernel, **options)


def linear(inputs: int = C, outputs: int = C, **options: Any) -> Callable[[], Any]:
    return lambda: nn.Linear(inputs, outputs, **options)


def bn(channels: int = C, **options: Any) -> Callable[[], Any]:
    return lambda: nn.BatchNorm2d(channels, **options)


def bn1d(channels: int = C) -> Callable[[], Any]:
    return lambda: nn.BatchNorm1d(channels)


def positive(*size: int) -> Callable[[], Tensor]:
    return lambda: torch.rand(size) + 0.5


def mixed(*size: int) -> Callable[[], Tensor]:
    """Positive, negative and zero values."""

    def make() -> Tensor:
        values = torch.randn(size)
        flat = values.flatten()
        flat[0] = 0.0
        flat[-1] = -1.5
        return values

    return make


# --- borders --------------------------------------------------------------------------------------

same = {"padding": 1}

trap(
    "bn into zero-padded 3x3",
    lambda n, x: torch.tanh(n.c(n.b(F.relu(x)))),
    c=conv(**same),
    b=bn(),
    reason=BORDER,
)
trap(
    "shift into zero-padded 3x3",
    lambda n, x: torch.tanh(n.c(F.relu(x) + n.h)),
    c=conv(**same),
    h=positive(C, 1, 1),
)
trap(
    "bn into reflect-padded 3x3",
    lambda n, x: torch.tanh(n.c(n.b(F.relu(x)))),
    c=conv(padding=1, padding_mode="reflect"),
    b=bn(),
)
trap(
    "average excludes padding",
    lambda n, x: n.c(x) + F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    c=conv(**same),
    reason=r"count_include_pad|pad",
)
trap(
    "average excludes padding, alone",
    lambda n, x: n.b(F.avg_pool2d(n.c(x), 3, 1, 1, count_include_pad=False)),
    c=conv(**same),
    b=bn(),
)
trap(
    "average in ceil mode",
    lambda n, x: n.c(x) + F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
    (2, C, 14, 14),
    c=conv(stride=2, padding=2),
    reason=r"ceil",
)
trap(
    "average with another divisor",
    lambda n, x: n.c(x) + F.avg_pool2d(x, 3, 1, 1, divisor_override=5),
    c=conv(**same),
)
trap(
    "shift through padded average",
    lambda n, x: torch.tanh(n.b(F.avg_pool2d(F.relu(n.c(x)) * n.g + n.h, 3, 1, 1))),
    c=conv(**same),
    b=bn(),
    g=positive(C, 1, 1),
    h=positive(C, 1, 1),
)
trap(
    "bn up through padded average",
    lambda n, x: n.b(F.avg_pool2d(n.c(x), 3, 1, 1)),
    c=conv(**same),
    b=bn(),
    reason=BORDER + "|pool",
)
trap(
    "biased 1x1 into padded depthwise",
    lambda n, x: n.d(n.c(F.relu(x))),
    c=conv(1),
    d=conv(3, padding=1, groups=C),
    reason=BORDER,
)
trap(
    "padded 3x3 into padded 3x3",
    lambda n, x: n.d(n.c(F.relu(x))),
    c=conv(padding=1, bias=False),
    d=conv(padding=1, bias=False),
    reason=BORDER,
)
trap(
    "unpadded 3x3 into padded 3x3",
    lambda n, x: n.d(n.c(F.relu(x))),
    c=conv(bias=False, groups=C),
    d=conv(padding=1, bias=False, groups=C),
)
trap(
    "padded 3x3 into unpadded 3x3",
    lambda n, x: n.d(n.c(F.relu(x))),
    c=conv(padding=1, groups=C),
    d=conv(groups=C),
)
trap("padded 1x1", lambda n, x: n.d(n.c(F.relu(x))), c=conv(1, padding=1), d=conv(1))
trap(
    "padded 1x1 beside 3x3",
    lambda n, x: n.c(x) + n.d(x),
    c=conv(1, padding=1),
    d=conv(3, padding=2),
)
trap(
    "constant pad of another value",
    lambda n, x: n.c(F.pad(F.relu(x), (1, 1, 1, 1), value=1.5)),
    c=conv(),
)
trap(
    "pad with -inf before max",
    lambda n, x: n.b(F.max_pool2d(F.pad(n.c(x), (1, 1, 1, 1), value=-1e3), 3)),
    c=conv(),
    b=bn(),
)
trap(
    "zero pad before max",
    lambda n, x: F.max_pool2d(F.pad(F.relu(n.c(x)) * n.g, (1, 1, 1, 1)), 3),
    c=conv(),
    g=mixed(C, 1, 1),
)
trap("bn after zero pad", lambda n, x: n.b(F.pad(n.c(x), (1, 1, 1, 1))), c=conv(), b=bn())
trap("pad of channels", lambda n, x: n.b(F.pad(n.c(x), (0, 0, 0, 0, 1, 2))), c=conv(), b=bn(C + 3))
trap("negative pad", lambda n, x: n.c(F.pad(F.relu(x), (-1, 2, 0, -1))), c=conv(**same))
trap(
    "crop after padded 3x3",
    lambda n, x: n.c(x)[:, :, 1:-1, 1:-1] + x[:, :, 1:-1, 1:-1],
    c=conv(**same),
)
trap("shifted identity", lambda n, x: n.c(x)[:, :, 1:] + x[:, :, :-1], c=conv(**same))
trap(
    "reflect beside zeros",
    lambda n, x: n.c(x) + n.d(x),
    c=conv(**same),
    d=conv(padding=1, padding_mode="reflect"),
    reason=r"pad|mode|border",
)
trap(
    "reflect beside circular",
    lambda n, x: n.c(x) + n.d(x),
    c=conv(padding=1, padding_mode="circular"),
    d=conv(padding=1, padding_mode="reflect"),
)
trap(
    "circular beside circular",
    lambda n, x: n.c(x) + n.d(x) + x,
    c=conv(padding=1, padding_mode="circular"),
    d=conv(padding=1, padding_mode="circular"),
)
trap(
    "replicate of two widths",
    lambda n, x: n.c(x) + n.d(x),
    c=conv(5, padding=2, padding_mode="replicate"),
    d=conv(3, padding=1, padding_mode="replicate"),
)
trap(
    "biased 1x1 into reflect",
    lambda n, x: n.d(n.c(F.relu(x))),
    c=conv(1),
    d=conv(padding=1, padding_mode="reflect"),
)
trap(
    "bias border on one side only",
    lambda n, x: n.d(_border(n.c(F.relu(x)), n.c.bias, sides=1)),
    c=conv(1),
    d=conv(),
    reason=None,
)
trap(
    "bias border of another value",
    lambda n, x: n.d(_border(n.c(F.relu(x)), n.h)),
    c=conv(1),
    d=conv(),
    h=positive(C),
)
trap(
    "bias border of two pixels, one written",
    lambda n, x: n.d(_border(n.c(F.relu(x)), n.c.bias, pad=2)),
    c=conv(1),
    d=conv(),
)
trap(
    "border written over a strip",
    lambda n, x: n.d(_strip(n.c(F.relu(x)), n.c.bias)),
    c=conv(1),
    d=conv(),
)


def _border(y: Tensor, value: Tensor, sides: int = 4, pad: int = 1) -> Tensor:
    y = F.pad(y, [pad] * 4)
    value = value.view(1, -1, 1, 1)
    slices = (slice(None, 1), slice(-1, None))
    for place in (*((..., s, slice(None)) for s in slices), *((..., s) for s in slices)):
        if sides:
            y[place] = value
            sides -= 1
    return y


def _strip(y: Tensor, value: Tensor) -> Tensor:
    y = F.pad(y, [1] * 4)
    y[:, :, 0:1, 2:5] = value.view(1, -1, 1, 1)
    y[:, :, ::3, -1:] = value.view(1, -1, 1, 1)
    return y


# --- grids, kernels, groups -----------------------------------------------------------------------

EVEN = (2, C, 14, 14)

trap(
    "strides that share no grid",
    lambda n, x: n.c(x) + n.d(x),
    EVEN,
    c=conv(3, stride=2, padding=1),
    d=conv(8),
    reason=r"stride|grid",
)
trap(
    "strided slice beside strided conv",
    lambda n, x: n.c(x) + x[:, :, ::2, ::2],
    EVEN,
    c=conv(3, stride=2, padding=1),
)
trap(
    "odd strided slice",
    lambda n, x: n.c(x) + x[:, :, 1::2, 1::2],
    EVEN,
    c=conv(3, stride=2, padding=1),
)
trap(
    "stride by slicing a conv",
    lambda n, x: n.c(x)[:, :, ::2] + n.d(x),
    EVEN,
    c=conv(3, padding=1),
    d=conv(3, stride=(2, 1), padding=1),
)
trap(
    "strides of both axes differ",
    lambda n, x: n.c(x) + n.d(x),
    EVEN,
    c=conv(3, stride=(2, 1), padding=1),
    d=conv((2, 1), stride=(2, 1)),
)
trap(
    "stride 3 on a size with a rest",
    lambda n, x: n.c(x) + n.d(x),
    (2, C, 11, 13),
    c=conv(3, stride=3, padding=1),
    d=conv(1, stride=3),
)
trap(
    "1x1 stride 2 with rest beside 2x2",
    lambda n, x: n.c(x) + n.d(x),
    (2, C, 14, 14),
    c=conv(2, stride=2),
    d=conv(1, stride=2),
)
trap(
    "strided 1x1 into strided 3x3",
    lambda n, x: n.d(n.c(F.relu(x))),
    (2, C, 15, 13),
    c=conv(1, stride=2, bias=False),
    d=conv(3, stride=2),
)
trap(
    "dilated and strided",
    lambda n, x: n.c(x) + n.d(x),
    (2, C, 15, 13),
    c=conv(3, stride=2, padding=2, dilation=2),
    d=conv(5, stride=2, padding=2),
)
trap(
    "even kernels",
    lambda n, x: n.c(x) + n.d(x) + F.pad(x, (0, 1, 0, 1)),
    c=conv(2, padding=1),
    d=conv(4, padding=2),
)
trap("even kernel, asymmetric pad", lambda n, x: n.c(F.pad(x, (1, 0, 1, 0))) + x, c=conv(2))
trap(
    "asymmetric pads that disagree",
    lambda n, x: n.c(F.pad(x, (1, 0, 1, 0))) + n.d(F.pad(x, (0, 1, 0, 1))),
    c=conv(2),
    d=conv(2),
)
trap(
    "same padding of even kernels",
    lambda n, x: n.c(x) + n.d(x) + x,
    c=conv(4, padding="same"),
    d=conv((3, 2), padding="same", dilation=2),
)
trap("valid padding", lambda n, x: n.c(x) + x[:, :, 1:-1, 1:-1], c=conv(3, padding="valid"))
trap(
    "padding wider than the kernel",
    lambda n, x: n.c(x) + n.d(x),
    c=conv(1, padding=3),
    d=conv(5, padding=5),
)
trap(
    "grouped beside dense", lambda n, x: n.c(x) + n.d(x), c=conv(3, padding=1, groups=4), d=conv(1)
)
trap(
    "groups 2 beside groups 4",
    lambda n, x: n.c(x) + n.d(x) + x,
    c=conv(3, padding=1, groups=2),
    d=conv(3, padding=1, groups=4),
)
trap(
    "depthwise multiplier",
    lambda n, x: n.d(n.c(F.relu(x))),
    c=conv(1, bias=False),
    d=conv(3, 3 * C, padding=1, groups=C),
)
trap(
    "grouped then grouped",
    lambda n, x: n.d(n.c(F.relu(x))),
    c=conv(3, 2 * C, groups=4),
    d=conv(1, C, 2 * C, groups=2),
)
trap(
    "grouped, shuffled, grouped",
    lambda n, x: n.d(F.channel_shuffle(n.c(F.relu(x)), 4)),
    c=conv(1, groups=4),
    d=conv(1, groups=2),
)
trap("transposed, equal channels", lambda n, x: n.b(n.c(x)), c=transposed(3, stride=2), b=bn())
trap("transposed, groups", lambda n, x: n.b(n.c(x)), c=transposed(3, 2 * C, groups=4), b=bn(2 * C))
trap(
    "transposed, output padding",
    lambda n, x: n.b(n.c(x)),
    c=transposed(3, stride=2, padding=1, output_padding=1, dilation=2),
    b=bn(),
)
trap(
    "bn into transposed",
    lambda n, x: torch.tanh(n.c(n.b(F.relu(x)))),
    c=transposed(3, stride=2, padding=1),
    b=bn(),
)
trap(
    "transposed pair and skip",
    lambda n, x: n.c(x) + n.d(x) + x,
    c=transposed(3, padding=1),
    d=transposed(1, groups=2),
)
trap(
    "transposed beside conv",
    lambda n, x: n.c(x) + n.d(x),
    c=transposed(3, padding=1),
    d=conv(3, padding=1),
)
trap("transposed into conv", lambda n, x: n.d(n.c(F.relu(x))), c=transposed(2, stride=2), d=conv(1))

# --- elementwise ----------------------------------------------------------------------------------

SQUARE = (2, C, 10, C)

trap(
    "vector along the width",
    lambda n, x: n.c(x) * n.g,
    SQUARE,
    c=conv(**same),
    g=positive(C),
    reason=AXIS,
)
trap(
    "vector along the height",
    lambda n, x: n.c(x) + n.h,
    (2, C, C, 5),
    c=conv(**same),
    h=positive(C, 1),
    reason=AXIS,
)
trap("image constant", lambda n, x: n.c(x) * n.g, c=conv(**same), g=positive(C, 10, 9))
trap(
    "constant of another batch",
    lambda n, x: n.c(x) * n.g,
    (1, C, 6, 6),
    c=conv(**same),
    g=positive(2, C, 1, 1),
)
trap(
    "constant per sample",
    lambda n, x: n.c(x) * n.g,
    (2, 2, 6, 6),
    c=conv(3, 2, 2, padding=1),
    g=positive(2, 1, 1, 1),
)
trap(
    "constant that adds an axis",
    lambda n, x: n.c(x) * n.g,
    (2, C, 5, C),
    c=conv(**same),
    g=positive(3, 1, 1, 1, 1),
)
trap(
    "constant that widens",
    lambda n, x: n.c(F.adaptive_avg_pool2d(x, 1)) + n.h,
    c=conv(1),
    h=positive(C, 4, 5),
)
trap(
    "zero that widens",
    lambda n, x: F.adaptive_avg_pool2d(n.c(x), 1) + n.h,
    c=conv(1),
    h=lambda: torch.zeros(C, 4, 5),
)
trap(
    "one that widens",
    lambda n, x: n.c(F.adaptive_avg_pool2d(x, 1)) * n.g,
    c=conv(1),
    g=lambda: torch.ones(1, 1, 4, 5),
)
trap("unbatched image", lambda n, x: n.c(x) * n.g, (C, 6, 7), c=conv(**same), g=positive(C, 1, 1))
trap("unbatched linear", lambda n, x: n.c(x) * n.g, (C,), c=linear(), g=positive(C))
trap(
    "rsub with alpha", lambda n, x: torch.rsub(n.c(x), n.h, alpha=2), c=conv(), h=positive(C, 1, 1)
)
trap("rsub of a number", lambda n, x: 1.25 - n.c(x), c=conv())
trap("add with alpha", lambda n, x: torch.add(n.c(x), n.d(x), alpha=3), c=conv(), d=conv())
trap(
    "add of a constant with alpha",
    lambda n, x: torch.add(n.h, n.c(x), alpha=-2),
    c=conv(),
    h=positive(C, 1, 1),
)
trap("sub with alpha", lambda n, x: torch.sub(n.c(x), n.h, alpha=2), c=conv(), h=positive(C, 1, 1))
trap(
    "sub of branches with alpha",
    lambda n, x: torch.sub(n.c(x), n.d(x), alpha=0.5),
    c=conv(),
    d=conv(),
)
trap(
    "addcmul with value",
    lambda n, x: torch.addcmul(n.h, n.c(x), n.g, value=0.5),
    c=conv(),
    g=positive(C, 1, 1),
    h=positive(C, 1, 1),
)
trap(
    "addcmul onto data",
    lambda n, x: torch.addcmul(n.c(x), n.g, n.h, value=-0.5),
    c=conv(),
    g=positive(C, 1, 1),
    h=positive(C, 1, 1),
)
trap(
    "addcmul of data twice",
    lambda n, x: torch.addcmul(n.h, n.c(x), n.c(x), value=2),
    c=conv(),
    h=positive(C, 1, 1),
)
trap(
    "addcdiv",
    lambda n, x: torch.addcdiv(n.h, n.c(x), n.g, value=2),
    c=conv(),
    g=positive(C, 1, 1),
    h=positive(C, 1, 1),
)
trap(
    "floor division",
    lambda n, x: torch.div(n.c(x), n.g, rounding_mode="floor"),
    c=conv(),
    g=positive(C, 1, 1),
)
trap(
    "truncating division",
    lambda n, x: torch.div(n.c(x), 0.25, rounding_mode="trunc"),
    c=conv(),
)
trap("constant over data", lambda n, x: n.g / (n.c(x) ** 2 + 1), c=conv(), g=positive(C, 1, 1))
trap("remainder", lambda n, x: torch.remainder(n.c(x) * n.g, 0.5), c=conv(), g=positive(C, 1, 1))
trap("lerp", lambda n, x: torch.lerp(n.c(x), n.d(x), 0.25), c=conv(), d=conv())
trap("squared", lambda n, x: n.c(x) * n.c(x) + n.h, c=conv(), h=positive(C, 1, 1))
trap(
    "data gate",
    lambda n, x: n.c(x) * torch.sigmoid(n.d(x.mean((2, 3), keepdim=True))),
    c=conv(),
    d=conv(1),
)
trap(
    "data added per channel",
    lambda n, x: n.b(n.c(x) + n.d(x.mean((2, 3), keepdim=True))),
    c=conv(),
    d=conv(1),
    b=bn(),
)
trap(
    "linear data gate", lambda n, x: n.c(x) + n.d(x.mean((2, 3), keepdim=True)), c=conv(), d=conv(1)
)
trap("data in place of a scale", lambda n, x, g: n.c(x) * g, IMAGE, (C, 1, 1), c=conv(**same))
trap(
    "addmm with beta and alpha",
    lambda n, x: torch.addmm(n.h, x, n.w, beta=0.5, alpha=2) * n.g,
    (4, C),
    w=mixed(C, C),
    h=positive(C),
    g=positive(C),
)
trap(
    "addmm with beta onto data",
    lambda n, x: torch.addmm(n.c(x), x, n.w, beta=0.5, alpha=2),
    (4, C),
    c=linear(),
    w=mixed(C, C),
)
trap(
    "constant on the left of a product",
    lambda n, x: n.w @ n.c(x),
    (2, C, C),
    c=linear(),
    w=mixed(C, C),
)
trap(
    "product then norm",
    lambda n, x: n.b((x @ n.w).transpose(1, 2)),
    TOKENS,
    w=mixed(C, C),
    b=bn1d(),
)
trap("zero times", lambda n, x: n.c(x) * 0.0 + x[:, :, 1:-1, 1:-1], c=conv())

# --- non-linearities ------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.75),
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "threshold": lambda x: F.threshold(x, 0.1, 0.0),
}
trap("conv, relu, bn", lambda n, x: n.b(F.relu(n.c(x))), c=conv(), b=bn(), reason=CROSSING)
trap(
    "shift through relu",
    lambda n, x: F.relu(n.c(x)) + n.h,
    c=conv(),
    h=positive(C, 1, 1),
    reason=CROSSING + "|shift",
)
trap(
    "mixed scale through relu",
    lambda n, x: F.relu(n.c(x)) * n.g,
    c=conv(),
    g=mixed(C, 1, 1),
    reason=SIGN,
)
trap(
    "mixed scale through leaky relu",
    lambda n, x: F.leaky_relu(n.c(x), 0.2) / n.g,
    c=conv(),
    g=lambda: -torch.rand(C, 1, 1) - 0.5,
    reason=SIGN,
)
trap(
    "mixed scale through prelu",
    lambda n, x: F.prelu(n.c(x), n.a) * n.g,
    c=conv(),
    a=mixed(C),
    g=mixed(C, 1, 1),
)
trap(
    "mixed scale through max",
    lambda n, x: F.max_pool2d(n.c(x), 2) * n.g,
    c=conv(),
    g=mixed(C, 1, 1),
    reason=SIGN,
)
trap("bn through padded max", lambda n, x: n.b(F.max_pool2d(n.c(x), 3, 2, 1)), c=conv(), b=bn())
trap(
    "positive scale through padded max",
    lambda n, x: F.max_pool2d(n.c(x), 3, 2, 1, ceil_mode=True) * n.g,
    c=conv(),
    g=positive(C, 1, 1),
)
trap(
    "scale through a sum of squares",
    lambda n, x: F.lp_pool2d(F.relu(n.c(x)), 2.0, 2) * n.g,
    c=conv(),
    g=positive(C, 1, 1),
)
trap(
    "scale through softmax", lambda n, x: F.softmax(n.c(x), 1) * n.g, c=conv(), g=positive(C, 1, 1)
)
trap(
    "scale through maximum",
    lambda n, x: torch.maximum(n.c(x), n.d(x)) * n.g,
    c=conv(),
    d=conv(),
    g=mixed(C, 1, 1),
)
trap(
    "value to a non-linearity and a branch",
    lambda n, x: _tap(n, x),
    c=conv(**same),
    d=conv(1),
    b=bn(),
)
for _name, _function in ACTIVATIONS.items():
    trap(
        f"scale through {_name}",
        lambda n, x, f=_function: f(n.c(x)) * n.g,
        c=conv(),
        g=positive(C, 1, 1),
        reason=CROSSING,
    )


def _tap(net: Any, x: Tensor) -> Tensor:
    y = net.c(x)
    return F.gelu(y) + net.b(net.d(y)) + y


# --- users, outputs, state ------------------------------------------------------------------------

trap(
    "producer of a norm and a tap",
    lambda n, x: (lambda y: n.b(y) * torch.tanh(y))(n.c(x)),
    c=conv(),
    b=bn(),
    reason=USERS,
)
trap(
    "producer is an output",
    lambda n, x: (lambda y: (n.b(y), y))(n.c(x)),
    c=conv(),
    b=bn(),
    reason=USERS + "|output",
)
trap("branch is an output", lambda n, x: (lambda y: (y + n.d(x), y))(n.c(x)), c=conv(), d=conv())
trap("input is an output", lambda n, x: (x, n.b(n.c(x))), c=conv(), b=bn())
trap(
    "one value as two outputs", lambda n, x: (lambda y: (y, y * 1.0))(n.b(n.c(x))), c=conv(), b=bn()
)
trap(
    "one conv, two norms",
    lambda n, x: (lambda y: n.b(y) * torch.tanh(n.d(y)))(n.c(x)),
    c=conv(),
    b=bn(),
    d=bn(),
)
trap(
    "one weight in two convs",
    lambda n, x: n.b(F.conv2d(F.relu(F.conv2d(x, n.w)), n.w)),
    w=mixed(C, C, 3, 3),
    b=bn(),
)
trap("one bias also added", lambda n, x: n.b(n.c(x)) * n.c.bias.sum(), c=conv(), b=bn())
trap(
    "weight read as data",
    lambda n, x: F.relu(n.b(n.c(x))).mean() + n.c.weight.sum(),
    c=conv(),
    b=bn(),
)
trap("norm called twice", lambda n, x: n.b(F.relu(n.b(n.c(x)))), c=conv(), b=bn())
trap(
    "conv called twice",
    lambda n, x: n.d(F.relu(n.c(F.relu(n.b(n.c(x)))))),
    c=conv(),
    b=bn(),
    d=conv(1, 64),
)
trap("written through a view", lambda n, x: n.b(_scaled_slice(n.c(x))), c=conv(), b=bn())
trap("written while read", lambda n, x: _written_late(n, x), c=conv(), b=bn())
trap(
    "in-place relu of a tap",
    lambda n, x: (lambda y: F.relu_(y * 1.0) + y)(n.b(n.c(x))),
    c=conv(),
    b=bn(),
)
trap("pixels overwritten before a conv", lambda n, x: n.c(_hole(n.b(F.relu(x)))), c=conv(), b=bn())


def _scaled_slice(y: Tensor) -> Tensor:
    y[:, :2].mul_(2.0)
    y[:, 1::3].add_(0.5)
    return y


def _written_late(net: Any, x: Tensor) -> Tensor:
    y = net.c(x)
    before = y.clone()
    alias = y.view(-1)
    alias.mul_(3.0)
    return net.b(y) + before


def _hole(y: Tensor) -> Tensor:
    y = y.clone()
    y[:, :, 3:5, 2] = 0.25
    return y


# --- norms ----------------------------------------------------------------------------------------

trap(
    "norm without running statistics",
    lambda n, x: n.b(n.c(x)),
    c=conv(),
    b=bn(track_running_stats=False),
    reason=STATISTICS,
)
trap(
    "norm of the batch",
    lambda n, x: F.batch_norm(n.c(x), None, None, n.g, n.h, True),
    c=conv(),
    g=positive(C),
    h=positive(C),
    reason=STATISTICS,
)
trap("norm without affine", lambda n, x: n.b(n.c(x)), c=conv(bias=False), b=bn(affine=False))
trap(
    "norm of axis 1 after linear",
    lambda n, x: n.b(n.c(x)),
    (2, C, C),
    c=linear(),
    b=bn1d(),
    reason=AXIS,
)
trap(
    "image norm of axis 1 after linear",
    lambda n, x: n.b(n.c(x)),
    (2, C, 5, C),
    c=linear(),
    b=bn(),
    reason=AXIS,
)
trap(
    "norm of axis 1 before linear",
    lambda n, x: torch.tanh(n.c(n.b(F.relu(x)))),
    (2, C, C),
    c=linear(),
    b=bn1d(),
)
trap(
    "norm of flattened pixels",
    lambda n, x: n.b(n.c(x).flatten(1)),
    (2, C, 4, 3),
    c=conv(**same),
    b=bn1d(C * 12),
    reason=AXIS + "|constant|per",
)
trap(
    "norm over batch and channels",
    lambda n, x: n.b(n.c(x).reshape(-1, 2 * C, 4, 4)),
    (2, C, 4, 4),
    c=conv(**same),
    b=bn(2 * C),
)
trap(
    "norm of half the channels",
    lambda n, x: n.b(n.c(x).reshape(-1, C // 2, 4, 4)),
    (2, C, 4, 4),
    c=conv(**same),
    b=bn(C // 2),
)
trap(
    "norm of rows as channels",
    lambda n, x: n.b(n.c(x).transpose(1, 2)),
    (2, C, C, 5),
    c=conv(**same),
    b=bn(),
    reason=AXIS,
)
trap(
    "instance norm", lambda n, x: n.b(n.c(x)), c=conv(), b=lambda: nn.InstanceNorm2d(C, affine=True)
)
trap(
    "scale through instance norm",
    lambda n, x: n.b(n.c(x) * n.g),
    c=conv(),
    g=mixed(C, 1, 1),
    b=lambda: nn.InstanceNorm2d(C),
)
trap(
    "scale before layer norm",
    lambda n, x: n.l(F.relu(x) * n.g),
    TOKENS,
    g=mixed(C),
    l=lambda: nn.LayerNorm(C),
)
trap(
    "scale of tokens after layer norm",
    lambda n, x: n.l(x) * n.g,
    (2, C, C),
    g=mixed(C, 1),
    l=lambda: nn.LayerNorm(C),
)
trap(
    "layer norm over an image",
    lambda n, x: n.l(n.c(x)) * n.g + n.h,
    (2, C, 6, 5),
    c=conv(**same),
    l=lambda: nn.LayerNorm([C, 6, 5]),
    g=mixed(C, 1, 1),
    h=mixed(5),
)
trap(
    "layer norm of one axis, scale of two",
    lambda n, x: n.l(x) * n.g,
    TOKENS,
    g=mixed(7, C),
    l=lambda: nn.LayerNorm(C),
)
trap(
    "shift after rms norm",
    lambda n, x: n.l(x) * n.g + n.h,
    TOKENS,
    g=mixed(C),
    h=mixed(C),
    l=lambda: nn.RMSNorm(C),
)
trap(
    "group norm",
    lambda n, x: n.l(n.c(x) * n.g) * n.h,
    c=conv(),
    g=positive(C, 1, 1),
    h=mixed(C, 1, 1),
    l=lambda: nn.GroupNorm(2, C),
)
trap(
    "layer norm into linear",
    lambda n, x: torch.tanh(n.c(n.l(x))),
    TOKENS,
    c=linear(),
    l=lambda: nn.LayerNorm(C),
)

# --- layouts --------------------------------------------------------------------------------------

trap(
    "concatenation of rows",
    lambda n, x: n.b(torch.cat([n.c(x), n.d(x)], 2)),
    c=conv(),
    d=conv(),
    b=bn(),
)
trap(
    "concatenation of batches",
    lambda n, x: n.b(torch.cat([n.c(x), n.d(x)], 0)),
    c=conv(),
    d=conv(),
    b=bn(),
)
trap(
    "concatenation with a non-linearity",
    lambda n, x: n.b(torch.cat([n.c(x), F.relu(x[:, :, 1:-1, 1:-1])], 1)),
    c=conv(),
    b=bn(2 * C),
)
trap(
    "concatenation with itself", lambda n, x: n.b(torch.cat([n.c(x)] * 2, 1)), c=conv(), b=bn(2 * C)
)
trap("channels swapped", lambda n, x: n.b(torch.cat(n.c(x).chunk(2, 1)[::-1], 1)), c=conv(), b=bn())
trap("channels rolled", lambda n, x: n.b(torch.roll(n.c(x), 3, 1)), c=conv(), b=bn())
trap("rows rolled", lambda n, x: n.b(torch.roll(n.c(x), 3, 2)) + n.c(x), c=conv(), b=bn())
trap(
    "channels last",
    lambda n, x: n.c(x).permute(0, 2, 3, 1) * n.g,
    (2, C, 6, C),
    c=conv(**same),
    g=mixed(C),
)
trap(
    "channels last, width scaled",
    lambda n, x: n.c(x).permute(0, 2, 3, 1) * n.g,
    (2, C, 6, C),
    c=conv(**same),
    g=mixed(C, 1),
    reason=AXIS,
)
trap("nearest then norm", lambda n, x: n.b(F.interpolate(n.c(x), scale_factor=2)), c=conv(), b=bn())
trap(
    "bilinear then norm",
    lambda n, x: n.b(F.interpolate(n.c(x), scale_factor=2, mode="bilinear", align_corners=True)),
    c=conv(),
    b=bn(),
)
trap(
    "bilinear then 3x3",
    lambda n, x: n.d(F.interpolate(n.c(x), scale_factor=2, mode="bilinear")),
    c=conv(1),
    d=conv(**same),
)
trap("unfold then norm", lambda n, x: n.b(F.unfold(n.c(x), 2, stride=2)), c=conv(), b=bn1d(4 * C))
trap("mean then linear", lambda n, x: n.d(n.c(x).mean((2, 3))), c=conv(), d=linear())
trap(
    "mean over channels",
    lambda n, x: n.c(x).mean(1, keepdim=True) * n.g,
    c=conv(),
    g=mixed(C, 1, 1),
)
trap(
    "flatten then linear",
    lambda n, x: n.d(n.c(x).flatten(1)),
    (2, C, 5, 4),
    c=conv(1),
    d=linear(C * 20, 6),
)
trap(
    "view needs a stride",
    lambda n, x: n.b(n.c(x)).permute(0, 2, 3, 1).reshape(2, -1, 2 * C),
    (2, C, 6, 5),
    c=conv(**same),
    b=bn(),
)

# --- weights that depend on data ------------------------------------------------------------------

trap(
    "dynamic convolution",
    lambda n, x: n.b(_dynamic(n, x)),
    (1, C, 6, 6),
    w=mixed(3, C, C, 3, 3),
    r=linear(C, 3),
    b=bn(),
)
trap(
    "routed experts",
    lambda n, x: (F.softmax(n.r(x), -1).unsqueeze(-1) * torch.stack([n.c(x), n.d(x)], -2)).sum(-2),
    TOKENS,
    r=linear(C, 2),
    c=linear(),
    d=linear(),
)
trap(
    "top expert",
    lambda n, x: torch.where(n.r(x).argmax(-1, keepdim=True) > 0, n.c(x), n.d(x)),
    TOKENS,
    r=linear(C, 2),
    c=linear(),
    d=linear(),
)
trap(
    "attention of one input",
    lambda n, x: F.scaled_dot_product_attention(n.c(x), n.d(x), x),
    TOKENS,
    c=linear(),
    d=linear(),
)


trap(
    "one weight under many affines",
    lambda n, x: _unrolled(n, x),
    (2, 3, 64),
    c=linear(64, 64),
    g=mixed(6, 64),
    h=positive(6, 64),
    reason=r"grow|share|larger|users|weight",
)
trap(
    "low-rank branch on an integer base",
    lambda n, x: F.linear(x, n.w.to(x.dtype) * n.s) + n.d(n.c(x)),
    TOKENS,
    w=lambda: torch.randint(-127, 127, (C, C), dtype=torch.int8),
    s=positive(C, 1),
    c=linear(C, 2, bias=False),
    d=linear(2, C, bias=False),
)
trap(
    "zero keys in a normalised score",
    lambda n, x: F.gelu(F.normalize(x @ n.k.T, dim=-1) * len(n.k) ** 0.5) @ n.v,
    TOKENS,
    k=lambda: torch.cat([torch.randn(4, C), torch.zeros(3, C)]),
    v=mixed(7, C),
)


def _unrolled(net: Any, x: Tensor) -> Tensor:
    for gain, shift in zip(net.g, net.h, strict=True):
        x = torch.tanh(net.c(x) * gain + shift)
    return x


def _dynamic(net: Any, x: Tensor) -> Tensor:
    routes = torch.softmax(net.r(x.mean((2, 3))), -1)[0]
    return F.conv2d(x, (routes.view(-1, 1, 1, 1, 1) * net.w).sum(0), padding=1)


@pytest.mark.parametrize("name", TRAPS)
def test_stays_equal(name: str) -> None:
    case = TRAPS[name]
    torch.manual_seed(0)
    inputs = tuple(torch.randn(size) for size in case.shapes)
    model = randomise(case.build(), inputs)
    folded = fold_double(model, inputs)
    if case.reason is not None:
        assert_declined(folded, case.reason)


def test_zero_variance() -> None:
    inputs = (torch.randn(IMAGE),)
    model = randomise(nn.Sequential(nn.Conv2d(C, C, 3), nn.BatchNorm2d(C)), inputs)
    model[1].running_var[::2] = 0.0
    fold_double(model, inputs)


def test_zero_and_negative_norm_scales() -> None:
    inputs = (torch.randn(IMAGE),)
    model = randomise(nn.Sequential(nn.Conv2d(C, C, 3), nn.BatchNorm2d(C), nn.ReLU()), inputs)
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(-1, 1, C).round())
    fold_double(model, inputs)


class Promotes(nn.Module):
    """A half-precision convolution scaled by a single-precision vector: the result is single."""

    def __init__(self, half: torch.dtype) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3).to(half)
        self.register_buffer("scale", 1 + torch.rand(C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.scale


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_type_promotion_is_kept(half: torch.dtype) -> None:
    model, inputs = Promotes(half).eval(), (torch.randn(IMAGE).to(half),)
    expected = call(model, inputs)
    actual = call(refold.fold(model, inputs), inputs)
    assert actual.dtype == expected.dtype == torch.float32
    oracle = call(deepcopy(model).double(), double(inputs))
    assert relative_error(actual, oracle) <= 2 * relative_error(expected, oracle) + 1e-6


class Integers(nn.Module):
    """Arithmetic that is neutral in value but not in dtype or shape."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x * 1.0, x + 0, x / 1, x.to(torch.float32) * 1, x + torch.zeros(2, 1, 1)


def test_neutral_arithmetic_keeps_dtype_and_shape() -> None:
    inputs = (torch.arange(12).reshape(3, 4),)
    model = Integers().eval()
    expected, actual = call(model, inputs), call(refold.fold(model, inputs), inputs)
    assert [t.dtype for t in actual] == [t.dtype for t in expected]
    assert relative_error(actual, expected) == 0


class RandomWeight(nn.Module):
    """A weight drawn anew at every call, as random-projection adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        basis = torch.rand(4, C, C, dtype=x.dtype)
        return F.linear(x, (self.coefficients.view(-1, 1, 1) * basis).sum(0))


def test_random_weights_are_not_frozen() -> None:
    inputs = (torch.randn(3, C),)
    folded = refold.fold(RandomWeight().eval(), inputs, verify=False)
    assert not torch.equal(call(folded, inputs), call(folded, inputs))
    assert census(folded.graph_module.graph)["rand"] == 1
    assert_declined(folded, "random")


class Counter(nn.Module):
    """A buffer that every call writes and that scales the output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3)
        self.register_buffer("scale", torch.ones(C, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.add_(0.5)
        return self.conv(x) * self.scale


def test_written_buffer_is_not_a_constant() -> None:
    inputs = (torch.randn(IMAGE),)
    model = Counter().eval()
    reference = deepcopy(model)
    folded = refold.fold(model, inputs)
    assert torch.equal(model.scale, torch.ones(C, 1, 1)), "compiling wrote the caller's buffer"
    for _ in range(3):
        assert relative_error(call(folded, inputs), call(reference, inputs)) <= 1e-6


class Quantised(nn.Module):
    """A trained fake quantiser on the weight: float64 would move values that sit on a step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.randint(-9, 9, (C, C)) + 0.5) * 0.1)
        self.step = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.round(self.weight / self.step) * self.step)


def test_quantised_weights_keep_their_steps() -> None:
    inputs = (torch.randn(5, C),)
    model = Quantised().eval()
    steps = model.weight / model.step
    wide = model.weight.double() / model.step.double()
    assert not torch.equal(steps.round().double(), wide.round()), "the weights sit on no step"
    folded = refold.fold(model, inputs)
    assert relative_error(call(folded, inputs), call(model, inputs)) <= 1e-6
