"""The folded graph as an ONNX model, with the origin of every node in its metadata."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.export import Dim

from refold.backends import base, flat
from refold.backends.base import LEFT_ALONE, Artifact
from refold.backends.onnx import initializers, pools, quantised, resizes
from refold.backends.onnx.mend import keep_pads_before_max_pool
from refold.backends.onnx.shift_add import choice as shift_add
from refold.backends.onnx.shift_add import rewrite as shift_add_layers
from refold.errors import BackendError, RefitError, first_line
from refold.graph.constants import stored
from refold.graph.nodes import symbolic_dims

if TYPE_CHECKING:
    from refold.graph.program import Program

# Protobuf ends at 2 GiB; what is not weights needs room too.
_EXTERNAL_DATA_BYTES = 1_500_000_000
_SYMBOL = re.compile(r"(?<!\w)[su]\d+(?!\w)")


@dataclass(frozen=True)
class OnnxContent:
    """An ONNX model in memory (``onnx_ir.Model``) and how the model's own calls map onto it.

    ``shift_add`` says what became of the shift-add layers, ``initializers`` how weights follow from
    the graph's constants, where the compilation keeps a recipe.
    """

    model: Any
    signature: flat.Signature
    shift_add: tuple[shift_add_layers.Written, ...] = ()
    initializers: initializers.Initializers | None = None


def refit(artifact: Artifact, tensors: Mapping[str, torch.Tensor]) -> Artifact:
    """The model with other constants; the given one stays as it is.

    Raises:
        RefitError: exporting these constants would leave another graph.
    """
    content: OnnxContent = artifact.content
    if content.initializers is None:
        raise RefitError("shift-add layers are stored packed: export again with the new weights")
    model = initializers.replaced(content.model, content.initializers.values(tensors))
    return replace(artifact, content=replace(content, model=model))


def lower(
    program: Program,
    gm: fx.GraphModule,
    asked: int,
    kernels: shift_add.Kernels = shift_add.ANY,
    *,
    refits: bool = False,
) -> Artifact:
    """Exports the folded graph to an ONNX model in memory.

    Args:
        program: what the graph was traced from.
        gm: the graph.
        asked: version of the operator set, unless a shift-add layer needs a later one.
        kernels: what the runtime behind the file multiplies fast.
        refits: keep how the stored weights follow from the graph's constants.
    """
    module, signature = flat.flatten(gm, program)
    quantised.spell_out(module.graph)
    pools.divide_as_asked(module.graph)
    resizes.check(module.graph)
    module.recompile()
    layers = shift_add_layers.prepare(module, kernels)
    opset = max([asked, *(layer.choice.opset for layer in layers)])
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    wanted = [symbolic_dims(n) for n in inputs]
    exported = _re_export(module, signature.tensors(program.args, program.kwargs), wanted)
    try:
        onnx_program, raw = _to_onnx(exported, opset, keep=refits)
    except Exception as error:  # of the exporter, or of the passes of another library that it runs
        raise BackendError(
            f"the ONNX exporter cannot translate the folded graph: {_root_cause(error)}"
            f"{base.places(module.graph, _translating(error))}\n  fix: {_remedy(error)}"
        ) from error
    model = onnx_program.model
    if model.opset_imports.get("") != opset:
        raise BackendError(
            f"asked for opset {opset}, the exporter wrote {model.opset_imports.get('')}"
        )
    _annotate(model, onnx_program.exported_program)
    _name(model, signature)
    related = None
    if raw is not None and not layers:
        _name(raw, signature)  # an output may be an initializer
        related = initializers.of(raw, model, _optimized, stored(module))
    notes = _name_dims(model, program, signature, wanted)
    written = shift_add_layers.rewrite(model, layers) if layers else ()
    notes += shift_add_layers.notes(layers, asked, opset)
    padded = keep_pads_before_max_pool(model)
    if padded:
        notes.append(
            f"{padded} zero Pad before MaxPool written with explicit axes: ONNX Runtime would "
            "otherwise fuse it into a pad with -inf"
        )
    if signature.written:
        names = ", ".join(signature.written)
        notes.append(f"the model writes its input {names}; {LEFT_ALONE}")
    return Artifact(OnnxContent(model, signature, written, related), tuple(notes))


def save(model: Any, folder: Path, name: str) -> None:
    """Writes the model; large weights go to ``<name>.data`` beside it."""
    import onnx_ir

    external = f"{name}.data" if weight_bytes(model) > _EXTERNAL_DATA_BYTES else None
    onnx_ir.save(model, folder / name, external_data=external)


def weight_bytes(model: Any) -> int:
    """Bytes of all initializers."""
    values = model.graph.initializers.values()
    return sum(v.const_value.nbytes for v in values if v.const_value is not None)


def places(model: Any, text: str) -> str:
    """Where the nodes come from that a runtime's message names: a few lines, or nothing."""
    words = set(re.findall(r"\w+", text))
    found = [n for n in model.graph if n.name in words] or [
        n for n in model.graph if n.op_type in words
    ]
    lines = []
    for node in found[:3]:
        module = node.metadata_props.get("refold.modules", "")
        source = node.metadata_props.get("refold.source", "")
        where = f" of module {module!r}" if module else ""
        lines.append(f"\n  {node.op_type} {node.name}{where}{f' at {source}' if source else ''}")
    return "".join(lines)


