"""Networks of one pattern each: ``relu(pattern(relu(x)))``, with the fewest compute nodes possible.

``optimum`` is what an ideal fold leaves between the two outer ReLUs; layout calls are free.
Statistics must be randomised before use (:func:`tests.randomise.randomise`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from refold.graph.ops import is_layout, op_name

CHANNELS = 16
IMAGE = (2, CHANNELS, 14, 14)
TOKENS = (2, 10, CHANNELS)
SEQUENCE = (2, CHANNELS, 20)
VOLUME = (2, CHANNELS, 5, 6, 7)
VECTOR = (4, CHANNELS)


class Expression(nn.Module):
    """A module whose forward is a function of its own parts: ``forward(self, *inputs)``.

    Parts are modules and parameters; plain tensors become buffers, which keep their values when
    parameters are randomised.
    """

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.expression = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.expression(self, *inputs)


class Sum(nn.Module):
    """Parallel branches, added."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in list(self.branches)[1:]:
            total = total + branch(x)
        return total


class BetweenReLUs(nn.Module):
    """Puts a pattern between two non-linearities, which no fold can cross."""

    def __init__(self, pattern: nn.Module) -> None:
        super().__init__()
        self.pattern = pattern

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.pattern(F.relu(x)))


@dataclass(frozen=True)
class Pattern:
    """One net: how to build it, its input's shape, and the compute nodes at the optimum."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    optimum: int

    def model(self) -> nn.Module:
        return BetweenReLUs(self.build())


PATTERNS: dict[str, Pattern] = {}


def compute_nodes(gm: fx.GraphModule) -> int:
    """Compute nodes of a traced pattern: no layout calls, no sizes, no ReLUs."""
    return sum(1 for node in gm.graph.nodes if _computes(node))


def _computes(node: fx.Node) -> bool:
    if node.op != "call_function" or is_layout(node):
        return False
    if not isinstance(node.meta.get("val", torch.empty(0)), Tensor | tuple | list):
        return False  # arithmetic on sizes
    return op_name(node).rstrip("_") != "relu"


def _pattern(
    name: str, *, optimum: int, shape: tuple[int, ...] = IMAGE
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        PATTERNS[name] = Pattern(build, shape, optimum)
        return build

    return register


def _bn(channels: int = CHANNELS) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


def _conv3(inputs: int = CHANNELS, outputs: int = CHANNELS, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **options)


def _conv1(inputs: int = CHANNELS, outputs: int = CHANNELS, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, bias=False, **options)


def _linear(inputs: int = CHANNELS, outputs: int = CHANNELS, **options: Any) -> nn.Linear:
    return nn.Linear(inputs, outputs, **options)


def _parameter(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(*size) + 0.5)


def _per_channel() -> nn.Parameter:
    return _parameter(CHANNELS, 1, 1)


# Batch norm and its neighbours.


@_pattern("conv-bn", optimum=1)
def conv_bn() -> nn.Module:
    return nn.Sequential(_conv3(), _bn())


@_pattern("conv-bn-bn", optimum=1)
def conv_bn_bn() -> nn.Module:
    return nn.Sequential(_conv3(), _bn(), _bn())


@_pattern("bn-conv1x1", optimum=1)
def bn_conv1x1() -> nn.Module:
    return nn.Sequential(_bn(), _conv1())


@_pattern("bn-conv3x3 padded (border map allowed)", optimum=2)
def bn_conv3x3_padded() -> nn.Module:
    return nn.Sequential(_bn(), _conv3())


@_pattern("convtranspose-bn", optimum=1)
def conv_transpose_bn() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, 2, bias=False), _bn())


@_pattern("convtranspose g2-bn", optimum=1)
def grouped_conv_transpose_bn() -> nn.Module:
    conv = nn.ConvTranspose2d(CHANNELS, 2 * CHANNELS, 3, 2, groups=2)
    return nn.Sequential(conv, _bn(2 * CHANNELS))


@_pattern("conv1d-bn", optimum=1, shape=SEQUENCE)
def conv1d_bn() -> nn.Module:
    conv = nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm1d(CHANNELS))


@_pattern("conv3d-bn || conv3d 1x1", optimum=1, shape=VOLUME)
def conv3d_branches() -> nn.Module:
    wide = nn.Sequential(nn.Conv3d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm3d(CHANNELS))
    return Sum(wide, nn.Conv3d(CHANNELS, CHANNELS, 1))


@_pattern("linear-bn1d", optimum=1, shape=VECTOR)
def linear_bn() -> nn.Module:
    return nn.Sequential(_linear(), nn.BatchNorm1d(CHANNELS))


@_pattern("bn1d-linear", optimum=1, shape=VECTOR)
def bn_linear() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(CHANNELS), _linear())


@_pattern("linear-flatten-bn1d", optimum=1, shape=TOKENS)
def linear_flatten_bn() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.norm(net.linear(x).flatten(0, 1)).reshape(x.shape)

    return Expression(forward, linear=_linear(bias=False), norm=nn.BatchNorm1d(CHANNELS))


@_pattern("linear-transpose-bn1d", optimum=1, shape=TOKENS)
def linear_transpose_bn() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.norm(net.linear(x).transpose(1, 2)).transpose(1, 2)

    return Expression(forward, linear=_linear(), norm=nn.BatchNorm1d(CHANNELS))


# One scale or shift after a convolution, in every spelling.


def _after_conv(forward: Callable[[Any, Tensor], Tensor], **parts: Any) -> nn.Module:
    return Expression(forward, conv=_conv3(), **parts)


@_pattern("g*conv", optimum=1)
def scale_times_conv() -> nn.Module:
    return _after_conv(lambda net, x: net.g * net.conv(x), g=_per_channel())


@_pattern("conv*g", optimum=1)
def conv_times_scale() -> nn.Module:
    return _after_conv(lambda net, x: net.conv(x) * net.g, g=_parameter(1, CHANNELS, 1, 1))


@_pattern("conv/g", optimum=1)
def conv_over_scale() -> nn.Module:
    return _after_conv(lambda net, x: net.conv(x) / net.g, g=_per_channel())


@_pattern("h+conv", optimum=1)
def shift_plus_conv() -> nn.Module:
    return _after_conv(lambda net, x: net.h + net.conv(x), h=_per_channel())


@_pattern("conv-h", optimum=1)
def conv_minus_shift() -> nn.Module:
    return _after_conv(lambda net, x: net.conv(x) - net.h, h=_per_channel())


@_pattern("h-conv", optimum=1)
def shift_minus_conv() -> nn.Module:
    return _after_conv(lambda net, x: net.h - net.conv(x), h=_per_channel())


@_pattern("-conv", optimum=1)
def negated_conv() -> nn.Module:
    return _after_conv(lambda net, x: -net.conv(x))


@_pattern("conv*.5+1.5", optimum=1)
def conv_scalars() -> nn.Module:
    return _after_conv(lambda net, x: net.conv(x) * 0.5 + 1.5)


@_pattern("addcmul", optimum=1)
def conv_addcmul() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        return torch.addcmul(net.h, net.conv(x), net.g)

    return _after_conv(forward, g=_per_channel(), h=_per_channel())


@_pattern("g*conv+h", optimum=1)
def conv_scale_shift() -> nn.Module:
    return _after_conv(
        lambda net, x: net.g * net.conv(x) + net.h, g=_per_channel(), h=_per_channel()
    )


@_pattern("scalar*x - conv", optimum=1)
def scalar_before_conv() -> nn.Module:
    return _after_conv(lambda net, x: net.conv(x * 0.5))


@_pattern("affine chain", optimum=1)
def affine_chain() -> nn.Module:
    return _after_conv(lambda net, x: ((net.conv(x) + 1.5) * net.g - 0.3) / 2.0, g=_per_channel())


@_pattern("fp16-safe scale stays fp32 shape", optimum=1)
def one_element_scale() -> nn.Module:
    return _after_conv(lambda net, x: net.conv(x) * net.g, g=_parameter(1))


@_pattern("linear-layerscale", optimum=1, shape=TOKENS)
def linear_layer_scale() -> nn.Module:
    return Expression(
        lambda net, x: net.linear(x) * net.g, linear=_linear(), g=_parameter(CHANNELS)
    )


@_pattern("layernorm-linear", optimum=2, shape=TOKENS)
def layer_norm_linear() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(CHANNELS), _linear())


@_pattern("layernorm-ssf", optimum=1, shape=TOKENS)
def layer_norm_scale_shift() -> nn.Module:
    return Expression(
        lambda net, x: net.norm(x) * net.g + net.h,
        norm=nn.LayerNorm(CHANNELS),
        g=_parameter(CHANNELS),
        h=_parameter(CHANNELS),
    )


# Parallel branches.


@_pattern("conv||conv", optimum=1)
def two_convs() -> nn.Module:
    return Sum(_conv3(), _conv3())


@_pattern("conv3x3+bn || conv1x1+bn", optimum=1)
def two_conv_bn() -> nn.Module:
    return Sum(nn.Sequential(_conv3(), _bn()), nn.Sequential(_conv1(), _bn()))


@_pattern("repvgg", optimum=1)
def repvgg() -> nn.Module:
    return Sum(nn.Sequential(_conv3(), _bn()), nn.Sequential(_conv1(), _bn()), _bn())


@_pattern("repvgg stride 2", optimum=1)
def repvgg_stride_2() -> nn.Module:
    wide = nn.Conv2d(CHANNELS, CHANNELS, 3, 2, 1)
    narrow = nn.Conv2d(CHANNELS, CHANNELS, 1, 2)
    return Sum(nn.Sequential(wide, _bn()), nn.Sequential(narrow, _bn()))


@_pattern("grouped repvgg", optimum=1)
def grouped_repvgg() -> nn.Module:
    wide, narrow = _conv3(groups=4), _conv1(groups=4)
    return Sum(nn.Sequential(wide, _bn()), nn.Sequential(narrow, _bn()), _bn())


@_pattern("conv + identity", optimum=1)
def conv_plus_identity() -> nn.Module:
    return _after_conv(lambda net, x: net.conv(x) + x)


@_pattern("identity - conv", optimum=1)
def identity_minus_conv() -> nn.Module:
    return _after_conv(lambda net, x: x - net.conv(x))


@_pattern("dw: x + ls*(mixer-norm)", optimum=1)
def rep_mixer() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        mixed = net.conv_norm(net.conv(x)) + net.skip_norm(x)
        return x + net.g * (mixed - net.norm(x))

    return Expression(
        forward,
        conv=_conv3(groups=CHANNELS),
        conv_norm=_bn(),
        skip_norm=_bn(),
        norm=_bn(),
        g=_per_channel(),
    )


@_pattern("conv3x3 || avgpool3x3", optimum=1)
def conv_plus_average() -> nn.Module:
    return _after_conv(lambda net, x: net.conv(x) + F.avg_pool2d(x, 3, 1, 1))


@_pattern("conv1x1-avgpool (DBB)", optimum=1)
def conv_plus_pointwise_average() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.conv(x) + F.avg_pool2d(net.pointwise(x), 3, 1, 1)

    return _after_conv(forward, pointwise=_conv1())


@_pattern("asym (ACB)", optimum=1)
def asymmetric() -> nn.Module:
    tall = nn.Conv2d(CHANNELS, CHANNELS, (3, 1), padding=(1, 0), bias=False)
    flat = nn.Conv2d(CHANNELS, CHANNELS, (1, 3), padding=(0, 1), bias=False)
    return Sum(_conv3(), tall, flat)


@_pattern("dilated || 5x5 dw", optimum=1)
def dilated_branch() -> nn.Module:
    depthwise = {"groups": CHANNELS, "bias": False}
    large = nn.Conv2d(CHANNELS, CHANNELS, 5, padding=2, **depthwise)
    dilated = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=2, dilation=2, **depthwise)
    return Sum(large, dilated)


@_pattern("dw1x1 chain of bn", optimum=1)
def chain_of_norms() -> nn.Module:
    return Sum(nn.Sequential(_bn(), _bn(), _bn()), _conv3())


@_pattern("repvgg inside a residual", optimum=3)  # convolution, sigmoid, add
def branches_inside_residual() -> nn.Module:
    return Expression(
        lambda net, x: net.wide(x) + torch.sigmoid(x) + net.narrow(x),
        wide=_conv3(),
        narrow=_conv1(),
    )


@_pattern("root feeds no non-linearity", optimum=4)  # convolution, tanh, convolution, add
def root_is_a_sum() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = x + net.first(x)
        return y + net.second(torch.tanh(y))

    return Expression(forward, first=_conv3(), second=_conv1())


@_pattern("branch is also an output", optimum=4)  # convolution, tanh, convolution, relu
def branch_with_another_user() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        shared = net.shared(x)
        merged = F.relu(shared + net.narrow(x) + net.norm(x))
        return torch.cat([merged, torch.tanh(shared)], 1)

    return Expression(forward, shared=_conv3(), narrow=_conv1(), norm=_bn())


# Sequences of linear maps.


@_pattern("conv1x1-conv3x3 no pad", optimum=1)
def pointwise_then_wide() -> nn.Module:
    return nn.Sequential(_conv1(), nn.Conv2d(CHANNELS, CHANNELS, 3, bias=False))


@_pattern("conv1x1(bias)-conv3x3 no pad", optimum=1)
def biased_pointwise_then_wide() -> nn.Module:
    return nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Conv2d(CHANNELS, CHANNELS, 3))


@_pattern("conv3x3-conv1x1", optimum=1)
def wide_then_pointwise() -> nn.Module:
    return nn.Sequential(_conv3(), _conv1())


@_pattern("explicit pad - conv", optimum=1)
def explicit_pad() -> nn.Module:
    return nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(CHANNELS, CHANNELS, 3, bias=False))


@_pattern("x+x+x", optimum=1)
def repeated_sum() -> nn.Module:
    return Expression(lambda net, x: net.conv(x + x + x), conv=_conv1())


@_pattern("linear-linear", optimum=1, shape=TOKENS)
def two_linears() -> nn.Module:
    return nn.Sequential(_linear(), _linear())


@_pattern("lora", optimum=1, shape=TOKENS)
def lora() -> nn.Module:
    return Expression(
        lambda net, x: net.base(x) + net.up(net.down(x)) * 2.0,
        base=_linear(),
        down=_linear(CHANNELS, 4, bias=False),
        up=_linear(4, CHANNELS, bias=False),
    )


@_pattern("conv lora", optimum=1)
def conv_lora() -> nn.Module:
    return Expression(
        lambda net, x: net.base(x) + net.up(net.down(x)) * 2.0,
        base=_conv3(),
        down=_conv3(CHANNELS, 4),
        up=_conv1(4, CHANNELS),
    )


# Through layout calls, concatenation and sharing.


@_pattern("cat(conv,conv)-bn", optimum=2)
def concat_bn() -> nn.Module:
    return Expression(
        lambda net, x: net.norm(torch.cat([net.wide(x), net.narrow(x)], 1)),
        wide=_conv3(),
        narrow=_conv1(),
        norm=_bn(2 * CHANNELS),
    )


@_pattern("cat(x,conv)-bn-conv1x1", optimum=1)
def concat_input_bn_conv() -> nn.Module:
    return Expression(
        lambda net, x: net.last(net.norm(torch.cat([x, net.conv(x)], 1))),
        conv=_conv3(),
        norm=_bn(2 * CHANNELS),
        last=_conv1(2 * CHANNELS, CHANNELS),
    )


@_pattern("conv shared by two bn", optimum=5)  # one convolution and two scale-shifts, or less
def conv_of_two_norms() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.conv(x)
        return torch.cat([net.first(y), net.second(y)], 1)

    return Expression(forward, conv=_conv3(), first=_bn(), second=_bn())


@_pattern("weight-standardised conv", optimum=1)
def weight_standardised() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        flat = net.w.reshape(1, CHANNELS, -1)
        standard = F.batch_norm(flat, None, None, weight=net.g, training=True)
        return F.conv2d(x, standard.reshape_as(net.w), padding=1)

    return Expression(forward, w=_parameter(CHANNELS, CHANNELS, 3, 3), g=_parameter(CHANNELS))


@_pattern("conv-channel_shuffle-bn", optimum=1)
def channel_shuffle() -> nn.Module:
    return nn.Sequential(_conv3(), nn.ChannelShuffle(4), _bn())


@_pattern("conv-pixelshuffle-bn", optimum=1)
def pixel_shuffle() -> nn.Module:
    return nn.Sequential(_conv3(CHANNELS, 4 * CHANNELS), nn.PixelShuffle(2), _bn())


@_pattern("conv-avgpool-bn", optimum=2)
def average_then_norm() -> nn.Module:
    return nn.Sequential(_conv3(), nn.AvgPool2d(2), _bn())
