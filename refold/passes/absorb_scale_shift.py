"""Absorb per-channel scales and shifts into the layers around them.

    g * conv(x, W, b) + h = conv(x, g * W, g * b + h)

in every spelling (``g*x``, ``x*g``, ``x/g``, ``x+h``, ``x-h``, ``h-x``, ``-x``, ``addcmul``,
numbers): into a convolution, transposed convolution, linear, embedding or the affine part of a
norm; through layouts (the axis is tracked by execution: the broadcast axis decides, never the
length of the vector), concatenation, sums, averages and resizing; through ReLU, LeakyReLU, PReLU
and max pooling only where the scale is positive; or into every consumer. LayerScale and SSF are
this rule.

Exact when: the result has the data operand's shape and dtype, each step has one user, and no shift
crosses a zero padding.

before:
    %a = linear(%x, @weight, @bias)
    %m = mul(%a, @gamma)
    %y = add(%m, @beta)
after:
    %y = linear(%x, @folded_weight, @folded_bias)

Sources: Lian et al., Scaling & Shifting Your Features (NeurIPS 2022), equation 6; Touvron et al.,
Going deeper with Image Transformers (ICCV 2021), LayerScale.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from refold.rewrite.push_affine import Pusher
from refold.rewrite.result import PassResult


@dataclass(frozen=True)
class AbsorbScaleShift:
    """Absorbs scales and shifts; see the module docstring.

    Attributes:
        max_growth: how far un-sharing weights may grow the stored constants (a ratio).
    """

    name: str = "absorb-scale-shift"
    exactness: str = "reassociates"
    max_growth: float = 1.25

    def run(self, gm: fx.GraphModule) -> PassResult:
        return Pusher(gm, self.name, lambda record: not record.is_norm, self.max_growth).run()
