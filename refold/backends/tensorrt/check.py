"""Preflight: what stands against a model before a build is tried, and where it came from.

Two levels: the table of :mod:`refold.backends.tensorrt.ops`, always, and the parser of TensorRT or
TensorRT-RTX where one is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from refold.backends.onnx import file
from refold.backends.tensorrt import library as libraries
from refold.backends.tensorrt import ops

_ORIGIN = ("modules", "source", "nodes", "rules")
# Inputs that hold positions, sizes or conditions, not data: their dtype is not the layer's.
_INDEX_INPUTS = {
    "Reshape": (1,), "Expand": (1,), "Slice": (1, 2, 3, 4), "Gather": (1,), "GatherElements": (1,),
    "GatherND": (1,), "ScatterND": (1,), "ScatterElements": (1,), "Pad": (1, 3), "Tile": (1,),
    "Squeeze": (1,), "Unsqueeze": (1,), "Split": (1,), "Resize": (1, 2, 3), "TopK": (1,),
    "OneHot": (0, 1), "Where": (0,), "CumSum": (1,), "ConstantOfShape": (0,), "RoiAlign": (2,),
    "QuantizeLinear": (2,), "DequantizeLinear": (1,), "NonMaxSuppression": (2,),
    "RotaryEmbedding": (3,), "If": (0,),
    "Loop": (0, 1), "ReverseSequence": (1,), "Trilu": (1,), "Dropout": (1, 2), "Attention": (3,),
}  # fmt: skip


@dataclass(frozen=True)
class Rejection:
    """Why a node is not accepted, and where it came from.

    Attributes:
        node: its name in the ONNX file; empty for the file as a whole.
        operator: its ONNX operator.
        reason: what is wrong.
        fix: what is known to help.
        found_by: the table, or the library whose parser said so.
        modules: the modules of the user's model behind it.
        source: the user's own line.
        nodes: the nodes of the traced graph.
        rules: the rewrites that made it what it is.
    """

    node: str
    operator: str
    reason: str
    fix: str
    found_by: str
    modules: str = ""
    source: str = ""
    nodes: str = ""
    rules: str = ""

    def __str__(self) -> str:
        place = f"{self.node} ({self.operator})" if self.node else "the model"
        lines = [f"{place}: {self.reason}  [{self.found_by}]"]
        for label, text in (
            ("module", self.modules),
            ("line", self.source),
            ("traced as", self.nodes),
            ("fix", self.fix),
        ):
            if text:
                lines.append(f"    {label:<9} {text}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Preflight:
    """What a check found.

    Attributes:
        version: the version whose table was used.
        rejections: what stands against the model.
        nodes: how many ONNX nodes were looked at.
        parser: the library whose parser read the model, or empty.
    """

    version: str
    rejections: tuple[Rejection, ...]
    nodes: int
    parser: str

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "accepted": not self.rejections}


def preflight(path: Path, version: ops.Version, library: libraries.Library | None) -> Preflight:
    """Checks an ONNX file against a version.

    Args:
        path: the file; one that refold wrote says where its nodes came from.
        version: whose table is used.
        library: whose parser shall read the file too.
    """
    model = file.read(path)
    found = list(_by_table(model, version))
    if library is not None:
        known = {r.node for r in found}
        found += [r for r in _by_parser(path, model, library) if not r.node or r.node not in known]
    count = sum(1 for _ in _every_node(model))
    return Preflight(str(version), tuple(found), count, str(library or ""))


def _by_table(model: Any, version: ops.Version) -> Iterator[Rejection]:
    table = f"table of {version}"
    opset = ops.opset_objection(model.opset_imports.get("", 0), version)
    if opset is not None:
        yield Rejection("", "", opset.reason, opset.fix, table)
    functions = {(f.domain, f.name) for f in model.functions.values()}
    for node in _every_node(model):
        if (node.domain, node.op_type) in functions:
            continue  # its body is looked at instead
        constants = {i: c for i, c in enumerate(map(_constant, node.inputs)) if c is not None}
        ranks = {i: len(v.shape) for i, v in enumerate(node.inputs) if v is not None and v.shape}
        used = sum(1 for o in node.outputs if o.name and (o.uses() or o.is_graph_output()))
        objections = ops.objections(
            node.op_type, node.domain, _dtypes(node), _attributes(node), constants, ranks, used,
            version,
        )  # fmt: skip
        for objection in objections:
            yield _rejection(node, objection.reason, objection.fix, table)


def _by_parser(path: Path, model: Any, library: libraries.Library) -> Iterator[Rejection]:
    parsed = libraries.parse(library, path)
    named = {n.name: n for n in _every_node(model)}
    for message in parsed.messages:
        node = named.get(message.node)
        text = message.text.strip() or "no reason was given"
        reason = f"{text} ({message.code})" if message.code else text
        fix = ops.known_fix(message.operator)
        if node is None:
            yield Rejection(message.node, message.operator, reason, fix, f"parser of {library}")
        else:
            yield _rejection(node, reason, fix, f"parser of {library}")


def _rejection(node: Any, reason: str, fix: str, found_by: str) -> Rejection:
    origin = {key: node.metadata_props.get(f"refold.{key}", "") for key in _ORIGIN}
    return Rejection(str(node.name), node.op_type, reason, fix, found_by, **origin)


def _every_node(model: Any) -> Iterator[Any]:
    """The nodes of the graph, of its subgraphs, and of its functions."""
    import onnx_ir

    yield from onnx_ir.traversal.RecursiveGraphIterator(model.graph)
    for function in model.functions.values():
        yield from onnx_ir.traversal.RecursiveGraphIterator(function)


def _constant(value: Any) -> Any:
    import onnx_ir

    if value is None:
        return None
    tensor = onnx_ir.convenience.get_const_tensor(value)
    # Large ones are weights: no rule asks for their values.
    return tensor.numpy() if tensor is not None and tensor.size <= 4096 else None


def _dtypes(node: Any) -> dict[str, str]:
    skipped = _INDEX_INPUTS.get(node.op_type, ())
    values = [v for i, v in enumerate(node.inputs) if i not in skipped]
    if node.op_type in ("Cast", "CastLike"):
        values += node.outputs
    return {str(v.name): str(v.dtype.name) for v in values if v is not None and v.dtype is not None}


def _attributes(node: Any) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def provenance(model: Any) -> dict[str, dict[str, str]]:
    """For each ONNX node by name: its operator, modules, source line, traced nodes and rules."""
    return {
        str(node.name): {
            "operator": node.op_type,
            **{key: node.metadata_props.get(f"refold.{key}", "") for key in _ORIGIN},
        }
        for node in _every_node(model)
    }
