"""Writes the layers: stubs before the export, integers and their products after it.

    x ---------------------------- MatMul -- Add -- y
    codes, scale - DequantizeLinear -'        |
    x -- Reshape -- ReduceSum -- MatMul(offset)-'      where half integers leave an offset

The sums over groups are computed once for all layers that read the same tensor.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from refold.algebra import integer_grid
from refold.backends.onnx.shift_add.choice import (
    DENSE,
    FUNCTION,
    REQUANTISED,
    Encoding,
    Kernels,
    choose,
)
from refold.errors import BackendError
from refold.graph import constants, nodes, provenance
from refold.ops.bcq_linear import dequantise, unpack

DOMAIN, FUNCTION_NAME = "refold", "BCQLinear"
_STUB = "ShiftAddLayer"
_IR_VERSION = {2: 13, 4: 10, 8: 10}
_NAMED = 4  # layers that a note names

_FUNCTION_TEXT = """
<domain: "refold", opset_import: ["" : 18]>
BCQLinear <group_size>(x, planes, alpha) => (y) {
  last = Constant <value_ints = [-1]> ()
  first = Constant <value_ints = [0]> ()
  axis = Constant <value_ints = [2]> ()
  joined = Constant <value_ints = [0, 0, -1]> ()
  one = Constant <value_ints = [1]> ()
  places = Constant <value = uint8[8] {1, 2, 4, 8, 16, 32, 64, 128}> ()
  zero = Constant <value = uint8[1] {0}> ()
  size = Constant <value_int : int = @group_size> ()
  size_1d = Reshape (size, last)
  spread = Concat <axis = 0> (one, one, one, size_1d)
  features = Shape <start = -1> (x)
  bytes = Unsqueeze (planes, last)
  masked = BitwiseAnd (bytes, places)
  clear_bits = Equal (masked, zero)
  clear_padded = Reshape (clear_bits, joined)
  clear = Slice (clear_padded, first, features, axis)
  alpha_column = Unsqueeze (alpha, last)
  alpha_spread = Expand (alpha_column, spread)
  alpha_padded = Reshape (alpha_spread, joined)
  scale = Slice (alpha_padded, first, features, axis)
  minus = Neg (scale)
  terms = Where (clear, minus, scale)
  weight = ReduceSum <keepdims = 0> (terms, first)
  turned = Transpose <perm = [1, 0]> (weight)
  y = MatMul (x, turned)
}
"""


@dataclass(frozen=True)
class LoweredLayer:
    """One layer as it is lowered.

    Attributes:
        name: module path, or the node's name.
        planes: packed signs.
        alpha: scales.
        features: inputs of the layer.
        group_size: weights that share scales.
        choice: how it is written.
    """

    name: str
    planes: torch.Tensor
    alpha: torch.Tensor
    features: int
    group_size: int
    choice: Encoding


@dataclass(frozen=True)
class Written:
    """A layer in the ONNX model: the values that it reads and returns (its bias comes later)."""

    layer: LoweredLayer
    read: str
    returned: str


def prepare(module: fx.GraphModule, kernels: Kernels) -> list[LoweredLayer]:
    """Replaces the layers of a graph by stubs that the exporter carries through.

    Returns:
        The layers, in the order of the graph; the index is the stub's own.

    Raises:
        BackendError: planes, scales or width are not constants.
    """
    layers: list[LoweredLayer] = []
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not torch.ops.refold.bcq_linear.default:
            continue
        given = nodes.arguments(node)
        x, bias = given["x"], given["bias"]
        layer = _layer(node, given, kernels)
        with module.graph.inserting_before(node):
            stub = functools.partial(_stub, index=len(layers), features=layer.planes.shape[1])
            stub.__name__ = "shift_add_layer"  # type: ignore[attr-defined]
            new = module.graph.call_function(stub, (x,))
            for key in ("val", "custom", "nn_module_stack", "stack_trace"):
                if key in node.meta:
                    new.meta[key] = node.meta[key]
            if bias is not None:
                new = module.graph.call_function(torch.ops.aten.add.Tensor, (new, bias))
                new.meta.update(new.args[0].meta)  # type: ignore[union-attr]
        nodes.replace(node, new)
        module.graph.erase_node(node)
        layers.append(layer)
    if layers:
        constants.sweep(module)
        module.recompile()
    return layers


def _layer(node: fx.Node, given: dict[str, Any], kernels: Kernels) -> LoweredLayer:
    x, planes, alpha = given["x"], given["planes"], given["alpha"]
    features = nodes.shape(x)[-1]
    name = provenance.module_path(node) or node.name
    if not (constants.is_get_attr(planes) and constants.is_get_attr(alpha)) or not isinstance(
        features, int
    ):
        raise BackendError(
            f"the planes, scales or width of {name} are computed: this target takes constants; "
            "run fold-constants first"
        )
    bits, scales = constants.tensor(planes).detach(), constants.tensor(alpha).detach()
    size = int(given["group_size"])
    choice = choose(bits, scales, features, size, nodes.dtype(x), kernels)
    return LoweredLayer(name, bits, scales, features, size, choice)


def _stub(x: torch.Tensor, *, index: int, features: int) -> torch.Tensor:
    made = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{_STUB}",
        (x,),
        {"index": index},
        dtype=x.dtype,
        shape=(*x.shape[:-1], features),
        version=1,
    )
    assert isinstance(made, torch.Tensor)
    return made


def rewrite(model: Any, layers: list[LoweredLayer]) -> tuple[Written, ...]:
    """Puts the layers in the place of their stubs, in an ``onnx_ir.Model``."""
    written = []
    builder = _Builder(model)
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == _STUB:
            layer = layers[node.attributes["index"].as_int()]
            written.append(builder.write(node, layer))
    if any(w.layer.choice.exactness == FUNCTION for w in written):
        _add_function(model)
    elif DOMAIN in model.opset_imports:
        del model.opset_imports[DOMAIN]
    needed = [_IR_VERSION.get(w.layer.choice.bits, 0) for w in written]
    model.ir_version = max([model.ir_version, *needed])
    return tuple(written)


class _Builder:
    """Adds nodes and constants to a model."""

    def __init__(self, model: Any) -> None:
        self._graph = model.graph
        self._sums: dict[tuple[Any, int], Any] = {}
        self._names = {v.name for v in self._graph.inputs} | set(self._graph.initializers)
        self._names |= {o.name for n in self._graph for o in n.outputs}

    def write(self, stub: Any, layer: LoweredLayer) -> Written:
        x, old = stub.inputs[0], stub.outputs[0]
        choice = layer.choice
        prefix = f"{layer.name}.shift_add"
        properties = {**stub.metadata_props, "refold.exactness": choice.exactness}
        if choice.bits:
            y = self._integers(stub, x, layer, prefix, properties)
        elif choice.exactness == DENSE:
            weight = dequantise(layer.planes, layer.alpha, layer.features, layer.group_size)
            constant = self._constant(f"{prefix}.weight", weight.t().to(_torch_dtype(x)))
            y = self._node(stub, "MatMul", [x, constant], old, properties)
        else:
            planes = self._constant(f"{prefix}.planes", layer.planes)
            alpha = self._constant(f"{prefix}.alpha", _every_alpha(layer).to(_torch_dtype(x)))
            y = self._node(
                stub, FUNCTION_NAME, [x, planes, alpha], old, properties,
                domain=DOMAIN, attributes={"group_size": layer.group_size},
            )  # fmt: skip
        name = old.name
        import onnx_ir

        onnx_ir.convenience.replace_all_uses_with(old, y, replace_graph_outputs=True)
        self._graph.remove(stub, safe=True)
        y.name = name
        return Written(layer, x.name, name)

    def _integers(
        self, stub: Any, x: Any, layer: LoweredLayer, prefix: str, properties: dict[str, str]
    ) -> Any:
        choice, old = layer.choice, stub.outputs[0]
        codes = _codes(layer)
        dtype = _torch_dtype(x)
        scale = _blocks(codes.scale, layer.group_size, choice.block, layer.features)
        weight = self._packed(f"{prefix}.codes", codes.codes.t().contiguous(), choice.bits)
        scales = self._constant(f"{prefix}.scale", scale.t().contiguous().to(dtype))
        dense = self._node(
            stub, "DequantizeLinear", [weight, scales], None, properties,
            attributes={"axis": 0, "block_size": choice.block},
        )  # fmt: skip
        product = self._node(stub, "MatMul", [x, dense], old, properties)
        if codes.offset is None:
            return product
        offset = self._constant(f"{prefix}.offset", codes.offset.t().contiguous().to(dtype))
        sums = self._group_sums(stub, x, layer)
        if len(x.shape) == 2:  # adds as it multiplies: half the correction's time at batch 1
            return self._node(stub, "Gemm", [sums, offset, product], old, properties)
        rest = self._node(stub, "MatMul", [sums, offset], old, properties)
        return self._node(stub, "Add", [product, rest], old, properties)

    def _group_sums(self, stub: Any, x: Any, layer: LoweredLayer) -> Any:
        """The sums of a tensor over groups of its last axis."""
        key = (x, layer.group_size)
        if key in self._sums:
            return self._sums[key]
        padded, missing = x, -layer.features % layer.group_size
        prefix = f"{x.name}.groups_of_{layer.group_size}"
        if missing:
            pads = self._constant(f"{prefix}.pads", torch.tensor([0, missing]))
            last = self._constant(f"{prefix}.last", torch.tensor([-1]))
            padded = self._node(stub, "Pad", [x, pads, None, last], None, {})
        groups = (layer.features + missing) // layer.group_size
        leading = [0] * (len(x.shape) - 1)  # 0 keeps the axis as it is
        shape = torch.tensor([*leading, groups, layer.group_size])
        split = self._node(
            stub, "Reshape", [padded, self._constant(f"{prefix}.shape", shape)], None, {}
        )
        axes = self._constant(f"{prefix}.axes", torch.tensor([-1]))
        self._sums[key] = self._node(
            stub, "ReduceSum", [split, axes], None, {}, attributes={"keepdims": 0}
        )
        return self._sums[key]

    def _node(
        self,
        before: Any,
        operator: str,
        inputs: list[Any],
        like: Any,
        properties: dict[str, str],
        *,
        domain: str = "",
        attributes: dict[str, Any] | None = None,
    ) -> Any:
        import onnx_ir

        name = self._unique(f"{before.name}.{operator}")
        node = onnx_ir.node(operator, inputs, attributes=attributes, domain=domain, name=name)
        node.metadata_props.update(properties)
        value = node.outputs[0]
        value.name = self._unique(f"{name}.result")
        if like is not None:
            value.shape, value.type = like.shape, like.type
        self._graph.insert_before(before, node)
        return value

    def _constant(self, name: str, tensor: torch.Tensor) -> Any:
        import onnx_ir

        name = self._unique(name)
        value = onnx_ir.Value(
            name=name, const_value=onnx_ir.tensor(tensor.contiguous().numpy(), name=name)
        )
        self._graph.register_initializer(value)
        return value

    def _packed(self, name: str, codes: torch.Tensor, bits: int) -> Any:
        import onnx_ir

        if bits == 8:
            return self._constant(name, codes)
        name = self._unique(name)
        dtype = onnx_ir.DataType.INT2 if bits == 2 else onnx_ir.DataType.INT4
        packed = onnx_ir.PackedTensor(
            pack(codes, bits).numpy(), dtype, shape=onnx_ir.Shape(codes.shape), name=name
        )
        value = onnx_ir.Value(name=name, const_value=packed)
        self._graph.register_initializer(value)
        return value

    def _unique(self, name: str) -> str:
        chosen, count = name, 0
        while chosen in self._names:
            count += 1
            chosen = f"{name}_{count}"
        self._names.add(chosen)
        return chosen


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers of 2 or 4 bits in row-major order, the first in the lowest bits of a byte."""
    each = 8 // bits
    flat = codes.flatten().view(torch.uint8) & (2**bits - 1)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % each)).view(-1, each)
    packed = flat[:, 0].clone()
    for place in range(1, each):
        packed |= flat[:, place] << (bits * place)
    return packed


