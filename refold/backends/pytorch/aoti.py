"""Target ``aoti``: an AOTInductor package (.pt2), which runs without Python and without the model.

Python loads it with ``torch._inductor.aoti_load_package``, C++ with
``torch::inductor::AOTIModelPackageLoader``.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx
from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree

from refold.backends.base import Artifact, Capabilities, Runner, Target, places
from refold.backends.pytorch.eager import re_export
from refold.backends.pytorch.inductor import Layouts, may_freeze, missing_compiler, mode_settings
from refold.backends.pytorch.own_outputs import OwnOutputs
from refold.errors import BackendError, UsageError, first_line
from refold.graph import constants
from refold.graph.ops import census
from refold.native.lower import lower
from refold.rewrite import cost
from refold.scratch import Scratch

if TYPE_CHECKING:
    from torch.utils._pytree import TreeSpec

    from refold.graph.program import Program

_NEEDS_PYTHON = (
    "the package calls layers of binary planes through Python: load it in a process that has done "
    "`import refold.native.op`; C++ alone cannot run it"
)


@dataclass(frozen=True)
class AotiOptions:
    """Options of the ``aoti`` target.

    Attributes:
        mode: ``default`` or ``max-autotune-no-cudagraphs``.
    """

    mode: str = "default"

    def __post_init__(self) -> None:
        if mode_settings(self.mode).get("triton.cudagraphs"):
            raise UsageError(
                f"mode {self.mode!r} records CUDA graphs, which a package cannot hold: "
                "use 'max-autotune-no-cudagraphs', or target='inductor'"
            )


@dataclass(frozen=True)
class _AotiContent:
    folder: Scratch  # lives as long as the artifact
    layouts: Layouts
    own: OwnOutputs
    outputs: tuple[Any, ...]  # the graph's: nodes, and numbers, which a package makes tensors
    in_spec: TreeSpec
    nodes: int

    def owned(self, results: Any, inputs: Sequence[Any]) -> Any:
        leaves, spec = pytree.tree_flatten(results)
        computed = [isinstance(given, fx.Node) for given in self.outputs]
        own = iter(self.own([v for v, c in zip(leaves, computed, strict=True) if c], inputs))
        pairs = zip(self.outputs, computed, strict=True)
        return pytree.tree_unflatten([next(own) if c else given for given, c in pairs], spec)

    @property
    def path(self) -> Path:
        return self.folder.path / "model.pt2"


class AotiTarget(Target):
    """Compiles the folded graph ahead of time into one file."""

    name = "aoti"
    suffix = ".pt2"
    options = AotiOptions
    capabilities = Capabilities(
        costs=cost.on_cpu("aoti"),
        shares_weights=(),
    )

    def available(self) -> str | None:
        return missing_compiler()

    def lower(self, program: Program, gm: fx.GraphModule, options: AotiOptions) -> Artifact:
        import torch._inductor

        state = [str(n.target) for n in constants.written(gm.graph) if n.op == "get_attr"]
        if state:
            raise BackendError(
                f"the model writes its own state ({', '.join(state)}), which a package of frozen "
                "weights cannot keep: use target='inductor', or make the state an input and an "
                "output"
            )
        notes = lower(gm, exact=True)
        if notes:  # with the kernel or without, the operator's implementation is a Python function
            notes = (*notes, _NEEDS_PYTHON)
        exported = re_export(gm, program.args, program.kwargs)
        outputs = pytree.tree_leaves(gm.graph.output_node().args)
        content = _AotiContent(
            Scratch(),
            Layouts.of(gm),
            OwnOutputs(gm),
            tuple(outputs),
            gm.graph._codegen.pytree_info.in_spec,  # type: ignore[attr-defined]
            sum(census(gm.graph).values()),
        )
        # Freezing takes every output for a computed value; a package returns constants too.
        freeze = may_freeze(gm) and all(isinstance(leaf, fx.Node) for leaf in outputs)
        settings = {**mode_settings(options.mode), "freezing": freeze}
        try:
            torch._inductor.aoti_compile_and_package(
                exported, package_path=str(content.path), inductor_configs=settings
            )
        except Exception as error:
            first = first_line(error)[:300]
            raise BackendError(
                f"AOTInductor cannot compile the graph: {type(error).__name__}: {first}"
                f"{places(gm.graph, str(error))}"
            ) from error
        return Artifact(content, notes)

    def load(self, artifact: Artifact, options: AotiOptions) -> Runner:
        import torch._inductor

        content: _AotiContent = artifact.content
        package = torch._inductor.aoti_load_package(str(content.path))

        def run(*args: Any, **kwargs: Any) -> Any:
            # The package takes strides for granted, as C++ callers must.
            leaves = fx_pytree.tree_flatten_spec((args, kwargs), content.in_spec)

            def call(*inputs: Any) -> Any:
                args, kwargs = pytree.tree_unflatten(inputs, content.in_spec)
                return content.owned(package(*args, **kwargs), inputs)

            return content.layouts.call(call, leaves)

        return run

    def save(self, artifact: Artifact, folder: Path, name: str) -> None:
        shutil.copyfile(artifact.content.path, folder / name)

    def stats(self, artifact: Artifact) -> dict[str, int]:
        content: _AotiContent = artifact.content
        return {"nodes": content.nodes, "bytes": content.path.stat().st_size}
