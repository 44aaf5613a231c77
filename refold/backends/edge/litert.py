"""Target ``litert``: a LiteRT model (.tflite), run by XNNPACK on the CPU."""

from __future__ import annotations

import itertools
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
    import numpy as np

    from refold.graph.program import Program

_NARROW = "LiteRT computes integers of 64 bits in 32: larger ones are refused as inputs"


@dataclass(frozen=True)
class LiteRtContent:
    """A model in memory and how the model's own calls map onto it.

    Attributes:
        data: the model.
        signature: of the model's own calls.
        dtypes: of the results, which the converter may have narrowed.
    """

    data: bytes
    signature: flat.Signature
    dtypes: tuple[torch.dtype, ...]


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
        dtypes = _dtypes(static.module.graph)
        taken = [*dtypes, *(t.dtype for t in static.tensors)]
        notes = (*static.notes, *([_NARROW] if torch.int64 in taken else []))
        return Artifact(LiteRtContent(_convert(static), static.signature, dtypes), notes)

    def load(self, artifact: Artifact, options: ThreadOptions) -> Runner:
        return _runner(artifact.content, options.threads)

    def load_file(self, path: Path, program: Program) -> Runner:
        module, signature = flat.flatten(program.graph_module, program)
        return _runner(LiteRtContent(path.read_bytes(), signature, _dtypes(module.graph)), 1)

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


def _dtypes(graph: fx.Graph) -> tuple[torch.dtype, ...]:
    returned: Any = graph.output_node().args[0]
    return tuple(n.meta["val"].dtype for n in returned)


def _runner(content: LiteRtContent, threads: int) -> Runner:
    interpreter = open_interpreter(content.data, threads=threads)
    runner = interpreter.get_signature_runner()
    (described,) = interpreter.get_signature_list().values()
    taken = {name: d["dtype"] for name, d in runner.get_input_details().items()}

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = content.signature.tensors(args, kwargs)
        feeds = {f"args_{i}": t.detach().cpu().contiguous().numpy() for i, t in enumerate(tensors)}
        try:
            results = runner(**{n: _narrowed(feeds[n], taken[n]) for n in described["inputs"]})
        except (RuntimeError, ValueError) as error:
            raise BackendError(f"LiteRT failed to run the model: {error}") from error
        made = [torch.as_tensor(results[f"output_{i}"]) for i in range(len(results))]
        return content.signature.rebuild(
            [_widened(r, d) for r, d in itertools.zip_longest(made, content.dtypes[: len(made)])]
        )

    return run


def _narrowed(array: np.ndarray, dtype: Any) -> np.ndarray:
    """An input in the integers that the converter made of its own, if they hold it."""
    if array.dtype.kind != "i" or array.dtype == dtype:
        return array
    narrow = array.astype(dtype)
    if (narrow != array).any():
        raise BackendError(f"LiteRT takes {narrow.dtype}, which cannot hold {abs(array).max()}")
    return narrow


def _widened(result: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return result.long() if (result.dtype, dtype) == (torch.int32, torch.int64) else result


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
