"""Average pools with a divisor of their own, which ONNX has not and the exporter leaves out.

With the padding counted, every window of ``K`` elements is divided by ``K``, so that

    avg_pool(x, divisor_override=d) = avg_pool(x, count_include_pad=True) * (K / d)

Before::

    y = avg_pool2d(x, [3, 3], [1, 1], [1, 1], False, False, 4)

After::

    y = mul(avg_pool2d(x, [3, 3], [1, 1], [1, 1], False, True, None), 9 / 4)
"""

from __future__ import annotations

import math

import torch
from torch import fx

from refold.errors import BackendError
from refold.graph import nodes
from refold.graph.ops import op_name

_aten = torch.ops.aten


def divide_as_asked(graph: fx.Graph) -> None:
    """Writes the divisors of average pools as products.

    Raises:
        BackendError: a window may end behind the padding (``ceil_mode``): it has fewer elements.
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node) in ("avg_pool2d", "avg_pool3d"):
            _divide(graph, node)


def _divide(graph: fx.Graph, node: fx.Node) -> None:
    given = nodes.arguments(node)
    divisor, kernel = given["divisor_override"], given["kernel_size"]
    if divisor is None:
        return
    if given["ceil_mode"]:
        raise BackendError(
            f"{node.name} is an average pool with ceil_mode and divisor_override, which ONNX has "
            "not\n  fix: pad the input, so that windows end where it does, and leave ceil_mode out"
        )
    rank = 2 if op_name(node) == "avg_pool2d" else 3
    elements = math.prod(kernel) if len(kernel) == rank else kernel[0] ** rank
    node.args = (node.args[0], kernel, given["stride"], given["padding"], False, True, None)
    node.kwargs = {}
    with graph.inserting_after(node):
        scaled = graph.call_function(_aten.mul.Tensor, (node, elements / divisor))
    scaled.meta = {key: value for key, value in node.meta.items() if key != "val"}
    node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
