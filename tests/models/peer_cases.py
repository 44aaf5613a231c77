"""What other compilers publish that they rewrite, stated anew: one small network a rewrite.

Written from their documentation and from the lists of their passes. ``left`` is how many calls the
peer leaves, layouts and sizes not counted. Every network stands in a frame of sines, which no rule
sees through and which are not counted, so that no input and no output is part of a rewrite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.patterns import Expression as E
from tests.models.systems.peft_adapters import TOKENS as PEFT_TOKENS
from tests.models.systems.peft_adapters import adapted

IMAGE = (2, 4, 8, 8)
SEQUENCE = (2, 4, 9)
VOLUME = (2, 4, 5, 6, 7)
TOKENS = (2, 5, 6)
VECTOR = (3, 6)

ONNXSCRIPT = "onnxscript"
OPTIMIZER = "onnx optimizer"
OPENVINO = "OpenVINO"
TVM = "TVM"
COREML = "coremltools"
FREEZING = "PyTorch freezing"
PEFT = "peft"


@dataclass(frozen=True)
class PeerCase:
    """One published rewrite.

    Attributes:
        peer: whose it is.
        name: what is rewritten.
        left: calls that the peer leaves; of peft ``None``, where its merged model is counted.
        make: builds the network without its frame; statistics are to be randomised.
        inputs: shapes of the inputs.
        reason: why the peer's rewrite is no equality, where it is none: then it is no demand.
        static: the first axis is no batch.
    """

    peer: str
    name: str
    left: int | None
    make: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...] = (IMAGE,)
    reason: str = ""
    static: bool = False

    @property
    def title(self) -> str:
        return f"{self.peer}: {self.name}"


class Framed(nn.Module):
    """``sin(body(sin(x)))``, of every input and every output."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, *inputs: Tensor) -> Any:
        made = self.body(*(torch.sin(x) for x in inputs))
        return tuple(map(torch.sin, made)) if isinstance(made, (tuple, list)) else torch.sin(made)


CASES: list[PeerCase] = []


def case(
    peers: str | tuple[str, ...],
    name: str,
    left: int | None,
    make: Callable[[], nn.Module],
    *inputs: tuple[int, ...],
    reason: str = "",
    static: bool = False,
) -> None:
    """Adds one rewrite, of every peer that has it."""
    for peer in (peers,) if isinstance(peers, str) else peers:
        CASES.append(PeerCase(peer, name, left, make, inputs or (IMAGE,), reason, static))


