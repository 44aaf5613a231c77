"""Target ``litert``: a LiteRT model (.tflite), run by XNNPACK on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from refold.backends import flat
from refold.backends.base import Artifact, Capabilities, Runner, Target
from refold.backends.edge.static import StaticProgram, ThreadOptions, quiet
from refold.errors import BackendError
from refold.rewrite import cost
from refold.scratch import Scratch

if TYPE_CHECKING:
    from refold.graph.program import Program


@dataclass(frozen=True)
class LiteRtContent:
    """A model in memory and how the model's own calls map onto it."""

    data: bytes
    signature: flat.Signature


class LiteRtTarget(Target):
    """Lowers through LiteRT Torch."""

    name = "litert"
    suffix = ".tflite"
    options = ThreadOptions
    capabilities = Capabilities(
        packages=("litert_torch", "ai_edge_litert"),
        extra="litert",
        costs=cost.on_cpu("litert"),
        shares_weights=(),
        complex_calls=False,
        dtypes=("float32",),
        static=True,
        verified="run and compared on the CPU",
    )

    def lower(self, program: Program, gm: fx.GraphModule, options: ThreadOptions) -> Artifact:
        static = StaticProgram.of(program, gm, "LiteRT")
        return Artifact(LiteRtContent(_convert(static), static.signature), static.notes)

    def load(self, artifact: Artifact, options: ThreadOptions) -> Runner:
        content: LiteRtContent = artifact.content
        return _runner(content.data, content.signature, options.threads)

    def load_file(self, path: Path, program: Program) -> Runner:
        return _runner(path.read_bytes(), flat.flatten(program.graph_module, program)[1], 1)

    def save(self, artifact: Artifact, folder: Path, name: str) -> None:
        (folder / name).write_bytes(artifact.content.data)

    def stats(self, artifact: Artifact) -> dict[str, int]:
        data = artifact.content.data
        return {"nodes": count_operators(data), "bytes": len(data)}


def _convert(static: StaticProgram) -> bytes:
    with quiet(), Scratch() as folder:
        import litert_torch

        path = folder / "model.tflite"
        try:
            litert_torch.convert(static.module.eval(), static.tensors).export(str(path))
        except Exception as error:
            # MLIR, JAX and the converter raise classes that share no base but Exception.
            text = " ".join(str(error).split())[:300] or type(error).__name__
            raise BackendError(
                f"LiteRT cannot convert the model: {text}{static.hints(str(error))}"
            ) from error
        return path.read_bytes()


def _runner(data: bytes, signature: flat.Signature, threads: int) -> Runner:
    interpreter = open_interpreter(data, threads=threads)
    runner = interpreter.get_signature_runner()
    (described,) = interpreter.get_signature_list().values()

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = signature.tensors(args, kwargs)
        feeds = {f"args_{i}": t.detach().cpu().contiguous().numpy() for i, t in enumerate(tensors)}
        try:
            results = runner(**{n: feeds[n] for n in described["inputs"]})
        except (RuntimeError, ValueError) as error:
            raise BackendError(f"LiteRT failed to run the model: {error}") from error
        return signature.rebuild(
            [torch.as_tensor(results[f"output_{i}"]) for i in range(len(results))]
        )

    return run


def open_interpreter(data: bytes, *, threads: int = 1) -> Any:
    """Opens a model for the CPU."""
    from ai_edge_litert.interpreter import Interpreter

    try:
        return Interpreter(model_content=data, num_threads=threads)
    except (RuntimeError, ValueError) as error:
        raise BackendError(f"LiteRT cannot load the model: {error}") from error


def count_operators(data: bytes) -> int:
    """Operators of a model, before the runtime hands them to XNNPACK."""
    from ai_edge_litert import schema_py_generated as schema

    return schema.Model.GetRootAs(data, 0).Subgraphs(0).OperatorsLength()
