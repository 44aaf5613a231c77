"""A vector with one number a channel that scales or shifts the columns of an image instead.

Code that finds the channel axis by its length takes the last axis where the width happens to be the
number of channels. The trace is an arithmetic call with a vector of that length and no view::

    y = conv2d(x, w)            # [N, C, H, W], W == C
    z = mul(y, get_attr[scale])  # [C]: broadcasts over W

The result is what the model says, and nothing is rewritten: it is only worth a word.
"""

from __future__ import annotations

from pathlib import PurePath

from torch import fx

from refold.graph import constants, provenance
from refold.graph.nodes import aten, is_call, is_tensor, same, shape
from refold.graph.records import convolutions, scale_shifts

_ARITHMETIC = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor)


def axis_collisions(graph: fx.Graph) -> list[str]:
    """A sentence for each parameter that lies along the columns and was likely meant otherwise."""
    found = []
    for node in graph.nodes:
        if not is_call(node, *_ARITHMETIC) or len(node.args) < 2:
            continue
        for data, vector in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
            if not constants.is_get_attr(vector) or not is_tensor(data):
                continue
            size = shape(data)
            if len(size) < 3 or not same(shape(vector), size[-1:]) or not same(size[-1], size[1]):
                continue
            if same(size[1], 1) or not _has_channels(data):
                continue
            source = PurePath(provenance.source_line(node)).name
            found.append(
                f"{vector.target} lies along the last axis of {node.name}, which is as long as the "
                f"channels ({size[1]}): if it was meant for the channels, reshape it to "
                f"[{', '.join(['-1', *['1'] * (len(size) - 2)])}]"
                + (f" ({source})" if source else "")
            )
    return found


def _has_channels(node: fx.Node) -> bool:
    """True if axis 1 is the channels': a convolution or its norm, with arithmetic in between."""
    while not (convolutions.conv(node) or scale_shifts.batch_norm(node)):
        if not is_call(node, *_ARITHMETIC) or not is_tensor(node.args[0]):
            return False
        node = node.args[0]  # type: ignore[assignment]
    return True
