"""How the initializers of an ONNX file follow from the constants of the graph that it was made of.

The exporter's optimizer transposes and reshapes weights, merges equal ones and drops what changes
nothing. Which of that depends on their values shows when it runs a second time, on arbitrary
weights: if it leaves the same graph, initializers that differ are those that follow from weights,
and what computes them is computed again from new ones.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from refold.errors import RefitError

_RANDOM = ("RandomNormal", "RandomUniform", "Multinomial", "Bernoulli", "Dropout")
Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Initializers:
    """What becomes of new constants.

    Attributes:
        program: an ONNX model from the graph's constants to initializers, as bytes.
        written: initializers that are constants, or computed from them.
        fixed: integer constants: sizes and indices that the optimizer may have used up.
        refused: why no other constants fit, or ``""``.
    """

    program: bytes = b""
    written: tuple[str, ...] = ()
    fixed: dict[str, torch.Tensor] = field(default_factory=dict)
    refused: str = ""

    def values(self, tensors: Mapping[str, torch.Tensor]) -> Arrays:
        """The initializers for new constants.

        Raises:
            RefitError: exporting these constants would leave another graph.
        """
        if self.refused:
            raise RefitError(f"{self.refused}: export again with the new weights")
        for name, then in self.fixed.items():
            if not torch.equal(tensors[name], then):
                raise RefitError(
                    f"the integers of {name!r} may decide what the graph is, and differ now: "
                    "export again with the new weights"
                )
        new = _computed(self.program, tensors)
        return {name: new[name] for name in self.written}


def of(
    before: Any, after: Any, optimize: Callable[[Any], Any], tensors: Mapping[str, torch.Tensor]
) -> Initializers:
    """Relates a model to what it was before it was optimized.

    Args:
        before: the exporter's model (``onnx_ir.Model``), not optimized.
        after: the same, optimized.
        optimize: what made the one of the other; it may change what it is given.
        tensors: the constants of the graph by name.
    """
    generator = torch.Generator().manual_seed(0)
    others = {
        name: (torch.rand(t.shape, generator=generator) + 0.5).to(t.dtype)
        if t.is_floating_point()
        else t
        for name, t in tensors.items()
    }
    known = {n: t for n, t in tensors.items() if n in before.graph.initializers}
    probe = optimize(replaced(before, {n: _array(others[n]) for n in known}))
    if _signature(after) != _signature(probe):
        return Initializers(refused=_difference(after, probe))
    pairs = {
        one.name: (one.const_value.numpy(), other.const_value.numpy())
        for one, other in zip(_read(after), _read(probe), strict=True)
    }
    written = tuple(sorted(n for n, pair in pairs.items() if not _identical(*pair)))
    program = _program(before, set(known), written)
    now, then = (_computed(program, t) for t in (tensors, others))
    for name in written:
        if name not in now or not all(
            _identical(have, want)
            for have, want in zip((now[name], then[name]), pairs[name], strict=True)
        ):
            return Initializers(refused=f"how initializer {name!r} is made of weights is not known")
    fixed = {n: t.clone() for n, t in tensors.items() if not t.is_floating_point()}
    return Initializers(program, written, fixed)


def replaced(model: Any, values: Mapping[str, np.ndarray[Any, Any]]) -> Any:
    """A copy of a model with other initializers."""
    import onnx_ir

    copy = model.clone()
    for name, value in values.items():
        copy.graph.initializers[name].const_value = onnx_ir.tensor(value, name=name)
    return copy


def fingerprint(model: Any, written: Iterable[str]) -> str:
    """Tells graphs apart in which other initializers than these, or other calls, make the numbers.

    Refitting leaves it as it is: what is written is not looked at.
    """
    new = set(written)
    sha = hashlib.sha256(repr((_signature(model), [v.name for v in model.graph.inputs])).encode())
    for value in _read(model):
        if value.name not in new:
            sha.update(value.const_value.tobytes())
    return sha.hexdigest()


def _read(model: Any) -> list[Any]:
    """The initializers in the order in which nodes read them: their names are arbitrary.

    Those that the model gives as they are come last.
    """
    import onnx_ir

    found: dict[str, Any] = {}
    nodes = onnx_ir.traversal.RecursiveGraphIterator(model.graph)
    read = (value for node in nodes for value in node.inputs)
    for value in itertools.chain(read, model.graph.outputs):
        if value is not None and value.name in model.graph.initializers:
            found.setdefault(value.name, value)
    return list(found.values())


def _signature(model: Any) -> Any:
    """Everything about a graph but names and the values of its initializers."""
    import onnx_ir

    stored = _read(model)
    numbers: dict[str, str] = {v.name: f"initializer {i}" for i, v in enumerate(stored)}
    nodes = []
    for node in model.graph:
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                numbers.setdefault(value.name, f"value {len(numbers)}")
        made = onnx_ir.serde.serialize_node(node)
        made.input[:] = [numbers.get(n, n) for n in made.input]
        made.output[:] = [numbers.get(n, n) for n in made.output]
        made.ClearField("name")
        made.ClearField("metadata_props")
        nodes.append(made.SerializeToString(deterministic=True))
    kinds = [(v.const_value.dtype, tuple(v.const_value.shape)) for v in stored]
    return nodes, kinds, [numbers.get(v.name, v.name) for v in model.graph.outputs]


def _difference(after: Any, probe: Any) -> str:
    known = {v.name for v in _read(after)}
    gone = [v.name for v in _read(probe) if v.name not in known and not v.name.startswith("val_")]
    which = f", such as {gone[0]!r}" if gone else ""
    return (
        "the exporter simplified the graph because of the values of weights (equal ones, zeros, "
        f"ones{which})"
    )


def _program(before: Any, own: set[str], wanted: Iterable[str]) -> bytes:
    """The part of a model that computes values from weights alone, as a model of its own."""
    import onnx
    import onnx_ir

    initial = before.graph.initializers
    constant = set(initial)
    makers: dict[str, Any] = {}
    for node in before.graph:
        if (
            all(v.name in constant for v in _operands(node))
            and not node.op_type.startswith(_RANDOM)
            and not node.domain
            and not any(a.type == onnx_ir.AttributeType.GRAPH for a in node.attributes.values())
        ):
            constant.update(v.name for v in node.outputs)
            makers.update((v.name, node) for v in node.outputs)
    needed: set[int] = set()
    read: set[str] = set()
    stack = [n for n in wanted if n in makers]
    outputs = list(stack)
    while stack:
        name = stack.pop()
        if name not in makers:
            read.add(name)
        elif id(makers[name]) not in needed:
            needed.add(id(makers[name]))
            stack.extend(v.name for v in _operands(makers[name]))
    graph = onnx.GraphProto(name="constants")
    for node in before.graph:
        if id(node) in needed:
            made = graph.node.add()
            made.CopyFrom(onnx_ir.serde.serialize_node(node))
            if node.op_type == "CastLike":
                del made.input[1:]
                dtype = node.outputs[0].dtype or node.inputs[1].dtype
                if dtype is None:
                    made.op_type = "Identity"  # the result is compared with what it has to be
                else:
                    made.op_type = "Cast"
                    made.attribute.append(onnx.helper.make_attribute("to", int(dtype)))
    for name in sorted(read):
        if name in own:
            graph.input.append(onnx_ir.serde.serialize_value(initial[name]))
        else:
            graph.initializer.append(onnx_ir.serde.serialize_tensor(initial[name].const_value))
    graph.output.extend(
        onnx_ir.serde.serialize_value(v)
        for name in outputs
        for v in makers[name].outputs
        if v.name == name
    )
    opsets = [onnx.helper.make_opsetid(d, v) for d, v in before.opset_imports.items()]
    data: bytes = onnx.helper.make_model(graph, opset_imports=opsets).SerializeToString()
    return data


def _operands(node: Any) -> list[Any]:
    """The inputs that a node's value depends on; of a type alone it does not."""
    inputs = node.inputs[:1] if node.op_type == "CastLike" else node.inputs
    return [v for v in inputs if v is not None]


def _computed(program: bytes, tensors: Mapping[str, torch.Tensor]) -> Arrays:
    """All constants, and what the program computes from them."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    arrays = {name: _array(t) for name, t in tensors.items()}
    model = onnx.load_model_from_string(program)
    if model.graph.output:
        feeds = {i.name: arrays[i.name] for i in model.graph.input}
        results: Any = ReferenceEvaluator(model).run(None, feeds)
        for value, result in zip(model.graph.output, results, strict=True):
            arrays[value.name] = np.asarray(result)
    return arrays


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype != torch.bfloat16:
        array: np.ndarray[Any, Any] = tensor.numpy()
        return array
    import ml_dtypes

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _identical(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()
    )
