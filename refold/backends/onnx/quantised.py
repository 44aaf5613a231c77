"""Spells quantisers of activations so that ONNX's ``QuantizeLinear`` means the same.

::

    quantize_per_tensor(x, s, z, low, high, int8)      QuantizeLinear(x, s, z) ends at -128 and 127,
                                                       whatever low and high are
    quantize_per_tensor(x, s, z, low, high, float8)    rounds to whole numbers before it rounds to
                                                       float8, QuantizeLinear does not

The exporter translates both to ``QuantizeLinear`` alone. Where that is another function, the first
gets a clamp of its input, at ``(low - z) * s`` and ``(high - z) * s``, which round to ``low`` and
``high``; the second is written as the multiplication, rounding, clamp and cast that it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from refold.errors import BackendError
from refold.graph import nodes
from refold.graph.ops import op_name

_aten = torch.ops.aten


def spell_out(graph: fx.Graph) -> None:
    """Rewrites the quantisers that the exporter would change."""
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node) == "quantize_per_tensor":
            _spell_out(graph, node)


def _spell_out(graph: fx.Graph, node: fx.Node) -> None:
    given = nodes.arguments(node)
    x, scale, zero, dtype = (given[k] for k in ("input", "scale", "zero_point", "dtype"))
    low, high = given["quant_min"], given["quant_max"]
    with graph.inserting_before(node):

        def call(target: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
            new = graph.call_function(target, args, kwargs)
            new.meta = {key: value for key, value in node.meta.items() if key != "val"}
            return new

        if nodes.dtype(x) != torch.float32:
            # PyTorch does so too; QuantizeLinear takes its input in the dtype of the scale.
            x = call(_aten._to_copy.default, x, dtype=torch.float32)
            node.update_arg(0, x)
        if not dtype.is_floating_point:
            info = torch.iinfo(dtype)
            if (low, high) == (info.min, info.max):
                return
        if any(isinstance(value, fx.Node) for value in (scale, zero, low, high)):
            raise BackendError(
                f"{node.name} quantises to {low} to {high} with a scale that is computed: ONNX "
                f"uses the whole range of {dtype}; quantise to that range, or with fixed numbers"
            )
        if not dtype.is_floating_point:
            ends = sorted(((low - zero) * scale, (high - zero) * scale))
            node.update_arg(0, call(_aten.clamp.default, x, *ends))
            return
        whole = call(_aten.round.default, call(_aten.mul.Tensor, x, 1.0 / scale))
        shifted = call(_aten.add.Tensor, whole, zero) if zero else whole
        clamped = call(_aten.clamp.default, shifted, low, high)
        node.replace_all_uses_with(call(_aten._to_copy.default, clamped, dtype=dtype))
    graph.erase_node(node)
