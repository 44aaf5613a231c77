"""Fold batch norms into the layers around them.

    y = gamma * (conv(x, W, b) - mean) / sqrt(var + eps) + beta
      = conv(x, s * W, s * (b - mean) + beta)              s = gamma / sqrt(var + eps)

A batch norm in eval mode is a scale and a shift per channel of axis 1; it goes into the producer
(convolution, transposed convolution with groups, linear, another norm's affine part), passing
layouts, concatenation, sums and unpadded averages, or into every consumer where that is exact.

A norm that nothing takes is one scale-shift already, and stays one call: runtimes have a kernel for
it, and a multiplication and an addition would be two.

In front of a sign or a comparison it only moves a threshold. A comparison with a constant holds it
itself; before a sign an addition is left, which layers further up may take, and the signs of gamma
go into what reads the signs (a channel with gamma = 0 is the constant sign(beta)):

    sign(s * x + h) = sgn(s) * sign(x + h / s)          s * x + h > c  =  x > (c - h) / s,  s > 0

Exact when: running statistics are used (``training=False``); the producer has no other user; on
the way down, no zero padding meets the shift. Signs and comparisons flip only within rounding of
the threshold.

Before::

    %c = conv2d(%x, @weight, None, padding=[1, 1])
    %y = batch_norm(%c, @gamma, @beta, @mean, @var)

After::

    %y = conv2d(%x, @folded_weight, @folded_bias, padding=[1, 1])

Sources: Ioffe and Szegedy, Batch Normalization (2015), algorithm 2, step 11; Jacob et al. (CVPR
2018), section 3.2; for signs Rastegari et al., XNOR-Net (ECCV 2016), section 3.2, and Umuroglu et
al., FINN (FPGA 2017), section 4.2.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from refold.graph import nodes
from refold.graph.nodes import aten, is_call
from refold.graph.ops import kind
from refold.graph.records import scale_shifts
from refold.graph.records.scale_shifts import Affine
from refold.passes.scale_shift.push.pusher import Pusher
from refold.rewrite.context import Context
from refold.rewrite.result import PassResult, declined


@dataclass(frozen=True)
class FoldBatchNorm:
    """Folds batch norms; see the module docstring.

    Attributes:
        max_growth: how far un-sharing weights may grow the stored constants (a ratio).
    """

    name: str = "fold-batch-norm"
    exactness: str = "reassociates"
    max_growth: float = 1.25

    def run(self, gm: fx.GraphModule, context: Context = Context()) -> PassResult:
        growth = context.growth_or(self.max_growth)
        # Each norm s * x + h goes up, into what makes x, or else down, into all that reads it; one
        # that neither takes stays, with the reasons of both.
        result = Pusher(gm, self.name, scale_and_shift, growth, context.costs).run()
        reported = {d.node for d in result.declined}
        for node in gm.graph.nodes:
            if node.name not in reported and not nodes.pinned(node) and _of_the_batch(node):
                result.declined.append(declined(self.name, node, *_OF_THE_BATCH))
        return result


def scale_and_shift(node: fx.Node) -> Affine | None:
    """A norm with running statistics as ``s * x + h``, along axis 1; the module docstring has s.

    The tuple form is read at the value of it: ``h = beta - mean * s``, and nothing reads the rest.
    """
    record = scale_shifts.affine(node)
    return record if record is not None and record.is_norm else None


_OF_THE_BATCH = (
    "it normalises with the statistics of the batch (training mode, or no running statistics), so "
    "it is not a constant scale and shift",
    "export with running statistics: track_running_stats=True and .eval()",
)


def _of_the_batch(node: fx.Node) -> bool:
    """A norm that is no constant scale and shift: what it does depends on its input."""
    if kind(node) != "batch-norm" or scale_shifts.batch_norm(node) is not None:
        return False
    return not is_call(node, aten._native_batch_norm_legit_no_training.default)
