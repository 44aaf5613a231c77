"""Absorb per-channel scales and shifts into the layers around them.

    g * conv(x, W, b) + h = conv(x, g * W, g * b + h)

in every spelling (``g*x``, ``x*g``, ``x/g``, ``x+h``, ``x-h``, ``h-x``, ``-x``, ``addcmul``,
numbers): into a convolution, transposed convolution, linear, embedding or the affine part of a
norm; through layouts (the axis is tracked by execution: the broadcast axis decides, never the
length of the vector), concatenation, sums, averages and resizing; through ReLU, LeakyReLU, PReLU
and max pooling only where the scale is positive; or into every consumer, where the scale of a
factor is that of the product and the shift of a term that of the sum. LayerScale and SSF are this
rule, and so is what a network does to its input: ``(x / 255 - mean) / std`` goes into the stem, and
what is left of it is the cast of the integers.

A zero padding stands in the way of a shift alone:

    conv(s * x + h, W) = conv(x + h / s, s * W)            the scale passes
    pad(s * x + h, 0) = s * pad(x, -h / s) + h             one value for all channels: it is padded
    conv(s * x + h, W) = conv(x, s * W) + conv(h, W)       ``border_maps``: a map of fixed size

What a layer, RMS, group or instance norm ends with goes into all that reads it, where that takes no
call more: the norm by itself is left. A recurrent layer takes it into the weights of its input.

Before a sign or a comparison with a constant they move its threshold, as a batch norm does.
A quantised weight takes the scale into its scales and keeps its integers (but for their sign).
Nothing crosses the quantiser of an activation.

Exact when: the result has the data operand's shape and dtype, or casts integers to it; each step
has one user; no shift crosses a zero padding otherwise.

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

import torch
from torch import fx

from refold.errors import Declined
from refold.graph import nodes, ops
from refold.graph.nodes import aten, is_call
from refold.graph.ops import op_name
from refold.graph.records import recurrences, scale_shifts
from refold.graph.records.scale_shifts import Affine
from refold.passes.scale_shift.push.pusher import Pusher
from refold.rewrite.context import Context
from refold.rewrite.result import PassResult, declined

# The forms in which a scale-shift of integers is written, to say why it stays.
_ARITHMETIC = (aten.add, aten.sub, aten.rsub, aten.mul, aten.neg)
_NARROW = (torch.uint8, torch.int8, torch.int16)


@dataclass(frozen=True)
class AbsorbScaleShift:
    """Absorbs scales and shifts; see the module docstring.

    Attributes:
        max_growth: how far un-sharing weights may grow the stored constants (a ratio).
        border_maps: a shift before a padded convolution may become a map that is added after it
            (fixed height and width, and only where that is cheaper). A map ends what branches could
            merge, so it is for the end of a pipeline.
    """

    name: str = "absorb-scale-shift"
    exactness: str = "reassociates"
    max_growth: float = 1.25
    border_maps: bool = False

    def run(self, gm: fx.GraphModule, context: Context = Context()) -> PassResult:
        growth = context.growth_or(self.max_growth)
        # Each s * x + h goes up, into what makes x, or else down, into all that reads it; one that
        # neither takes stays, with the reasons of both.
        result = Pusher(
            gm, self.name, scale_and_shift, growth, context.costs, border_maps=self.border_maps
        ).run()
        for node in gm.graph.nodes:
            reason = _no_scale(node)
            if reason is not None:
                result.declined.append(declined(self.name, node, reason))
        return result


def scale_and_shift(node: fx.Node) -> Affine | None:
    """Arithmetic with constants as ``s * x + h``; where ``x`` holds integers, a cast comes first.

    Batch norms are read by ``fold-batch-norm``, which goes before. Other norms end with one.
    """
    record = scale_shifts.affine(node) or scale_shifts.widening_affine(node)
    if record is None:
        return scale_shifts.end_of_norm(node) if _all_may_take(node) else None
    return None if record.is_norm else record


def _all_may_take(node: fx.Node) -> bool:
    """False where a reader shows by its operator that it takes none: no value is looked at."""
    crossed = ops.HOMOGENEOUS | ops.ORDER
    return all(
        user.op == "call_function"
        and (
            not ops.has(user, ops.NONLINEAR)
            or ops.has(user, crossed)
            or recurrences.recurrence(user) is not None
        )
        for user in node.users
    )


def _no_scale(node: fx.Node) -> Declined | None:
    """Why arithmetic that looks like a scale or shift is none, where that is worth saying."""
    if is_call(node, *_ARITHMETIC) and nodes.dtype(node) in _NARROW:
        reason = f"{op_name(node)} computes in {nodes.dtype(node)}, where it wraps around"
        return Declined(reason, hint="cast to a floating dtype first")
    if is_call(node, aten.div.Tensor_mode, aten.div.Scalar_mode) and not nodes.pinned(node):
        mode = nodes.arguments(node)["rounding_mode"]
        if mode is not None:
            return Declined(f"the division rounds ({mode}), so it is not a scale")
    return None
