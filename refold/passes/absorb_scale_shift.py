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

Before::

    %a = linear(%x, @weight, @bias)
    %m = mul(%a, @gamma)
    %y = add(%m, @beta)

After::

    %y = linear(%x, @folded_weight, @folded_bias)

Sources: Lian et al., Scaling & Shifting Your Features (NeurIPS 2022), equation 6; Touvron et al.,
Going deeper with Image Transformers (ICCV 2021), LayerScale.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from refold.graph import nodes
from refold.graph.nodes import aten, is_call
from refold.rewrite.push_affine import Pusher
from refold.rewrite.result import PassResult, declined


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
        result = Pusher(gm, self.name, lambda record: not record.is_norm, self.max_growth).run()
        for node in gm.graph.nodes:
            if is_call(node, aten.div.Tensor_mode, aten.div.Scalar_mode) and not nodes.pinned(node):
                mode = nodes.arguments(node)["rounding_mode"]
                if mode is not None:
                    reason = f"the division rounds ({mode}), so it is not a scale"
                    result.declined.append(declined(self.name, node, reason))
        return result