def stats(model: Any) -> dict[str, int]:
    """Operator nodes and bytes of weights."""
    return {"nodes": sum(1 for _ in model.graph), "bytes": weight_bytes(model)}


def _re_export(
    module: fx.GraphModule, tensors: list[torch.Tensor], dims: list[list[int]]
) -> torch.export.ExportedProgram:
    shapes = tuple(dict.fromkeys(d, Dim.AUTO) for d in dims)
    # A failed export can leave its example tensors unusable: it gets fresh copies.
    with torch.no_grad():
        args = tuple(t.clone() for t in tensors)
        return torch.export.export(module, args, dynamic_shapes=shapes, strict=False)


def _to_onnx(exported: torch.export.ExportedProgram, opset: int, *, keep: bool) -> tuple[Any, Any]:
    """The exported model and, if it is kept, what it was before it was optimized."""
    with _quiet():
        made: Any = torch.onnx.export(
            exported, dynamo=True, opset_version=opset, verbose=False, optimize=not keep
        )
        raw = made.model.clone() if keep else None
        if keep:
            made.optimize()
        return made, raw


def _optimized(model: Any) -> Any:
    made = torch.onnx.ONNXProgram(model, None)
    made.optimize()
    return made.model


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _translating(error: BaseException) -> str:
    """What the exporter says of the node that it was at; its other sentences name none."""
    current: BaseException | None = error
    while current is not None:
        if "translating node" in str(current):
            return str(current).partition("translating node")[2]
        current = current.__cause__
    return str(error)


def _remedy(error: BaseException) -> str:
    missing_argument = re.search(r"Required parameter '(\w+)' is not provided", _root_cause(error))
    if missing_argument:
        return f"give that call its argument {missing_argument.group(1)!r}, which ONNX must know"
    return "write that operation with others, or keep it outside of the compiled module"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's chatter about optional packages and its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _annotate(model: Any, exported: torch.export.ExportedProgram) -> None:
    """Replaces the exporter's metadata, which holds source paths, by refold's own."""
    import onnx_ir

    from refold._version import __version__

    origins = {n.name: (n.meta.get("custom") or {}).get("refold") for n in exported.graph.nodes}
    for holder in [model, model.graph, *model.graph.inputs, *model.graph.outputs]:
        _strip(holder.metadata_props)
    for function in model.functions.values():
        _strip(function.metadata_props)
        for node in function:
            _strip(node.metadata_props)
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        fx_node = re.match(r"%(\w+)", node.metadata_props.get("pkg.torch.onnx.fx_node", ""))
        _strip(node.metadata_props)
        for output in node.outputs:
            _strip(output.metadata_props)
        origin = origins.get(fx_node.group(1)) if fx_node else None
        if not origin:
            continue
        for key, value in (
            ("modules", ", ".join(origin["modules"])),
            ("source", origin.get("source", "")),
            ("nodes", ", ".join(origin["nodes"])),
            ("rules", ", ".join(origin["rules"])),
        ):
            if value:
                node.metadata_props[f"refold.{key}"] = value
    model.metadata_props["refold.version"] = __version__


def _strip(properties: Any) -> None:
    for key in [k for k in properties if k.startswith("pkg.torch.")]:
        del properties[key]


def _name(model: Any, signature: flat.Signature) -> None:
    graph = model.graph
    reserved = {*signature.input_names, *signature.output_names}
    for node in graph:
        for value in node.outputs:
            if value.name in reserved:
                value.name = f"{value.name}_value"
    for value, name in [
        *zip(graph.inputs, signature.input_names, strict=True),
        *zip(graph.outputs, signature.output_names, strict=True),
    ]:
        value.name = name


def _name_dims(
    model: Any, program: Program, signature: flat.Signature, wanted: list[list[int]]
) -> list[str]:
    """Gives symbolic dimensions telling names; returns notes on those that became static."""
    specs = [s for s in program.inputs if s.dtype is not None]
    names: dict[str, str] = {}
    notes = []
    for value, spec, dims in zip(model.graph.inputs, specs, wanted, strict=True):
        for dim in dims:
            symbol = value.shape[dim]
            if isinstance(symbol, int):
                notes.append(f"dimension {dim} of {value.name} became static in ONNX ({symbol})")
            elif _SYMBOL.fullmatch(str(symbol.value)):
                own = str(spec.sizes[dim])
                chosen = "batch" if dim == spec.batch else own
                telling = chosen if not _SYMBOL.fullmatch(chosen) else f"{value.name}_{dim}"
                names.setdefault(str(symbol.value), program.names.get(own, telling))
    import onnx_ir

    for value in _values(model.graph):
        if value.shape is None or value.shape.is_static():
            continue
        value.shape = onnx_ir.Shape(
            [
                d
                if isinstance(d, int) or d.value is None
                else _SYMBOL.sub(lambda m: names.get(m.group(), m.group()), str(d.value))
                for d in value.shape
            ]
        )
    return notes


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs
