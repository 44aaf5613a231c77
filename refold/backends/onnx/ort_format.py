"""Target ``ort-format``: ONNX Runtime's own file format (.ort), which minimal builds load too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx

from refold.backends import flat
from refold.backends.base import Artifact, Runner, Target
from refold.backends.onnx import export, session
from refold.backends.onnx.targets import OnnxRuntimeOptions, OnnxRuntimeTarget
from refold.errors import BackendError, UsageError, first_line
from refold.scratch import Scratch

if TYPE_CHECKING:
    from refold.graph.program import Program


@dataclass(frozen=True)
class OrtContent:
    """A file in memory, how the model's own calls map onto it, and the bytes of its weights."""

    data: bytes
    signature: flat.Signature
    weights: int


class OrtFormatTarget(Target):
    """Lowers through ONNX to a .ort file at the level that every processor can run."""

    name = "ort-format"
    suffix = ".ort"
    capabilities = replace(
        OnnxRuntimeTarget.capabilities,
        shares_weights=(),
        verified="run and compared on the CPU",
    )
    options = OnnxRuntimeOptions

    def lower(self, program: Program, gm: fx.GraphModule, options: OnnxRuntimeOptions) -> Artifact:
        if options.requantise is not None or options.accuracy_level != 4:
            raise UsageError(
                "the .ort format names no 2 or 4-bit integers, and its runtime fuses none: drop "
                "requantise and accuracy_level, or use target='ort'"
            )
        lowered = export.lower(program, gm, options.opset)
        content: export.OnnxContent = lowered.content
        data = _convert(content.model, flat.half_precision(gm))
        weights = export.weight_bytes(content.model)
        return Artifact(OrtContent(data, content.signature, weights), lowered.notes)

    def load(self, artifact: Artifact, options: OnnxRuntimeOptions) -> Runner:
        content: OrtContent = artifact.content
        signature = content.signature
        opened = session.open_session(content.data, threads=options.threads)

        def run(*args: Any, **kwargs: Any) -> Any:
            tensors = signature.tensors(args, kwargs)
            return signature.rebuild(session.run_session(opened, tensors))

        return run

    def save(self, artifact: Artifact, folder: Path, name: str) -> None:
        (folder / name).write_bytes(artifact.content.data)

    def stats(self, artifact: Artifact) -> dict[str, int]:
        content: OrtContent = artifact.content
        return {"nodes": count_nodes(content.data), "bytes": content.weights}

    def load_file(self, path: Path, program: Program) -> Runner:
        return session.load_file(path, program)


def _convert(model: Any, hint: str) -> bytes:
    """Writes the file with the optimizations that depend on no processor.

    Those that do are recorded in it, and replayed where the file is loaded.
    """
    import onnxruntime as runtime

    with Scratch() as folder:
        source, written = folder / "model.onnx", folder / "model.ort"
        export.save(model, folder, source.name)
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(written)
        options.add_session_config_entry("session.save_model_format", "ORT")
        options.add_session_config_entry("optimization.minimal_build_optimizations", "save")
        try:
            runtime.InferenceSession(
                str(source), options, providers=["CPUExecutionProvider"],
                disabled_optimizers=list(session.LOSSY),
            )  # fmt: skip
        except Exception as error:
            # The bindings raise classes of their own that share no base but Exception.
            text = first_line(error)
            raise BackendError(
                f"ONNX Runtime cannot convert the model: {text}{export.places(model, text)}{hint}"
            ) from error
        return written.read_bytes()


def count_nodes(data: bytes) -> int:
    """Operator nodes of a .ort file."""
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs import InferenceSession

    return InferenceSession.InferenceSession.GetRootAs(data, 0).Model().Graph().NodesLength()
