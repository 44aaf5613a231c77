"""Rewrites of the ONNX graph that TensorRT alone needs.

::

    HardSwish(x), bfloat16           x * HardSigmoid(x), which is its definition
    Cast(Clip(x / s), float8)        QuantizeLinear(x, s), if the clip ends where float8 does
    Cast(q, float32) * s             DequantizeLinear(q, s)
    QuantizeLinear(Cast(x), s)       QuantizeLinear(x, s'), x and s' in half precision
    Cast(DequantizeLinear(q, s))     DequantizeLinear(q, s'), s' and the result in half precision

The parser takes HardSwish in float32 and float16 alone, and casts to no float8. It fuses a layer
with the quantisers around it only if nothing lies between them. ``s'`` is ``s`` rounded, by less
than what rounding a value costs: a cast model is judged with it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

_LARGEST = 448.0  # of float8_e4m3fn
_EPS = {ir.DataType.FLOAT16: 2.0**-10, ir.DataType.BFLOAT16: 2.0**-7}
_FLOATS = (ir.DataType.FLOAT, *_EPS)
_FLOAT8 = ir.DataType.FLOAT8E4M3FN


def rewrite(model: ir.Model) -> list[str]:
    """Rewrites a model in place; returns notes for the report."""
    swishes = [_spell_hard_swish(model.graph, n) for n in list(model.graph)]
    for node in list(model.graph):
        _quantise_float8(model.graph, node)
        _dequantise_float8(model.graph, node)
    halves = model.opset_imports.get("", 0) >= 19  # quantisers take float32 alone before that
    tiny = [_fuse_cast(model.graph, n) for n in list(model.graph) if halves]
    RemoveUnusedNodesPass()(model)
    notes = []
    if any(swishes):
        notes.append(f"{sum(swishes)} bfloat16 HardSwish written as x * HardSigmoid(x)")
    if any(tiny):
        notes.append(
            f"{sum(tiny)} quantisers keep their scale in float32, with a cast beside them: half "
            "precision does not have it, and TensorRT may not fuse their layers into int8 ones"
        )
    return notes


def _spell_hard_swish(graph: ir.Graph, node: ir.Node) -> bool:
    wide = node.inputs[0].dtype if node.inputs and node.inputs[0] is not None else None
    if node.op_type != "HardSwish" or wide != ir.DataType.BFLOAT16:
        return False
    source, result = node.inputs[0], node.outputs[0]
    gate = ir.Node(
        "", "HardSigmoid", [source], [ir.AttrFloat32("alpha", 1 / 6),
        ir.AttrFloat32("beta", 0.5)], name=f"{node.name}_gate",
    )  # fmt: skip
    gate.outputs[0].name = f"{result.name}_gate"
    product = ir.Node("", "Mul", [source, gate.outputs[0]], name=str(node.name))
    for new in (gate, product):
        new.metadata_props.update(node.metadata_props)
        new.outputs[0].dtype, new.outputs[0].shape = wide, result.shape
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [gate, product], [result], [product.outputs[0]]
    )
    return True


def _quantise_float8(graph: ir.Graph, cast: ir.Node) -> None:
    if _cast_to(cast) != _FLOAT8:
        return
    wider = _producer(cast, "Cast")
    # From half precision to float32 no value changes.
    exact = wider is not None and _cast_to(wider) == ir.DataType.FLOAT
    clip = _producer(wider if wider is not None and exact else cast, "Clip")
    if clip is None:
        return
    if [_scalar(clip, 1), _scalar(clip, 2)] != [-_LARGEST, _LARGEST]:
        return  # beyond its range float8 has NaN in PyTorch, its largest number in ONNX
    # QuantizeLinear ends there itself.
    divided = _producer(clip, "Div")
    step = _factor(divided, 1) if divided is not None else None
    source, scale = (divided.inputs[0], step) if divided and step else (clip.inputs[0], 1.0)
    if source is None or source.dtype is None:
        return
    zero = _constant(graph, f"{cast.name}_zero", 0.0, _FLOAT8)
    given = [source, _constant(graph, f"{cast.name}_scale", scale, source.dtype), zero]
    _replace(graph, [cast], "QuantizeLinear", given)


def _dequantise_float8(graph: ir.Graph, cast: ir.Node) -> None:
    if not cast.inputs or cast.inputs[0] is None or cast.inputs[0].dtype != _FLOAT8:
        return
    wide = _cast_to(cast)
    if wide not in _FLOATS:
        return
    last, scale = cast, 1.0
    users = list(cast.outputs[0].uses())
    if len(users) == 1 and users[0][0].op_type == "Mul" and not cast.outputs[0].is_graph_output():
        product, position = users[0]
        step = _factor(product, 1 - position)
        if step is not None:
            last, scale = product, step
    given = [cast.inputs[0], _constant(graph, f"{cast.name}_scale", scale, wide)]
    _replace(graph, [last] if last is cast else [last, cast], "DequantizeLinear", given)


def _fuse_cast(graph: ir.Graph, node: ir.Node) -> bool:
    """Lets a quantiser read or return half precision itself; True if its scale forbids that."""
    casts: list[ir.Node] = []
    if node.op_type == "QuantizeLinear":
        before = _producer(node, "Cast")
        half = before.inputs[0].dtype if before is not None and before.inputs[0] else None
    elif node.op_type == "DequantizeLinear" and not node.outputs[0].is_graph_output():
        before, casts = None, [user for user, _ in node.outputs[0].uses()]
        wanted = {_cast_to(c) for c in casts}
        half = wanted.pop() if len(wanted) == 1 else None
    else:
        return False
    stored = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] else None
    if half is None or half not in _EPS or stored is None:
        return False
    exact = stored.numpy()
    rounded = exact.astype(half.numpy())
    if (np.abs(rounded.astype(exact.dtype) - exact) > _EPS[half] * np.abs(exact)).any():
        return True  # it is subnormal there
    node.replace_input_with(1, _constant(graph, f"{node.name}_scale", rounded, half))
    if before is not None:
        node.replace_input_with(0, before.inputs[0])
        return False
    node.outputs[0].dtype = half
    for cast in casts:
        cast.outputs[0].replace_all_uses_with(node.outputs[0])
    return False


def _producer(node: ir.Node, operator: str) -> ir.Node | None:
    made = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    return made if made is not None and made.op_type == operator else None


def _cast_to(node: ir.Node) -> ir.DataType | None:
    return ir.DataType(node.attributes["to"].as_int()) if node.op_type == "Cast" else None


def _scalar(node: ir.Node, index: int) -> float | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None


def _factor(node: ir.Node, index: int) -> float | None:
    """A positive number that a product or quotient has for an operand, and no other shape."""
    scale, data = _scalar(node, index), node.inputs[1 - index]
    same = data is not None and data.shape == node.outputs[0].shape
    return scale if same and scale is not None and scale > 0 else None


def _constant(graph: ir.Graph, name: str, data: Any, dtype: ir.DataType) -> ir.Value:
    tensor = ir.tensor(np.asarray(data, dtype=dtype.numpy()), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _replace(
    graph: ir.Graph, old: list[ir.Node], operator: str, given: list[ir.Value | None]
) -> None:
    """Puts one node in the place of others, of which the first gives the result."""
    result = old[0].outputs[0]
    new = ir.Node("", operator, given, name=str(old[0].name))
    new.metadata_props.update(old[0].metadata_props)
    new.outputs[0].type, new.outputs[0].shape = result.type, result.shape
    ir.convenience.replace_nodes_and_values(graph, old[0], old, [new], [result], [new.outputs[0]])
