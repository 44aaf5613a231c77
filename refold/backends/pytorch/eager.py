"""Target ``torch``: the folded graph itself, run eagerly; saved as an exported program (.pt2)."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.export import Dim, ShapesCollection
from torch.utils import _pytree as pytree

from refold.backends.base import Artifact, Capabilities, Checked, Runner, Target
from refold.errors import BackendError
from refold.graph.evaluate import flat_inputs
from refold.graph.nodes import symbolic_dims
from refold.graph.ops import census
from refold.native.lower import is_packed, lower, with_sums
from refold.rewrite import cost

if TYPE_CHECKING:
    from refold.graph.program import Program
    from refold.verify.references import References


@dataclass(frozen=True)
class TorchOptions:
    """Options of the eager target.

    Attributes:
        exact: layers of binary planes sum activations in float32; else in 8-bit steps, faster.
    """

    exact: bool = True


@dataclass(frozen=True)
class _EagerContent:
    # Not the whole program: that holds the unfolded weights too.
    graph_module: fx.GraphModule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class TorchTarget(Target):
    """Runs the folded graph in eager PyTorch."""

    name = "torch"
    suffix = ".pt2"
    options = TorchOptions
    capabilities = Capabilities(
        costs=cost.on_cpu("torch"),
        ranks_follow_sizes=True,
    )

    def lower(self, program: Program, gm: fx.GraphModule, options: TorchOptions) -> Artifact:
        notes = lower(gm, exact=options.exact)
        # Another module over the same tensors: a runner that is not the verified graph is verified.
        runner = with_sums(gm, exact=options.exact) if notes else gm
        return Artifact(_EagerContent(runner, program.args, program.kwargs), notes)

    def check(
        self, artifact: Artifact, gm: fx.GraphModule, known: References, options: TorchOptions
    ) -> Checked:
        rounded = artifact.content.graph_module
        if options.exact or not known.calls or not any(map(is_packed, rounded.graph.nodes)):
            return Checked()
        return check_sums(rounded, known)

    def load(self, artifact: Artifact, options: TorchOptions) -> Runner:
        runner: Runner = artifact.content.graph_module
        return runner

    def save(self, artifact: Artifact, folder: Path, name: str) -> None:
        content: _EagerContent = artifact.content
        program = re_export(content.graph_module, content.args, content.kwargs)
        written = io.BytesIO()  # torch's own writer ends the process where the disk is full
        try:
            torch.export.save(program, written)
        except NotImplementedError as error:
            raise BackendError(f"the program cannot be written as a .pt2: {error}") from error
        (folder / name).write_bytes(written.getbuffer())

    def refit(
        self, artifact: Artifact, gm: fx.GraphModule, tensors: Mapping[str, torch.Tensor]
    ) -> Artifact:
        content: _EagerContent = artifact.content
        return Artifact(_EagerContent(gm, content.args, content.kwargs))

    def stats(self, artifact: Artifact) -> dict[str, int]:
        gm = artifact.content.graph_module
        return {"nodes": sum(census(gm.graph).values()), "bytes": constant_bytes(gm)}


def check_sums(rounded: fx.GraphModule, known: References) -> Checked:
    """Judges a graph with 8-bit sums of activations: with exact ones, then layer by layer.

    Raises:
        VerificationError: the exact form is wrong, or rounding does not explain a difference.
    """
    from refold.native.check import Noisy, SumsJudge
    from refold.verify import compare

    exact = with_sums(rounded, exact=True)
    result = compare.verify(None, exact, known)
    judge, furthest = SumsJudge(rounded), 0.0
    nearby: list[list[Any]] = []
    for call in known.calls:
        args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, call)
        with torch.no_grad():
            ours = pytree.tree_leaves(rounded(*args, **kwargs))
            theirs = pytree.tree_leaves(exact(*args, **kwargs))
            flat = flat_inputs(rounded.graph, args, kwargs)
            judge.run(*flat, enable_io_processing=False)
            noisy = Noisy(exact).run(*flat, enable_io_processing=False)
            nearby.append([exact.graph.process_outputs(noisy)])
        for a, b in zip(ours, theirs, strict=True):
            if isinstance(b, torch.Tensor) and b.is_floating_point() and b.numel():
                apart = (a.double() - b.double()).nan_to_num(0, 0, 0).abs().max()
                scale = b.double().nan_to_num(0, 0, 0).abs().max()
                furthest = max(furthest, float(apart / (scale or 1.0)))
    return Checked(
        (
            f"with float32 sums: {result.summary}",
            f"8-bit sums cost at most {judge.worst:.1e} of a layer ({judge.where}, relative L2) "
            f"and {furthest:.1e} of an output; exact=True computes in float32",
        ),
        replace(known, nearby=nearby),
    )


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
