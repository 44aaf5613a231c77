"""Target ``ort``: the folded graph in ONNX Runtime, on the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from refold.backends import flat, onnx
from refold.backends.base import Artifact, Runner, missing
from refold.errors import BackendError, MissingDependencyError, UsageError

if TYPE_CHECKING:
    from refold.frontends.export import Program


@dataclass(frozen=True)
class OnnxRuntimeOptions(onnx.OnnxOptions):
    """Options of the ``ort`` target.

    Attributes:
        opset: version of the standard operator set, 18 to 23.
        threads: threads inside one operator; 0 lets ONNX Runtime choose.
    """

    threads: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threads < 0:
            raise UsageError(
                f"threads must be 0 (ONNX Runtime chooses) or more, got {self.threads}"
            )


class OnnxRuntimeTarget:
    """Lowers through ONNX and runs the model in ONNX Runtime."""

    name = "ort"
    suffix = ".onnx"
    options = OnnxRuntimeOptions

    def available(self) -> str | None:
        return missing(("onnx", "onnxscript", "onnxruntime"), "ort")

    def lower(self, program: Program, gm: fx.GraphModule, options: OnnxRuntimeOptions) -> Artifact:
        return onnx.lower(program, gm, options.opset)

    def load(self, artifact: Artifact, options: OnnxRuntimeOptions) -> Runner:
        return load(artifact.content, threads=options.threads)

    def save(self, artifact: Artifact, folder: Path, name: str) -> None:
        onnx.save(artifact.content.model, folder, name)

    def stats(self, artifact: Artifact) -> dict[str, int]:
        return onnx.stats(artifact.content.model)


def load(content: onnx.OnnxContent, *, threads: int = 0) -> Runner:
    """Loads a model in memory into a session with the model's own call convention."""
    _require_runtime()
    import onnx_ir

    signature = content.signature
    for value in content.model.graph.inputs:
        if value.dtype == onnx_ir.DataType.BFLOAT16:
            raise BackendError(
                f"input {value.name} is bfloat16, which NumPy and so ONNX Runtime's Python API "
                "cannot hold: compile a float32 or float16 model for this target"
            )
    with tempfile.TemporaryDirectory(prefix="refold-") as folder:
        onnx.save(content.model, Path(folder), "model.onnx")
        session = open_session(Path(folder) / "model.onnx", threads=threads)

    def run(*args: Any, **kwargs: Any) -> Any:
        return signature.rebuild(run_session(session, signature.tensors(args, kwargs)))

    return run


def load_file(path: Path, program: Program) -> Runner:
    """Loads an ONNX file as a candidate for the traced model: by names, else by position."""
    session = open_session(path)
    _, signature = flat.flatten(program.graph_module, program)
    order = []
    for kind, wanted, nodes in (
        ("inputs", signature.input_names, session.get_inputs()),
        ("outputs", signature.output_names, session.get_outputs()),
    ):
        got = [n.name for n in nodes]
        if len(got) != len(wanted):
            raise BackendError(
                f"{path} has {len(got)} {kind} ({', '.join(got)}), the model has {len(wanted)} "
                f"({', '.join(wanted)})"
            )
        by_name = set(got) == set(wanted)
        order.append([wanted.index(n) for n in got] if by_name else list(range(len(got))))
    inputs, outputs = order

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = signature.tensors(args, kwargs)
        results = run_session(session, [tensors[i] for i in inputs])
        return signature.rebuild([results[outputs.index(i)] for i in range(len(results))])

    return run


def open_session(model: Path | bytes, *, threads: int = 0) -> Any:
    """Opens a file, or its bytes, with ONNX Runtime's default optimizations on the CPU.

    All but one, which changes the numbers of quantised graphs.
    """
    _require_runtime()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        source = model if isinstance(model, bytes) else str(model)
        return onnxruntime.InferenceSession(
            source,
            options,
            providers=["CPUExecutionProvider"],
            # It rounds float weights and biases between quantised activations to 8 and 32 bits.
            disabled_optimizers=["WeightBiasQuantization"],
        )
    except Exception as error:
        # The bindings raise classes of their own that share no base but Exception.
        raise BackendError(f"ONNX Runtime cannot load the model: {_first_line(error)}") from error


def _require_runtime() -> None:
    reason = missing(("onnxruntime",), "ort")
    if reason:
        raise MissingDependencyError(reason)


def run_session(session: Any, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Runs a session over torch tensors, in the order of the session's inputs."""
    feeds = {}
    for node, tensor in zip(session.get_inputs(), tensors, strict=True):
        feeds[node.name] = tensor.detach().cpu().contiguous().numpy()
    try:
        results = session.run(None, feeds)
    except Exception as error:
        raise BackendError(f"ONNX Runtime failed to run the model: {_first_line(error)}") from error
    return [torch.as_tensor(r) for r in results]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