def P(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def ints(*values: int) -> Tensor:
    return torch.tensor(values)


# --- norms, scales and shifts into layers ---------------------------------------------------------

ALL_CONV = (ONNXSCRIPT, OPTIMIZER, OPENVINO, TVM, COREML, FREEZING)
case(
    ALL_CONV,
    "conv, batch norm",
    1,
    lambda: E(lambda s, x: s.b(s.c(x)), c=nn.Conv2d(4, 6, 3), b=nn.BatchNorm2d(6)),
)
case(
    ALL_CONV,
    "conv without bias, batch norm",
    1,
    lambda: E(lambda s, x: s.b(s.c(x)), c=nn.Conv2d(4, 6, 3, bias=False), b=nn.BatchNorm2d(6)),
)
case(
    (OPENVINO, COREML, FREEZING),
    "conv of a sequence, batch norm",
    1,
    lambda: E(lambda s, x: s.b(s.c(x)), c=nn.Conv1d(4, 6, 3), b=nn.BatchNorm1d(6)),
    SEQUENCE,
)
case(
    (OPENVINO, COREML, FREEZING),
    "conv of a volume, batch norm",
    1,
    lambda: E(lambda s, x: s.b(s.c(x)), c=nn.Conv3d(4, 6, 3), b=nn.BatchNorm3d(6)),
    VOLUME,
)
case(
    (OPENVINO, TVM, COREML),
    "depthwise conv, batch norm",
    1,
    lambda: E(lambda s, x: s.b(s.c(x)), c=nn.Conv2d(4, 8, 3, groups=4), b=nn.BatchNorm2d(8)),
)
case(
    (ONNXSCRIPT, OPENVINO, TVM, COREML),
    "transposed conv, batch norm",
    1,
    lambda: E(lambda s, x: s.b(s.c(x)), c=nn.ConvTranspose2d(4, 6, 3), b=nn.BatchNorm2d(6)),
)
case(
    (ONNXSCRIPT, OPENVINO, COREML),
    "transposed grouped conv, batch norm",
    1,
    lambda: E(
        lambda s, x: s.b(s.c(x)), c=nn.ConvTranspose2d(4, 6, 3, groups=2), b=nn.BatchNorm2d(6)
    ),
)
case(
    (ONNXSCRIPT, FREEZING),
    "linear, batch norm",
    1,
    lambda: E(lambda s, x: s.b(s.l(x)), l=nn.Linear(6, 5), b=nn.BatchNorm1d(5)),
    VECTOR,
)
case(
    FREEZING,
    "linear of an image, batch norm of its channels",
    1,
    lambda: E(lambda s, x: s.b(s.l(x)), l=nn.Linear(8, 4), b=nn.BatchNorm2d(4)),
    (2, 4, 4, 8),
    reason="the norm's channels are axis 1 and the layer's features the last: "
    "scaling the rows of the weight is another function",
)
case(
    (ONNXSCRIPT, OPENVINO, TVM, COREML, FREEZING),
    "conv, times channels",
    1,
    lambda: E(lambda s, x: s.c(x) * s.g, c=nn.Conv2d(4, 6, 3), g=P(6, 1, 1)),
)
case(
    (OPTIMIZER, OPENVINO, FREEZING),
    "channels times conv",
    1,
    lambda: E(lambda s, x: s.g * s.c(x), c=nn.Conv2d(4, 6, 3), g=P(1, 6, 1, 1)),
)
case(
    (COREML, FREEZING),
    "conv, divided by channels",
    1,
    lambda: E(lambda s, x: s.c(x) / s.g, c=nn.Conv2d(4, 6, 3), g=P(6, 1, 1)),
)
case(
    (COREML, FREEZING),
    "conv, divided by integers",
    1,
    lambda: E(lambda s, x: s.c(x) / s.t, c=nn.Conv2d(4, 3, 3), t=ints(8, 16, 24).view(3, 1, 1)),
)
case(
    (OPTIMIZER, OPENVINO, TVM, COREML, FREEZING),
    "conv, plus channels",
    1,
    lambda: E(lambda s, x: s.c(x) + s.g, c=nn.Conv2d(4, 6, 3), g=P(6, 1, 1)),
)
case(
    (OPTIMIZER, COREML),
    "channels plus conv without bias",
    1,
    lambda: E(lambda s, x: s.g + s.c(x), c=nn.Conv2d(4, 6, 3, bias=False), g=P(1, 6, 1, 1)),
)
case(
    (COREML, FREEZING),
    "conv, minus channels",
    1,
    lambda: E(lambda s, x: torch.subtract(s.c(x), s.g), c=nn.Conv2d(4, 6, 3), g=P(6, 1, 1)),
)
case(
    COREML,
    "channels minus conv",
    1,
    lambda: E(lambda s, x: s.g - s.c(x), c=nn.Conv2d(4, 6, 3), g=P(6, 1, 1)),
)
case(
    (ONNXSCRIPT, COREML, FREEZING),
    "conv, times and plus a number",
    1,
    lambda: E(lambda s, x: s.c(x) * 0.5 + 2, c=nn.Conv2d(4, 6, 3)),
)
case(
    ONNXSCRIPT,
    "times and plus a number, conv",
    1,
    lambda: E(lambda s, x: s.c(x * 0.5 + 2), c=nn.Conv2d(4, 6, 3)),
)
case(
    (OPENVINO, TVM),
    "times channels, conv",
    1,
    lambda: E(lambda s, x: s.c(x * s.g), c=nn.Conv2d(4, 6, 3, padding=1), g=P(4, 1, 1)),
)
case(
    OPENVINO,
    "times channels, depthwise conv",
    1,
    lambda: E(lambda s, x: s.c(x * s.g), c=nn.Conv2d(4, 4, 3, padding=1, groups=4), g=P(4, 1, 1)),
)
case(
    OPENVINO,
    "times channels, transposed conv",
    1,
    lambda: E(lambda s, x: s.c(x * s.g), c=nn.ConvTranspose2d(4, 6, 3), g=P(4, 1, 1)),
)
case(
    TVM,
    "times positive channels, relu, conv",
    2,
    lambda: E(
        lambda s, x: s.c(F.relu(x * s.g)),
        c=nn.Conv2d(4, 6, 3),
        g=torch.tensor([0.5, 2.0, 1.5, 3.0]).view(4, 1, 1),
    ),
)
case(
    TVM,
    "conv, relu, times positive channels",
    2,
    lambda: E(
        lambda s, x: F.relu(s.c(x)) * s.g,
        c=nn.Conv2d(4, 4, 3),
        g=torch.tensor([0.5, 2.0, 1.5, 3.0]).view(4, 1, 1),
    ),
)
case(
    TVM,
    "conv, max pool, times positive channels",
    2,
    lambda: E(
        lambda s, x: F.max_pool2d(s.c(x), 2) * s.g,
        c=nn.Conv2d(4, 4, 3),
        g=torch.tensor([0.5, 2.0, 1.5, 3.0]).view(4, 1, 1),
    ),
)
case(
    TVM,
    "two convs, added, times channels",
    1,
    lambda: E(
        lambda s, x: (s.c(x) + s.d(x)) * s.g,
        c=nn.Conv2d(4, 6, 3),
        d=nn.Conv2d(4, 6, 3),
        g=P(6, 1, 1),
    ),
)
case(
    TVM,
    "times channels read by two convs",
    2,
    lambda: E(
        lambda s, x: (s.c(y := x * s.g), s.d(y)),
        c=nn.Conv2d(4, 6, 3),
        d=nn.Conv2d(4, 6, 5),
        g=P(4, 1, 1),
    ),
)
case(
    TVM,
    "linear, times features",
    1,
    lambda: E(lambda s, x: s.l(x) * s.g, l=nn.Linear(6, 5), g=P(5)),
    VECTOR,
)
case(
    TVM,
    "times features, linear",
    1,
    lambda: E(lambda s, x: s.l(x * s.g), l=nn.Linear(6, 5), g=P(6)),
    VECTOR,
)
case(
    (COREML, OPENVINO),
    "linear, plus features",
    1,
    lambda: E(lambda s, x: s.l(x) + s.g, l=nn.Linear(6, 5, bias=False), g=P(5)),
    TOKENS,
)
case(
    COREML,
    "linear, minus features",
    1,
    lambda: E(lambda s, x: s.l(x) - s.g, l=nn.Linear(6, 5), g=P(5)),
    TOKENS,
)
case(
    (COREML, ONNXSCRIPT, OPTIMIZER),
    "product with a weight, plus a bias",
    1,
    lambda: E(lambda s, x: x @ s.w + s.g, w=P(6, 5), g=P(5)),
    VECTOR,
)
case(
    OPENVINO,
    "product with a weight, times features",
    1,
    lambda: E(lambda s, x: (x @ s.w) * s.g, w=P(6, 5), g=P(5)),
    TOKENS,
)
case(
    OPENVINO,
    "product with a weight, scalars on both sides",
    1,
    lambda: E(lambda s, x: 0.5 * ((2 * x) @ s.w) * 3, w=P(6, 5)),
    TOKENS,
)
case(
    OPENVINO,
    "product with a weight for each head, times features",
    1,
    lambda: E(lambda s, x: (x @ s.w) * s.g, w=P(4, 8, 3), g=P(3)),
)
case(
    TVM,
    "batched product with a weight, times features",
    1,
    lambda: E(lambda s, x: torch.bmm(x, s.w) * s.g, w=P(4, 8, 3), g=P(3)),
    (4, 5, 8),
    static=True,
)
case(
    (ONNXSCRIPT, OPTIMIZER),
    "addmm with alpha and beta, times features",
    1,
    lambda: E(
        lambda s, x: torch.addmm(s.b, x, s.w, beta=0.5, alpha=2) * s.g, w=P(6, 5), b=P(5), g=P(5)
    ),
    VECTOR,
)
case(
    TVM,
    "baddbmm with alpha and beta, times features",
    1,
    lambda: E(
        lambda s, x: torch.baddbmm(s.b, x, s.w, beta=0.5, alpha=2) * s.g,
        w=P(4, 8, 3),
        b=P(4, 1, 3),
        g=P(3),
    ),
    (4, 5, 8),
    static=True,
)
case(
    (ONNXSCRIPT, OPTIMIZER),
    "product with a transposed weight",
    1,
    lambda: E(lambda s, x: x @ s.w.mT + s.g, w=P(5, 6), g=P(5)),
    VECTOR,
)
case(
    (ONNXSCRIPT, COREML, OPENVINO),
    "product with a transposed operand",
    1,
    lambda: E(lambda s, x: x.transpose(1, 2).mT @ s.w, w=P(6, 5)),
    TOKENS,
)
case(
    ONNXSCRIPT,
    "conv with a bias of zeros",
    1,
    lambda: E(lambda s, x: F.conv2d(x, s.w, s.z), w=P(6, 4, 3, 3), z=torch.zeros(6)),
)
case(
    (OPENVINO, FREEZING),
    "conv of one sample, times channels",
    1,
    lambda: E(lambda s, x: s.c(x) * s.g, c=nn.Conv2d(4, 6, 3), g=P(6, 1, 1)),
    (4, 8, 8),
    static=True,
)
case(
    (OPENVINO, FREEZING),
    "linear of a vector, times features",
    1,
    lambda: E(lambda s, x: s.l(x) * s.g, l=nn.Linear(6, 5), g=P(5)),
    (6,),
    static=True,
)
case(
    COREML,
    "conv of a sequence written as one of an image",
    1,
    lambda: E(
        lambda s, x: s.c(x.unsqueeze(-1)).squeeze(-1) * s.g, c=nn.Conv2d(4, 6, (3, 1)), g=P(6, 1)
    ),
    SEQUENCE,
)
case(
    TVM,
    "layer norm, linear",
    2,
    lambda: E(lambda s, x: s.l(s.n(x)), l=nn.Linear(6, 5), n=nn.LayerNorm(6)),
    TOKENS,
)
case(
    TVM,
    "group norm, pointwise conv",
    2,
    lambda: E(lambda s, x: s.c(s.n(x)), c=nn.Conv2d(4, 6, 1), n=nn.GroupNorm(2, 4)),
)
case(
    OPENVINO,
    "batch norm, GRU",
    1,
    lambda: E(
        lambda s, x: s.r(s.b(x).transpose(1, 2))[0],
        b=nn.BatchNorm1d(4),
        r=nn.GRU(4, 3, batch_first=True),
    ),
    SEQUENCE,
)

# --- chains of affine calls -----------------------------------------------------------------------

case(
    (OPENVINO, TVM),
    "times, times",
    1,
    lambda: E(lambda s, x: x * s.g * s.h, g=P(4, 1, 1), h=P(4, 1, 1)),
)
case(
    (OPENVINO, TVM),
    "plus, plus",
    1,
    lambda: E(lambda s, x: x + s.g + s.h, g=P(4, 1, 1), h=P(4, 1, 1)),
)
case(
    (OPENVINO, TVM),
    "plus, times",
    2,
    lambda: E(lambda s, x: (x + s.g) * s.h, g=P(4, 1, 1), h=P(4, 1, 1)),
)
case(
    (OPENVINO, TVM),
    "plus, times, plus",
    2,
    lambda: E(lambda s, x: (x + s.g) * s.h + s.g, g=P(4, 1, 1), h=P(4, 1, 1)),
)
case(
    OPENVINO,
    "minus a sum with channels",
    2,
    lambda: E(lambda s, x, y: y - (x + s.g) - s.g, g=P(4, 1, 1)),
    IMAGE,
    IMAGE,
)
case(
    OPENVINO,
    "channels minus a sum with channels",
    1,
    lambda: E(lambda s, x: s.g - (x + s.h), g=P(4, 1, 1), h=P(4, 1, 1)),
)
case(TVM, "x + x", 1, lambda: E(lambda s, x: x + x))
case(TVM, "x + x, conv", 1, lambda: E(lambda s, x: s.c(x + x), c=nn.Conv2d(4, 6, 3)))
case(TVM, "conv + the same conv", 1, lambda: E(lambda s, x: s.c(x) + s.c(x), c=nn.Conv2d(4, 6, 3)))
case(OPENVINO, "plus the negative", 1, lambda: E(lambda s, x, y: x + (-y)), IMAGE, IMAGE)
case(
    OPENVINO,
    "times the power of minus one",
    1,
    lambda: E(
        lambda s, x, y: x * (y + 2).pow(-1),
    ),
    IMAGE,
    IMAGE,
    reason="the quotient rounds once and the product with a reciprocal twice; the sum before it "
    "stays, too: no fewer calls of layers",
)
case(
    TVM,
    "square of a binomial",
    2,
    lambda: E(lambda s, x, y: x * x + 2 * x * y + y * y),
    IMAGE,
    IMAGE,
    reason="where x + y cancels, the square is small and the sum of three products has the "
    "rounding errors of large ones",
)
case(
    TVM,
    "one over a root",
    1,
    lambda: E(lambda s, x: 1 / torch.sqrt(x)),
    reason="1 / sqrt(-0.0) is minus infinity, as rsqrt(-0.0) is, but the two round apart, and no "
    "layer is spared",
)
case(COREML, "divided by a number", 1, lambda: E(lambda s, x: x / 4.0))
case(
    COREML,
    "batch norm in primitives, conv",
    1,
    lambda: E(
        lambda s, x: s.c((x - s.m) / torch.sqrt(s.v + 1e-5) * s.g + s.b),
        c=nn.Conv2d(4, 6, 3),
        m=torch.randn(4, 1, 1),
        v=torch.rand(4, 1, 1) + 0.5,
        g=P(4, 1, 1),
        b=P(4, 1, 1),
    ),
)
case(
    COREML,
    "times and plus channels",
    2,
    lambda: E(lambda s, x: x * s.g + s.h, g=P(4, 1, 1), h=P(4, 1, 1)),
)

# --- what computes nothing ------------------------------------------------------------------------

NOTHING = (ONNXSCRIPT, OPTIMIZER, OPENVINO, TVM, COREML)
case(NOTHING, "x + 0", 0, lambda: E(lambda s, x: x + 0))
case(NOTHING, "zeros + x", 0, lambda: E(lambda s, x: s.z + x, z=torch.zeros(4, 1, 1)))
case(NOTHING, "x - 0", 0, lambda: E(lambda s, x: torch.subtract(x, s.z), z=torch.zeros(1)))
case(NOTHING, "x * 1", 0, lambda: E(lambda s, x: torch.multiply(x, s.o), o=torch.ones(4, 1, 1)))
case(NOTHING, "x * 1 of integers", 0, lambda: E(lambda s, x: x * s.o, o=torch.ones(1).long()))
case(NOTHING, "x / 1", 0, lambda: E(lambda s, x: torch.true_divide(x, 1)))
case((OPTIMIZER, COREML), "pow(x, 1)", 0, lambda: E(lambda s, x: x**1))
case(
    (OPTIMIZER, COREML),
    "pow(x, ones)",
    0,
    lambda: E(lambda s, x: torch.pow(x, s.o), o=torch.ones(1)),
)
case(TVM, "x + zeros_like(y)", 0, lambda: E(lambda s, x, y: x + torch.zeros_like(y)), IMAGE, IMAGE)
case(
    TVM,
    "x + zeros_like(layer of x)",
    1,
    lambda: E(
        lambda s, x: s.c(x) + torch.zeros_like(s.d(x)), c=nn.Conv2d(4, 6, 3), d=nn.Conv2d(4, 6, 3)
    ),
)
case(TVM, "x * ones_like(x)", 0, lambda: E(lambda s, x: x * torch.ones_like(x)))
case(TVM, "x + full_like(x)", 1, lambda: E(lambda s, x: x + torch.full_like(x, 2.5)))
case(
    (ONNXSCRIPT, OPTIMIZER, FREEZING),
    "dropout",
    0,
    lambda: E(lambda s, x: s.d(x), d=nn.Dropout(0.5)),
)
case(FREEZING, "detach", 0, lambda: E(lambda s, x: x.detach()))
case((OPTIMIZER, OPENVINO, COREML), "identity", 0, lambda: E(lambda s, x: s.i(x), i=nn.Identity()))
case(
    (ONNXSCRIPT, OPTIMIZER, OPENVINO, TVM, COREML),
    "cast to the same type",
    0,
    lambda: E(lambda s, x: x.to(x.dtype)),
)
case((OPTIMIZER, OPENVINO, COREML), "pad by nothing", 0, lambda: E(lambda s, x: F.pad(x, (0, 0))))
case(
    (OPENVINO, COREML),
    "resize to its own size",
    0,
    lambda: E(lambda s, x: F.interpolate(x, size=(8, 8), mode="bilinear")),
)
case(COREML, "resize by one", 0, lambda: E(lambda s, x: F.interpolate(x, scale_factor=1.0)))
case(
    COREML,
    "nearest-exact resize by one",
    0,
    lambda: E(lambda s, x: F.interpolate(x, scale_factor=1, mode="nearest-exact")),
)
case(
    (ONNXSCRIPT, OPTIMIZER, OPENVINO, TVM, COREML),
    "identity permute",
    0,
    lambda: E(lambda s, x: x.permute(0, 1, 2, 3)),
)
case(
    (OPTIMIZER, OPENVINO, COREML),
    "split into one",
    0,
    lambda: E(lambda s, x: torch.split(x, 4, 1)[0]),
)
case(
    OPENVINO,
    "split and joined again",
    0,
    lambda: E(lambda s, x: torch.cat(torch.split(x, 2, 1), 1)),
)
case(OPENVINO, "chunks joined again", 0, lambda: E(lambda s, x: torch.concat(x.chunk(2, 1), 1)))
case((OPTIMIZER, OPENVINO), "cat of one", 0, lambda: E(lambda s, x: torch.concat([x], 1)))
case(
    (OPTIMIZER, OPENVINO),
    "cat with nothing",
    0,
    lambda: E(lambda s, x: torch.cat([x, s.z], 1), z=torch.zeros(2, 0, 8, 8)),
    static=True,
)
case((ONNXSCRIPT, OPENVINO, COREML), "slice of everything", 0, lambda: E(lambda s, x: x[:, 0:4]))
case((COREML,), "tile once", 0, lambda: E(lambda s, x: x.tile(1, 1, 1, 1)))
case(
    (ONNXSCRIPT, OPTIMIZER),
    "expand to its own shape",
    0,
    lambda: E(lambda s, x: x.broadcast_to(x.shape)),
)
case(
    (OPENVINO, COREML),
    "where with a constant condition",
    1,
    lambda: E(lambda s, x: torch.where(s.m, x * 2, x.exp()), m=torch.ones(4, 1, 1).bool()),
)
case(
    COREML,
    "where with a constant false condition",
    1,
    lambda: E(lambda s, x: torch.where(s.m, x * 2, x.exp()), m=torch.zeros(1).bool()),
)
case(
    (OPTIMIZER, OPENVINO),
    "and with true",
    1,
    lambda: E(lambda s, x: (x > 0) & s.m, m=torch.ones(1).bool()),
)
case(
    (OPTIMIZER, OPENVINO),
    "or with false",
    1,
    lambda: E(lambda s, x: torch.logical_or(x > 0, s.m), m=torch.zeros(1).bool()),
)
case(
    OPTIMIZER,
    "where of a negated condition",
    2,
    lambda: E(lambda s, x, y: torch.where(~(x > 0), x, y)),
    IMAGE,
    IMAGE,
)
case((OPTIMIZER, COREML), "relu of relu", 1, lambda: E(lambda s, x: F.relu(F.relu(x))))
case(OPTIMIZER, "floor of floor", 2, lambda: E(lambda s, x: torch.floor(torch.floor(x * 9))))
case(OPTIMIZER, "ceil of ceil", 2, lambda: E(lambda s, x: torch.ceil(torch.ceil(x * 9))))
case(OPTIMIZER, "round of round", 2, lambda: E(lambda s, x: torch.round(torch.round(x * 9))))
case(ONNXSCRIPT, "relu of clamp", 1, lambda: E(lambda s, x: F.relu(x.clamp(-0.5, 0.5))))
case(ONNXSCRIPT, "clamp of relu", 1, lambda: E(lambda s, x: torch.clip(F.relu(x), -0.5, 0.5)))
case(
    ONNXSCRIPT,
    "clamp of clamp",
    1,
    lambda: E(lambda s, x: torch.clip(torch.clip(x, -0.5, 0.5), -0.2, 0.7)),
)
case(
    (ONNXSCRIPT, OPENVINO),
    "min of max",
    1,
    lambda: E(
        lambda s, x: torch.minimum(torch.maximum(x, s.a), s.b),
        a=torch.tensor(-0.5),
        b=torch.tensor(0.5),
    ),
)
case(
    ONNXSCRIPT,
    "max of max",
    1,
    lambda: E(
        lambda s, x: torch.maximum(torch.maximum(x, s.a), s.b),
        a=torch.tensor(-0.5),
        b=torch.tensor(0.5),
    ),
)
case(
    (OPTIMIZER, OPENVINO, TVM, COREML),
    "equal subexpressions",
    2,
    lambda: E(lambda s, x: torch.exp(x) * torch.exp(x)),
)
case(
    OPTIMIZER,
    "argmax of softmax",
    1,
    lambda: E(lambda s, x: x.softmax(1).argmax(1)),
    reason="the exponential rounds neighbours to one value, of which argmax takes the first: "
    "the index is another",
)
case(
    OPTIMIZER,
    "log of softmax",
    1,
    lambda: E(lambda s, x: x.softmax(1).log()),
    reason="where softmax underflows its log is minus infinity, and log_softmax is finite",
)
case(
    (OPENVINO,),
    "softmax in primitives",
    1,
    lambda: E(lambda s, x: x.exp() / x.exp().sum(1, keepdim=True)),
    reason="where the exponential overflows the quotient is not a number, and softmax is finite",
)
case(
    OPENVINO,
    "softmax of a difference from the maximum",
    1,
    lambda: E(lambda s, x: (e := (x - x.amax(1, True)).exp()) / e.sum(1, keepdim=True)),
)
case((OPENVINO,), "sum of a sum", 1, lambda: E(lambda s, x: x.sum(3).sum(2)))
case((OPENVINO, COREML), "mean of a mean", 1, lambda: E(lambda s, x: x.mean(3).mean(2)))
case(COREML, "sum divided by its number", 1, lambda: E(lambda s, x: x.sum((2, 3)) / 64))
case(
    OPENVINO,
    "max of two stacked",
    1,
    lambda: E(lambda s, x, y: torch.stack([x, y]).amax(0)),
    IMAGE,
    IMAGE,
)

# --- layouts --------------------------------------------------------------------------------------

MOVES = (ONNXSCRIPT, OPTIMIZER, OPENVINO, TVM, COREML)
case(
    MOVES,
    "permute of permute, conv, batch norm",
    1,
    lambda: E(
        lambda s, x: s.b(s.c(x).permute(0, 2, 3, 1).permute(0, 3, 1, 2)),
        c=nn.Conv2d(4, 6, 3),
        b=nn.BatchNorm2d(6),
    ),
)
case(
    MOVES,
    "reshape of reshape, conv, times channels",
    1,
    lambda: E(
        lambda s, x: s.c(x).reshape(2, -1).reshape(2, 6, 6, 6) * s.g,
        c=nn.Conv2d(4, 6, 3),
        g=P(6, 1, 1),
    ),
    static=True,
)
case(
    (OPTIMIZER, OPENVINO),
    "squeeze of unsqueeze, linear, times features",
    1,
    lambda: E(lambda s, x: s.l(x).unsqueeze(1).squeeze(1) * s.g, l=nn.Linear(6, 5), g=P(5)),
    VECTOR,
)
case(
    (COREML, TVM),
    "transposes around a relu",
    1,
    lambda: E(lambda s, x: F.relu(x.transpose(1, 3)).swapaxes(1, 3)),
)
case(
    COREML,
    "transposes around a norm's scale",
    1,
    lambda: E(
        lambda s, x: (s.c(x).permute(0, 2, 3, 1) * s.g).moveaxis(-1, 1),
        c=nn.Conv2d(4, 6, 3),
        g=P(6),
    ),
)
case(
    OPENVINO,
    "channel shuffle between conv and batch norm",
    1,
    lambda: E(
        lambda s, x: s.b(F.channel_shuffle(s.c(x), 2)), c=nn.Conv2d(4, 6, 3), b=nn.BatchNorm2d(6)
    ),
)
case(
    (OPENVINO, COREML),
    "depth to space between conv and batch norm",
    1,
    lambda: E(
        lambda s, x: s.b(F.pixel_shuffle(s.c(x), 2)), c=nn.Conv2d(4, 8, 3), b=nn.BatchNorm2d(2)
    ),
)
case(
    ONNXSCRIPT,
    "product between reshapes, plus a bias",
    1,
    lambda: E(lambda s, x: (x.reshape(-1, 6) @ s.w).reshape(2, 5, 3) + s.b, w=P(6, 3), b=P(3)),
    TOKENS,
    static=True,
)
case(
    TVM,
    "linear with a transposed weight in the graph",
    1,
    lambda: E(lambda s, x: F.linear(x, s.w.t().contiguous().t(), s.b), w=P(5, 6), b=P(5)),
    VECTOR,
)
case(
    OPTIMIZER,
    "einsum that is a product",
    1,
    lambda: E(lambda s, x: torch.einsum("bij,jk->bik", x, s.w) * s.g, w=P(6, 5), g=P(5)),
    TOKENS,
)
case(
    COREML,
    "one-hot times a table",
    1,
    lambda: E(lambda s, x: F.one_hot((x > 0).long(), 2).to(s.w.dtype) @ s.w, w=P(2, 5)),
    VECTOR,
    reason="inf in a row of the table that is not chosen makes the product not a number",
)
case(
    OPENVINO,
    "reversed channels, conv",
    1,
    lambda: E(lambda s, x: s.c(x.flip(1)), c=nn.Conv2d(4, 6, 3)),
)
case(
    OPENVINO,
    "chosen channels, conv",
    1,
    lambda: E(lambda s, x: s.c(x[:, [2, 1, 0, 3]]), c=nn.Conv2d(4, 6, 3)),
)
case(
    OPENVINO,
    "chosen channels behind a conv",
    1,
    lambda: E(lambda s, x: s.c(x)[:, [2, 1, 0]], c=nn.Conv2d(4, 3, 3)),
)
case(
    OPENVINO,
    "strided pointwise conv behind a conv",
    1,
    lambda: E(lambda s, x: s.d(s.c(x)), c=nn.Conv2d(4, 6, 3), d=nn.Conv2d(6, 5, 1, stride=2)),
)
for operation, call in {
    "rot90": lambda y: torch.rot90(y, 1, (2, 3)),
    "fftshift": lambda y: torch.fft.fftshift(y, (2, 3)),
    "roll": lambda y: torch.roll(y, 2, 3),
    "nearest-exact resize": lambda y: F.interpolate(y, scale_factor=2, mode="nearest-exact"),
    "crop written as a pad": lambda y: F.pad(y, (0, -1, 0, -2)),
    "sum of rows": lambda y: y.sum(3),
}.items():
    case(
        COREML if "pad" in operation else OPENVINO,
        f"{operation} between conv and scale",
        1 if operation == "roll" else 2,
        lambda call=call: E(
            lambda s, x: call(s.c(x)) * s.g,
            c=nn.Conv2d(4, 6, 3),
            g=P(6, *([1] * (call(torch.zeros(1, 6, 6, 6)).ndim - 2))),
        ),
    )
_POSITIVE = torch.tensor([0.5, 2.0, 1.5, 3.0])
for operation, call in {
    "amax": lambda y: y.amax((2, 3), keepdim=True),
    "max": lambda y: y.max(3, keepdim=True).values,
    "adaptive max pool": lambda y: F.adaptive_max_pool2d(y, 2),
    "sort": lambda y: y.sort(3).values,
    "topk": lambda y: y.topk(2, 3).values,
    "cummax": lambda y: y.cummax(3).values,
    "clamp": lambda y: y.clamp(-0.3, 0.4),
}.items():
    case(
        TVM,
        f"{operation} between conv and a positive scale",
        2,
        lambda call=call: E(
            lambda s, x: call(s.c(x)) * s.g, c=nn.Conv2d(4, 4, 3), g=_POSITIVE.view(4, 1, 1)
        ),
    )

# --- pads, pools and layers -----------------------------------------------------------------------

PADS = (ONNXSCRIPT, OPTIMIZER, OPENVINO, TVM, COREML)
case(
    PADS, "pad, conv", 1, lambda: E(lambda s, x: s.c(F.pad(x, (1, 1, 1, 1))), c=nn.Conv2d(4, 6, 3))
)
case(
    (ONNXSCRIPT, OPENVINO),
    "uneven pad, conv",
    2,
    lambda: E(lambda s, x: s.c(F.pad(x, (0, 1, 0, 1))), c=nn.Conv2d(4, 6, 3)),
)
case(
    (OPTIMIZER, OPENVINO),
    "pad, average pool",
    1,
    lambda: E(lambda s, x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1)),
)
case(
    OPENVINO,
    "pad, depthwise conv",
    1,
    lambda: E(lambda s, x: s.c(F.pad(x, (1, 1, 2, 2))), c=nn.Conv2d(4, 4, 3, groups=4)),
)
case(
    OPTIMIZER,
    "pad by zeros, max pool",
    1,
    lambda: E(lambda s, x: F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3)),
    reason="the pool's own border is minus infinity, which a border of zeros beats "
    "wherever all inputs are negative",
)
case(
    (OPTIMIZER, TVM),
    "pad by minus infinity, max pool",
    1,
    lambda: E(lambda s, x: F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=float("-inf")), 3)),
)
case(COREML, "pad, pad", 1, lambda: E(lambda s, x: F.pad(F.pad(x, (1, 1, 0, 0)), (0, 0, 2, 2))))
case(
    COREML,
    "pad, permute, conv",
    1,
    lambda: E(
        lambda s, x: s.c(F.pad(x, (0, 0, 1, 1, 1, 1)).permute(0, 3, 1, 2)), c=nn.Conv2d(4, 6, 3)
    ),
    (2, 8, 8, 4),
)
case(
    COREML,
    "pad, transposed back, conv",
    1,
    lambda: E(
        lambda s, x: s.c(F.pad(x.transpose(2, 3), (1, 1)).transpose(2, 3)), c=nn.Conv2d(4, 6, 3)
    ),
)
case(
    OPENVINO,
    "average pool over everything, conv, times a number",
    2,
    lambda: E(lambda s, x: s.c(F.adaptive_avg_pool2d(x, 1)) * 2, c=nn.Conv2d(4, 6, 1)),
)
case(
    (OPENVINO,),
    "two resizes of different axes",
    1,
    lambda: E(lambda s, x: F.interpolate(F.interpolate(x, size=(16, 8)), size=(16, 16))),
)
case(
    (OPENVINO, COREML),
    "pieces doubled, which is a resize",
    1,
    lambda: E(lambda s, x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)),
)


