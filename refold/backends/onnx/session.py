"""Runs ONNX models in ONNX Runtime, on the CPU, with the call convention of the model."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from refold.backends import flat
from refold.backends.base import Runner, missing
from refold.backends.onnx import export
from refold.errors import BackendError, MissingDependencyError, first_line
from refold.scratch import Scratch

if TYPE_CHECKING:
    from refold.graph.program import Program

# Optimizations that change numbers: float weights and biases between quantised activations would be
# rounded to 8 and 32 bits.
LOSSY = ("WeightBiasQuantization",)


def load(
    content: export.OnnxContent,
    *,
    threads: int = 0,
    accuracy_level: int = 4,
    dense: bool = False,
    later: bool = False,
) -> Runner:
    """Loads a model in memory into a session with the model's own call convention.

    The other keywords are those of :func:`open_session`.

    Args:
        content: the model.
        threads: as there.
        accuracy_level: as there.
        dense: as there.
        later: open the session at the first call: it has weights of its own, and whoever only
            writes the file never needs it.
    """
    _require_runtime()
    import onnx_ir

    signature = content.signature
    for value in content.model.graph.inputs:
        if value.dtype == onnx_ir.DataType.BFLOAT16:
            raise BackendError(
                f"input {value.name} is bfloat16, which NumPy and so ONNX Runtime's Python API "
                "cannot hold: compile a float32 or float16 model for this target"
            )

    @functools.cache
    def opened() -> Any:
        with Scratch() as folder:
            export.save(content.model, folder, "model.onnx")
            return open_session(
                folder / "model.onnx",
                threads=threads,
                accuracy_level=accuracy_level,
                dense=dense,
            )

    first = threading.Lock()

    def run(*args: Any, **kwargs: Any) -> Any:
        with first:
            session = opened()
        return signature.rebuild(run_session(session, signature.tensors(args, kwargs)))

    if not later:
        opened()
    return run


def load_file(path: Path, program: Program) -> Runner:
    """Loads an ONNX file as a candidate for the traced model: by names, else by position."""
    session = open_session(path)
    _, signature = flat.flatten(program.graph_module, program)
    inputs, outputs = flat.match(
        path, signature, [n.name for n in session.get_inputs()],
        [n.name for n in session.get_outputs()],
    )  # fmt: skip

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = signature.tensors(args, kwargs)
        results = run_session(session, [tensors[i] for i in inputs])
        return signature.rebuild([results[outputs.index(i)] for i in range(len(results))])

    return run


def open_session(
    model: Path | bytes, *, threads: int = 0, accuracy_level: int = 4, dense: bool = False
) -> Any:
    """Opens a file, or its bytes, with ONNX Runtime's default optimizations on the CPU.

    All but one, which changes the numbers of quantised graphs.

    Args:
        model: the file, or what it holds.
        threads: threads inside one operator; 0 lets ONNX Runtime choose.
        accuracy_level: of products with block-quantised weights: 4 rounds the activations to int8,
            0 computes in float32.
        dense: make such weights float when the file is loaded, as a reference for their kernels.
    """
    _require_runtime()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    level = str(accuracy_level)
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    if dense:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        source = model if isinstance(model, bytes) else str(model)
        return onnxruntime.InferenceSession(
            source,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(LOSSY),
        )
    except Exception as error:
        # The bindings raise classes of their own that share no base but Exception.
        raise BackendError(f"ONNX Runtime cannot load the model: {first_line(error)}") from error


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
        raise BackendError(f"ONNX Runtime failed to run the model: {first_line(error)}") from error
    return [torch.as_tensor(r) for r in results]
