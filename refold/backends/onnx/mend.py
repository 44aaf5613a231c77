"""Spells what ONNX Runtime would read wrongly in a way that means the same everywhere."""

from __future__ import annotations

import math
from typing import Any


def keep_pads_before_max_pool(model: Any) -> int:
    """Spells constant pads that end in a MaxPool with explicit axes; returns how many.

    ONNX Runtime's level-1 ``Pad_Fusion`` moves a zero Pad into the following MaxPool, whose own
    padding is -inf: wrong wherever a border window is negative (measured with 1.31). It leaves a
    Pad with an ``axes`` input alone, and that spelling means the same everywhere.
    """
    import numpy as np
    import onnx_ir

    count = 0
    for node in list(model.graph):
        if not is_fusable_pad(node) or not _feeds_max_pool(node):
            continue
        pads = onnx_ir.convenience.get_const_tensor(node.inputs[1]).numpy().tolist()
        rank = len(pads) // 2
        axes = [a for a in range(rank) if pads[a] or pads[rank + a]] or [rank - 1]
        kept = [pads[a] for a in axes] + [pads[rank + a] for a in axes]
        value = node.inputs[2] if len(node.inputs) > 2 else None
        constants = []
        for role, data in (("pads", kept), ("axes", axes)):
            name = f"{node.outputs[0].name}_{role}"
            tensor = onnx_ir.tensor(np.array(data, dtype=np.int64), name=name)
            constants.append(onnx_ir.Value(name=name, const_value=tensor))
            model.graph.register_initializer(constants[-1])
        node.resize_inputs(4)
        for index, new in enumerate([node.inputs[0], constants[0], value, constants[1]]):
            node.replace_input_with(index, new)
        count += 1
    return count


def is_fusable_pad(node: Any) -> bool:
    """A constant Pad with known pads, no axes, and a value other than -inf."""
    import onnx_ir

    if node.op_type != "Pad" or node.domain or len(node.inputs) > 3:
        return False
    mode = node.attributes.get("mode")
    if mode is not None and mode.as_string() != "constant":
        return False
    if onnx_ir.convenience.get_const_tensor(node.inputs[1]) is None:
        return False
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        value = onnx_ir.convenience.get_const_tensor(node.inputs[2])
        return value is None or float(value.numpy()) != -math.inf
    return True


def _feeds_max_pool(node: Any) -> bool:
    # Identities vanish and neighbouring pads merge before the fusion is tried.
    users = [user for output in node.outputs for user, _ in output.uses()]
    return any(
        u.op_type == "MaxPool" or (u.op_type in ("Identity", "Pad") and _feeds_max_pool(u))
        for u in users
    )
