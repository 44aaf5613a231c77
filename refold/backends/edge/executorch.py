"""Target ``executorch``: an ExecuTorch program (.pte) whose layers run in XNNPACK."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from refold.backends import flat
from refold.backends.base import Artifact, Capabilities, Runner, Target
from refold.backends.edge.static import StaticProgram, keep_pooled_dims, quiet
from refold.errors import BackendError
from refold.rewrite import cost

if TYPE_CHECKING:
    from refold.graph.program import Program

_BOOKKEEPING = frozenset({"getitem", "executorch_call_delegate"})


@dataclass(frozen=True)
class ExecuTorchContent:
    """A program in memory, how the model's own calls map onto it, and its operators."""

    data: bytes
    signature: flat.Signature
    nodes: int
    delegates: int


class ExecuTorchTarget(Target):
    """Lowers through ExecuTorch's edge dialect; what XNNPACK cannot run has portable kernels."""

    name = "executorch"
    suffix = ".pte"
    capabilities = Capabilities(
        packages=("executorch",),
        extra="executorch",
        costs=cost.on_cpu("executorch"),
        shares_weights=(),
        complex_calls=False,
        dtypes=("float32", "float16", "bfloat16"),
        static=True,
        verified="run and compared on the CPU",
    )

    def lower(self, program: Program, gm: fx.GraphModule, options: Any) -> Artifact:
        static = StaticProgram.of(program, gm, "ExecuTorch")
        keep_pooled_dims(static.module.graph)
        static.module.recompile()
        data, delegated, left = _lower(static)
        content = ExecuTorchContent(
            data, static.signature, sum(delegated) + left.total(), len(delegated)
        )
        notes = list(static.notes)
        if left:
            kinds = ", ".join(f"{n} {name}" for name, n in sorted(left.items()))
            notes.append(
                f"XNNPACK takes the graph in {len(delegated)} pieces; left to portable kernels, "
                f"which are slower: {kinds}"
            )
        return Artifact(content, tuple(notes))

    def load(self, artifact: Artifact, options: Any) -> Runner:
        content: ExecuTorchContent = artifact.content
        return _runner(content.data, content.signature)

    def load_file(self, path: Path, program: Program) -> Runner:
        return _runner(path.read_bytes(), flat.flatten(program.graph_module, program)[1])

    def save(self, artifact: Artifact, folder: Path, name: str) -> None:
        (folder / name).write_bytes(artifact.content.data)

    def stats(self, artifact: Artifact) -> dict[str, int]:
        content: ExecuTorchContent = artifact.content
        return {
            "nodes": content.nodes,
            "delegates": content.delegates,
            "bytes": len(content.data),
        }


def _runner(data: bytes, signature: flat.Signature) -> Runner:
    loaded = load_program(data)

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [t.detach().cpu().contiguous() for t in signature.tensors(args, kwargs)]
        try:
            results = loaded.execute(tensors)
        except RuntimeError as error:
            raise BackendError(f"ExecuTorch failed to run the model: {error}") from error
        return signature.rebuild([torch.as_tensor(r) for r in results])

    return run


def _lower(static: StaticProgram) -> tuple[bytes, list[int], Counter[str]]:
    """The program, the operators in each XNNPACK delegate, and those outside of any."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with quiet():
        try:
            edge = to_edge_transform_and_lower(static.export(), partitioner=[XnnpackPartitioner()])
            delegated, left = _count(edge.exported_program().graph_module)
            data = edge.to_executorch().buffer  # this rewrites the graph
        except Exception as error:
            # Each stage raises errors of its own classes, which share no base but Exception.
            text = " ".join(str(error).split())[:300] or type(error).__name__
            raise BackendError(
                f"ExecuTorch cannot lower the model: {text}{static.hints(str(error))}"
            ) from error
    return data, delegated, left


def _count(gm: fx.GraphModule) -> tuple[list[int], Counter[str]]:
    pieces: list[Any] = [m for n, m in gm.named_children() if n.startswith("lowered_module")]
    graphs: list[fx.Graph] = [m.original_module.graph_module.graph for m in pieces]
    return [_operators(g).total() for g in graphs], _operators(gm.graph)


def _operators(graph: fx.Graph) -> Counter[str]:
    names: list[str] = [n.target.__name__ for n in graph.nodes if n.op == "call_function"]
    return Counter(n.split(".")[1] if "." in n else n for n in names if n not in _BOOKKEEPING)


@dataclass(frozen=True)
class Loaded:
    """A program that can be run; the runtime reads the bytes where they are.

    A method alone does not keep the bytes alive, so it is called only here.
    """

    data: bytes
    program: Any
    method: Any

    def execute(self, tensors: list[torch.Tensor]) -> list[Any]:
        results: list[Any] = self.method.execute(tensors)
        return results


def load_program(data: bytes) -> Loaded:
    """Loads a program, which is executed on a list of tensors."""
    try:
        with quiet():
            from executorch.runtime import Runtime

            program = Runtime.get().load_program(data)
            return Loaded(data, program, program.load_method("forward"))
    except RuntimeError as error:
        raise BackendError(f"ExecuTorch cannot load the program: {error}") from error
