"""Target ``torch``: the folded graph itself, run eagerly; saved as an exported program (.pt2)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.export import Dim, ShapesCollection
from torch.utils import _pytree as pytree

from refold.backends.base import Artifact, Runner
from refold.errors import BackendError
from refold.graph.kinds import census

if TYPE_CHECKING:
    from refold.frontends.export import Program


@dataclass(frozen=True)
class TorchOptions:
    """The eager target has no options."""


@dataclass(frozen=True)
class _Content:
    # Not the whole program: that holds the unfolded weights too.
    graph_module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class TorchTarget:
    """Runs the folded graph in eager PyTorch."""

    name = "torch"
    suffix = ".pt2"
    options = TorchOptions

    def available(self) -> str | None:
        return None

    def lower(self, program: Program, gm: fx.GraphModule, options: TorchOptions) -> Artifact:
        return Artifact(_Content(gm, program.args, program.kwargs))

    def load(self, artifact: Artifact, options: TorchOptions) -> Runner:
        runner: Runner = artifact.content.graph_module
        return runner

    def save(self, artifact: Artifact, folder: Path, name: str) -> None:
        content: _Content = artifact.content
        program = re_export(content.graph_module, content.args, content.kwargs)
        try:
            torch.export.save(program, folder / name)
        except NotImplementedError as error:
            raise BackendError(f"the program cannot be written as a .pt2: {error}") from error

    def stats(self, artifact: Artifact) -> dict[str, int]:
        gm = artifact.content.graph_module
        return {"nodes": sum(census(gm.graph).values()), "bytes": constant_bytes(gm)}


def constant_bytes(gm: fx.GraphModule) -> int:
    """Bytes of all parameters and buffers, tied ones counted once."""
    return sum(t.numel() * t.element_size() for t in [*gm.parameters(), *gm.buffers()])


def re_export(
    gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.export.ExportedProgram:
    """Exports an edited graph again, with the same dimensions left symbolic.

    Export of a graph that fails can leave its example tensors unusable, so it gets fresh copies.
    """
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    shapes = ShapesCollection()
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for leaf, node in zip(pytree.tree_leaves((args, kwargs)), placeholders, strict=True):
        if isinstance(leaf, torch.Tensor):
            dims = symbolic_dims(node)
            if dims:
                shapes[leaf] = dict.fromkeys(dims, Dim.AUTO)
    dynamic: Any = shapes if len(shapes) else None
    with torch.no_grad():
        return torch.export.export(gm, tuple(args), kwargs, dynamic_shapes=dynamic, strict=False)


def symbolic_dims(node: fx.Node) -> list[int]:
    """The dimensions of an input that the trace left free."""
    value: Any = node.meta["val"]
    return [i for i, size in enumerate(value.shape) if isinstance(size, torch.SymInt)]