def _codes(layer: LoweredLayer) -> integer_grid.Codes:
    choice, size = layer.choice, layer.group_size
    if choice.grid is None:
        weight = dequantise(layer.planes, layer.alpha, layer.features, size, torch.float64)
        return integer_grid.requantise(weight, size, choice.bits)
    signs = (unpack(plane, layer.features) for plane in layer.planes)
    return integer_grid.encode(signs, choice.grid, size, choice.bits)


def effective_weight(layer: LoweredLayer) -> torch.Tensor:
    """The weight ``[N, K]`` in float64 that the file has for a layer."""
    size = layer.group_size
    if layer.choice.exactness != REQUANTISED:
        return dequantise(layer.planes, layer.alpha, layer.features, size, torch.float64)
    codes = _codes(layer)
    return codes.codes * codes.scale.repeat_interleave(size, dim=-1)[:, : layer.features]


def _blocks(scale: torch.Tensor, group_size: int, block: int, features: int) -> torch.Tensor:
    """Scales by block, from scales by group; a block lies within one group."""
    count = -(-features // block)
    starts = torch.arange(count) * block // group_size
    return scale[:, starts]


def _every_alpha(layer: LoweredLayer) -> torch.Tensor:
    """The scales of each plane, also where one stands for all."""
    planes, alpha = layer.planes.shape[0], layer.alpha
    if alpha.shape[0] == planes:
        return alpha
    return alpha.float() * 2.0 ** torch.arange(planes - 1, -1, -1)[:, None, None]


def _torch_dtype(value: Any) -> torch.dtype:
    import onnx_ir

    return torch.float16 if value.dtype == onnx_ir.DataType.FLOAT16 else torch.float32


def _add_function(model: Any) -> None:
    import onnx
    import onnx_ir

    function = onnx_ir.serde.deserialize_function(onnx.parser.parse_function(_FUNCTION_TEXT))
    function.opset_imports[""] = model.opset_imports[""]
    model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = 1


def notes(layers: list[LoweredLayer], asked: int, opset: int) -> list[str]:
    """What was written how, by class, as sentences for the report."""
    if not layers:
        return []
    told = []
    by_kind = defaultdict(list)
    for layer in layers:
        c = layer.choice
        by_kind[c.bits, c.exactness, c.reason, layer.planes.shape[0]].append(layer.name)
    for (bits, exactness, reason, planes), names in by_kind.items():
        many = "layer" if len(names) == 1 else "layers"
        what = f"{len(names)} shift-add {many} of {planes} bits ({_listed(names)})"
        if bits:
            wider = f", {planes}-bit codes stored in {bits}" if planes < bits else ""
            told.append(f"{what}: INT{bits} DequantizeLinear and MatMul{wider}; {exactness}")
        elif exactness == FUNCTION:
            told.append(
                f"{what}: the function {DOMAIN}::{FUNCTION_NAME}, because {reason}; {exactness}. "
                "The file is small; in memory ONNX Runtime makes them dense float weights"
            )
        else:
            told.append(f"{what}: dense float weights, because {reason}; {exactness}")
    if opset != asked:
        told.append(f"opset {opset} instead of {asked}: the first that has these integers")
    return told


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