def _to_batch(x: Tensor) -> Tensor:
    """Space to batch by two: every other row and column become samples."""
    n, c, h, w = x.shape
    x = x.view(n, c, h // 2, 2, w // 2, 2).permute(3, 5, 0, 1, 2, 4)
    return x.reshape(4 * n, c, h // 2, w // 2)


def _to_space(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    x = x.view(2, 2, n // 4, c, h, w).permute(2, 3, 4, 0, 5, 1)
    return x.reshape(n // 4, c, 2 * h, 2 * w)


case(
    (OPENVINO, TVM, COREML),
    "space to batch, conv, batch to space",
    1,
    lambda: E(lambda s, x: _to_space(s.c(_to_batch(x))), c=nn.Conv2d(4, 6, 3, padding=1)),
    static=True,
)
case(
    TVM,
    "parallel convs, joined",
    1,
    lambda: E(
        lambda s, x: torch.concatenate([s.c(x), s.d(x)], 1),
        c=nn.Conv2d(4, 6, 3),
        d=nn.Conv2d(4, 5, 3),
    ),
)
case(
    TVM,
    "parallel convs, added",
    1,
    lambda: E(lambda s, x: s.c(x) + s.d(x), c=nn.Conv2d(4, 6, 3), d=nn.Conv2d(4, 6, 3)),
)
case(
    (TVM, FREEZING),
    "three parallel linears",
    1,
    lambda: E(
        lambda s, x: (s.q(x), s.k(x), s.v(x)),
        q=nn.Linear(6, 6),
        k=nn.Linear(6, 6),
        v=nn.Linear(6, 6),
    ),
    TOKENS,
    reason="it is no fewer multiplications and copies the parts: refold merges where that is "
    "asked for, or where the parts are read together",
)
case(
    (TVM, OPTIMIZER),
    "parallel products of one width, joined",
    1,
    lambda: E(lambda s, x: torch.cat([x @ s.q, x @ s.k], -1), q=P(6, 5), k=P(6, 4)),
    TOKENS,
)
case(
    OPENVINO,
    "scales of attention",
    1,
    lambda: E(lambda s, x, y: F.scaled_dot_product_attention(x * 0.5, y, y)),
    IMAGE,
    IMAGE,
)
case(
    OPENVINO,
    "attention in primitives",
    1,
    lambda: E(lambda s, x, y: ((x @ y.mT) * 8**-0.5).softmax(-1) @ y),
    IMAGE,
    IMAGE,
)
case(
    ONNXSCRIPT,
    "product divided by a number",
    1,
    lambda: E(lambda s, x, y: x @ y.mT / 4),
    IMAGE,
    IMAGE,
    reason="it is ONNX Runtime's own product with a factor: PyTorch has none of four axes, "
    "and nothing is spared",
)

# --- written-out forms ----------------------------------------------------------------------------

case(
    (COREML, OPTIMIZER, OPENVINO),
    "GELU in primitives",
    1,
    lambda: E(lambda s, x: 0.5 * x * (1 + torch.erf(x / 2**0.5))),
)
case(
    (COREML, OPENVINO),
    "GELU in primitives, halved last",
    1,
    lambda: E(lambda s, x: x * (torch.erf(x * 2**-0.5) + 1) * 0.5),
)
case(
    (COREML, OPENVINO),
    "tanh GELU in primitives",
    1,
    lambda: E(
        lambda s, x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    ),
)
case(
    (OPENVINO, ONNXSCRIPT),
    "hard swish in primitives",
    1,
    lambda: E(lambda s, x: x * F.relu6(x + 3) / 6),
)
case(
    (OPENVINO, ONNXSCRIPT),
    "hard swish by clamp",
    1,
    lambda: E(lambda s, x: x * torch.clamp(x + 3, 0, 6) / 6),
)
case(
    (OPENVINO, ONNXSCRIPT),
    "hard sigmoid in primitives",
    1,
    lambda: E(lambda s, x: F.relu6(x + 3) / 6),
)
case(OPENVINO, "swish in primitives", 1, lambda: E(lambda s, x: x * torch.sigmoid(x)))
case(
    OPENVINO,
    "softplus in primitives",
    1,
    lambda: E(lambda s, x: torch.log(1 + torch.exp(x))),
    reason="where the exponential overflows it is infinity, and softplus is finite",
)
case(OPENVINO, "mish in primitives", 1, lambda: E(lambda s, x: x * torch.tanh(F.softplus(x))))
case(
    (COREML, OPENVINO),
    "leaky relu in primitives",
    1,
    lambda: E(lambda s, x: torch.maximum(x, 0.1 * x)),
)
case(
    (COREML, OPENVINO),
    "PReLU in primitives",
    1,
    lambda: E(lambda s, x: F.relu(x) - s.a * F.relu(-x), a=P(4, 1, 1)),
)
case(
    OPENVINO,
    "gated unit in primitives",
    1,
    lambda: E(lambda s, x: (h := x.chunk(2, 1))[0] * torch.sigmoid(h[1])),
)


def _normed(x: Tensor, *axes: int, epsilon: float = 1e-5) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(axes, keepdim=True) + epsilon)


case(
    (COREML, OPENVINO, ONNXSCRIPT),
    "layer norm in primitives",
    1,
    lambda: E(lambda s, x: _normed(x, -1) * s.g + s.b, g=P(6), b=P(6)),
    TOKENS,
)
case(
    (OPENVINO, ONNXSCRIPT),
    "layer norm in primitives, power and rsqrt",
    1,
    lambda: E(
        lambda s, x: (
            (c := x - x.mean(-1, True)) * torch.rsqrt(c.pow(2).mean(-1, True) + 1e-5) * s.g + s.b
        ),
        g=P(6),
        b=P(6),
    ),
    TOKENS,
)
case(
    COREML,
    "instance norm in primitives",
    1,
    lambda: E(lambda s, x: _normed(x, 2, 3) * s.g + s.b, g=P(4, 1, 1), b=P(4, 1, 1)),
)
case(
    (OPENVINO, ONNXSCRIPT),
    "RMS norm in primitives",
    1,
    lambda: E(lambda s, x: x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-6) * s.g, g=P(6)),
    TOKENS,
)
case(
    OPENVINO,
    "RMS norm in primitives, linear",
    2,
    lambda: E(
        lambda s, x: s.l(s.g * (x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-6))),
        g=P(6),
        l=nn.Linear(6, 5),
    ),
    TOKENS,
)
case(
    OPENVINO,
    "group norm in primitives",
    1,
    lambda: E(
        lambda s, x: _normed(x.reshape(2, 2, 2, 8, 8), 2, 3, 4).reshape(2, 4, 8, 8) * s.g + s.b,
        g=P(4, 1, 1),
        b=P(4, 1, 1),
    ),
    static=True,
)
case(
    OPENVINO,
    "L2 norm in primitives",
    1,
    lambda: E(lambda s, x: x / torch.sqrt(x.pow(2).sum(1, keepdim=True) + 1e-6)),
    reason="normalize of PyTorch bounds the norm from below, where this adds to its square: "
    "it is another function, and no operator of PyTorch is it",
)

# --- adapters: as peft merges them ----------------------------------------------------------------

_LINEARS = {"target_modules": ["q", "k", "v", "out", "up", "down"]}
_SQUARE = {"target_modules": ["q", "k", "v", "out"]}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"r": 2, **_LINEARS}),
    "rsLoRA": ("LoraConfig", {"r": 2, "use_rslora": True, **_LINEARS}),
    "DoRA": ("LoraConfig", {"r": 2, "use_dora": True, **_LINEARS}),
    "LoRA with a bias": ("LoraConfig", {"r": 2, "lora_bias": True, **_LINEARS}),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 2, "target_r": 2, "total_step": 10, **_LINEARS}),
    "AdaMSS": ("AdamssConfig", {"r": 4, "num_subspaces": 2, **_SQUARE}),
    "BEFT": ("BeftConfig", {**_LINEARS}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4, **_LINEARS}),
    "C3A": ("C3AConfig", {"block_size": 8, **_LINEARS}),
    "DEFT": ("DeftConfig", {"r": 2, **_LINEARS}),
    "DeLoRA": ("DeloraConfig", {"r": 2, **_LINEARS}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 8, **_LINEARS}),
    "FRoD": ("FrodConfig", {**_SQUARE}),
    "GLoRA": ("GloraConfig", {"r": 2, **_LINEARS}),
    "GraLoRA": ("GraloraConfig", {"r": 4, "gralora_k": 2, **_LINEARS}),
    "HiRA": ("HiraConfig", {"r": 2, **_LINEARS}),
    "HRA": ("HRAConfig", {"r": 2, **_LINEARS}),
    "IA3": ("IA3Config", {"target_modules": ["k", "v", "down"], "feedforward_modules": ["down"]}),
    "Lily": ("LilyConfig", {"r": 2, **_LINEARS}),
    "LN tuning": ("LNTuningConfig", {"target_modules": ["norm1", "norm2"]}),
    "LoHa": ("LoHaConfig", {"r": 2, **_LINEARS}),
    "LoKr": ("LoKrConfig", {"r": 2, **_LINEARS}),
    "MiSS": ("MissConfig", {"r": 2, **_LINEARS}),
    "MiSS, bat": ("MissConfig", {"r": 2, "init_weights": "bat", **_LINEARS}),
    "OFT": ("OFTConfig", {"oft_block_size": 4, "r": 0, **_LINEARS}),
    "OFT, Cayley": (
        "OFTConfig",
        {"oft_block_size": 4, "r": 0, "use_cayley_neumann": False, **_LINEARS},
    ),
    "OSF": ("OSFConfig", {"effective_rank": 2, **_LINEARS}),
    "PEANuT": ("PeanutConfig", {"r": 2, **_LINEARS}),
    "PSOFT": ("PsoftConfig", {"r": 4, **_LINEARS}),
    "PVeRA": ("PveraConfig", {"r": 4, **_SQUARE}),
    "RandLora": ("RandLoraConfig", {"r": 2, **_LINEARS}),
    "RoAd": ("RoadConfig", {"group_size": 8, **_LINEARS}),
    "RoAd 2": ("RoadConfig", {"variant": "road_2", "group_size": 8, **_LINEARS}),
    "RoAd 4": ("RoadConfig", {"variant": "road_4", "group_size": 8, **_LINEARS}),
    "SHiRA": ("ShiraConfig", {"r": 2, **_LINEARS}),
    "Supertuning": ("SupertuningConfig", {"sparsity": 0.9, **_LINEARS}),
    "TinyLoRA": ("TinyLoraConfig", {"r": 2, "u": 4, **_LINEARS}),
    "UniLoRA": ("UniLoraConfig", {"r": 2, "theta_d_length": 64, **_LINEARS}),
    "VBLoRA": (
        "VBLoRAConfig",
        {"r": 2, "num_vectors": 8, "vector_length": 8, "topk": 2, **_LINEARS},
    ),
    "VeRA": ("VeraConfig", {"r": 4, **_SQUARE}),
    "WaveFT": ("WaveFTConfig", {"n_frequency": 8, **_LINEARS}),
}
REASONS = {
    "AdaMSS": "peft itself needs scikit-learn for it, which is not installed here",
    "FRoD": "its forward reads the places of its sparse weights out of a tensor, as sizes, "
    "which no trace can follow",
    "Lily": "peft itself does not merge it",
    "SHiRA": "its forward makes a sparse tensor, which no target takes",
}
for adapter, (config, options) in ADAPTERS.items():
    case(
        PEFT,
        adapter,
        None,
        lambda c=config, o=options: adapted(c, **o),
        PEFT_TOKENS,
        reason=REASONS.get(adapter, ""),
    )
